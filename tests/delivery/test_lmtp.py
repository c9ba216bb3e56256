"""A next hop that speaks LMTP: one answer for each recipient behind the final dot (RFC 2033)."""

from __future__ import annotations

import pytest

from tests.bed.next_hop import Drop, Hold, Say, Step
from tests.bed.wire import letter
from tests.delivery.conftest import Bed, MakeBed, Spot


@pytest.fixture(scope="module")
def beds(_module_beds: MakeBed) -> dict[str, Bed]:
    return {
        way: _module_beds(15, protocol="lmtp", delivery={"express": way == "express"}) for way in ("express", "durable")
    }


@pytest.fixture
def spot(beds: dict[str, Bed], way: str) -> Spot:
    return beds[way].spot()


def served(spot: Spot) -> list[str]:
    return sorted(one.recipients[0].partition("@")[0] for one in spot.hop.accepted)


def test_everybody_is_served_and_the_connection_serves_again(spot: Spot, way: str) -> None:
    for name in ("a", "b"):
        sent = spot.send(spot.to(name), spot.to("c"))
        assert sent.delivered if way == "express" else sent.queued
        spot.wait_for_result(sent.id, "sent", spot.to(name))
        spot.bed.wait_until_gone(sent.id)
    assert served(spot) == ["a", "b", "c", "c"]
    assert spot.hop.sessions == 1
    assert spot.hop.said("LHLO")
    assert not spot.hop.said("EHLO")


def test_each_answer_behind_the_dot_counts_for_its_recipient(spot: Spot) -> None:
    spot.hop.on(Step.FINAL, Say("552 5.2.2 mailbox full"), only="full@")
    spot.hop.on(Step.FINAL, Say("451 4.2.1 locked"), only="locked@", times=1)
    sent = spot.send(spot.to("good"), spot.to("full"), spot.to("locked"), spot.to("fine"))
    assert sent.queued
    spot.wait_for_result(sent.id, "bounced", spot.to("full"), "mailbox full")
    spot.wait_for_result(sent.id, "deferred", spot.to("locked"))
    spot.wait_for_result(sent.id, "sent", spot.to("locked"))
    spot.bed.wait_until_gone(sent.id)
    assert served(spot) == ["fine", "good", "locked"]
    [report] = spot.reports()
    assert report.message.count(b"Final-Recipient:") == 1
    assert b"Status: 5.2.2" in report.message


def test_a_recipient_refused_before_the_message_has_no_answer_behind_it(spot: Spot, way: str) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"), only="gone@")
    sent = spot.send(spot.to("gone"), spot.to("good"))
    assert sent.delivered if way == "express" else sent.queued
    spot.wait_for_result(sent.id, "bounced", spot.to("gone"))
    spot.wait_for_result(sent.id, "sent", spot.to("good"))
    assert served(spot) == ["good"]
    assert len(spot.reports()) == 1


def test_an_arrival_that_was_to_be_reported_is_a_delivery(spot: Spot) -> None:
    """Behind LMTP there is no further server (RFC 2033 §1), so "relayed" would say too little."""
    spot.hop.on(Step.FINAL, Say("550 5.2.2 full"), only="full@")
    everything = "NOTIFY=SUCCESS,FAILURE"
    spot.send((spot.to("a"), everything), spot.to("b"), (spot.to("full"), everything))
    reports = b"".join(sorted(one.message for one in spot.reports(2)))
    assert f"rfc822; {spot.to('a')}\r\nAction: delivered\r\nStatus: 2.0.0\r\n".encode() in reports
    assert f"rfc822; {spot.to('full')}\r\nAction: failed\r\nStatus: 5.2.2\r\n".encode() in reports
    assert spot.to("b").encode() not in reports


def test_all_refused_behind_the_dot(spot: Spot, way: str) -> None:
    spot.hop.on(Step.FINAL, Say("550 5.7.1 no"))
    sent = spot.send(spot.to("a"), spot.to("b"))
    if way == "express":
        assert (sent.code, sent.text) == (550, "5.7.1 The destination server refused the message")
    else:
        [report] = spot.reports()
        assert report.message.count(b"Final-Recipient:") == 2


