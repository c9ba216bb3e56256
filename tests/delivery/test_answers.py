"""What each answer of a next hop leads to: for the client, in the queue, in log and metrics, and for the mail itself.

The cases of a table are played side by side on one relay, each with a next hop of its own; the tests look at what came
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.bed.next_hop import Drop, Say, Step
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter
from tests.delivery.conftest import Bed, Sent, Spot

SPOTS = 75  # metrics tell 100 next hops apart


@dataclass(frozen=True)
class Case:
    """A next hop that says ``answer`` at ``step``; ``expect`` and ``advice`` are the test's."""

    step: Step
    answer: str
    expect: str = ""
    advice: str = ""
    drops: bool = False

    def __str__(self) -> str:
        return f"{self.step}-{self.answer[:16]}{'-drops' if self.drops else ''}"

    @property
    def code(self) -> int:
        return int(self.answer[:3])

    @property
    def enhanced(self) -> str:
        word = self.answer.split()[1]
        return word if word.count(".") == 2 else ""


@dataclass(frozen=True)
class Story:
    """What became of a case."""

    spot: Spot
    sent: Sent

    @property
    def results(self) -> list[str]:
        """The log's lines about its recipient."""
        return self.spot.relay.grep(rf"to=<{self.spot.to()}>, relay={self.spot.name}, ")

    @property
    def alarms(self) -> list[str]:
        """The log's lines about its next hop."""
        return self.spot.relay.grep(rf" next_hop_\w+ next_hop={self.spot.name}\b")


def begin(bed: Bed, cases: Sequence[Case], times: int) -> dict[Case, Story]:
    """Send a message for each case and wait until each has a result."""
    stories: dict[Case, Story] = {}
    for case in cases:
        spot = bed.spot()
        spot.hop.on(case.step, Say(case.answer), *([Drop()] if case.drops else []), times=times)
        stories[case] = Story(spot, spot.send())
    for case, story in stories.items():
        wait_for(lambda story=story: story.results, lambda case=case: f"result of {case}; {bed.relay.complaints()}")
    return stories


