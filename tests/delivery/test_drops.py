"""Next hops that end the connection, talk nonsense, or talk without end: at every step, in order or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.bed.next_hop import Drop, Say, Step
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter
from tests.delivery.conftest import Bed, Sent, Spot

SPOTS = 45

HUGE = letter(body=b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\r\n" * 220_000)
"""14 MB, more than the buffers of two sockets take: what happens in its middle happens before the final dot."""


@dataclass(frozen=True)
class Case:
    step: Step
    actions: tuple[Say | Drop, ...]
    said: str
    name: str

    def __str__(self) -> str:
        return self.name


LOST = r"connection lost|Connection lost|EOF|[Rr]eset"
CASES = [
    *(
        Case(step, (Drop(reset=reset),), LOST, f"{step}-{'reset' if reset else 'closed'}")
        for step in (Step.BANNER, Step.EHLO, Step.MAIL, Step.RCPT, Step.DATA, Step.BODY, Step.FINAL)
        for reset in (False, True)
    ),
    *(
        Case(step, (Say("what is this"),), "[Mm]alformed|reply", f"{step}-nonsense")
        for step in (Step.BANNER, Step.EHLO, Step.MAIL, Step.RCPT, Step.DATA, Step.FINAL)
    ),
    *(
        Case(step, (Say("\r\n".join([f"{code}-and so on"] * 50_000)),), "too long", f"{step}-endless")
        for step, code in ((Step.EHLO, 250), (Step.MAIL, 250), (Step.FINAL, 550))
    ),
    Case(Step.MAIL, (Say("250 " + "x" * 200_000),), "too long", "MAIL-one-line"),
]
UNKNOWN = {"final dot-closed", "final dot-reset", "final dot-nonsense", "final dot-endless"}
"""Cases in which the next hop may have the message (RFC 1047)."""


@dataclass(frozen=True)
class Story:
    spot: Spot
    sent: Sent
    message: bytes


@pytest.fixture(scope="module")
def stories(shared: Callable[[str], Bed]) -> Callable[[str], dict[str, Story]]:
    played: dict[str, dict[str, Story]] = {}

    def get(way: str) -> dict[str, Story]:
        if way not in played:
            bed = shared(way)
            played[way] = {}
            for case in CASES:
                spot = bed.spot()
                spot.hop.on(case.step, *case.actions, times=1)
                message = HUGE if case.step is Step.BODY else letter()
                played[way][case.name] = Story(spot, spot.send(message=message), message)
            wait_for(lambda: not bed.queue(), lambda: f"an empty queue; {bed.queue()} {bed.relay.complaints()}")
            bed.relay.wait_for_log(r"status=sent", len(CASES))
        return played[way]

    return get


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_message_is_queued_and_gets_through_on_another_connection(
    stories: Callable[[str], dict[str, Story]], way: str, case: Case
) -> None:
    story = stories(way)[case.name]
    spot, sent = story.spot, story.sent
    assert sent.queued
    [first, *_, last] = spot.relay.wait_for_log(rf"{sent.id}: to=<{spot.to()}>", 2)
    assert "status=deferred" in first
    assert "status=sent" in last
    assert spot.relay.grep(rf"{sent.id}: .*status=deferred \(.*({case.said})")
    assert [after_trace(one.message) for one in spot.taken()] == [story.message]
    named = spot.relay.grep(f"warning: {sent.id}: possible duplicate")
    assert len(named) == (case.name in UNKNOWN)
    spot.taken(1, tries=1 + len(named))


def test_possible_duplicates_are_counted_and_only_these(
    stories: Callable[[str], dict[str, Story]], shared: Callable[[str], Bed], way: str
) -> None:
    stories(way)
    shared(way).relay.wait_for_metric("relay_possible_duplicates_total", len(UNKNOWN))
    assert shared(way).relay.metric("relay_possible_duplicates_total") == len(UNKNOWN)


def test_a_message_that_may_have_been_taken_is_marked_so_in_the_queue(spot: Spot) -> None:
    spot.hop.on(Step.FINAL, Drop())
    sent = spot.send(spot.to("a"), spot.to("b"))
    assert sent.queued
    waiting = spot.bed.wait_for_queued(sent.id, lambda message: message["recipients"][0]["attempts"])
    assert waiting["possible_duplicate"]
    assert {one["last_code"] for one in waiting["recipients"]} == {0}
    spot.relay.wait_for_log(f"warning: {sent.id}: possible duplicate")
    spot.hop.behave()
    spot.delivered(sent.id, spot.to("a"))
    spot.taken()


def test_an_idle_connection_closed_by_the_next_hop_delays_nothing(spot: Spot, way: str) -> None:
    first = spot.send()
    spot.wait_for_result(first.id, "sent")
    spot.hop.hang_up()
    second = spot.send()
    assert second.delivered if way == "express" else second.queued
    spot.wait_for_result(second.id, "sent")
    assert not spot.relay.grep(rf"({first.id}|{second.id}): .*status=deferred")
    spot.taken(2)
    assert spot.hop.sessions == 2


@pytest.mark.parametrize("last_words", [(Drop(),), (Say("421 4.4.2 Connection dropped due to inactivity"), Drop())])
def test_a_connection_that_ends_just_as_it_is_used_again_delays_nothing(
    spot: Spot, way: str, last_words: tuple[Say | Drop, ...]
) -> None:
    first = spot.send()
    spot.wait_for_result(first.id, "sent")
    spot.hop.on(Step.MAIL, *last_words, times=1)
    second = spot.send()
    assert second.delivered if way == "express" else second.queued
    spot.wait_for_result(second.id, "sent")
    assert not spot.relay.grep(rf"{second.id}: .*status=deferred")
    spot.taken(2)
    assert spot.hop.sessions == 2


def test_a_next_hop_that_takes_one_message_a_connection_gets_one(spot: Spot, way: str) -> None:
    spot.hop.on(Step.FINAL, Say("250 2.0.0 taken\r\n421 4.3.2 that was all"))
    sent = [spot.send() for _ in range(5)]
    for one in sent:
        assert one.delivered if way == "express" else one.queued
        spot.wait_for_result(one.id, "sent")
        assert not spot.relay.grep(rf"{one.id}: .*status=deferred")
    spot.taken(5)
    assert spot.hop.sessions == 5


def test_nobody_gets_a_message_when_data_is_let_in_though_all_recipients_were_refused(spot: Spot, way: str) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"), times=1)
    spot.hop.on(Step.DATA, Say("354 go on"), times=1)
    sent = spot.send()
    if way == "express":
        assert sent.code == 550
    else:
        assert len(spot.reports()) == 1
    [ended] = spot.hop.transactions
    assert (ended.recipients, ended.wire) == ((), b"")
    again = spot.send()
    spot.wait_for_result(again.id, "sent")
    spot.taken(1)
    assert spot.hop.sessions == 1
