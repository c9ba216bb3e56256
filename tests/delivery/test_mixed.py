"""Recipients that fare differently, recipients of different next hops, and routes with several next hops."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.bed.next_hop import Drop, Hold, NextHop, Say, Step
from tests.bed.wire import after_trace, letter
from tests.delivery.conftest import Bed, MakeBed, Spot

SPOTS = 30


def times_accepted(spot: Spot, messages: int = 1) -> dict[str, int]:
    """Recipient → how often the next hop took the message for it, in so many transactions."""
    counts: dict[str, int] = {}
    for one in spot.taken(messages):
        assert after_trace(one.message) == letter()
        for recipient in one.recipients:
            counts[recipient.partition("@")[0]] = counts.get(recipient.partition("@")[0], 0) + 1
    return counts


def test_one_is_served_one_waits_and_one_is_refused(spot: Spot) -> None:
    later = spot.hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="later@")
    spot.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"), only="gone@")
    sent = spot.send(spot.to("good"), spot.to("later"), spot.to("gone"))
    assert sent.queued
    spot.wait_for_result(sent.id, "sent", spot.to("good"))
    spot.wait_for_result(sent.id, "deferred", spot.to("later"), said=r"\(450 4\.2\.1 greylisted\)")
    spot.wait_for_result(sent.id, "bounced", spot.to("gone"), said=r"\(550 5\.1\.1 User unknown\)")
    waiting = spot.bed.wait_for_queued(sent.id, lambda message: len(message["recipients"]) == 1)
    [recipient] = waiting["recipients"]
    assert (recipient["mailbox"], recipient["last_code"]) == (spot.to("later"), 450)
    [report] = spot.reports()
    assert b"Final-Recipient: rfc822; " + spot.to("gone").encode() in report.message
    assert spot.to("later").encode() not in report.message
    assert not spot.relay.grep(f"{sent.id}: removed")
    later.left = 0
    spot.delivered(sent.id, spot.to("later"))
    assert times_accepted(spot, 2) == {"good": 1, "later": 1}
    assert len(spot.reports()) == 1
    spot.relay.wait_for_log(f"{sent.id}: removed")
    spot.metric("relay_deliveries_total", 2, outcome="delivered")
    spot.metric("relay_deliveries_total", 1, outcome="bounced")


def test_one_is_served_and_one_refused_without_any_to_wait(spot: Spot, way: str) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"), only="gone@")
    sent = spot.send(spot.to("good"), spot.to("gone"))
    assert sent.delivered if way == "express" else sent.queued
    assert len(spot.reports()) == 1
    spot.bed.wait_until_gone(sent.id)
    assert times_accepted(spot) == {"good": 1}


def test_when_all_are_refused_but_one_that_waits_nobody_is_told_yet_but_by_report(spot: Spot) -> None:
    spot.hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="later@", times=1)
    spot.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"), only="gone@")
    sent = spot.send(spot.to("gone"), spot.to("later"))
    assert sent.queued
    assert len(spot.reports()) == 1
    spot.delivered(sent.id, spot.to("later"))
    assert times_accepted(spot) == {"later": 1}


def test_when_all_are_refused_differently_the_client_hears_the_most_telling(spot: Spot, way: str) -> None:
    spot.hop.on(Step.RCPT, Say("550 no"), only="a@")
    spot.hop.on(Step.RCPT, Say("554 5.7.1 not from you"), only="b@")
    sent = spot.send(spot.to("a"), spot.to("b"))
    if way == "express":
        assert f"{sent.code} {sent.text}" == "554 5.7.1 The destination server refused the message"
        assert sent.id not in spot.bed.queue()
    else:
        [report] = spot.reports()
        assert report.message.count(b"Final-Recipient:") == 2


def test_greylisting_of_two_of_three_takes_one_more_transaction(spot: Spot) -> None:
    for name in ("b", "c"):
        spot.hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only=f"{name}@", times=1)
    sent = spot.send(spot.to("a"), spot.to("b"), spot.to("c"))
    for name in "abc":
        spot.delivered(sent.id, spot.to(name))
    assert [one.recipients for one in spot.taken(2)] == [(spot.to("a"),), (spot.to("b"), spot.to("c"))]


def test_a_refused_message_counts_for_those_who_were_accepted(spot: Spot, way: str) -> None:
    spot.hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="later@", times=1)
    spot.hop.on(Step.FINAL, Say("554 5.6.0 malformed"), times=1)
    sent = spot.send(spot.to("now"), spot.to("later"))
    assert sent.queued
    [report] = spot.reports()
    assert spot.to("now").encode() in report.message
    spot.delivered(sent.id, spot.to("later"))
    assert times_accepted(spot) == {"later": 1}


def test_recipients_of_different_next_hops_fare_each_for_themselves(bed: Bed) -> None:
    good, slow, refusing, down = (bed.spot() for _ in range(4))
    slow.hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), times=2)
    refusing.hop.on(Step.MAIL, Say("552 5.3.4 too big"))
    down.hop.stop()
    sent = good.send(*(one.to() for one in (good, slow, refusing, down)))
    assert sent.queued
    good.wait_for_result(sent.id, "sent")
    refusing.wait_for_result(sent.id, "bounced")
    slow.wait_for_result(sent.id, "sent")
    waiting = bed.wait_for_queued(sent.id, lambda message: len(message["recipients"]) == 1)
    assert waiting["recipients"][0]["mailbox"] == down.to()
    assert not bed.relay.grep(f"{sent.id}: removed"), "somebody is still in the queue"
    down.hop.start()
    down.delivered(sent.id)
    bed.relay.wait_for_log(f"{sent.id}: removed")
    assert [times_accepted(one) for one in (good, slow, down)] == [{"user": 1}] * 3
    assert refusing.hop.accepted == []
    [report] = good.reports()
    assert report.message.count(b"Final-Recipient:") == 1


def test_a_message_is_called_removed_once_though_its_recipients_wait_for_different_times(make_bed: MakeBed) -> None:
    """One was tried more often than the other, so they are due at different moments."""
    bed = make_bed(2, queue={"retry_s": [0.3, 1.0]}, delivery={"express": False})
    first, second = bed.spot(), bed.spot()
    one = first.hop.on(Step.RCPT, Say("450 4.2.1 later"), times=2)
    two = second.hop.on(Step.RCPT, Say("450 4.2.1 later"))
    sent = first.send(first.to(), second.to())
    first.wait_for_result(sent.id, "sent")
    assert one.used == 2
    bed.wait_for_queued(sent.id, lambda message: len(message["recipients"]) == 1)
    assert not bed.relay.grep(f"{sent.id}: removed")
    two.left = 0
    second.delivered(sent.id)
    assert len(bed.relay.wait_for_log(f"{sent.id}: removed")) == 1


# --- several next hops -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(_module_beds: MakeBed) -> dict[str, Bed]:
    """Routes of two next hops each; a first one that is down is noticed at the first failure."""
    return {
        way: _module_beds(
            8, second=True, delivery={"express": way == "express", "failures": 1, "connect_timeout_s": 2.0},
        )
        for way in ("express", "durable")
    }  # fmt: skip


@pytest.fixture
def pair(pairs: dict[str, Bed], way: str) -> Spot:
    """A spot whose route has a second next hop."""
    return pairs[way].spot()


def second_of(pair: Spot) -> NextHop:
    assert pair.second is not None
    return pair.second


@pytest.mark.parametrize("fault", ["refuses", "4xx", "421", "5xx", "hangs", "drops at EHLO"])
def test_while_the_first_next_hop_fails_the_second_serves_and_then_the_first_again(
    pair: Spot, way: str, fault: str
) -> None:
    second = second_of(pair)
    match fault:
        case "refuses":
            pair.hop.stop()
        case "4xx":
            pair.hop.on(Step.BANNER, Say("450 4.3.2 not now"))
        case "421":
            pair.hop.on(Step.BANNER, Say("421 4.3.2 not now"), Drop())
        case "5xx":
            pair.hop.on(Step.BANNER, Say("554 5.7.1 not you"))
        case "hangs":
            pair.hop.on(Step.BANNER, Hold())
        case _:
            pair.hop.on(Step.EHLO, Drop())
    sent = [pair.send() for _ in range(3)]
    assert all(one.delivered if way == "express" else one.queued for one in sent)
    second.wait_for_accepted(3)
    pair.relay.wait_for_log(rf"error: next_hop_down next_hop={pair.name} ")
    for one in sent:
        pair.relay.wait_for_log(rf"{one.id}: to=<{pair.to()}>, relay=127\.0\.0\.1:{second.port}, .*status=sent")
        assert not pair.relay.grep(f"{one.id}: .*status=deferred")

    if fault == "refuses":
        pair.hop.start()
    pair.hop.behave()
    pair.relay.wait_for_log(rf"next_hop_up next_hop={pair.name}$")
    back = pair.send()
    assert back.delivered if way == "express" else back.queued
    pair.wait_for_result(back.id, "sent")
    pair.taken()
    assert len(second.accepted) == 3


def test_while_both_fail_mail_waits_and_whoever_is_back_serves_it(pair: Spot) -> None:
    second = second_of(pair)
    pair.hop.stop()
    second.stop()
    sent = pair.send()
    assert sent.queued
    second.start()
    second.wait_for_accepted()
    pair.bed.wait_until_gone(sent.id)
    pair.hop.start()
    pair.relay.wait_for_log(rf"next_hop_up next_hop={pair.name}$")
    assert (len(second.accepted), len(pair.hop.accepted)) == (1, 0)


def test_a_refusal_by_the_first_is_final_and_not_asked_of_the_second(pair: Spot, way: str) -> None:
    """Another next hop is for trouble with the connection; shopping for a yes would make two answers of one."""
    second = second_of(pair)
    pair.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"))
    sent = pair.send()
    if way == "express":
        assert sent.code == 550
    else:
        assert len(pair.reports()) == 1
    assert second.sessions == 0


@pytest.fixture
def deaf() -> Iterator[str]:
    """A port whose backlog is full: connecting to it hangs, as behind a firewall that drops packets."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filling = []
        try:
            for _ in range(4):
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex(listener.getsockname())
                filling.append(one)
            yield f"smtp:[127.0.0.1]:{listener.getsockname()[1]}"
        finally:
            for one in filling:
                one.close()


def test_a_next_hop_that_cannot_be_reached_at_all_costs_its_time_out_once(make_bed: MakeBed, deaf: str) -> None:
    bed = make_bed(1, first=deaf, delivery={"failures": 1, "connect_timeout_s": 0.7, "express_deadline_s": 0.3})
    spot = bed.spot()
    sent = spot.send()
    assert sent.queued, "the client waited longer than the express deadline"
    spot.hop.wait_for_accepted()
    [down] = bed.relay.wait_for_log("next_hop_down")
    assert "stage=connect code=0" in down
    assert all(one.delivered for one in (spot.send(), spot.send()))
    spot.taken(3)
