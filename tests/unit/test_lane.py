"""One next hop as a worker sees it: how many connections, when it counts as down, who waits and who does not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from relay.mail.answer import Answer, Stage
from relay.outbound.lane import BACKOFF_S
from tests.unit.scripted_hop import ALL, Hop, Message, Script, Talk, brief, configuration, deliver, good, wait_until

TAKEN = [(Stage.FINAL, 250, "2.0.0")]
REFUSED = b"421 4.3.2 too many connections\r\n"


class Gate:
    """A server that takes messages and answers the final dot only when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Event] = []
        self.most = 0

    async def __call__(self, talk: Talk) -> None:
        await talk.hello(*ALL)
        while True:
            match (await talk.hear()).split()[0]:
                case "DATA":
                    await talk.say("354 go")
                    await talk.hear_message()
                    event = asyncio.Event()
                    self.waiting.append(event)
                    self.most = max(self.most, len(self.waiting))
                    await event.wait()
                    await talk.say("250 2.0.0 taken")
                case "QUIT":
                    return
                case _:
                    await talk.say("250 ok")

    async def held(self, count: int) -> None:
        await wait_until(lambda: len(self.waiting) >= count)

    def release(self, count: int = 1) -> None:
        for _ in range(count):
            self.waiting.pop(0).set()


def refusing(*, after: int) -> Sequence[Script]:
    """Connections over ``after`` get 421; the script list is per connection."""

    async def busy(talk: Talk) -> None:
        await talk.say(REFUSED)

    return [*[good] * after, busy]


async def all_done(messages: Sequence[Message]) -> list[list[Answer]]:
    async with asyncio.timeout(20):
        return await asyncio.gather(*(message.result for message in messages))


def submit(hop: Hop, count: int, *, express: bool = True) -> list[Message]:
    messages = [Message(f"u{number}") for number in range(count)]
    for message in messages:
        hop.lane.submit(message, express=express)
    return messages


async def take_down(hop: Hop) -> None:
    """Let the next hop refuse until the lane counts it as down; the clock is the test's."""

    async def closed(talk: Talk) -> None:
        return

    hop.stop_the_clock()
    hop.scripts = [closed]
    while hop.lane.up:
        [answer] = await deliver(hop)
        assert (answer.stage, answer.code) == (Stage.CONNECT, 0)


# --- how many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("concurrency", "workers", "limit"), [(3, 1, 3), (16, 4, 4), (7, 2, 3), (2, 5, 1)])
async def test_connections_never_exceed_this_workers_share_and_all_mail_gets_through(
    hop: Hop, concurrency: int, workers: int, limit: int
) -> None:
    gate = Gate()
    hop.scripts = [gate]
    hop.lane.configure(configuration(concurrency=concurrency), workers)
    messages = submit(hop, 12)
    for _ in messages:
        await gate.held(1)
        gate.release()
    assert [brief(answers) for answers in await all_done(messages)] == [TAKEN] * 12
    assert len(hop.talks) <= limit
    assert gate.most <= limit


async def test_more_workers_mean_a_smaller_share_at_once(hop: Hop) -> None:
    gate = Gate()
    hop.scripts = [gate]
    hop.lane.configure(configuration(concurrency=4), 1)
    messages = submit(hop, 10)
    await gate.held(4)
    hop.lane.configure(configuration(concurrency=4), 2)
    gate.release(4)
    await gate.held(2)
    for _ in range(6):
        await gate.held(1)
        assert hop.lane.connections <= 2
        gate.release()
    assert [brief(answers) for answers in await all_done(messages)] == [TAKEN] * 10


async def test_mail_in_turn_from_clients_and_from_the_queue(hop: Hop) -> None:
    gate = Gate()
    hop.scripts = [gate]
    hop.lane.configure(configuration(concurrency=1), 1)
    first = submit(hop, 1)
    await gate.held(1)
    express, queued = submit(hop, 3), submit(hop, 3, express=False)
    order: list[str] = []
    for name, messages in (("express", express), ("queued", queued)):
        for message in messages:
            message.result.add_done_callback(lambda _, name=name: order.append(name))
    for _ in range(7):
        await gate.held(1)
        gate.release()
    await all_done([*first, *express, *queued])
    await wait_until(lambda: len(order) == 6)
    assert order in (["queued", "express"] * 3, ["express", "queued"] * 3)


