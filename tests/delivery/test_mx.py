"""Mail by MX: a real DNS server with every trick a zone allows, one in front of it that misbehaves on command, and hosts
with addresses of their own. Each line of ``FAULTS`` is one fault: what becomes of mail for ``user@NAME.test``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import dns.rcode
import pytest
from typer.testing import CliRunner

from relay.cli.queue import app
from tests.bed import dns as servers
from tests.bed.network import Network
from tests.bed.next_hop import Drop, Hold, NextHop, Say, Step
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for
from tests.bed.wire import letter

pytestmark = pytest.mark.needs("root", "ip", "nsd")

RELAY, GOOD, SECOND, SIX, OUTSIDE = "192.0.2.1", "192.0.2.10", "192.0.2.11", "2001:db8::10", "192.0.2.9"
CLOSED = "192.0.2.20"  # nobody listens here
ABSENT = "192.0.2.200"  # nobody has this address
BUSY, GREETS_5XX, HANGS, DROPS, BAD_TLS = (f"192.0.2.{number}" for number in range(12, 17))
NO_SENDER, NO_RIGHT, NO_RECIPIENT, GREYLISTS = (f"192.0.2.{number}" for number in range(30, 34))
SCRIPTED, NAMESERVER = "192.0.2.54", "192.0.2.53"

HOSTS = f"""\
good            A {GOOD}
second          A {SECOND}
six             AAAA {SIX}
closed          A {CLOSED}
absent          A {ABSENT}
busy            A {BUSY}
greets5xx       A {GREETS_5XX}
hangs           A {HANGS}
drops           A {DROPS}
badtls          A {BAD_TLS}
nosender        A {NO_SENDER}
noright         A {NO_RIGHT}
norecipient     A {NO_RECIPIENT}
greylists       A {GREYLISTS}
relay           A {RELAY}
loop4           A 127.0.0.1
loop6           AAAA ::1
mapped          AAAA ::ffff:127.0.0.1
zero            A 0.0.0.0
text            TXT "no address here"
alias           CNAME good
ring1           CNAME ring2
ring2           CNAME ring1
dangling        CNAME nowhere
both            A {CLOSED}
both            AAAA {SIX}
twice           A {CLOSED}
twice           A {GOOD}
chain8          CNAME c7
c7              CNAME c6
c6              CNAME c5
c5              CNAME c4
c4              CNAME c3
c3              CNAME c2
c2              CNAME c1
c1              CNAME plain
chain9          CNAME chain8
lame            NS ns.elsewhere.example.
broken          NS ns
"""


class Fault(NamedTuple):
    """``records`` of ``name`` in the zone; what the DNS server in front does; what becomes of the mail, and where."""

    name: str
    records: tuple[str, ...]
    end: str
    """``sent HOST``, ``bounced STATUS`` or ``deferred STATUS`` (of the queue's last answer)."""
    said: str = ""
    """A part of the answer's text."""
    trick: servers.Trick | None = None


LONG = tuple(f"MX 10 {'x' * 40}{number}.{'y' * 40}" for number in range(60))

FAULTS = (
    Fault("plain", ("MX 10 good",), "sent good"),
    Fault("preferred", ("MX 20 second", "MX 10 good"), "sent good"),
    Fault("first-closed", ("MX 10 closed", "MX 20 second"), "sent second"),
    Fault("first-absent", ("MX 10 absent", "MX 20 second"), "sent second"),
    Fault("first-busy", ("MX 10 busy", "MX 20 second"), "sent second"),
    Fault("first-5xx", ("MX 10 greets5xx", "MX 20 second"), "sent second"),
    Fault("first-hangs", ("MX 10 hangs", "MX 20 second"), "sent second"),
    Fault("first-drops", ("MX 10 drops", "MX 20 second"), "sent second"),
    Fault("broken-tls", ("MX 10 badtls",), "sent badtls"),
    Fault("all-closed", ("MX 10 closed",), "deferred", "refused"),
    Fault("all-absent", ("MX 10 absent",), "deferred"),
    Fault("all-busy", ("MX 10 busy",), "deferred 4.3.2"),
    Fault("all-5xx", ("MX 10 greets5xx",), "deferred 5.7.1", "not you"),
    Fault("all-hang", ("MX 10 hangs",), "deferred"),
    Fault("all-drop", ("MX 10 drops",), "deferred"),
    Fault("no-sender", ("MX 10 nosender",), "bounced 5.7.1"),
    Fault("no-right", ("MX 10 noright",), "bounced 5.7.57"),
    Fault("no-recipient", ("MX 10 norecipient",), "bounced 5.1.1"),
    Fault("greylisted", ("MX 10 greylists",), "sent greylists"),
    Fault("implicit", (f"A {GOOD}",), "sent implicit"),
    Fault("implicit-six", (f"AAAA {SIX}",), "sent implicit-six"),
    Fault("six-only", ("MX 10 six",), "sent six"),
    Fault("four-dead", ("MX 10 both",), "sent both"),
    Fault("one-of-two-addresses", ("MX 10 twice",), "sent twice"),
    Fault("null-mx", ("MX 0 .",), "bounced 5.1.10", "does not accept mail"),
    Fault("null-mx-among-others", ("MX 0 .", "MX 10 good"), "sent good"),
    Fault("no-such-domain", (), "bounced 5.1.2", "does not exist"),
    Fault("nodata", ('TXT "nothing here"',), "bounced 5.1.2", "neither mail exchanger nor address"),
    Fault("mx-nowhere", ("MX 10 nowhere",), "bounced 5.4.4", "has an address"),
    Fault("mx-nowhere-and-good", ("MX 10 nowhere", "MX 20 good"), "sent good"),
    Fault("mx-without-address", ("MX 10 text",), "bounced 5.4.4"),
    Fault("mx-is-an-address", (f"MX 10 {GOOD}.",), "bounced 5.4.4"),
    Fault("domain-alias", ("CNAME plain",), "sent good"),
    Fault("chain8", (), "sent good"),
    Fault("chain9", (), "deferred 4.4.3", "more than 8 CNAMEs"),
    Fault("ring1", (), "deferred 4.4.3", "CNAME loop"),
    Fault("dangling", (), "bounced 5.1.2"),
    Fault("mx-alias", ("MX 10 alias",), "sent alias"),
    Fault("mx-ring", ("MX 10 ring1",), "deferred 4.4.3"),
    Fault("mx-ring-and-good", ("MX 10 ring1", "MX 20 good"), "sent good"),
    Fault("loopback", ("MX 10 loop4",), "bounced 5.4.4", "no address that can be reached"),
    Fault("loopback-six", ("MX 10 loop6",), "bounced 5.4.4"),
    Fault("loopback-mapped", ("MX 10 mapped",), "bounced 5.4.4"),
    Fault("unspecified", ("MX 10 zero",), "bounced 5.4.4"),
    Fault("loopback-and-good", ("MX 10 loop4", "MX 20 good"), "sent good"),
    Fault("localhost", ("MX 10 localhost.",), "bounced 5.4.6", "loops back"),
    Fault("own-name", ("MX 10 mx.example.com.",), "bounced 5.4.6", "loops back to this relay"),
    Fault("own-address", ("MX 10 relay",), "bounced 5.4.6"),
    Fault("own-by-configuration", ("MX 10 balancer.test.", "MX 10 good"), "bounced 5.4.6"),
    Fault("own-is-second", ("MX 10 closed", "MX 20 relay", "MX 30 good"), "deferred", "refused"),
    Fault("own-name-is-second", ("MX 10 good", "MX 20 mx.example.com.", "MX 30 second"), "sent good"),
    Fault("mx-servfail-and-good", ("MX 10 host.sub.broken-zone", "MX 20 good"), "sent good"),
    Fault("mx-servfail", ("MX 10 host.broken-zone.test.",), "deferred 4.4.3", "SERVFAIL"),
    Fault("lame", (), "deferred 4.4.3", "referral"),
    Fault("long", (*LONG, "MX 5 good"), "sent good"),
    Fault("ttl-zero", ("0 MX 10 good",), "sent good"),
    Fault("silent", ("MX 10 good",), "sent good", trick=servers.silence),
    Fault("garbage", ("MX 10 good",), "sent good", trick=servers.garbage),
    Fault("cut", ("MX 10 good",), "sent good", trick=servers.cut),
    Fault("wrong-id", ("MX 10 good",), "sent good", trick=servers.wrong_id),
    Fault("wrong-question", ("MX 10 good",), "sent good", trick=servers.wrong_question),
    Fault("forged-first", ("MX 10 good",), "sent good", trick=servers.forged_first),
    Fault("servfail-first", ("MX 10 good",), "sent good", trick=servers.code(dns.rcode.SERVFAIL)),
    Fault("refused-first", ("MX 10 good",), "sent good", trick=servers.code(dns.rcode.REFUSED)),
    Fault("notimp-first", ("MX 10 good",), "sent good", trick=servers.code(dns.rcode.NOTIMP)),
    Fault("without-edns", ("MX 10 good",), "sent good", trick=servers.without_edns),
    Fault("truncated", ("MX 10 good",), "sent good", trick=servers.truncated),
    Fault("truncated-for-good", ("MX 10 good",), "sent good", trick=servers.truncated_for_good),
    Fault("empty-answer", (f"A {GOOD}",), "bounced 5.1.2", trick=servers.empty),
)

# Names that the second server does not know either, so that the first one's misbehaviour is all there is.
ALONE = (
    Fault("silent.example", (), "deferred 4.4.3", "did not answer in time", servers.silence),
    Fault("garbage.example", (), "deferred 4.4.3", "REFUSED", servers.garbage),
    Fault("servfail.example", (), "deferred 4.4.3", trick=servers.code(dns.rcode.SERVFAIL)),
    Fault("refused.example", (), "deferred 4.4.3", "REFUSED"),
    Fault("formerr.example", (), "deferred 4.4.3", trick=servers.code(dns.rcode.FORMERR)),
    Fault("broken-zone.test", (), "deferred 4.4.3", "SERVFAIL"),
)


def domain_of(fault: Fault) -> str:
    return fault.name if fault in ALONE else f"{fault.name}.test"


@dataclass
class World:
    """Everything of this page. ``posted`` is the queue id of each fault's message."""

    network: Network
    relay: RelayRunner
    hops: dict[str, NextHop]
    nsd: servers.Nsd
    scripted: servers.ScriptedDns
    posted: dict[str, str]

    def send(self, *recipients: str, sender: str = "sender@example.net") -> str:
        """One message; the queue id of its 250."""
        with self.relay.client() as client:
            reply = client.open().deliver(sender, recipients, letter())
        assert reply.code == 250, reply
        return reply.text.split()[-1]

    def queue(self) -> dict[str, dict[str, Any]]:
        listed = CliRunner().invoke(app, ["list", "--json", "--limit", "0", "--config", str(self.relay.config_file)])
        assert listed.exit_code == 0, listed.output
        return {message["id"]: message for message in map(json.loads, listed.stdout.splitlines())}

    def result(self, queue_id: str, status: str, recipient: str = "") -> dict[str, Any]:
        """The first result of that status."""
        lines = self.relay.wait_for_log(
            rf'"event":"result".*"id":"{queue_id}".*"recipient":"{recipient or ".*"}".*"status":"{status}"'
        )
        return json.loads(lines[0])

    def report(self, queue_id: str) -> bytes:
        """The report about a message."""
        return wait_for(
            lambda: next(
                (one.message for one in self.hops["outside"].accepted if queue_id.encode() in one.message), b""
            ),
            lambda: f"report about {queue_id}; {self.relay.complaints()}",
        )


def scripts(hops: dict[str, NextHop]) -> None:
    hops["busy"].on(Step.BANNER, Say("421 4.3.2 too many"), Drop())
    hops["greets5xx"].on(Step.BANNER, Say("554 5.7.1 not you"), Drop())
    hops["hangs"].on(Step.BANNER, Hold())
    hops["drops"].on(Step.EHLO, Drop())
    hops["badtls"].on(Step.STARTTLS, Say("454 4.7.0 not now"), times=1)
    hops["nosender"].on(Step.MAIL, Say("550 5.7.1 we do not know you"))
    hops["noright"].on(Step.RCPT, Say("550 5.7.57 no right"))
    hops["norecipient"].on(Step.RCPT, Say("550 5.1.1 nobody"))
    hops["greylists"].on(Step.RCPT, Say("450 4.2.1 later"), times=1)


@pytest.fixture(scope="module")
def world(authority) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    folder.chmod(0o755)
    addresses = {
        "good": GOOD, "second": SECOND, "six": SIX, "outside": OUTSIDE, "busy": BUSY, "greets5xx": GREETS_5XX,
        "hangs": HANGS, "drops": DROPS, "badtls": BAD_TLS, "nosender": NO_SENDER, "noright": NO_RIGHT,
        "norecipient": NO_RECIPIENT, "greylists": GREYLISTS,
    }  # fmt: skip
    others = (CLOSED, SCRIPTED, NAMESERVER)
    network = Network(
        [f"{RELAY}/24", "2001:db8::1/64"],
        [f"{address}/{64 if ':' in address else 24}" for address in (*addresses.values(), *others)],
    )
    zone = HOSTS + "".join(f"{fault.name} {record}\n" for fault in FAULTS for record in fault.records)
    for name in ("late1", "late2", "reused1", "reused2", "first", "outage"):
        zone += f"{name} MX 10 good\n"
    zone += "equal MX 10 good\nequal MX 10 second\nmended MX 10 good\n"
    (folder / "dns").mkdir()
    with network.far():
        hops = {
            name: NextHop(host=address, port=25, certificate=authority.server("mx") if name == "badtls" else None)
            for name, address in addresses.items()
        }
        scripts(hops)
        nsd = servers.Nsd(folder / "dns", NAMESERVER, {"test": zone, "broken-zone.test": ""})
        scripted = servers.ScriptedDns(SCRIPTED, nsd.address)
    for fault in (*FAULTS, *ALONE):
        if fault.trick is not None:
            scripted.tricks[domain_of(fault)] = fault.trick
    (folder / "relay").mkdir()
    relay = RelayRunner(
        folder / "relay",
        hops["outside"].route,
        config={
            "domain": [{"names": ["example.com"], "recipients": "any"}],
            "route": [
                {"domains": ["*"], "next_hops": ["smtp:"]},
                {"domains": ["example.net", "example.com"], "next_hops": [f"smtp:[{OUTSIDE}]"]},
                {"domains": ["elsewhere.example"], "next_hops": ["smtp:plain.test"]},
                {"domains": ["mixed.example"], "next_hops": [f"smtp:[{CLOSED}]", "smtp:plain.test"]},
            ],
            "dns": {"servers": [SCRIPTED, NAMESERVER], "timeout_s": 0.3, "own_hosts": ["balancer.test"]},
            "trusted": {"networks": ["127.0.0.1"]},
            "queue": {"retry_s": [1.0]},
            "delivery": {"connect_timeout_s": 1.0, "express_deadline_s": 20.0},
            "log": {"format": "json"},
        },
    )
    with network.near():
        relay.start(build=False)
        world = World(network, relay, hops, nsd, scripted, {})
        for fault in (*FAULTS, *ALONE):
            world.posted[fault.name] = world.send(f"user@{domain_of(fault)}")
        try:
            yield world
        finally:
            for hop in hops.values():
                hop.behave()
            relay.close()
    for hop in hops.values():
        hop.close()
    scripted.close()
    nsd.close()
    network.close()
    shutil.rmtree(folder)
    assert [violation for hop in hops.values() for violation in hop.violations] == []


@pytest.mark.parametrize("fault", [*FAULTS, *ALONE], ids=lambda fault: fault.name)
def test_mail_by_mx_ends_as_the_dns_and_the_hosts_say(world: World, fault: Fault) -> None:
    queue_id = world.posted[fault.name]
    end, _, what = fault.end.partition(" ")
    recipient = f"user@{domain_of(fault)}"
    found = world.result(queue_id, end)
    assert fault.said in found["text"]
    match end:
        case "sent":
            assert found["next_hop"] == f"{what}.test:25"
            taken = [one for hop in world.hops.values() for one in hop.accepted if recipient in one.recipients]
            assert len(taken) == 1
            wait_for(lambda: queue_id not in world.queue(), f"end of {queue_id}")
        case "bounced":
            assert found["enhanced"] == what
            report = world.report(queue_id)
            assert f"Final-Recipient: rfc822; {recipient}".encode() in report
            assert f"Status: {what}".encode() in report
            wait_for(lambda: queue_id not in world.queue(), f"end of {queue_id}")
        case _:
            assert found["enhanced"] == what
            [waiting] = world.queue()[queue_id]["recipients"]
            assert waiting["state"] == "pending"
            assert waiting["attempts"] >= 1
            assert not world.relay.grep(f'"id":"{queue_id}".*"status":"(bounced|expired)"')


def test_the_page_lists_every_fault_and_there_are_more_than_sixty() -> None:
    page = Path("docs/faults.md").read_text(encoding="utf-8")
    listed = {tuple(part.strip(" `") for part in (line.split("|")[1], line.split("|")[-2])) for line in page.splitlines()
              if line.startswith("| `") and "/" not in line.split("|")[1]}  # fmt: skip
    assert listed == {(fault.name, fault.end) for fault in (*FAULTS, *ALONE)}
    assert len(listed) > 60


def test_nobody_is_asked_while_a_client_waits_and_what_is_known_goes_express(world: World) -> None:
    first = world.send("user@first.test")
    assert world.relay.wait_for_log(f'"event":"queued".*"id":"{first}","reason":"mx"')
    world.result(first, "sent")
    second = world.send("user@first.test")
    assert json.loads(world.relay.wait_for_log(f'"result".*"id":"{second}"')[0])["via"] == "express"


def test_equal_preferences_share_the_mail(world: World) -> None:
    def counts() -> set[str]:
        return {n for n in ("good", "second") for one in world.hops[n].accepted if "user@equal.test" in one.recipients}

    for _ in range(60):
        world.send("user@equal.test")
        if counts() == {"good", "second"}:
            break
    assert counts() == {"good", "second"}


def test_recipients_of_several_domains_fare_each_for_themselves(world: World) -> None:
    sent = world.send("a@plain.test", "b@null-mx.test", "c@first-closed.test", "d@plain.test")
    world.result(sent, "bounced", "b@null-mx.test")
    for recipient in ("a@plain.test", "c@first-closed.test", "d@plain.test"):
        world.result(sent, "sent", recipient)
    report = world.report(sent)
    assert report.count(b"Final-Recipient:") == 1
    assert b"Status: 5.1.10" in report
    wait_for(lambda: sent not in world.queue(), f"end of {sent}")
    assert [one.recipients for one in world.hops["good"].accepted if "a@plain.test" in one.recipients] == [
        ("a@plain.test", "d@plain.test")
    ]


def test_a_fixed_domain_and_a_list_of_a_host_and_exchangers(world: World) -> None:
    for domain in ("elsewhere.example", "mixed.example"):
        sent = world.send(f"user@{domain}")
        assert world.result(sent, "sent")["next_hop"] == "good.test:25"


@pytest.mark.parametrize(
    ("literal", "end", "what"),
    [
        (f"[{GOOD}]", "sent", f"{GOOD}:25"),
        (f"[IPv6:{SIX}]", "sent", f"[{SIX}]:25"),
        ("[127.0.0.1]", "bounced", "5.4.4"),
        (f"[{RELAY}]", "bounced", "5.4.6"),
    ],
)
def test_an_address_literal_is_the_host(world: World, literal: str, end: str, what: str) -> None:
    sent = world.send(f"user@{literal}")
    found = world.result(sent, end)
    assert found["next_hop" if end == "sent" else "enhanced"] == what


def test_relay_route_says_what_the_dns_says(world: World) -> None:
    def ask(address: str) -> tuple[int, dict[str, Any]]:
        done = world.relay.command("route", address, "--json")
        return done.returncode, json.loads(done.stdout)

    code, way = ask("user@preferred.test")
    assert code == 0
    assert [(hop["name"], hop["addresses"]) for hop in way["next_hops"]] == [
        ("good.test:25", [GOOD]), ("second.test:25", [SECOND]),
    ]  # fmt: skip
    assert way["next_hops"][0]["why"] == "preference 10 of preferred.test"
    assert way["dns"][0].startswith("MX of preferred.test: 10 good.test, 20 second.test; for 60 s, asked of")
    for name, answer in (
        ("null-mx", "556 5.1.10 domain null-mx.test does not accept mail (null MX)"),
        ("no-such-domain", "550 5.1.2 domain no-such-domain.test does not exist"),
        ("own-address", "554 5.4.6 mail for own-address.test loops back to this relay"),
    ):
        code, way = ask(f"user@{name}.test")
        assert (code, way["answer"], way["next_hops"]) == (1, answer, [])
    code, way = ask("user@refused.example")
    assert (code, way["answer"][:9]) == (1, "451 4.4.3")


def test_a_mended_domain_gets_its_waiting_mail(world: World) -> None:
    world.scripted.tricks["mended.test"] = servers.code(dns.rcode.SERVFAIL)
    with world.network.far():
        world.nsd.write("broken-zone.test", "@ MX 10 good.test.\n")
        world.nsd.reload("broken-zone.test")
    world.result(world.posted["broken-zone.test"], "sent")
    world.result(world.posted["mx-servfail"], "bounced")
    assert b"Status: 5.4.4" in world.report(world.posted["mx-servfail"])


def test_a_host_that_comes_back_gets_its_waiting_mail(world: World) -> None:
    with world.network.far():
        hop = NextHop(host=CLOSED, port=25)
    try:
        for name in ("all-closed", "own-is-second"):
            assert world.result(world.posted[name], "sent")["next_hop"] == "closed.test:25"
    finally:
        hop.close()


def test_hosts_of_strangers_have_one_label_and_raise_no_alarm(world: World) -> None:
    world.result(world.posted["all-closed"], "deferred")
    names = {
        line.partition('next_hop="')[2].partition('"')[0]
        for line in world.relay.get("/metrics")[1].splitlines()
        if 'next_hop="' in line
    }
    assert "mx" in names
    assert not any(name.endswith(".test:25") for name in names)
    assert not world.relay.grep('"level":"error".*"event":"next_hop_(down|misconfigured)".*test:25')


def test_when_no_dns_server_answers_mail_waits_and_an_alarm_is_raised_until_one_does(world: World) -> None:
    """The last test: the servers are stopped in it."""
    world.relay.configure({"dns": {"servers": [SCRIPTED], "timeout_s": 0.3}})
    world.scripted.silent = True
    assert world.relay.command("reload").returncode == 0
    world.relay.wait_for_log('"event":"reloaded"')
    waiting = [world.send(f"user@{name}.test") for name in ("late1", "late2", "outage", "reused1", "reused2", "plain")]
    for queue_id in waiting:
        assert world.result(queue_id, "deferred")["enhanced"] == "4.4.3"
    world.relay.wait_for_log('"level":"error","event":"dns_down"')
    world.scripted.silent = False
    for queue_id in waiting:
        world.result(queue_id, "sent")
    world.relay.wait_for_log('"event":"dns_up"')
