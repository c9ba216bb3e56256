"""Routes that are more than one host: the transport table, error:, retry:, discard:, weights, and a change of them."""

from __future__ import annotations

import json

import pytest

from tests.bed.next_hop import NextHop
from tests.bed.waiting import wait_for
from tests.delivery.conftest import Bed, MakeBed, Spot

TABLE = """\
user@special.example.com    smtp:[127.0.0.1]:{other}
closed.example.com          error:5.1.2 this domain is closed
gone@d0.example.com         error:5.1.6 she has left
later.example.com           retry:4.4.1 being moved
trap.example.com            discard:nobody reads this
.example.com                smtp:[127.0.0.1]:{below}
"""


@pytest.fixture(scope="module")
def hops():
    made = {"other": NextHop(), "below": NextHop()}
    yield made
    for hop in made.values():
        hop.close()
    assert [violation for hop in made.values() for violation in hop.violations] == []


@pytest.fixture(scope="module")
def tables(_module_beds: MakeBed, hops: dict[str, NextHop], tmp_path_factory) -> Bed:
    file = tmp_path_factory.mktemp("routes") / "transport"
    file.write_text(TABLE.format(other=hops["other"].port, below=hops["below"].port))
    domains = ["d0.example.com", "d1.example.com"] + [
        f"{name}.example.com" for name in ("special", "closed", "later", "trap", "below")
    ]
    bed = _module_beds(
        2,
        routing={"transport": file},
        domain=[{"names": domains, "recipients": "any"}],
        log={"format": "json"},
    )
    bed.transport = file
    return bed


@pytest.fixture
def spot(tables: Bed) -> Spot:
    return Spot(tables, 0, tables.hops[0])


def results(bed: Bed, queue_id: str, count: int = 1) -> list[dict]:
    lines = bed.relay.wait_for_log(f'"event":"result".*"id":"{queue_id}"', count)
    return [json.loads(line) for line in lines]


def test_an_address_and_a_parent_domain_have_their_own_next_hops(spot: Spot, hops: dict[str, NextHop]) -> None:
    assert spot.send("user@special.example.com").delivered
    assert spot.send("another@special.example.com").delivered
    assert spot.send("user@below.example.com").delivered
    [one] = hops["other"].wait_for_accepted()
    assert one.recipients == ("user@special.example.com",)
    assert {t.recipients[0] for t in hops["below"].wait_for_accepted(2)} == {
        "another@special.example.com", "user@below.example.com",
    }  # fmt: skip


def test_error_refuses_at_rcpt_with_its_code_and_text_and_nobody_else(tables: Bed) -> None:
    with tables.relay.client() as client:
        client.open().expect("250", "MAIL FROM:<a@example.net>")
        reply = client.command("RCPT TO:<User@closed.example.com>")
        assert str(reply) == ("550 5.1.2 <User@closed.example.com>: Recipient address rejected: this domain is closed")
        client.expect("550 5.1.6 <gone@d0.example.com>: Recipient address rejected: she has left",
                      "RCPT TO:<gone@d0.example.com>")  # fmt: skip
        client.expect("250", "RCPT TO:<here@d0.example.com>")
    [line] = tables.relay.wait_for_log('"event":"reject".*closed.example.com')
    assert json.loads(line)["rule"] == "route closed.example.com"
    tables.relay.wait_for_metric("relay_replies_total", 1, code="550", enhanced="5.1.2", reason="route")


def test_a_route_opens_nothing_to_strangers(tables: Bed) -> None:
    """No entry, not even for *, makes the relay take mail for domains that are not its own (row F4)."""
    with tables.relay.client() as client:
        client.open().expect("250", "MAIL FROM:<a@example.net>")
        for address in ("user@elsewhere.example.com", "user@outside.example.net", "gone@unknown.example.com"):
            client.expect("554 5.7.1", f"RCPT TO:<{address}>")


def test_discard_takes_mail_and_throws_it_away_and_says_so(tables: Bed, spot: Spot) -> None:
    sent = spot.send("a@trap.example.com", "b@trap.example.com")
    assert sent.delivered
    first, second = results(tables, sent.id, 2)
    assert (first["next_hop"], first["status"], first["text"]) == ("discard", "sent", "nobody reads this")
    assert second["recipient"] == "b@trap.example.com"
    assert sent.id not in tables.queue()
    tables.relay.wait_for_metric("relay_deliveries_total", 2, next_hop="none", outcome="discarded")


def test_discard_beside_other_recipients_touches_only_its_own(tables: Bed, spot: Spot) -> None:
    before = len(spot.hop.accepted)
    sent = spot.send("a@trap.example.com", spot.to("mixed"))
    assert sent.queued
    tables.wait_until_gone(sent.id)
    mixed = [one for one in spot.hop.wait_for_accepted(before + 1) if one.recipients == (spot.to("mixed"),)]
    assert len(mixed) == 1
    assert {one["next_hop"] for one in results(tables, sent.id, 2)} == {"discard", spot.name}