async def test_a_client_waits_for_a_slot_only_while_few_others_do(hop: Hop) -> None:
    gate = Gate()
    hop.scripts = [gate]
    hop.lane.configure(configuration(concurrency=2), 1)
    messages = submit(hop, 2)
    await gate.held(2)
    assert hop.lane.has_room()
    messages += submit(hop, 2)
    assert not hop.lane.has_room()
    gate.release(2)
    await gate.held(2)
    assert hop.lane.has_room()
    gate.release(2)
    await all_done(messages)


async def test_who_waits_can_be_taken_back_and_who_is_under_way_cannot(hop: Hop) -> None:
    gate = Gate()
    hop.scripts = [gate]
    hop.lane.configure(configuration(concurrency=1), 1)
    [under_way] = submit(hop, 1)
    await gate.held(1)
    [waiting] = submit(hop, 1)
    assert not hop.lane.withdraw(under_way)
    assert hop.lane.withdraw(waiting)
    assert not hop.lane.withdraw(waiting)
    gate.release()
    await all_done([under_way])
    assert not hop.lane.busy
    assert not waiting.result.done()


async def test_queued_mail_that_waits_too_long_for_a_connection_makes_room_and_what_is_under_way_stays(
    hop: Hop,
) -> None:
    gate = Gate()
    hop.scripts = [gate]
    hop.stop_the_clock()
    hop.lane.configure(configuration(concurrency=1, connect_timeout_s=30.0), 1)
    [under_way] = submit(hop, 1, express=False)
    await gate.held(1)
    old, [client] = submit(hop, 2, express=False), submit(hop, 1)
    for message in (under_way, *old, client):
        message.started = hop.clock
    hop.clock += 31
    [young] = submit(hop, 1, express=False)
    young.started = hop.clock
    hop.lane.turn_away()
    for answers in await all_done(old):
        assert [(answer.stage, answer.code, answer.text) for answer in answers] == [
            (Stage.CONNECT, 0, "no connection became free")
        ]
    for _ in range(3):
        await gate.held(1)
        gate.release()
    assert [brief(answers) for answers in await all_done([under_way, client, young])] == [TAKEN] * 3


# --- 421 ---------------------------------------------------------------------------------------------------------


async def test_421_to_surplus_connections_lowers_the_limit_and_costs_no_message(hop: Hop) -> None:
    hop.scripts = list(refusing(after=2))
    messages = submit(hop, 40)
    assert [brief(answers) for answers in await all_done(messages)] == [TAKEN] * 40
    assert hop.lane.up
    assert [line for line in hop.lines if "next_hop_down" in line] == []


async def test_421_to_every_connection_is_a_failure_like_another(hop: Hop) -> None:
    hop.scripts = list(refusing(after=0))
    for _ in range(3):
        assert brief(await deliver(hop)) == [(Stage.BANNER, 421, "4.3.2")]
    assert not hop.lane.up
    assert len([line for line in hop.lines if "next_hop_down" in line and "code=421" in line]) == 1


