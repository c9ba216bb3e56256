"""Next hops that are slow or hang: what clients are told meanwhile, and what becomes of the answer when it comes."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.bed.next_hop import Drop, Hold, Say, Step
from tests.bed.wire import after_trace, letter
from tests.delivery.conftest import Bed, MakeBed, Sent, Spot

HANGS = [Step.BANNER, Step.EHLO, Step.MAIL, Step.RCPT, Step.DATA, Step.FINAL]


# --- hanging for longer than the time-outs -----------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    spot: Spot
    sent: Sent


@pytest.fixture(scope="module")
def hangs(_module_beds: MakeBed) -> Callable[[str], dict[Step, Story]]:
    """A message for each step, all at once: each hangs there until the time-out, then the next hop is well again."""
    played: dict[str, dict[Step, Story]] = {}

    def get(way: str) -> dict[Step, Story]:
        if way in played:
            return played[way]
        bed = _module_beds(
            len(HANGS),
            delivery={
                "express": way == "express",
                "express_deadline_s": 0.3,
                "connect_timeout_s": 2.0,
                "command_timeout_s": 2.0,
                "final_reply_timeout_s": 2.0,
            },
            queue={"lease_s": 6.0, "retry_s": [0.4]},
        )
        stories: dict[Step, Story] = {}

        def send(step: Step, spot: Spot) -> None:
            stories[step] = Story(spot, spot.send())

        threads = []
        for step in HANGS:
            spot = bed.spot()
            spot.hop.on(step, Hold(), times=1)
            threads.append(threading.Thread(target=send, args=(step, spot)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for story in stories.values():
            story.spot.delivered(story.sent.id)
        played[way] = stories
        return stories

    return get


@pytest.mark.parametrize("step", HANGS)
def test_a_next_hop_that_hangs_is_given_up_after_its_time_out_and_tried_again(
    hangs: Callable[[str], dict[Step, Story]], way: str, step: Step
) -> None:
    story = hangs(way)[step]
    spot, sent = story.spot, story.sent
    assert sent.queued
    results = spot.relay.grep(rf"{sent.id}: to=<{spot.to()}>")
    assert "status=deferred (" in results[0]
    assert "imed out" in results[0]
    assert "status=sent" in results[-1]
    named = spot.relay.grep(f"warning: {sent.id}: possible duplicate")
    assert len(named) == (step is Step.FINAL)
    assert [after_trace(one.message) for one in spot.taken()] == [letter()]
    if way == "express":
        slow = spot.relay.grep(f"{sent.id}: queued, reason=slow")
        assert len(slow) == 1


def test_a_next_hop_that_hangs_does_not_keep_the_queue_from_serving_the_others(make_bed: MakeBed, way: str) -> None:
    """It fills the window of active messages, which makes room after ``delivery.connect_timeout_s``."""
    bed = make_bed(
        2,
        delivery={"express": way == "express", "concurrency": 1, "connect_timeout_s": 1.0, "express_deadline_s": 0.2},
        queue={"active": 3, "retry_s": [0.4]},
    )
    hanging, other = bed.spot(), bed.spot()
    hold = hanging.hop.on(Step.FINAL, Hold()).hold
    sent = [hanging.send() for _ in range(6)]
    other.hop.on(Step.RCPT, Say("450 4.2.1 to the queue with it"), times=1)
    one = other.send()
    assert all(each.queued for each in (*sent, one))
    other.delivered(one.id)
    assert hanging.hop.accepted == []
    hold.release()
    for each in sent:
        hanging.delivered(each.id)
    hanging.taken(6, tries=6)


# --- slower than the express deadline, and then an answer --------------------------------------------------------


@pytest.fixture(scope="module")
def slow_bed(_module_beds: MakeBed) -> Bed:
    return _module_beds(12, delivery={"express": True, "express_deadline_s": 0.3})


@pytest.fixture
def slow(slow_bed: Bed) -> Spot:
    """A next hop of a relay that acknowledges soon."""
    return slow_bed.spot()


def test_while_an_answer_is_late_the_queue_holds_the_message_as_in_flight(slow: Spot) -> None:
    hold = slow.hop.on(Step.FINAL, Hold()).hold
    before = slow.relay.metric("relay_late_answers_total")
    sent = slow.send()
    assert sent.queued
    assert slow.relay.wait_for_log(f"{sent.id}: queued, reason=slow")
    waiting = slow.bed.queued(sent.id)
    assert (waiting["state"], waiting["possible_duplicate"]) == ("in delivery", True)
    slow.relay.wait_for_metric("relay_late_answers_total", before + 1)
    assert slow.relay.metric("relay_accepted_total", way="queue", reason="slow") >= 1
    hold.release()
    slow.delivered(sent.id)
    slow.relay.wait_for_log(f"{sent.id}: removed")
    slow.taken(1, tries=1)
    assert not slow.relay.grep(f"{sent.id}: possible duplicate")


def test_a_late_refusal_goes_to_the_sender(slow: Spot) -> None:
    hold = slow.hop.on(Step.FINAL, Hold(), Say("554 5.6.0 after long thought, no")).hold
    sent = slow.send()
    assert sent.queued
    hold.release()
    [report] = slow.reports()
    assert b"Diagnostic-Code: smtp; 554 5.6.0 after long thought, no\r\n" in report.message
    slow.bed.wait_until_gone(sent.id)
    slow.taken(0, tries=1)


def test_a_late_not_now_is_tried_again(slow: Spot) -> None:
    hold = slow.hop.on(Step.FINAL, Hold(), Say("451 4.3.0 not now"), times=1).hold
    sent = slow.send()
    assert sent.queued
    hold.release()
    slow.wait_for_result(sent.id, "deferred", said=r"\(451 4\.3\.0 not now\)")
    slow.delivered(sent.id)
    slow.taken(1, tries=2)
    assert not slow.relay.grep(f"{sent.id}: possible duplicate")


def test_a_late_drop_may_have_been_a_yes(slow: Spot) -> None:
    hold = slow.hop.on(Step.FINAL, Hold(), Drop(), times=1).hold
    sent = slow.send()
    assert sent.queued
    hold.release()
    slow.delivered(sent.id)
    assert len(slow.relay.grep(f"warning: {sent.id}: possible duplicate")) == 1
    slow.taken(1, tries=2)


def test_a_late_answer_counts_for_those_who_were_accepted(slow: Spot) -> None:
    slow.hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="b@", times=1)
    slow.hop.on(Step.RCPT, Say("550 5.1.1 unknown"), only="c@")
    hold = slow.hop.on(Step.FINAL, Hold(), times=1).hold
    sent = slow.send(slow.to("a"), slow.to("b"), slow.to("c"))
    assert sent.queued
    hold.release()
    slow.delivered(sent.id, slow.to("b"))
    assert len(slow.reports()) == 1
    assert [one.recipients for one in slow.taken(2)] == [(slow.to("a"),), (slow.to("b"),)]


@pytest.mark.parametrize("step", [Step.MAIL, Step.RCPT, Step.DATA])
def test_slowness_before_the_dot_is_waited_for_too_and_the_message_goes_out_once(slow: Spot, step: Step) -> None:
    hold = slow.hop.on(step, Hold(), times=1).hold
    sent = slow.send()
    assert sent.queued
    hold.release()
    slow.delivered(sent.id)
    slow.taken(1, tries=1)
    assert not slow.relay.grep(f"{sent.id}: .*status=deferred")


def test_a_message_that_still_waits_for_a_connection_is_simply_queued(slow: Spot) -> None:
    hold = slow.hop.on(Step.BANNER, Hold(), times=1).hold
    sent = slow.send()
    assert sent.queued
    assert not slow.bed.queued(sent.id)["possible_duplicate"]
    hold.release()
    slow.delivered(sent.id)
    slow.taken(1, tries=1)
    assert slow.hop.sessions == 1


def test_a_client_that_leaves_meanwhile_changes_nothing(slow: Spot) -> None:
    hold = slow.hop.on(Step.FINAL, Hold(), times=1).hold
    with slow.relay.client() as client:
        client.open().envelope(slow.sender, [slow.to()])
        client.expect("354", "DATA")
        client.send(letter() + b".\r\n")
        hold.wait_reached()
        client.reset()
    [line] = slow.relay.wait_for_log(f"from=<{slow.sender}>")
    queue_id = line.partition("]: ")[2].partition(":")[0]
    slow.relay.wait_for_log(f"{queue_id}: queued, reason=slow")
    hold.release()
    slow.delivered(queue_id)
    slow.taken(1, tries=1)


# --- the end of the relay ----------------------------------------------------------------------------------------


def test_a_drain_waits_for_late_answers_and_settles_them(make_bed: MakeBed, way: str) -> None:
    bed = make_bed(2, delivery={"express": way == "express", "express_deadline_s": 0.3})
    taken, refused = bed.spot(), bed.spot()
    holds = [taken.hop.on(Step.FINAL, Hold()).hold, refused.hop.on(Step.FINAL, Hold(), Say("451 4.3.0 no")).hold]
    sent = [taken.send(), refused.send()]
    assert all(one.queued for one in sent)
    for hold in holds:
        hold.wait_reached()
    bed.relay.send_signal(signal.SIGTERM)
    bed.relay.wait_for_log("supervisor_drains")
    for hold in holds:
        hold.release()
    assert bed.relay.wait_for_exit() == 0
    taken.taken(1, tries=1)
    waiting = bed.queue()
    assert list(waiting) == [sent[1].id]
    assert not waiting[sent[1].id]["possible_duplicate"]
    refused.hop.behave()
    bed.relay.start(build=False)
    refused.delivered(sent[1].id)
    taken.taken(1, tries=1)
    refused.taken(1, tries=2)


def test_what_is_still_in_flight_when_the_drain_ends_is_named_a_possible_duplicate(make_bed: MakeBed, way: str) -> None:
    bed = make_bed(1, delivery={"express": way == "express", "express_deadline_s": 0.3}, process={"drain_timeout_s": 2})
    spot = bed.spot()
    hold = spot.hop.on(Step.FINAL, Hold(), times=1).hold
    sent = spot.send()
    assert sent.queued
    hold.wait_reached()
    assert bed.relay.stop() == 0
    assert list(bed.queue()) == [sent.id]
    hold.release()
    bed.relay.start(build=False)
    spot.delivered(sent.id)
    assert bed.relay.grep(f"{sent.id}: possible duplicate")


# --- a queue that cannot be written ------------------------------------------------------------------------------


@contextmanager
def stuck_queue(bed: Bed) -> Iterator[None]:
    """Hold the lock that every write takes, as a stuck disk would."""
    descriptor = os.open(bed.relay.spool / "queue" / "write.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def brittle_bed(_module_beds: MakeBed) -> Bed:
    return _module_beds(
        6, delivery={"express": True, "express_deadline_s": 0.3}, queue={"write_timeout_s": 0.5, "retry_s": [0.4]}
    )


def test_when_the_queue_fails_at_the_deadline_the_client_waits_for_the_answer_itself(brittle_bed: Bed) -> None:
    """451 would bring the message a second time, while the first may still be taken."""
    spot = brittle_bed.spot()
    hold = spot.hop.on(Step.FINAL, Hold()).hold
    answers: list[Sent] = []
    client = threading.Thread(target=lambda: answers.append(spot.send()))
    with stuck_queue(brittle_bed):
        client.start()
        hold.wait_reached()
        spot.relay.wait_for_log("error: queue_put_failed")
        assert answers == []
        hold.release()
        client.join()
    assert answers[0].delivered
    spot.taken(1, tries=1)
    assert brittle_bed.queue() == {}


@pytest.mark.parametrize("answer", ["450 4.2.1 not now", "530 5.7.57 not you"])
def test_when_the_queue_fails_what_cannot_be_delivered_is_left_to_the_client(brittle_bed: Bed, answer: str) -> None:
    spot = brittle_bed.spot()
    spot.hop.on(Step.RCPT, Say(answer), times=1)
    with stuck_queue(brittle_bed):
        sent = spot.send()
    assert f"{sent.code} {sent.text}" == "451 4.3.0 Message could not be stored, try again later"
    again = spot.send()
    assert again.delivered
    spot.taken()


def test_a_settlement_the_queue_cannot_record_is_tried_until_it_can(brittle_bed: Bed) -> None:
    spot = brittle_bed.spot()
    hold = spot.hop.on(Step.FINAL, Hold()).hold
    sent = spot.send()
    assert sent.queued
    with stuck_queue(brittle_bed):
        hold.release()
        spot.relay.wait_for_log(rf"error: queue_settle_failed id={sent.id}")
    spot.delivered(sent.id)
    spot.relay.wait_for_log(f"{sent.id}: removed")
    spot.taken(1, tries=1)