def test_retry_keeps_mail_and_a_change_of_the_table_lets_it_go_refused_or_delivered(tables: Bed, spot: Spot) -> None:
    sent = spot.send("kept@later.example.com", "lost@later.example.com")
    assert sent.queued
    waiting = tables.wait_for_queued(sent.id, lambda message: message["recipients"][0]["attempts"] >= 1)
    for recipient in waiting["recipients"]:
        assert (recipient["last_code"], recipient["last_enhanced"], recipient["last_text"]) == (
            451, "4.4.1", "being moved",
        )  # fmt: skip
    text = tables.transport.read_text()
    tables.transport.write_text(
        text.replace("later.example.com ", f"later.example.com {tables.hops[1].route} #")
        .replace(" #", "\n#", 1) + "lost@later.example.com error:5.1.6 she has left\n"
    )  # fmt: skip
    reloaded = tables.relay.command("reload")
    assert reloaded.returncode == 0, reloaded.stderr
    [taken] = tables.hops[1].wait_for_accepted()
    assert taken.recipients == ("kept@later.example.com",)
    [report] = spot.reports()
    assert b"Final-Recipient: rfc822; lost@later.example.com" in report.message
    assert b"Status: 5.1.6" in report.message
    tables.wait_until_gone(sent.id)


def test_a_table_with_a_mistake_changes_nothing_and_is_told_with_its_line(tables: Bed, spot: Spot) -> None:
    text = tables.transport.read_text()
    tables.transport.write_text("broken.example.com 192.0.2.1\n")
    try:
        checked = tables.relay.command("check")
        assert checked.returncode == 2
        assert f'{tables.transport}:1: "192.0.2.1" is a bare IP address; write smtp:[192.0.2.1]' in checked.stderr
        tables.relay.command("reload")
        with tables.relay.client() as client:
            client.open().expect("250", "MAIL FROM:<a@example.net>")
            client.expect("550 5.1.2", "RCPT TO:<user@closed.example.com>")
    finally:
        tables.transport.write_text(text)


def route(bed: Bed, address: str) -> tuple[int, dict]:
    done = bed.relay.command("route", address, "--json")
    return done.returncode, json.loads(done.stdout)


def test_relay_route_names_the_entry_and_the_state_of_its_next_hop(tables: Bed, spot: Spot) -> None:
    assert spot.send().code == 250
    tables.relay.wait_for_metric("relay_next_hop_connections", 1, next_hop=spot.name)
    code, way = route(tables, f"Someone@{spot.domain.upper()}")
    assert code == 0
    line = next(n for n, text in enumerate(tables.relay.config_file.read_text().splitlines(), 1) if spot.domain in text
                and text.startswith("domains"))  # fmt: skip
    assert way["place"] == f"{tables.relay.config_file}:{line}"
    [hop] = way["next_hops"]
    assert (hop["name"], hop["addresses"]) == (spot.name, ["127.0.0.1"])
    assert hop["state"].startswith("up; connections open: ")
    assert way["tls"].startswith("opportunistic")
    assert way["asked"] == [f"someone@{spot.domain}", spot.domain]


def test_relay_route_says_why_mail_does_not_go(tables: Bed) -> None:
    code, way = route(tables, "x@closed.example.com")
    assert (code, way["action"]) == (1, "error")
    assert way["place"] == f"{tables.transport}:2"
    assert way["answer"] == "550 5.1.2 <x@closed.example.com>: Recipient address rejected: this domain is closed"
    assert route(tables, "x@trap.example.com")[1]["action"] == "discard"
    done = tables.relay.command("route", "not an address")
    assert done.returncode == 1
    assert "not an address; write for example user@example.com" in done.stderr


def test_relay_route_is_readable(tables: Bed) -> None:
    told = tables.relay.command("route", "user@special.example.com").stdout
    assert told.startswith("user@special.example.com: goes to 127.0.0.1:")
    assert f"entry       {tables.transport}:1: user@special.example.com" in told


def test_weights_share_out_and_whoever_is_down_gets_nothing(make_bed: MakeBed) -> None:
    first, second, reserve = (NextHop() for _ in range(3))
    bed = make_bed(
        1,
        domain=[{"names": ["shared.example.com"], "recipients": "any"}],
        route=[
            {
                "domains": ["*"],
                "next_hops": [first.route, second.route, reserve.route],
                "weights": [3, 1, 0],
            }
        ],
        delivery={"failures": 1},
    )
    spot = bed.spot()
    try:
        for _ in range(60):
            assert spot.send("user@shared.example.com").delivered
        wait_for(lambda: sum(len(hop.accepted) for hop in (first, second, reserve)) == 60, "60 messages noted")
        counts = [len(hop.accepted) for hop in (first, second, reserve)]
        assert counts[0] > counts[1] > 0
        assert counts[2] == 0
        first.stop()
        second.stop()
        sent = spot.send("user@shared.example.com")
        assert sent.code == 250
        reserve.wait_for_accepted()
    finally:
        for hop in (first, second, reserve):
            hop.close()