async def test_421_in_a_transaction_lowers_the_limit_and_answers_raise_it_again(hop: Hop) -> None:
    gate = Gate()

    async def goes_away(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.hear("MAIL")
        await gate.held(3)
        await talk.say("421 4.3.2 too much")

    hop.scripts = [gate, gate, gate, goes_away, gate]
    hop.lane.configure(configuration(concurrency=4), 1)
    messages = submit(hop, 4)
    await gate.held(3)
    await wait_until(lambda: sum(message.result.done() for message in messages) == 1)
    more = submit(hop, 20)
    await asyncio.sleep(0.05)  # a fourth connection, were there one, would have come by now
    assert len(hop.talks) == 4
    for _ in range(23):
        await gate.held(1)
        gate.release()
    answers = await all_done([*messages, *more])
    assert sorted(answer.code for [answer] in answers) == [250] * 23 + [421]
    again = submit(hop, 4)
    await gate.held(4)
    gate.release(4)
    await all_done(again)


# --- down and up -------------------------------------------------------------------------------------------------


async def test_a_next_hop_that_refuses_is_down_after_the_failures_configured_and_mail_hears_it_at_once(
    hop: Hop,
) -> None:
    await take_down(hop)
    assert len(hop.talks) == 3
    assert not hop.lane.has_room()
    [message] = submit(hop, 1)
    assert message.result.done(), "it waited"
    assert len(hop.talks) == 3
    assert len([line for line in hop.lines if "next_hop_down" in line]) == 1


async def test_all_who_wait_hear_of_the_failure_and_none_is_forgotten(hop: Hop) -> None:
    async def closed(talk: Talk) -> None:
        return

    hop.scripts = [closed]
    messages = [*submit(hop, 30), *submit(hop, 30, express=False)]
    for answers in await all_done(messages):
        assert brief(answers) == [(Stage.CONNECT, 0, "")]
    assert not hop.lane.busy


async def test_a_message_handed_in_as_another_hears_of_the_failure_is_not_forgotten(hop: Hop) -> None:
    async def closed(talk: Talk) -> None:
        return

    hop.scripts = [closed, good]
    first, second = Message(), Message()
    first.result.add_done_callback(lambda _: hop.lane.submit(second, express=False))
    hop.lane.submit(first, express=True)
    assert [brief(answers) for answers in await all_done([first, second])] == [[(Stage.CONNECT, 0, "")], TAKEN]


async def test_one_connection_probes_after_waits_that_double_up_to_the_first_retry(hop: Hop) -> None:
    await take_down(hop)
    waits = []
    for number in range(6):
        waits.append(hop.lane.retry_at - hop.clock)
        hop.clock = hop.lane.retry_at - 0.01
        hop.lane.sweep()
        assert not hop.lane._opening
        hop.clock += 0.02
        before = hop.lane.retry_at
        for _ in range(3):
            hop.lane.sweep()
            assert len(hop.lane._opening) == 1
        await wait_until(lambda before=before: hop.lane.retry_at != before)
        assert len(hop.talks) == 4 + number
    assert waits == [pytest.approx(wait, abs=0.1) for wait in (1, 2, 4, 5, 5, 5)]
    assert max(waits) <= BACKOFF_S
    assert len([line for line in hop.lines if "next_hop_down" in line]) == 1


async def test_a_probe_that_connects_ends_it_without_any_mail(hop: Hop) -> None:
    await take_down(hop)
    hop.scripts = [good]
    hop.clock = hop.lane.retry_at
    hop.lane.sweep()
    await wait_until(lambda: hop.lane.up)
    assert hop.lane.has_room()
    assert len([line for line in hop.lines if "next_hop_up" in line]) == 1
    talks = len(hop.talks)
    assert brief(await deliver(hop)) == TAKEN
    assert len(hop.talks) == talks, "the probe's connection was not used"


async def test_queued_mail_waits_for_the_probe_and_no_client_does(hop: Hop) -> None:
    await take_down(hop)
    gate = Gate()
    hop.scripts = [gate]
    hop.clock = hop.lane.retry_at
    assert hop.lane.worth_trying
    assert not hop.lane.has_room()
    messages = submit(hop, 3, express=False)
    assert len(hop.lane._opening) == 1
    await gate.held(1)
    assert hop.lane.up
    for _ in range(3):
        await gate.held(1)
        gate.release()
    assert [brief(answers) for answers in await all_done(messages)] == [TAKEN] * 3


async def test_after_an_outage_connections_double_with_each_round(hop: Hop) -> None:
    await take_down(hop)
    gate = Gate()
    hop.scripts = [gate]
    hop.clock = hop.lane.retry_at
    messages = submit(hop, 60, express=False)
    rounds = []
    for expected in (1, 2, 4, 8, 16):
        await gate.held(expected)
        await asyncio.sleep(0.02)  # one too many would have come by now
        rounds.append(len(gate.waiting))
        gate.release(expected)
    assert rounds == [1, 2, 4, 8, 16]
    for _ in range(60 - sum(rounds)):
        await gate.held(1)
        gate.release()
    await all_done(messages)
    assert gate.most == 16


async def test_an_answer_on_an_older_connection_ends_it_too(hop: Hop) -> None:
    gate = Gate()

    async def closed(talk: Talk) -> None:
        return

    hop.scripts = [gate, closed]
    [slow] = submit(hop, 1)
    await gate.held(1)
    while hop.lane.up:
        submit(hop, 1)
        await wait_until(lambda: not hop.lane._opening)
    gate.release()
    assert brief((await all_done([slow]))[0]) == TAKEN
    assert hop.lane.up


async def test_a_hanging_connection_does_not_keep_the_probe_away(hop: Hop) -> None:
    gate = Gate()

    async def closed(talk: Talk) -> None:
        return

    hop.stop_the_clock()
    hop.scripts = [gate, closed]
    [hanging] = submit(hop, 1)
    await gate.held(1)
    while hop.lane.up:
        submit(hop, 1)
        await wait_until(lambda: not hop.lane._opening)
    hop.scripts = [good]
    hop.clock = hop.lane.retry_at
    [message] = submit(hop, 1, express=False)
    assert brief((await all_done([message]))[0]) == TAKEN
    assert not hanging.result.done()
    gate.release()
    await all_done([hanging])


async def test_what_cannot_be_foreseen_while_connecting_is_told_and_costs_an_attempt(hop: Hop) -> None:
    hop.scripts = [good]
    hop.lane.hostname = "not\na name"
    assert brief(await deliver(hop)) == [(Stage.CONNECT, 0, "")]
    assert len([line for line in hop.lines if "next_hop_fault" in line]) == 1


# --- how long ----------------------------------------------------------------------------------------------------


async def test_one_connection_serves_message_after_message(hop: Hop) -> None:
    hop.scripts = [good]
    for _ in range(50):
        assert brief(await deliver(hop)) == TAKEN
    assert len(hop.talks) == 1
    assert hop.talks[0].heard.count("DATA") == 50


@pytest.mark.parametrize(("setting", "wait"), [("idle_s", 240.0), ("reuse_s", 480.0)])
async def test_an_idle_connection_is_ended_in_time_with_quit(hop: Hop, setting: str, wait: float) -> None:
    hop.scripts = [good]
    other = "idle_s" if setting == "reuse_s" else "reuse_s"
    hop.lane.configure(configuration(**{setting: wait, other: 10_000.0}), 1)
    hop.stop_the_clock()
    await deliver(hop)
    hop.clock += wait - 1
    hop.lane.sweep()
    assert hop.lane.connections == 1
    hop.clock += 2
    hop.lane.sweep()
    assert hop.lane.connections == 0
    await wait_until(lambda: hop.talks[0].heard[-1] == "QUIT")


async def test_a_connection_in_use_for_too_long_is_ended_behind_its_message(hop: Hop) -> None:
    hop.scripts = [good]
    hop.stop_the_clock()
    await deliver(hop)
    hop.clock += 479
    assert brief(await deliver(hop)) == TAKEN
    assert len(hop.talks) == 1
    hop.clock += 2
    assert brief(await deliver(hop)) == TAKEN
    assert len(hop.talks) == 2
    await wait_until(lambda: hop.talks[0].heard[-1] == "QUIT")


async def test_a_draining_lane_takes_no_express_mail_and_serves_what_it_has(hop: Hop) -> None:
    gate = Gate()
    hop.scripts = [gate]
    hop.lane.configure(configuration(concurrency=1), 1)
    messages = submit(hop, 3)
    await gate.held(1)
    hop.lane.draining = True
    assert not hop.lane.has_room()
    assert hop.lane.busy
    for _ in range(3):
        await gate.held(1)
        gate.release()
    assert [brief(answers) for answers in await all_done(messages)] == [TAKEN] * 3
    assert not hop.lane.busy
    hop.lane.close()
    await wait_until(lambda: all(talk.heard[-1] == "DATA" or talk.reader.at_eof() for talk in hop.talks))


# --- what mail that waits for a next hop goes by ---------------------------------------------------------------------------


async def test_a_next_hop_that_was_away_proves_itself_with_a_connection_and_that_is_told_once(hop: Hop) -> None:
    back: list[str] = []
    hop.lane.back = lambda lane: back.append(lane.name)
    await take_down(hop)
    assert (hop.lane.proven, back) == (False, [])
    hop.scripts = [good]
    hop.clock += BACKOFF_S
    for _ in range(3):
        assert brief(await deliver(hop)) == TAKEN
    assert hop.lane.proven
    assert set(back) == {hop.lane.name}


async def test_a_next_hop_that_is_slow_to_connect_the_first_time_hesitates_and_lets_go_of_queued_mail(hop: Hop) -> None:
    greet = asyncio.Event()

    async def slow(talk: Talk) -> None:
        await greet.wait()
        await good(talk)

    hop.scripts = [slow]
    hop.stop_the_clock()
    waiting = submit(hop, 1, express=False)[0]
    assert not hop.lane.hesitates
    hop.clock += 2.0
    assert hop.lane.hesitates
    assert hop.lane.failure().text == "no connection yet"
    hop.lane.turn_away()
    assert [answer.text for answer in await waiting.result] == ["no connection became free"]
    greet.set()
    await wait_until(lambda: hop.lane.proven)
    assert not hop.lane.hesitates


# --- how many in a minute ------------------------------------------------------------------------------------------------


def pace(hop: Hop, per_minute: int, workers: int = 1) -> None:
    table = {"host": hop.lane.next_hop.host, "messages_per_minute": per_minute}
    hop.lane.configure(configuration(next_hop=[table]), workers)


@pytest.mark.parametrize(("per_minute", "workers", "apart_s"), [(60, 1, 1.0), (6, 1, 10.0), (60, 4, 4.0)])
async def test_a_next_hop_gets_no_more_in_a_minute_than_its_table_says_over_all_workers(
    hop: Hop, per_minute: int, workers: int, apart_s: float
) -> None:
    hop.scripts = [good]
    hop.stop_the_clock()
    pace(hop, per_minute, workers)
    messages = submit(hop, 4, express=False)
    for served in range(1, 5):
        await wait_until(lambda: sum(m.result.done() for m in messages) == served)  # noqa: B023 - waited for right here
        hop.clock += apart_s * 0.9
        hop.lane.sweep()
        assert not hop.lane.has_room()
        await asyncio.wait([m.result for m in messages], timeout=0.02)
        assert sum(m.result.done() for m in messages) == served
        hop.clock += apart_s * 0.11
        hop.lane.sweep()
    assert [brief(answers) for answers in await all_done(messages)] == [TAKEN] * 4


async def test_mail_over_the_rate_gets_turns_one_after_another_and_expired_mail_is_tried_all_the_same(hop: Hop) -> None:
    hop.scripts = [good]
    hop.stop_the_clock()
    pace(hop, 6)
    [first] = submit(hop, 1, express=False)
    await all_done([first])
    assert hop.lane.puts_off(expired=False) is None
    [waiting] = submit(hop, 1, express=False)
    why = hop.lane.puts_off(expired=False)
    assert why is not None
    assert why.text.startswith("held back")
    assert hop.lane.puts_off(expired=True) is None
    assert [round(hop.lane.turn_in_s()) for _ in range(3)] == [20, 30, 40]
    hop.lane.configure(configuration(), 1)
    assert hop.lane.puts_off(expired=False) is None
    assert [brief(answers) for answers in await all_done([waiting])] == [TAKEN]
