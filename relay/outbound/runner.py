"""Owns: delivery from the queue: which messages are worked on, each message's way over its lanes, the settlement.

A small active window over a large queue: at most ``queue.active`` messages and ACTIVE_OCTETS of bodies in memory; the
rest waits on disk until it is claimed. When it is full, mail that waits for a next hop that hangs makes room. One attempt, one transaction: answers are settled as they come, one ``settle``
for each next hop of a message.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from relay.config.schema import Config
from relay.mail.address import Mailbox, domain_of
from relay.mail.answer import Answer, Stage
from relay.mail.content import Content
from relay.mail.dsn import Notice
from relay.mail.envelope import Envelope, QueueId
from relay.mail.terms import PLAIN, some
from relay.outbound.lane import Lane
from relay.outbound.lanes import SESSION_STAGES, Lanes
from relay.outbound.pace import HELD_BACK
from relay.outbound.results import Judged, Results, Tried, boot_clock, everybody_served, first_tries, owes_report
from relay.policy.outcome import Outcome, classify
from relay.policy.route import Action, Route
from relay.queue.store import Claimed, Lease, QueueError, Settlement, Store
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics

ACTIVE_OCTETS: Final = 32 * 1024 * 1024
"""Bodies held in memory for queue delivery by one worker."""
AWAITED_S: Final = 10.0
"""Between two looks at what parked mail waits for."""
CLAIM: Final = 100
"""Messages claimed in one transaction: more would hold the write lock for too long."""
LEAST_WAIT_S: Final = 0.01
"""Between claims that brought nothing, whatever the queue says about the next."""
POLL_S: Final = 0.5
"""How often the queue is looked at for mail of dead workers and for what other workers left over."""
PARKED: Final = 20
"""Messages that wait for a next hop which is away: so many are tried when they are due, each PARKED_S. They only move their
own dates; a backlog of them must not keep the worker busy. The lane probes, and ``ready`` brings them when it is back."""
PARKED_S: Final = 0.2
SETTLE_AGAIN_S: Final = 1.0
"""Wait before a settlement that the disk refused is tried again; the lease keeps others off meanwhile."""

GIVEN_UP: Final = Answer(Stage.ROUTE, 550, "5.0.0", "returned to its sender by the postmaster")


class Delivery:
    """One leased message being delivered; ``pending`` counts its attempts still under way, ``open`` the recipients that
    stay queued. ``turn``: with several attempts, settlements go one by one, for the last one ends the lease.
    """

    __slots__ = (
        "content",
        "counted",
        "created",
        "delays",
        "envelope",
        "expired",
        "given_up",
        "lease",
        "open",
        "pending",
        "possible_duplicate",
        "turn",
        "warned",
    )

    def __init__(
        self, lease: Lease, envelope: Envelope, content: Content, created: float, *, expired: bool,
        possible_duplicate: bool,
    ) -> None:  # fmt: skip
        self.lease = lease
        self.envelope = envelope
        self.content = content
        self.created = created
        self.expired = expired
        self.possible_duplicate = possible_duplicate
        self.pending = 0
        self.open = 0
        self.counted = False
        self.given_up = False
        self.warned = False
        self.delays: tuple[Notice, ...] = ()
        self.turn: asyncio.Lock | None = None


class QueueAttempt:
    """Some recipients of a leased message on their way to one next hop (see ``outbound.attempt``)."""

    __slots__ = (
        "_cell", "_lane", "_others", "_runner", "body_8bit", "content", "delivery", "recipients", "route", "sender",
        "started", "terms", "told", "tried",
    )  # fmt: skip

    def __init__(
        self, runner: Runner, delivery: Delivery, tried: Sequence[Tried], route: Route, lanes: list[Lane]
    ) -> None:
        self._runner = runner
        self.route = route
        self.delivery = delivery
        self.tried = tried
        self.sender = delivery.envelope.sender
        self.recipients: Sequence[Mailbox] = [one.mailbox for one in tried]
        self.content = delivery.content
        self.body_8bit = delivery.envelope.body_8bit
        terms = delivery.envelope.terms
        self.terms = terms if terms is PLAIN else replace(terms, recipients=some([one.terms for one in tried]))
        self.told = False
        self._lane = lanes[0]
        self._others = lanes[1:]
        self._cell = -1
        self.started = 0.0

    def start(self) -> None:
        """Hand it to its lane."""
        self.started = self._lane.now()
        self._lane.submit(self, express=False)

    def may_finish(self) -> bool:
        """The journal names the message; then the lease must outlast the wait for the final reply.

        In this order: a worker that hangs in between and wakes up late either finds its lease over, or whoever took the
        message over has found the mark.
        """
        delivery, store = self.delivery, self._runner.store
        try:
            cell = store.mark(delivery.lease.key)
        except QueueError:
            return False
        if delivery.lease.until - boot_clock() < self._lane.final_reply_timeout_s:
            store.clear(cell)
            return False
        self._cell = cell
        if delivery.possible_duplicate:
            self._runner.perhaps_again(delivery.envelope.id, len(self.recipients))
        return True

    def done(self, answers: list[Answer], next_hop: str) -> None:
        """Try the next lane of the route when this one could not even be talked to; else record the result."""
        if self._others and all(
            a.stage in SESSION_STAGES and classify(a) in (Outcome.DEFERRED, Outcome.OUR_FAULT) for a in answers
        ):
            self._lane = self._others.pop(0)
            self._lane.submit(self, express=False)
            return
        self._runner.metrics.delivery_seconds(next_hop, self._lane.now() - self.started)
        self._runner.finish(self, answers, self._lane, self._cell)


class Runner:
    """Delivers from the queue for one worker."""

    def __init__(
        self, config: Config, store: Store, lanes: Lanes, results: Results, log: MailLog,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self.store = store
        self.metrics = metrics
        self._lanes = lanes
        self._results = results
        self._log = log
        self._active: dict[int, Delivery] = {}
        self._octets = 0
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._parked_again = 0.0
        self._hungry = -1
        """As soon as no more messages than this are active, the queue is to be looked at; -1: it does not wait for that."""
        lanes.on_ready = self.wake
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a (new) configuration."""
        self._limit = config.queue.active
        lease_s = config.queue.lease_s
        # Often enough that what is left of a lease always outlasts the wait for a final reply.
        self._renew_s = min(lease_s / 4, (lease_s - config.delivery.final_reply_timeout_s) / 2)

    def has_room(self, content: Content) -> bool:
        """Whether a message may be put already leased, to be delivered from memory."""
        return (
            not self._draining
            and len(self._active) < self._limit
            and (content.memory is None or self._octets + content.size <= ACTIVE_OCTETS)
        )

    @property
    def busy(self) -> bool:
        """True while messages are being delivered."""
        return bool(self._active)

    def wake(self) -> None:
        """Something was put that is due."""
        self._wake.set()

    def take(self, lease: Lease, envelope: Envelope, content: Content, created: float) -> None:
        """Deliver a message this worker has just put; ``content`` is the runner's from now on."""
        delivery = Delivery(lease, envelope, content, created, expired=False, possible_duplicate=False)
        self._deliver(delivery, first_tries(envelope))

    def keep(self, delivery: Delivery) -> None:
        """Renew the lease of a message whose attempt runs elsewhere (a late express answer)."""
        self._active[delivery.lease.key] = delivery

    # --- the loops -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to claim and to renew."""
        self._spawn(self._claims())
        self._spawn(self._renewals())
        self._spawn(self._returns())

    def drain(self) -> None:
        """Claim no more."""
        self._draining = True
        self._wake.set()

    def stop(self) -> None:
        """End the loops; messages under way stay in the queue."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _claims(self) -> None:
        while not self._draining:
            self._wake.clear()
            wait = await self._claim()
            if wait:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait)

    async def _claim(self) -> float:
        """Claim once; how long to wait before the next time."""
        active, limit = len(self._active), self._limit
        self._hungry = limit - max(1, limit // 10)
        room = min(CLAIM, limit - active)
        if room <= 0 or self._octets >= ACTIVE_OCTETS:
            self._lanes.turn_away()
            return POLL_S
        now = boot_clock()
        # Mail of a next hop that is back leaves half of the window to all others.
        ready = self._lanes.ready()
        self._hungry = -1
        if ready and active > limit // 2:
            ready = []
            self._hungry = limit // 2
        try:
            claimed, due = await self.store.claim(room, ready, PARKED if now >= self._parked_again else 0)
        except QueueError as error:
            self._log.alarm("queue_claim_failed", error=str(error))
            return POLL_S
        if len(claimed) < room:
            self._lanes.served(ready)  # that was all of it
        ordinary = 0
        for one in claimed:
            if not one.waits_for or one.waits_for in ready:
                ordinary += 1
            else:
                self._parked_again = now + PARKED_S
            self._claimed(one)
        if ordinary:
            return 0.0
        if due is None:
            return POLL_S
        return min(POLL_S, max(LEAST_WAIT_S, due - now, self._parked_again - now if due <= now else 0.0))

    async def _renewals(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            deliveries = list(self._active.values())
            try:
                leases = await self.store.renew([d.lease for d in deliveries]) if deliveries else []
            except QueueError as error:
                self._log.alarm("queue_renew_failed", error=str(error))
                continue
            for delivery, lease in zip(deliveries, leases, strict=True):
                if lease is not None:
                    delivery.lease = lease

    async def _returns(self) -> None:
        """Mail that waits for a next hop which nobody here has tried: parked before the start, or by other workers."""
        while True:
            try:
                self._lanes.awaited(await self.store.awaited())
            except QueueError as error:
                self._log.alarm("queue_claim_failed", error=str(error))
            await asyncio.sleep(AWAITED_S)

    # --- one message ---------------------------------------------------------------------------------------------------

    def _claimed(self, one: Claimed) -> None:
        delivery = Delivery(
            one.lease, one.envelope, one.content, one.created, expired=one.expired,
            possible_duplicate=one.possible_duplicate,
        )  # fmt: skip
        delivery.open = len(one.envelope.recipients) - len(one.recipients)  # held, or due later
        delivery.given_up = one.given_up
        delivery.warned = one.warned
        self._deliver(delivery, [Tried(r.number, r.mailbox, r.attempts, r.terms) for r in one.recipients])

    def perhaps_again(self, queue_id: QueueId, recipients: int) -> None:
        """A final dot goes out for a message whose earlier one was not answered (RFC 1047)."""
        self._log.possible_duplicate(queue_id)
        self.metrics.possible_duplicate(recipients)

    def _deliver(self, delivery: Delivery, tried: Sequence[Tried]) -> None:
        self._active[delivery.lease.key] = delivery
        if delivery.content.memory is not None:
            delivery.counted = True
            self._octets += delivery.content.size
        if delivery.given_up:
            delivery.pending = 1
            self._finish_unsent(delivery, tried, GIVEN_UP, None)
            return
        groups = self._groups(tried)
        delivery.pending = len(groups)
        if len(groups) > 1:
            delivery.turn = asyncio.Lock()
        for route, members in groups:
            if route is None:
                self._finish_unsent(delivery, members, _no_route(members[0].mailbox), None)
                continue
            if route.action is not Action.DELIVER:
                self._decided(delivery, members, route)
                continue
            if route.static:
                lanes = self._lanes.candidates(route)
            else:
                lanes = self._lanes.known(route, members[0].mailbox)
                if not lanes:
                    self._spawn(self._find(delivery, members, route))
                    continue
            why_not = lanes[0].puts_off(expired=delivery.expired)
            if why_not is not None:
                self._finish_unsent(delivery, members, why_not, lanes[0], route)
                continue
            QueueAttempt(self, delivery, members, route, lanes).start()

    def _groups(self, tried: Sequence[Tried]) -> list[tuple[Route | None, list[Tried]]]:
        """Recipients that travel together."""
        if len(tried) == 1:
            return [(self._lanes.of(tried[0].mailbox), [tried[0]])]
        groups: dict[tuple[Route | None, str], list[Tried]] = {}
        for one in tried:
            route = self._lanes.of(one.mailbox)
            domain = domain_of(one.mailbox) if route is not None and route.by_domain else ""
            groups.setdefault((route, domain), []).append(one)
        return [(route, members) for (route, _), members in groups.items()]

    async def _find(self, delivery: Delivery, tried: Sequence[Tried], route: Route) -> None:
        """The next hops have to be looked up first."""
        lanes = await self._lanes.find(route, tried[0].mailbox)
        if isinstance(lanes, Answer):
            self._finish_unsent(delivery, tried, lanes, None)
        elif (why_not := lanes[0].puts_off(expired=delivery.expired)) is not None:
            self._finish_unsent(delivery, tried, why_not, lanes[0], route)
        else:
            QueueAttempt(self, delivery, tried, route, lanes).start()

    def _decided(self, delivery: Delivery, tried: Sequence[Tried], route: Route) -> None:
        """The route says what becomes of these, no next hop is asked."""
        if route.action is not Action.DISCARD:
            self._finish_unsent(delivery, tried, route.answer, None)
            return
        self._results.discarded(
            delivery.envelope.id,
            [one.mailbox for one in tried],
            route,
            delivery.created,
            "queue",
            tried[0].attempts + 1,
        )
        gone = Judged(0, tuple([one.number for one in tried]), (), (), unknown=False)
        self._spawn(self._settle(delivery, gone, -1))

    def _finish_unsent(
        self, delivery: Delivery, tried: Sequence[Tried], answer: Answer, lane: Lane | None, route: Route | None = None
    ) -> None:
        judged = self._results.judge(
            delivery.envelope, tried, [answer] * len(tried), lane, delivery.content.size, delivery.created, "queue",
            expired=delivery.expired,
        )  # fmt: skip
        waits_for = ""
        if route is not None and lane is not None and answer is not HELD_BACK:  # that has a date of its own
            waits_for = self._lanes.waits_for(route, lane)
        self._spawn(self._settle(delivery, judged, -1, waits_for))

    def finish(self, attempt: QueueAttempt, answers: list[Answer], lane: Lane, cell: int) -> None:
        """An attempt is over."""
        delivery = attempt.delivery
        if delivery.turn is None and everybody_served(answers) and not owes_report(attempt):
            delivery.pending = 0
            self._results.delivered(
                delivery.envelope.id, attempt.recipients, answers, lane, delivery.content.size, delivery.created,
                "queue", attempt.tried[0].attempts + 1,
            )  # fmt: skip
            finished = tuple([one.number for one in attempt.tried])
            settlement = Settlement(delivery.lease, finished, (), possible_duplicate=delivery.possible_duplicate)
            self._settle_soon(delivery, settlement, cell)
            return
        judged = self._results.judge(
            delivery.envelope, attempt.tried, answers, lane, delivery.content.size, delivery.created, "queue",
            expired=delivery.expired, told=attempt.told,
        )  # fmt: skip
        self._spawn(self._settle(delivery, judged, cell, self._lanes.waited_for(attempt.route, lane, answers)))

    async def _settle(self, delivery: Delivery, judged: Judged, cell: int, waits_for: str = "") -> None:
        """Record it, after the earlier ones of the message."""
        if delivery.turn is None:
            await self._settle_next(delivery, judged, cell, waits_for if not delivery.open else "")
        else:
            async with delivery.turn:
                await self._settle_next(delivery, judged, cell, "")

    async def _settle_next(self, delivery: Delivery, judged: Judged, cell: int, waits_for: str) -> None:
        delivery.possible_duplicate = delivery.possible_duplicate or judged.unknown
        delivery.pending -= 1
        last = delivery.pending == 0
        delivery.open += len(judged.deferred)
        reports = self._results.report(delivery.envelope, delivery.content, delivery.created, judged.notices)
        delivery.delays += judged.delays
        warned = last and bool(delivery.delays) and not delivery.warned
        if warned:
            reports += self._results.warning(delivery.envelope, delivery.content, delivery.created, delivery.delays)
        settlement = Settlement(
            delivery.lease, judged.finished, judged.deferred, reports, keep=not last,
            possible_duplicate=delivery.possible_duplicate, waits_for=waits_for, warned=warned,
        )  # fmt: skip
        await self.settle(delivery, settlement, cell)

    async def settle(self, delivery: Delivery, settlement: Settlement, cell: int) -> None:
        """Record an attempt; as long as the disk refuses, the lease is held and it is tried again."""
        kept: bool | None = None
        while kept is None:
            try:
                kept = await self.store.settle(settlement)
            except QueueError as error:
                self._log.alarm("queue_settle_failed", id=delivery.envelope.id, error=str(error))
                await asyncio.sleep(SETTLE_AGAIN_S)
                settlement = replace(settlement, lease=delivery.lease)  # renewed meanwhile
        self._settled(delivery, settlement, cell, kept=kept)

    def _settle_soon(self, delivery: Delivery, settlement: Settlement, cell: int) -> None:
        """The same without a task, as long as the disk does not refuse."""

        def done(future: asyncio.Future[bool]) -> None:
            if future.exception() is not None:
                self._spawn(self.settle(delivery, settlement, cell))
            else:
                self._settled(delivery, settlement, cell, kept=future.result())

        self.store.settle_soon(settlement).add_done_callback(done)

    def _settled(self, delivery: Delivery, settlement: Settlement, cell: int, *, kept: bool) -> None:
        if cell >= 0:
            self.store.clear(cell)
        if not kept:
            self._log.note("warning", "lease_lost", id=delivery.envelope.id)
        if settlement.reports:
            self.wake()
        if settlement.keep:
            return
        if self._active.pop(delivery.lease.key, None) is not None and delivery.counted:
            self._octets -= delivery.content.size
        if len(self._active) <= self._hungry:
            self._hungry = -1
            self.wake()
        delivery.content.close()
        if kept and not delivery.open:
            self._log.removed(delivery.envelope.id)


def _no_route(mailbox: Mailbox) -> Answer:
    return Answer(Stage.CONNECT, 451, "4.4.4", f"no route for {domain_of(mailbox)}: add a [[route]] for it or for *")
