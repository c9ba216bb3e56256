"""What every store promises, tried on each of them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from relay.mail.content import MEMORY_OCTETS, Content
from relay.mail.envelope import QueueId
from relay.mail.terms import PLAIN_RECIPIENT, RecipientTerms, Terms
from relay.queue.store import Acted, Action, Lease, QueueError, RecipientState, Settlement


def done(lease, *numbers, reports=()):
    return Settlement(lease, numbers, (), reports)


async def large(store, octets=3 * MEMORY_OCTETS):
    body = os.urandom(octets)
    descriptor = store.open_body()
    os.write(descriptor, body)
    return body, Content(None, descriptor, len(body))


async def test_a_leased_put_is_nobody_elses_until_it_is_settled(bench):
    store, other = await bench.store(0), await bench.store(1)
    (lease,) = await store.put([bench.message()])
    assert (lease.token, lease.until) == (1, bench.now + 60)
    assert (await other.claim(10))[0] == []
    assert (await store.stats()).leased == 1
    assert await store.settle(done(lease, 0))
    assert (await store.stats()).messages == 0
    assert await store.claim(10) == ([], None)


async def test_an_unleased_put_comes_back_whole_when_it_is_due(bench):
    store = await bench.store()
    message = bench.message("M7", ["a@example.org", "b@example.org"], leased=False, due=bench.now + 5)
    (lease,) = await store.put([message])
    assert not await store.settle(done(lease, 0, 1))
    assert await store.claim(10) == ([], bench.now + 5)
    bench.now += 5
    (claimed,), _ = await store.claim(10)
    assert claimed.envelope == message.envelope
    assert claimed.content.memory == message.content.memory
    assert claimed.created == message.created
    assert [r.number for r in claimed.recipients] == [0, 1]
    assert not claimed.expired
    assert not claimed.possible_duplicate


async def test_what_the_client_said_about_reports_stays_with_the_recipient_it_was_said_of(bench):
    store = await bench.store()
    said = (RecipientTerms("NEVER"), PLAIN_RECIPIENT, RecipientTerms("SUCCESS,DELAY", "rfc822;c+2B@example.org"))
    terms = Terms(utf8=True, ret="HDRS", envid="QQ+2B314159", recipients=said)
    to = ["a@example.org", "b@example.org", "c@example.org"]
    message = bench.message("M7", to, leased=False, terms=terms)
    await store.put([message])
    (claimed,), _ = await store.claim(10)
    assert claimed.envelope == message.envelope
    assert tuple(r.terms for r in claimed.recipients) == said
    assert await store.settle(Settlement(claimed.lease, (0,), (bench.deferral(1, 5), bench.deferral(2, 5))))
    bench.now += 5
    (again,), _ = await store.claim(10)
    assert again.envelope.terms == replace(terms, recipients=said[1:])
    assert await store.settle(Settlement(again.lease, (2,), (bench.deferral(1, 5),)))
    bench.now += 5
    (last,), _ = await store.claim(10)
    assert last.envelope.terms == replace(terms, recipients=())


async def test_a_large_body_comes_back_octet_for_octet_and_stays_the_callers(bench):
    store = await bench.store()
    body, content = await large(store)
    await store.put(
        [bench.message("M1", content=content, leased=False), bench.message("M2", content=content, leased=False)]
    )
    content.close()
    claimed, _ = await store.claim(10)
    assert len(claimed) == 2
    for each in claimed:
        assert each.content.memory is None
        assert b"".join(each.content.chunks()) == body
        assert each.content.head(100) == body[:100]
        assert await store.settle(done(each.lease, 0))
        assert b"".join(each.content.chunks()) == body, "readable until its reader closes it"
        each.content.close()
    assert (await store.stats()).messages == 0


async def test_the_oldest_due_come_first_and_no_more_than_the_limit(bench):
    store = await bench.store()
    for name, age in (("B", 2), ("A", 3), ("D", 0), ("C", 1)):
        await store.put([bench.message(name, leased=False, due=bench.now - age)])
    first, again = await store.claim(3)
    assert [each.envelope.id for each in first] == ["A", "B", "C"]
    assert again == bench.now
    second, again = await store.claim(3)
    assert [each.envelope.id for each in second] == ["D"]
    assert again == bench.now + 60, "only leases are left to wait for"


async def test_a_put_of_several_is_all_or_none(bench):
    store = await bench.store()
    with pytest.raises(QueueError):
        await store.put([bench.message("M1"), bench.message("M2", to=[])])
    assert (await store.stats()).messages == 0
    leases = await store.put([bench.message("M1"), bench.message("M2")])
    assert len({lease.key for lease in leases}) == 2
    assert (await store.stats()).messages == 2


async def test_deferred_recipients_wait_and_finished_ones_are_gone(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message(to=["a@example.org", "b@example.org", "c@example.org"])])
    deferred = (bench.deferral(1, 10), bench.deferral(2, 20))
    assert await store.settle(Settlement(lease, (0,), deferred))
    assert await store.claim(10) == ([], bench.now + 10)
    bench.now += 12
    (claimed,), _ = await store.claim(10)
    (only,) = claimed.recipients
    assert (only.number, only.mailbox, only.attempts) == (1, "b@example.org", 1)
    assert (only.last_code, only.last_enhanced, only.last_text, only.last_host) == (
        450,
        "4.2.0",
        "later, please",
        "hop.example.net",
    )
    assert claimed.envelope.recipients == ("b@example.org", "c@example.org")
    assert await store.settle(done(claimed.lease, 1))
    assert await store.claim(10) == ([], bench.now + 8)
    assert (await store.stats()).recipients == 1


async def test_finishing_the_lowest_numbers_never_takes_others_along(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message(to=["a@example.org", "b@example.org"])])
    assert await store.settle(Settlement(lease, (0,), (), keep=True))
    assert await store.settle(done(lease, 0)), "says again what is known"
    assert (await store.stats()).recipients == 1
    (claimed,), _ = await store.claim(1)
    assert [r.number for r in claimed.recipients] == [1]


async def test_a_settlement_may_keep_the_lease(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message(to=["a@example.org", "b@example.org"])])
    assert await store.settle(Settlement(lease, (0,), (), keep=True))
    assert (await store.claim(10))[0] == []
    assert await store.settle(done(lease, 1))
    assert (await store.stats()).messages == 0


@pytest.mark.parametrize("unknown", [True, False])
async def test_an_attempt_without_final_reply_is_remembered_when_the_lease_goes_on(bench, unknown):
    dying = await bench.store(0, 1)
    (lease,) = await dying.put([bench.message(to=["a@example.org", "b@example.org"])])
    cell = dying.mark(lease.key)
    kept = Settlement(lease, (), (bench.deferral(0, 1),), keep=True, possible_duplicate=unknown)
    assert await dying.settle(kept)
    dying.clear(cell)
    new = await bench.store(0, 2)
    await new.take_over_slot()
    bench.now += 5
    (claimed,), _ = await new.claim(1)
    assert claimed.possible_duplicate is unknown


async def test_a_final_reply_lets_an_earlier_attempt_in_flight_be_forgotten(bench):
    store = await bench.store()
    (lease,) = await store.put([replace(bench.message(), possible_duplicate=True)])
    assert await store.settle(Settlement(lease, (), (bench.deferral(0, 1),)))
    bench.now += 5
    (claimed,), _ = await store.claim(1)
    assert not claimed.possible_duplicate


async def test_first_failures_may_come_with_the_put(bench):
    store = await bench.store()
    message = bench.message(to=["a@example.org", "b@example.org"], leased=False, deferrals=(bench.deferral(1, 30),))
    await store.put([message])
    (claimed,), _ = await store.claim(1)
    assert [r.number for r in claimed.recipients] == [0]
    assert await store.settle(done(claimed.lease, 0))
    assert await store.claim(1) == ([], bench.now + 30)


async def test_reports_come_with_the_settlement_or_not_at_all(bench):
    store, other = await bench.store(0), await bench.store(1)
    (lease,) = await store.put([bench.message()])
    body, content = await large(store)
    reports = (bench.message("R1", leased=True), bench.message("R2", content=content, leased=False))
    assert await store.settle(done(lease, 0, reports=reports))
    content.close()
    claimed, _ = await other.claim(10)
    assert [each.envelope.id for each in claimed] == ["R1", "R2"]
    assert b"".join(claimed[1].content.chunks()) == body
    claimed[1].content.close()
    assert not await store.settle(done(lease, 0, reports=(bench.message("R3"),)))
    assert (await store.stats()).messages == 2


async def test_a_lease_that_ran_out_can_be_claimed_and_its_old_holder_changes_nothing(bench):
    store, other = await bench.store(0), await bench.store(1)
    (lease,) = await store.put([bench.message()])
    bench.now += 59
    assert (await other.claim(1))[0] == []
    bench.now += 1
    (claimed,), _ = await other.claim(1)
    assert claimed.lease.token > lease.token
    assert not await store.settle(done(lease, 0))
    assert not await store.settle(Settlement(lease, (), (bench.deferral(0, 5),)))
    assert await store.renew([lease]) == [None]
    assert (await store.stats()).recipients == 1
    assert await other.settle(done(claimed.lease, 0))


async def test_a_renewed_lease_lasts_longer(bench):
    store, other = await bench.store(0), await bench.store(1)
    first, second = await store.put([bench.message("M1"), bench.message("M2")])
    bench.now += 50
    renewed, lost = await store.renew([first, replace(second, token=second.token + 1)])
    assert renewed == Lease(first.key, first.token, bench.now + 60)
    assert lost is None
    bench.now += 30
    claimed, _ = await other.claim(10)
    assert [each.envelope.id for each in claimed] == ["M2"]
    assert await store.settle(done(renewed, 0))


async def test_a_new_incarnation_voids_the_leases_of_its_slot_only(bench):
    old, neighbour = await bench.store(0, 1), await bench.store(1, 1)
    (lost,) = await old.put([bench.message("M1")])
    (kept,) = await neighbour.put([bench.message("M2")])
    new = await bench.store(0, 2)
    taken = await new.take_over_slot()
    assert (taken.voided, taken.duplicates) == (1, ())
    assert not await old.settle(done(lost, 0)), "even before anybody claims it"
    (claimed,), _ = await new.claim(10)
    assert claimed.envelope.id == "M1"
    assert await neighbour.settle(done(kept, 0))
    assert (await new.take_over_slot()).voided == 0, "its own leases stay"
    assert await new.settle(done(claimed.lease, 0))


async def test_the_journal_of_a_dead_worker_names_possible_duplicates(bench):
    old = await bench.store(0, 1)
    under_way, finished, cleared = await old.put([bench.message(name) for name in ("M1", "M2", "M3")])
    old.mark(under_way.key)
    old.mark(finished.key)
    assert await old.settle(done(finished, 0))
    old.clear(old.mark(cleared.key))
    new = await bench.store(0, 2)
    taken = await new.take_over_slot()
    assert (taken.voided, taken.duplicates) == (2, (QueueId("M1"),))
    claimed, _ = await new.claim(10)
    assert {each.envelope.id: each.possible_duplicate for each in claimed} == {"M1": True, "M3": False}
    newest = await bench.store(0, 3)
    assert (await newest.take_over_slot()).duplicates == (), "told once"


async def test_the_journal_of_a_worker_that_hangs_past_its_lease_counts_too(bench):
    hanging, other = await bench.store(0), await bench.store(1)
    under_way, _ = await hanging.put([bench.message("M1"), bench.message("M2")])
    cell = hanging.mark(under_way.key)
    bench.now += 60
    claimed, _ = await other.claim(10)
    assert {each.envelope.id: each.possible_duplicate for each in claimed} == {"M1": True, "M2": False}
    assert not await hanging.settle(done(under_way, 0))
    hanging.clear(cell)


async def test_an_expired_message_is_claimed_for_all_its_pending_recipients(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message(to=["a@example.org", "b@example.org"], expires_in=100)])
    await store.settle(Settlement(lease, (), (bench.deferral(0, 500), bench.deferral(1, 90))))
    assert (await store.claim(1))[1] == bench.now + 90
    bench.now += 95
    (claimed,), _ = await store.claim(1)
    assert (claimed.expired, [r.number for r in claimed.recipients]) == (False, [1])
    await store.settle(Settlement(claimed.lease, (), (bench.deferral(1, 500, attempts=2),)))
    assert await store.claim(1) == ([], bench.now + 5)
    bench.now += 5
    (claimed,), _ = await store.claim(1)
    assert (claimed.expired, [r.number for r in claimed.recipients]) == (True, [0, 1])


async def test_a_held_message_waits_for_its_release(bench):
    store = await bench.store()
    await store.put([bench.message("M1", to=["a@example.org", "b@example.org"], leased=False, expires_in=50)])
    assert await store.act(QueueId("M1"), Action.HOLD) == Acted(1, 2)
    bench.now += 100
    assert await store.claim(1) == ([], None)
    stats = await store.stats()
    assert (stats.messages, stats.recipients, stats.held) == (1, 2, 2)
    assert await store.act(QueueId("M1"), Action.RELEASE) == Acted(1, 2)
    (claimed,), _ = await store.claim(1)
    assert {r.state for r in claimed.recipients} == {RecipientState.PENDING}
    assert await store.act(QueueId("nobody"), Action.HOLD) == Acted()


async def test_a_message_held_while_it_is_tried_is_not_tried_again(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message("M1")])
    assert await store.act(QueueId("M1"), Action.HOLD) == Acted(1, 1)
    assert await store.settle(Settlement(lease, (), (bench.deferral(0, 1),)))
    bench.now += 10
    assert await store.claim(1) == ([], None)


async def test_a_held_recipient_leaves_the_others_their_expiry(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message("M1", to=["a@example.org", "b@example.org"], expires_in=50)])
    assert await store.settle(Settlement(lease, (), (bench.deferral(0, 1), bench.deferral(1, 1))))
    assert await store.act(QueueId("M1"), Action.HOLD) == Acted(1, 2)
    bench.now += 1000
    assert await store.claim(1) == ([], None), "held mail does not expire"
    assert await store.act(QueueId("M1"), Action.RELEASE) == Acted(1, 2)
    (claimed,), _ = await store.claim(1)
    assert claimed.expired, "it has one last attempt"
    assert not claimed.given_up


async def test_a_retry_makes_what_waits_due_now_and_leaves_held_ones_alone(bench):
    store = await bench.store()
    await store.put([bench.message("M1", leased=False, due=bench.now + 500)])
    await store.put([bench.message("M2", leased=False, due=bench.now + 500)])
    await store.act(QueueId("M2"), Action.HOLD)
    assert await store.act(QueueId("M1"), Action.RETRY) == Acted(1, 1)
    assert await store.act(QueueId("M2"), Action.RETRY) == Acted()
    claimed, _ = await store.claim(10)
    assert [each.envelope.id for each in claimed] == ["M1"]


async def test_what_is_being_delivered_is_neither_deleted_nor_hastened_nor_returned(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message("M1")])
    for action in (Action.DELETE, Action.RETRY, Action.REROUTE, Action.BOUNCE):
        assert await store.act(QueueId("M1"), action) == Acted(busy=1)
    assert await store.settle(done(lease, 0))


async def test_a_deleted_message_is_gone_with_its_body_and_late_settlements_change_nothing(bench):
    store, other = await bench.store(0), await bench.store(1)
    _, content = await large(store)
    (lease,) = await store.put([bench.message("M1", to=["a@example.org", "b@example.org"], content=content)])
    content.close()
    bench.now += 60
    (claimed,), _ = await other.claim(1)
    claimed.content.close()
    assert await other.settle(Settlement(claimed.lease, (), (bench.deferral(0, 5), bench.deferral(1, 5))))
    assert await store.act(QueueId("M1"), Action.DELETE) == Acted(1, 2)
    assert await store.act(QueueId("M1"), Action.DELETE) == Acted()
    assert not await store.settle(done(lease, 0, 1))
    assert (await store.stats()).messages == 0
    assert await store.claim(1) == ([], None)


async def test_a_returned_message_is_claimed_for_everybody_and_said_to_be_given_up(bench):
    store = await bench.store()
    message = bench.message(
        "M1", to=["a@example.org", "b@example.org"], leased=False, deferrals=(bench.deferral(1, 99),)
    )
    await store.put([message])
    await store.act(QueueId("M1"), Action.HOLD)
    assert await store.act(QueueId("M1"), Action.BOUNCE) == Acted(1, 2)
    (claimed,), _ = await store.claim(1)
    assert (claimed.given_up, claimed.expired, len(claimed.recipients)) == (True, True, 2)
    assert await store.settle(done(claimed.lease, 0, 1))
    assert (await store.stats()).messages == 0


# --- parked: nobody is left but those whose next hop is away ------------------------------------------------------------
async def parked(store, bench, name, wait=100.0, hops="hop:25"):
    (lease,) = await store.put([bench.message(name)])
    assert await store.settle(Settlement(lease, (), (bench.deferral(0, wait),), waits_for=hops))


async def names(store, limit=10, ready=()):
    claimed, _ = await store.claim(limit, ready)
    return [each.envelope.id for each in claimed]


async def test_a_parked_message_comes_when_it_is_due_or_as_soon_as_its_next_hop_is_ready(bench):
    store = await bench.store()
    await parked(store, bench, "M1")
    await parked(store, bench, "M2", hops="other:25")
    assert await store.claim(10) == ([], bench.now + 100)
    assert await names(store, ready=["nobody:25"]) == []
    (claimed,), _ = await store.claim(10, ["hop:25", "third:25"])
    assert (claimed.envelope.id, claimed.waits_for) == ("M1", "hop:25")
    assert [r.mailbox for r in claimed.recipients] == ["user@example.org"], "although nobody is due"
    assert await store.settle(Settlement(claimed.lease, (), (bench.deferral(0, 50),)))
    assert await names(store, ready=["hop:25"]) == [], "this time it was something else"
    bench.now += 100
    assert sorted(await names(store)) == ["M1", "M2"]


async def test_a_backlog_of_parked_mail_leaves_four_parts_of_five_to_the_others(bench):
    store = await bench.store()
    for number in range(20):
        await parked(store, bench, f"P{number}", wait=1)
    bench.now += 5
    await store.put([bench.message(f"M{number}", leased=False) for number in range(20)])
    first = await names(store, 10)
    assert [name[0] for name in first] == ["M"] * 8 + ["P"] * 2
    assert await names(store, 1) == ["M8"]
    assert len(await names(store, 100)) == 29


async def test_the_store_tells_what_parked_mail_waits_for_and_takes_no_more_of_it_than_asked(bench):
    store = await bench.store()
    for number in range(6):
        await parked(store, bench, f"P{number}", hops=("b:25", "a:25 c:25", "b:25")[number % 3])
    assert await store.awaited() == ["a:25 c:25", "b:25"]
    assert await names(store, ready=["b:25"]) == ["P0", "P2", "P3", "P5"]
    assert await store.awaited() == ["a:25 c:25"], "of the others somebody holds the lease"
    bench.now += 200
    assert len((await store.claim(10, (), 1))[0]) == 1 + 4, "and those whose lease ran out"
    assert (await store.claim(10, (), 0))[0] == []
    await store.act(QueueId("P4"), Action.HOLD)
    assert await store.awaited() == []


async def test_a_put_may_be_parked(bench):
    store = await bench.store()
    await store.put([replace(bench.message("M1", leased=False, due=bench.now + 50), waits_for="hop:25")])
    assert await names(store) == []
    assert await names(store, ready=["hop:25"]) == ["M1"]


async def test_parked_mail_can_be_hastened_and_rerouted_and_expires(bench):
    store = await bench.store()
    await parked(store, bench, "M1", wait=5000)
    await parked(store, bench, "M2", wait=5000)
    assert await store.act(QueueId("M1"), Action.REROUTE) == Acted(1, 1)
    (claimed,), again = await store.claim(10)
    assert (claimed.envelope.id, claimed.waits_for, claimed.expired) == ("M1", "", False)
    assert again == bench.now + 60
    bench.now += 1000
    claimed, _ = await store.claim(10)
    assert [(each.envelope.id, each.expired) for each in claimed] == [("M1", True), ("M2", True)]


async def test_that_the_sender_was_warned_is_remembered(bench):
    store = await bench.store()
    (lease,) = await store.put([bench.message("M1")])
    assert await store.settle(Settlement(lease, (), (bench.deferral(0, 1),), warned=True))
    for _ in range(2):
        bench.now += 5
        (claimed,), _ = await store.claim(1)
        assert claimed.warned
        assert await store.settle(Settlement(claimed.lease, (), (bench.deferral(0, 1),)))


async def test_an_attempt_that_did_nothing_gives_the_message_back(bench):
    store, other = await bench.store(0), await bench.store(1)
    (lease,) = await store.put([bench.message()])
    assert await store.settle(Settlement(lease, (), ()))
    assert not await store.settle(Settlement(lease, (), ()))
    assert len((await other.claim(1))[0]) == 1


async def test_stats_tell_depth_and_age(bench):
    store = await bench.store()
    messages = [bench.message("M1", to=["a@example.org", "b@example.org"]), bench.message("M2", leased=False)]
    messages[0] = replace(messages[0], created=1_000_000.5)
    await store.put(messages)
    stats = await store.stats()
    assert (stats.messages, stats.recipients, stats.leased, stats.corrupt) == (2, 3, 1, 0)
    assert stats.octets == sum(m.content.size for m in messages)
    assert stats.oldest == 1_000_000.5


async def test_a_closed_store_takes_nothing(bench):
    store = await bench.store()
    await store.close()
    with pytest.raises(QueueError):
        await store.put([bench.message()])
    bench._stores.clear()
