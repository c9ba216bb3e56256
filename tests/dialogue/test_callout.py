"""Recipients that only the next hop knows (row R13): it is asked once, bounded, and not at all where it takes anything."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed.next_hop import Drop, Hold, NextHop, Say, Step
from tests.bed.ports import free_port
from tests.bed.relay import RelayRunner
from tests.bed.wire import letter

UNSURE = "451 4.3.0 <{}>: Recipient cannot be verified now, try again later"
UNKNOWN = "550 5.1.1 <{}>: Recipient address rejected: User unknown"
NO_SUCH = Say("550 5.1.1 no such user")


class World:
    """A next hop that knows its users, one that takes anything, one that is down."""

    def __init__(self, folder: Path) -> None:
        self.knows, self.takes = NextHop(), NextHop()
        self.behave()
        config = {
            "domain": [
                {"names": ["call.example.com", "anything.example.com", "down.example.com"], "recipients": "callout"},
                {"names": ["example.com"]},
                {"names": ["static.example.com"], "recipients": "static"},
                {"names": ["none.example.com"], "recipients": "none"},
            ],
            "route": [
                {"domains": ["anything.example.com"], "next_hops": [self.takes.route]},
                {"domains": ["down.example.com"], "next_hops": [f"smtp:[127.0.0.1]:{free_port()}"]},
                {"domains": ["*"], "next_hops": [self.knows.route]},
            ],
            "directory": {
                "overrides": [{"address": "left@call.example.com", "action": "550 5.1.6 Has moved"}],
            },
            "callout": {"per_minute": 1000, "timeout_s": 30.0},
        }
        recipients = ["user@example.com", "known@static.example.com"]
        self.relay = RelayRunner(folder, self.knows.route, config=config, recipients=recipients)
        self.relay.start()

    def behave(self) -> None:
        self.knows.behave()
        self.knows.on(Step.RCPT, NO_SUCH, only="relay-callout-")
        self.knows.on(Step.RCPT, NO_SUCH, only="nobody")

    def said(self, recipient: str) -> str:
        with self.relay.client().open() as client:
            client.expect("250", "MAIL FROM:<x@elsewhere.example>")
            return str(client.command(f"RCPT TO:<{recipient}>"))

    def asked(self, hop: NextHop, recipient: str) -> int:
        return len([line for line in hop.said("RCPT") if recipient in line])

    def close(self) -> None:
        self.relay.close()
        self.knows.close()
        self.takes.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    made = World(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.fixture
def world(shared: World) -> World:
    shared.behave()
    return shared


def test_the_next_hop_is_asked_once_and_gets_no_mail_by_it(world: World) -> None:
    for _ in range(3):
        assert world.said("ann@call.example.com") == "250 2.1.5 Ok"
        assert world.said("nobody1@call.example.com") == UNKNOWN.format("nobody1@call.example.com")
    assert world.said("Ann@Call.example.com") == "250 2.1.5 Ok"
    assert world.asked(world.knows, "ann@") == world.asked(world.knows, "nobody1@") == 1
    assert set(world.knows.said("MAIL")) == {"MAIL FROM:<>"}
    assert world.knows.said("DATA") == []
    world.knows.wait_until(lambda hop: len(hop.said("RSET")) == len(hop.said("MAIL")), "RSET behind each question")


def test_mail_to_a_recipient_that_was_asked_for_is_delivered(world: World) -> None:
    with world.relay.client() as client:
        answer = client.open().deliver("mail@elsewhere.example", ["eve@call.example.com"], letter())
        assert answer.code == 250
    assert [one.recipients for one in world.knows.wait_for_accepted(1)][-1] == ("eve@call.example.com",)


def test_a_random_address_is_asked_first_and_not_again(world: World) -> None:
    world.said("first@call.example.com")
    world.said("second@call.example.com")
    assert world.asked(world.knows, "relay-callout-") == 1


def test_a_next_hop_that_takes_anything_is_not_asked_any_more_and_an_alarm_says_so(world: World) -> None:
    for number in range(3):
        assert world.said(f"who{number}@anything.example.com") == "250 2.1.5 Ok"
    assert len(world.takes.said("RCPT")) == 1
    assert "relay-callout-" in world.takes.said("RCPT")[0]
    world.relay.wait_for_log(r"callout_off .*domain=anything\.example\.com")
    world.relay.wait_for_metric("relay_callout_off", 1)
    checked = world.relay.command("check")
    assert (checked.returncode, "takes a random address" in checked.stdout) == (1, True)


def test_a_next_hop_that_is_down_means_later(world: World) -> None:
    assert world.said("ann@down.example.com") == UNSURE.format("ann@down.example.com")


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (1, "450 4.2.0 greylisted"),
        (2, "550 5.7.1 we do not like you"),
        (3, "421 4.3.2 going down"),
        (4, "530 5.7.57 who are you"),
    ],
)
def test_what_is_not_about_the_mailbox_proves_nothing(world: World, number: int, reply: str) -> None:
    address = f"odd{number}@call.example.com"
    world.knows.on(Step.RCPT, Say(reply), only=f"odd{number}@", times=1)
    assert world.said(address) == UNSURE.format(address)
    world.relay.wait_for_log(rf"callout_failed recipient={address}")


def test_addresses_in_utf8_are_asked_for_as_they_would_be_delivered(world: World) -> None:
    def said(recipient: str) -> str:
        with world.relay.client().open() as client:
            client.expect("250", "MAIL FROM:<x@elsewhere.example> SMTPUTF8")
            return str(client.command(f"RCPT TO:<{recipient}>".encode()))

    usual = world.knows.extensions
    assert said("jörg@call.example.com").startswith("451")
    world.knows.extensions = (*usual, "SMTPUTF8")
    try:
        assert said("jörg@call.example.com").startswith("250")
    finally:
        world.knows.extensions = usual
    assert "MAIL FROM:<> SMTPUTF8" in world.knows.said("MAIL")


def test_a_full_mailbox_is_one(world: World) -> None:
    world.knows.on(Step.RCPT, Say("552 5.2.2 mailbox full"), only="full@")
    wait = world.said("full@call.example.com")
    assert wait == "250 2.1.5 Ok"


def test_the_client_waits_and_nobody_else(world: World) -> None:
    hold = Hold()
    world.knows.on(Step.RCPT, hold, only="slow@", times=1)
    with world.relay.client().open() as client:
        client.expect("250", "MAIL FROM:<x@elsewhere.example>")
        client.send(b"RCPT TO:<slow@call.example.com>\r\nRCPT TO:<user@example.com>\r\nRCPT TO:<bad@example.com>\r\n")
        world.knows.wait_until(lambda hop: any("slow@" in line for line in hop.said("RCPT")), "the question")
        assert world.said("user@example.com") == "250 2.1.5 Ok"
        assert world.said("other@call.example.com") == "250 2.1.5 Ok"
        hold.release()
        codes = [client.read().code for _ in range(3)]
        assert codes == [250, 250, 550]


def test_a_client_that_leaves_meanwhile_harms_nobody(world: World) -> None:
    hold = Hold()
    world.knows.on(Step.RCPT, hold, only="left-alone@", times=1)
    with world.relay.client().open() as client:
        client.expect("250", "MAIL FROM:<x@elsewhere.example>")
        client.send(b"RCPT TO:<left-alone@call.example.com>\r\n")
        world.knows.wait_until(lambda hop: any("left-alone@" in line for line in hop.said("RCPT")), "the question")
    hold.release()
    assert world.said("left-alone@call.example.com") == "250 2.1.5 Ok"


def test_no_question_where_others_know(world: World) -> None:
    before = len(world.knows.said("RCPT"))
    assert world.said("guess@example.com").startswith("550 5.1.1")
    assert world.said("known@static.example.com") == "250 2.1.5 Ok"
    assert world.said("guess@static.example.com").startswith("550 5.1.1")
    assert world.said("guess@none.example.com") == "250 2.1.5 Ok"
    assert world.said("postmaster@call.example.com") == "250 2.1.5 Ok"
    assert world.said("left@call.example.com").startswith("550 5.1.6 <left@call.example.com>")
    assert len(world.knows.said("RCPT")) == before


def test_the_command_line_asks_as_well_and_says_so(world: World) -> None:
    told = world.relay.command("recipient", "-v", "nobody2@call.example.com")
    assert told.returncode == 1
    assert UNKNOWN.format("nobody2@call.example.com") in told.stdout
    assert "callout:" in told.stdout
    assert "takes any" in world.relay.command("recipient", "-v", "x@anything.example.com").stdout
    explained = world.relay.command("explain", "--to", "z@call.example.com")
    assert "has to be asked (callout)" in explained.stdout + explained.stderr


def test_questions_have_a_budget(world: World) -> None:
    world.relay.configure({"callout": {"per_minute": 1}})
    before = len(world.relay.grep("reloaded"))
    assert world.relay.command("reload").returncode == 0
    world.relay.wait_for_log("reloaded", before + 1)
    answers = [world.said(f"nobody{number}@call.example.com")[:3] for number in range(20, 24)]
    assert answers.count("451") >= 2
    assert world.relay.metric("relay_callouts_total", result="budget") >= 0
    world.relay.wait_for_metric("relay_callouts_total", 2, result="budget")


def test_a_hop_that_breaks_off_means_later(world: World) -> None:
    world.relay.configure({"callout": {"per_minute": 1000}})
    before = len(world.relay.grep("reloaded"))
    assert world.relay.command("reload").returncode == 0
    world.relay.wait_for_log("reloaded", before + 1)
    world.knows.on(Step.RCPT, Drop(), only="broken@", times=1)
    assert world.said("broken@call.example.com").startswith("451")