def all_tried(queue: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return queue if all(one["recipients"][0]["attempts"] for one in queue.values()) else {}


def wait_for_sent(stories: dict[Case, Story]) -> None:
    """The log is written a moment after the queue is empty."""
    for case, story in stories.items():
        wait_for(lambda story=story: "status=sent" in story.results[-1], f"the end of {case} in the log")


def wait_for_empty(bed: Bed) -> None:
    wait_for(lambda: not bed.queue(), lambda: f"end of {bed.queue()}; {bed.relay.complaints()}")


# --- answers that blame us ---------------------------------------------------------------------------------------

OUR_FAULT = [
    Case(Step.BANNER, "554 5.7.1 no service for you", "banner", "RemoteIPRanges"),
    Case(Step.BANNER, "521 5.3.2 does not accept mail", "banner", "RemoteIPRanges"),
    Case(Step.EHLO, "550 5.7.1 who are you", "ehlo", "server.hostname"),
    Case(Step.EHLO, "504 5.5.2 need a full name", "ehlo", "server.hostname"),
    Case(Step.MAIL, "500 5.5.2 what", "mail", "firewall"),
    Case(Step.MAIL, "501 5.5.4 syntax", "mail", "firewall"),
    Case(Step.MAIL, "502 5.5.1 not implemented", "mail", "firewall"),
    Case(Step.MAIL, "503 5.5.1 bad sequence", "mail", "firewall"),
    Case(Step.MAIL, "504 5.5.4 parameter", "mail", "firewall"),
    Case(Step.MAIL, "530 5.7.0 Must issue a STARTTLS command first", "mail", "RequireTLS"),
    Case(Step.MAIL, "530 5.7.1 Client was not authenticated", "mail", "login"),
    Case(Step.MAIL, "530 5.7.57 Client not authenticated to send anonymous mail", "mail", "AnonymousUsers"),
    Case(Step.MAIL, "534 5.7.9 mechanism is too weak", "mail", "login"),
    Case(Step.MAIL, "535 5.7.3 Authentication unsuccessful", "mail", "login"),
    Case(Step.MAIL, "538 5.7.11 encryption needed", "mail", "login"),
    Case(Step.MAIL, "550 5.7.60 no permission to send as this sender", "mail", "Accept-Any-Sender"),
    Case(Step.MAIL, "550 5.7.1 no permissions to send as this sender", "mail", "Accept-Authoritative"),
    Case(Step.MAIL, "551 5.7.1 Client does not have permission to submit", "mail", "ms-Exch-SMTP-Submit"),
    Case(Step.MAIL, "554 no", "mail", "ms-Exch-SMTP-Submit"),
    Case(Step.RCPT, "550 5.7.54 Unable to relay recipient in non-accepted domain", "rcpt", "Accept-Any-Recipient"),
    Case(Step.RCPT, "530 5.7.57 Client not authenticated", "rcpt", "AnonymousUsers"),
    Case(Step.RCPT, "503 5.5.1 need HELO", "rcpt", "firewall"),
    Case(Step.DATA, "502 5.5.1 not implemented", "data", "firewall"),
    Case(Step.FINAL, "550 5.7.60 no permission to send as this sender", "final", "Accept-Any-Sender"),
    Case(Step.FINAL, "530 5.7.0 Authentication required", "final", "login"),
    Case(Step.MAIL, "530 5.7.57 Client not authenticated", "mail", "AnonymousUsers", drops=True),
]


@dataclass(frozen=True)
class Faults:
    """The stories; each message in the queue while its next hop refused it."""

    bed: Bed
    stories: dict[Case, Story]
    waiting: dict[str, dict[str, Any]]
    misconfigured: float


@pytest.fixture(scope="module")
def faults(shared: Callable[[str], Bed]) -> Callable[[str], Faults]:
    played: dict[str, Faults] = {}

    def get(way: str) -> Faults:
        if way not in played:
            bed = shared(way)
            stories = begin(bed, OUR_FAULT, times=1_000_000)
            waiting = wait_for(
                lambda bed=bed: all_tried(bed.queue()),
                lambda bed=bed: f"a first attempt of each message; {bed.queue()}",
            )
            bed.relay.wait_for_metric("relay_next_hop_state", len(stories), state="misconfigured")
            misconfigured = bed.relay.metric("relay_next_hop_state", state="misconfigured")
            for story in stories.values():
                story.spot.hop.behave()
            wait_for_empty(bed)
            bed.relay.wait_for_metric("relay_deliveries_total", len(stories), outcome="delivered")
            played[way] = Faults(bed, stories, waiting, misconfigured)
        return played[way]

    return get


@pytest.mark.parametrize("case", OUR_FAULT, ids=str)
def test_an_answer_that_blames_us_queues_the_mail_and_tells_the_operator(
    faults: Callable[[str], Faults], way: str, case: Case
) -> None:
    played = faults(way)
    story = played.stories[case]
    spot, sent = story.spot, story.sent
    assert sent.queued
    assert f"status=deferred ({case.answer})" in story.results[0]
    alarm, *_ = [line for line in story.alarms if "next_hop_misconfigured" in line]
    assert f" stage={case.expect} code={case.code} " in alarm
    assert case.advice in alarm
    waiting = played.waiting[sent.id]
    [recipient] = waiting["recipients"]
    assert (recipient["last_code"], recipient["last_enhanced"]) == (case.code, case.enhanced)
    assert (recipient["last_host"], recipient["state"]) == (spot.name, "pending")
    assert not waiting["possible_duplicate"]
    assert [after_trace(one.message) for one in spot.taken()] == [letter()]
    assert f"next_hop_mended next_hop={spot.name}" in story.alarms[-1]
    assert "status=sent" in story.results[-1]


def test_each_next_hop_at_fault_is_shown_until_it_takes_mail_again(faults: Callable[[str], Faults], way: str) -> None:
    played = faults(way)
    assert played.misconfigured == len(OUR_FAULT)
    names = {story.spot.name for story in played.stories.values()}
    blamed = played.bed.by_next_hop("relay_deliveries_total", outcome="our_fault")
    assert {name for name, count in blamed.items() if count} == names
    delivered = played.bed.by_next_hop("relay_deliveries_total", outcome="delivered")
    assert {name: delivered[name] for name in names} == dict.fromkeys(names, 1)
    assert not any(played.bed.by_next_hop("relay_next_hop_state", state="misconfigured").values())


def test_a_fault_that_stays_raises_one_alarm_and_another_one_raises_another(spot: Spot) -> None:
    mail = spot.hop.on(Step.MAIL, Say("530 5.7.57 Client not authenticated"))
    sent = spot.send()
    spot.hop.wait_until(lambda _: mail.used >= 3, "three attempts")
    spot.hop.on(Step.RCPT, Say("550 5.7.54 Unable to relay"))
    mail.left = 0
    spot.relay.wait_for_log(rf"next_hop_misconfigured next_hop={spot.name} stage=rcpt")
    assert len(spot.relay.grep(rf"next_hop_misconfigured next_hop={spot.name} stage=mail")) == 1
    spot.hop.behave()
    spot.delivered(sent.id)


# --- answers for now ---------------------------------------------------------------------------------------------

FOR_NOW = [
    Case(Step.BANNER, "450 4.3.2 not now"),
    Case(Step.BANNER, "250 that is no greeting"),
    Case(Step.EHLO, "451 4.3.0 not now"),
    Case(Step.MAIL, "450 4.7.1 not now"),
    Case(Step.MAIL, "354 out of place"),
    Case(Step.RCPT, "450 4.2.1 greylisted"),
    Case(Step.RCPT, "452 4.5.3 too many recipients"),
    Case(Step.RCPT, "552 too many recipients"),
    Case(Step.DATA, "451 4.3.0 not now"),
    Case(Step.DATA, "250 2.0.0 out of place", "unexpected reply 250 to DATA"),
    Case(Step.FINAL, "452 4.3.1 disk full"),
    Case(Step.FINAL, "354 again"),
    *(
        Case(step, "421 4.3.2 Service not available", drops=drops)
        for step in (Step.BANNER, Step.EHLO, Step.MAIL, Step.RCPT, Step.DATA, Step.FINAL)
        for drops in (False, True)
    ),
]


@pytest.fixture(scope="module")
def delays(shared: Callable[[str], Bed]) -> Callable[[str], dict[Case, Story]]:
    played: dict[str, dict[Case, Story]] = {}

    def get(way: str) -> dict[Case, Story]:
        if way not in played:
            bed = shared(way)
            played[way] = begin(bed, FOR_NOW, times=1)
            wait_for_empty(bed)
            wait_for_sent(played[way])
        return played[way]

    return get


@pytest.mark.parametrize("case", FOR_NOW, ids=str)
def test_an_answer_for_now_costs_one_attempt_and_blames_nobody(
    delays: Callable[[str], dict[Case, Story]], way: str, case: Case
) -> None:
    story = delays(way)[case]
    assert story.sent.queued
    first, second = story.results
    assert f"status=deferred ({case.expect or case.answer}" in first
    assert "status=sent" in second
    assert [after_trace(one.message) for one in story.spot.taken()] == [letter()]
    assert story.alarms == []
    assert not story.spot.relay.grep(f"possible duplicate: {story.sent.id}")


# --- answers about the mail --------------------------------------------------------------------------------------

REFUSALS = [
    Case(Step.RCPT, "550 5.1.1 User unknown", "550 5.1.1"),
    Case(Step.RCPT, "551 no such user", "551 5.0.0"),
    Case(Step.RCPT, "501 5.1.3 Bad destination mailbox", "501 5.1.3"),
    Case(Step.RCPT, "554 5.7.1 not for you", "554 5.7.1"),
    Case(Step.MAIL, "552 5.3.4 Message size exceeds the limit", "552 5.3.4"),
    Case(Step.MAIL, "552 too big", "552 5.0.0"),
    Case(Step.MAIL, "553 5.6.7 SMTPUTF8 needed", "553 5.6.7"),
    Case(Step.MAIL, "553 5.1.8 Sender's domain does not exist", "553 5.1.8"),
    Case(Step.DATA, "554 5.7.1 no", "554 5.7.1"),
    Case(Step.FINAL, "554 5.6.0 Malformed message", "554 5.6.0"),
    Case(Step.FINAL, "552 5.3.4 too big after all", "552 5.3.4"),
    Case(Step.RCPT, "550 5.1.1 User unknown", "550 5.1.1", drops=True),
    Case(Step.MAIL, "552 5.3.4 Message size exceeds the limit", "552 5.3.4", drops=True),
    Case(Step.FINAL, "554 5.6.0 Malformed message", "554 5.6.0", drops=True),
]


@pytest.fixture(scope="module")
def refusals(shared: Callable[[str], Bed]) -> Callable[[str], dict[Case, Story]]:
    played: dict[str, dict[Case, Story]] = {}

    def get(way: str) -> dict[Case, Story]:
        if way not in played:
            played[way] = begin(shared(way), REFUSALS, times=1_000_000)
            wait_for_empty(shared(way))
            for story in played[way].values():
                story.spot.metric("relay_deliveries_total", 1, outcome="bounced")
        return played[way]

    return get


@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_a_refusal_of_the_mail_reaches_the_client_or_by_report_the_sender(
    refusals: Callable[[str], dict[Case, Story]], way: str, case: Case
) -> None:
    story = refusals(way)[case]
    spot, sent = story.spot, story.sent
    if way == "express":
        assert f"{sent.code} {sent.text}" == f"{case.expect} The destination server refused the message"
        assert not [one for one in spot.bed.outside.transactions if spot.sender in one.recipients]
    else:
        assert sent.queued
        [report] = spot.reports()
        assert f"Diagnostic-Code: smtp; {case.answer}\r\n".encode() in report.message
    [result] = story.results
    assert f"status=bounced ({case.answer})" in result
    assert story.alarms == []
    assert spot.hop.accepted == []


# --- what a next hop can do --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [500, 502])
def test_a_next_hop_that_knows_helo_only_is_served(spot: Spot, code: int) -> None:
    spot.hop.on(Step.EHLO, Say(f"{code} 5.5.1 what"))
    sent = spot.send(parameters="BODY=8BITMIME SIZE=100")
    spot.delivered(sent.id)
    [taken] = spot.hop.accepted
    assert (taken.helo, taken.parameters) == ("mx.example.com", "")
    assert spot.hop.said("MAIL") == [f"MAIL FROM:<{spot.sender}>"]


@pytest.mark.parametrize("lacking", [("8BITMIME",), ("PIPELINING",), ("SIZE",), ("PIPELINING", "8BITMIME", "SIZE")])
def test_a_next_hop_is_asked_only_for_what_it_offers(spot: Spot, lacking: tuple[str, ...]) -> None:
    spot.hop.extensions = tuple(word for word in spot.hop.extensions if word.split()[0] not in lacking)
    message = letter(body=b"\xe4\xf6\xfc\r\n" * 50)
    first = spot.send(spot.to("a"), spot.to("b"), message=message, parameters="BODY=8BITMIME")
    second = spot.send(spot.to("c"), message=message, parameters="BODY=8BITMIME")
    for sent, local in ((first, "a"), (second, "c")):
        spot.delivered(sent.id, spot.to(local))
    assert sorted((one.recipients, after_trace(one.message)) for one in spot.taken(2)) == [
        ((spot.to("a"), spot.to("b")), message),
        ((spot.to("c"),), message),
    ]
    for one in spot.hop.accepted:
        assert ("SIZE=" in one.parameters) == ("SIZE" not in lacking)
        assert ("BODY=8BITMIME" in one.parameters) == ("8BITMIME" not in lacking)


def test_a_message_over_the_next_hops_size_is_refused_and_leaves_the_connection_usable(spot: Spot, way: str) -> None:
    spot.hop.extensions = ("PIPELINING", "SIZE 2000")
    with spot.relay.client() as client:
        client.open()
        big = client.deliver(spot.sender, [spot.to()], letter(body=b"x" * 70 + b"\r\n" + b"0123456789\r\n" * 200))
        small = client.deliver(spot.sender, [spot.to()], letter())
    assert small.code == 250
    [taken] = spot.hop.wait_for_accepted()
    assert after_trace(taken.message) == letter()
    if way == "express":
        assert (big.code, big.enhanced) == (552, "5.3.4")
        assert spot.hop.sessions == 1
    else:
        assert b"Status: 5.3.4\r\n" in spot.reports()[0].message