def test_all_refused_before_the_message_and_354_all_the_same(spot: Spot, way: str) -> None:
    """RFC 2033 section 4.2 forbids this 354; a lone dot would never be answered."""
    spot.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"))
    spot.hop.on(Step.DATA, Say("354 go"))
    sent = spot.send()
    if way == "express":
        assert sent.code == 550
    else:
        assert len(spot.reports()) == 1
    assert spot.hop.transactions == []


def test_a_connection_lost_among_the_answers_concerns_those_without_one(spot: Spot) -> None:
    spot.hop.on(Step.FINAL, Drop(), only="second@", times=1)
    sent = spot.send(spot.to("first"), spot.to("second"), spot.to("third"))
    assert sent.queued
    for name in ("second", "third"):
        spot.wait_for_result(sent.id, "deferred", spot.to(name), "connection lost")
        spot.wait_for_result(sent.id, "sent", spot.to(name))
    spot.bed.wait_until_gone(sent.id)
    assert served(spot) == ["first", "second", "third"]
    spot.relay.wait_for_log(f"{sent.id}: possible duplicate")


def test_421_among_the_answers_concerns_those_without_one(spot: Spot) -> None:
    spot.hop.on(Step.FINAL, Say("421 4.3.2 going down"), Drop(), only="second@", times=1)
    sent = spot.send(spot.to("first"), spot.to("second"), spot.to("third"))
    for name in ("second", "third"):
        spot.wait_for_result(sent.id, "deferred", spot.to(name), "going down")
    spot.bed.wait_until_gone(sent.id)
    assert served(spot) == ["first", "second", "third"]


def test_silence_among_the_answers_ends_at_the_time_out(make_bed: MakeBed) -> None:
    bed = make_bed(1, protocol="lmtp", delivery={"final_reply_timeout_s": 1.0, "express": False})
    spot = bed.spot()
    spot.hop.on(Step.FINAL, Hold(), only="second@", times=1)
    sent = spot.send(spot.to("first"), spot.to("second"))
    spot.wait_for_result(sent.id, "sent", spot.to("first"))
    spot.wait_for_result(sent.id, "deferred", spot.to("second"), "timed out")
    spot.hop.behave()
    spot.wait_for_result(sent.id, "sent", spot.to("second"))


def test_a_large_message_from_a_file_has_its_answers_too(spot: Spot) -> None:
    spot.hop.on(Step.FINAL, Say("552 5.2.2 mailbox full"), only="full@")
    sent = spot.send(spot.to("good"), spot.to("full"), message=letter() + b"x" * 70 + b"\r\n" * 1 + b"y\r\n" * 60000)
    assert sent.code == 250
    spot.wait_for_result(sent.id, "bounced", spot.to("full"))
    assert served(spot) == ["good"]


def test_without_pipelining_it_is_the_same(spot: Spot) -> None:
    spot.hop.extensions = ("SIZE", "8BITMIME")
    spot.hop.on(Step.FINAL, Say("451 4.2.1 locked"), only="b@", times=1)
    sent = spot.send(spot.to("a"), spot.to("b"))
    spot.wait_for_result(sent.id, "sent", spot.to("b"))
    spot.bed.wait_until_gone(sent.id)
    assert served(spot) == ["a", "b"]


def test_a_server_that_speaks_smtp_only_is_the_operators_to_mend(spot: Spot) -> None:
    spot.hop.on(Step.EHLO, Say("500 5.5.2 LHLO unknown"))
    sent = spot.send()
    assert sent.queued
    spot.relay.wait_for_log(f"next_hop_misconfigured next_hop={spot.name} stage=ehlo code=500")
    spot.hop.behave()
    spot.delivered(sent.id)


@pytest.mark.needs("smtp-sink")
def test_postfixs_own_lmtp_server_takes_mail(make_sink, make_relay) -> None:
    sink = make_sink("-L")
    relay = make_relay(sink.route.replace("smtp:", "lmtp:"), recipients=["a@example.com", "b@example.com"])
    with relay.client() as client:
        reply = client.open().deliver("sender@example.net", ["a@example.com", "b@example.com"], letter())
    assert reply.text.startswith("2.0.0 Ok: delivered")
    sink.wait_for_count(1)
