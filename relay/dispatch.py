"""Owns: the way of an accepted message: express or queue, and the reply to the final dot. The only place where 250 for a
message is said, and the only one where inbound meets outbound.

250 means: every accepted recipient has the next hop's 250, a committed queue row, or a committed report.

==============================================  =================================================================
the express attempt ends with                   then
==============================================  =================================================================
every recipient delivered                       250 delivered
every recipient refused for good                the next hop's 5xx, no report
anything else                                   what is left over and the report are committed, then 250 queued
no answer by the express deadline               committed as in flight, 250 queued; the late answer settles the row
the commit fails                                451 (452 when the disk is full)
==============================================  =================================================================
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from relay.config.schema import Config
from relay.directory.answers import Answers
from relay.mail import reply
from relay.mail.address import Mailbox, domain_of
from relay.mail.answer import Answer
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.mail.reply import Kind, OperatorText
from relay.mail.terms import PLAIN
from relay.outbound.callout import Callout, Told
from relay.outbound.copies import Copies
from relay.outbound.lane import Lane
from relay.outbound.lanes import SESSION_STAGES, Lanes
from relay.outbound.results import Judged, Results, boot_clock, everybody_served, first_tries, owes_report
from relay.outbound.runner import Delivery, Runner
from relay.policy.outcome import client_reply
from relay.policy.route import Action, Route
from relay.queue.store import Deferral, Lease, NewMessage, QueueError, QueueFull, Settlement, Store
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics

Answerer = Callable[[Kind, OperatorText | QueueId], None]
"""How a session is told what to say. Called exactly once."""

NO_TEXT: Final = OperatorText("")

KEPT_OVER: Final = 256
"""Finished express attempts that may lie behind an unfinished one: some megabytes of small messages."""


class Ids:
    """Queue ids: start of the worker in milliseconds, its slot, a counter; unique over slots and restarts."""

    __slots__ = ("_count", "_prefix")

    def __init__(self, slot: int) -> None:
        self._prefix = f"{time.time_ns() // 1_000_000:011X}{slot:02X}"
        self._count = 0

    def next(self) -> QueueId:
        """A new id: upper-case hexadecimal digits."""
        self._count += 1
        return QueueId(f"{self._prefix}{self._count:06X}")


class ExpressAttempt:
    """A message handed straight on (see ``outbound.attempt``). Outlives its session; a drain waits for it."""

    __slots__ = (
        "_answer", "_answers", "_cell", "_dispatch", "_dot_sent", "_lane", "_others", "_storing",
        "body_8bit", "content", "created", "deadline", "delivery", "envelope", "over", "recipients", "sender", "started",
        "terms", "told",
    )  # fmt: skip

    def __init__(
        self, dispatch: Dispatch, envelope: Envelope, content: Content, answer: Answerer, lanes: list[Lane]
    ) -> None:
        self._dispatch = dispatch
        self._answer = answer
        self._lane = lanes[0]
        self._others = lanes[1:]
        self._answers: list[Answer] | None = None
        self._cell = -1
        self._dot_sent = False
        self._storing = False
        self.started = time.monotonic()
        self.envelope = envelope
        self.content = content
        self.sender = envelope.sender
        self.recipients: Sequence[Mailbox] = envelope.recipients
        self.body_8bit = envelope.body_8bit
        self.terms = envelope.terms
        self.told = False
        self.created = time.time()
        self.deadline = self.started + dispatch.express_deadline_s
        self.delivery: Delivery | None = None
        self.over = False

    def start(self) -> None:
        """Hand it to its lane."""
        self._lane.submit(self, express=True)

    def may_finish(self) -> bool:
        """Express needs no journal: the client's own retry is the record. A message already queued does."""
        if self.delivery is not None:
            lease, store = self.delivery.lease, self._dispatch.store
            try:
                cell = store.mark(lease.key)
            except QueueError:
                return False
            if lease.until - boot_clock() < self._lane.final_reply_timeout_s:  # the order matters: see QueueAttempt
                store.clear(cell)
                return False
            self._cell = cell
        self._dot_sent = True
        return True

    def done(self, answers: list[Answer], next_hop: str) -> None:
        """The lane's result."""
        others = self._others
        while others and answers[0].stage in SESSION_STAGES:
            lane = others.pop(0)
            if lane.up:
                self._lane = lane
                lane.submit(self, express=True)
                return
        dispatch = self._dispatch
        dispatch.metrics.delivery_seconds(next_hop, time.monotonic() - self.started)
        if self._storing:
            self._answers = answers  # the row is being committed: settled right after
        elif self.delivery is not None:
            self._settle_late(answers)
        else:
            self._judge(answers)

    def _judge(self, answers: list[Answer]) -> None:
        """Nothing was said to the client yet."""
        self.over = True
        dispatch, envelope, lane = self._dispatch, self.envelope, self._lane
        if everybody_served(answers) and (self.terms is PLAIN or not owes_report(self)):
            dispatch.results.delivered(
                envelope.id, envelope.recipients, answers, lane, self.content.size, self.created, "express"
            )
            dispatch.metrics.express()
            self.content.close()
            self._answer(reply.OK_DELIVERED, envelope.id)
            return
        tried = first_tries(envelope)
        judged = dispatch.results.judge(
            envelope, tried, answers, lane, self.content.size, self.created, "express", expired=False,
            told=self.told,
        )  # fmt: skip
        if len(judged.failures) == len(tried):
            self.content.close()
            self._answer(client_reply(answers, lane.classify), NO_TEXT)
            return
        route = dispatch.lanes.of(envelope.recipients[0])
        waits_for = "" if route is None else dispatch.lanes.waited_for(route, lane, answers)
        dispatch.background(dispatch.store_rest(self, judged, self._answer, waits_for))

    def _settle_late(self, answers: list[Answer]) -> None:
        self.over = True
        delivery, envelope = self.delivery, self.envelope
        assert delivery is not None
        tried = first_tries(envelope)
        judged = self._dispatch.results.judge(
            envelope, tried, answers, self._lane, self.content.size, self.created, "queue", expired=False,
            told=self.told,
        )  # fmt: skip
        self._dispatch.background(self._dispatch.settle_late(delivery, judged, self._cell))

    def late(self) -> None:
        """The express deadline passed: commit, acknowledge, and let the answer settle the row when it comes."""
        if self._lane.withdraw(self):
            self.over = True
            self._dispatch.queue(self.envelope, self.content, self._answer, "slow")
            return
        self._storing = True
        self._dispatch.background(self._store_late())

    async def _store_late(self) -> None:
        dispatch = self._dispatch
        message = dispatch.new_message(self.envelope, self.content, self.created, leased=True, in_flight=True)
        try:
            [lease] = await dispatch.store.put([message])
        except QueueError as error:
            # Saying 451 now would bring the message a second time while this attempt may still succeed.
            dispatch.log.alarm("queue_put_failed", id=self.envelope.id, error=str(error))
            self._storing = False
            if self._answers is not None:
                self._judge(self._answers)
            return
        self._storing = False
        self.delivery = Delivery(
            lease, self.envelope, self.content, self.created, expired=False, possible_duplicate=False
        )
        dispatch.runner.keep(self.delivery)
        if self._dot_sent:
            with suppress(QueueError):  # the row itself is marked as in flight
                self._cell = dispatch.store.mark(lease.key)
        dispatch.metrics.late()
        dispatch.metrics.queued("slow")
        dispatch.log.queued(self.envelope.id, "slow", self.content.size)
        self._answer(reply.OK_QUEUED, self.envelope.id)
        if self._answers is not None:
            self._settle_late(self._answers)


class Dispatch:
    """Express and queue for one worker."""

    def __init__(self, config: Config, slot: int, store: Store, lanes: Lanes, log: MailLog, metrics: Metrics) -> None:
        self.store = store
        self.lanes = lanes
        self.log = log
        self.metrics = metrics
        self.next_id = Ids(slot).next
        self.open_body = store.open_body
        self.copies = Copies(config, store, log, self.next_id)
        self.results = Results(config, log, metrics, self.next_id, self.copies)
        self.runner = Runner(config, store, lanes, self.results, log, metrics)
        self._attempts: deque[ExpressAttempt] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._committing = 0
        self._draining = False
        self.answers = Answers()
        self._callout: Callout | None = None
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a (new) configuration."""
        self._express = config.delivery.express
        self.express_deadline_s = config.delivery.express_deadline_s
        self._expire_s = config.queue.expire_after_s
        self._config = config
        if self._callout is not None:
            self._callout.configure(config)
        self.results.configure(config)
        self.runner.configure(config)

    def accept(self, envelope: Envelope, content: Content, answer: Answerer) -> None:
        """Take a message whose final dot was read; ``content`` is ours from now on. ``answer`` may be called at once."""
        if self._express and not self._draining:
            route = self._common_route(envelope.recipients)
            if route is not None and not route.static:
                self._accept_elsewhere(route, envelope, content, answer)
                return
            if route is not None:
                lanes = self.lanes.candidates(route)
                if lanes[0].has_room():
                    attempt = ExpressAttempt(self, envelope, content, answer, lanes)
                    self._attempts.append(attempt)
                    attempt.start()
                    return
                self.queue(envelope, content, answer, "busy" if lanes[0].up else "down")
                return
            self.queue(envelope, content, answer, "routes")
            return
        self.queue(envelope, content, answer, "draining" if self._draining else "durable")

    def accept_without(
        self, numbers: Sequence[int], kind: Kind, envelope: Envelope, content: Content, answer: Answerer
    ) -> None:
        """As ``accept``, without some recipients, who are refused for good as ``kind`` says: the sender gets a report of
        them, which is committed before the 250.
        """
        reports = self.results.refused(envelope, numbers, kind, content)
        left = [number for number in range(len(envelope.recipients)) if number not in numbers]

        async def put(said: Kind, text: OperatorText | QueueId) -> None:
            if await self._put(reports, envelope.id, answer) is not None:
                answer(said, text)
                self.runner.wake()

        def told(said: Kind, text: OperatorText | QueueId) -> None:
            if said.code >= 300 or not reports:
                answer(said, text)
            else:
                self.background(put(said, text))

        recipients = tuple(envelope.recipients[number] for number in left)
        self.accept(replace(envelope, recipients=recipients, terms=envelope.terms.only(left)), content, told)

    def call_out(self, mailbox: Mailbox, told: Told) -> None:
        """Ask the next hop of a recipient whether it takes it; ``told`` hears at once or later."""
        if self._callout is None:
            self._callout = Callout(self._config, self.lanes, self.answers, self.log, self.metrics)
        self._callout.ask(mailbox, told)

    def _accept_elsewhere(self, route: Route, envelope: Envelope, content: Content, answer: Answerer) -> None:
        """A route that is not just hosts."""
        if route.action is Action.DISCARD:
            self.results.discarded(envelope.id, envelope.recipients, route, time.time(), "express")
            content.close()
            answer(reply.OK_DELIVERED, envelope.id)
            return
        if route.action is not Action.DELIVER:
            self.queue(envelope, content, answer, "route")
            return
        recipients = envelope.recipients
        if route.by_domain and any(domain_of(one) != domain_of(recipients[0]) for one in recipients[1:]):
            self.queue(envelope, content, answer, "routes")
            return
        lanes = self.lanes.known(route, recipients[0])
        if not lanes:  # nothing is asked of the DNS while a client waits
            self.queue(envelope, content, answer, "mx")
        elif lanes[0].has_room():
            attempt = ExpressAttempt(self, envelope, content, answer, lanes)
            self._attempts.append(attempt)
            attempt.start()
        else:
            self.queue(envelope, content, answer, "busy" if lanes[0].up else "down")

    def _common_route(self, recipients: Sequence[Mailbox]) -> Route | None:
        route = self.lanes.of(recipients[0])
        for mailbox in recipients[1:]:
            if self.lanes.of(mailbox) is not route:
                return None
        return route

    def sweep(self) -> None:
        """Find express attempts past their deadline; it is the same for all, so the oldest stand in front."""
        now = time.monotonic()
        attempts = self._attempts
        if len(attempts) > KEPT_OVER:  # one slow attempt in front keeps none of the others in memory
            attempts = self._attempts = deque(attempt for attempt in attempts if not attempt.over)
        while attempts and (attempts[0].over or attempts[0].deadline <= now):
            attempt = attempts.popleft()
            if not attempt.over:
                attempt.late()

    # --- the queue -----------------------------------------------------------------------------------------------------

    def queue(self, envelope: Envelope, content: Content, answer: Answerer, reason: str) -> None:
        """Commit, then acknowledge."""
        created = time.time()
        leased = reason != "down" and self.runner.has_room(content)
        message = self.new_message(envelope, content, created, leased=leased)
        if content.memory is None:
            self.background(self._store(message, answer, reason))
            return
        try:
            lease, committed = self.store.put_soon(message)
        except QueueError as error:
            self._not_stored(error, envelope.id, answer)
            return
        self._committing += 1

        def done(future: asyncio.Future[None]) -> None:
            self._committing -= 1
            error = future.exception()
            if isinstance(error, QueueError):
                self._not_stored(error, envelope.id, answer)
            else:
                self._stored(lease, message, answer, reason)

        committed.add_done_callback(done)

    def new_message(
        self, envelope: Envelope, content: Content, created: float, *, leased: bool, in_flight: bool = False
    ) -> NewMessage:
        """A message as it came in, nobody served yet."""
        due = boot_clock()
        waits_for = ""
        if not leased:
            route = self.lanes.of(envelope.recipients[0])
            if route is not None and route.static:
                lane = self.lanes.candidates(route)[0]
                if not lane.up:
                    due += max(0.0, lane.retry_at - lane.now())
                    if self._common_route(envelope.recipients) is route:
                        waits_for = self.lanes.waits_for(route, lane)
        return NewMessage(
            envelope=envelope,
            content=content,
            created=created,
            expires_in=self._expire_s,
            due=due,
            leased=leased,
            possible_duplicate=in_flight,
            waits_for=waits_for,
        )

    async def _store(self, message: NewMessage, answer: Answerer, reason: str) -> None:
        lease = await self._put([message], message.envelope.id, answer)
        if lease is None:
            message.content.close()
        else:
            self._stored(lease, message, answer, reason)

    def _stored(self, lease: Lease, message: NewMessage, answer: Answerer, reason: str) -> None:
        """It is on the disk: the client may know, and it goes on its way."""
        envelope, content = message.envelope, message.content
        self.metrics.queued(reason)
        self.log.queued(envelope.id, reason, content.size)
        answer(reply.OK_QUEUED, envelope.id)
        if message.leased:
            self.runner.take(lease, envelope, content, message.created)
        else:
            content.close()
            if not message.waits_for:
                self.runner.wake()

    def _not_stored(self, error: QueueError, queue_id: QueueId, answer: Answerer) -> None:
        """It is not, and never will be: the client keeps it."""
        if isinstance(error, QueueFull):
            self.log.alarm("queue_full", id=queue_id, error=str(error))
            answer(reply.QUEUE_FULL, NO_TEXT)
        else:
            self.log.alarm("queue_put_failed", id=queue_id, error=str(error))
            answer(reply.QUEUE_FAILED, NO_TEXT)

    async def _put(self, messages: Sequence[NewMessage], queue_id: QueueId, answer: Answerer) -> Lease | None:
        """Commit and give the first one's lease; on failure the client is told, and None comes back."""
        try:
            leases = await self.store.put(messages)
        except QueueError as error:
            self._not_stored(error, queue_id, answer)
            return None
        return leases[0]

    async def store_rest(self, attempt: ExpressAttempt, judged: Judged, answer: Answerer, waits_for: str) -> None:
        """After a mixed result: what is left over and the report, in one transaction, before the 250."""
        envelope, content = attempt.envelope, attempt.content
        messages: list[NewMessage] = []
        if judged.deferred:
            left = [envelope.recipients[d.number] for d in judged.deferred]
            renumbered = tuple(_renumbered(number, d) for number, d in enumerate(judged.deferred))
            messages.append(
                NewMessage(
                    envelope=replace(
                        envelope,
                        recipients=tuple(left),
                        terms=envelope.terms.only([d.number for d in judged.deferred]),
                    ),
                    content=content,
                    created=attempt.created,
                    expires_in=self._expire_s,
                    due=min(d.due for d in judged.deferred),
                    leased=False,
                    deferrals=renumbered,
                    possible_duplicate=judged.unknown,
                    waits_for=waits_for,
                )
            )
        messages += self.results.report(envelope, content, attempt.created, judged.notices)
        if messages and await self._put(messages, envelope.id, answer) is None:
            content.close()
            return
        content.close()
        if judged.deferred:
            self.metrics.queued("deferred")
            self.log.queued(envelope.id, "deferred", content.size)
            answer(reply.OK_QUEUED, envelope.id)
        else:
            self.metrics.express()
            answer(reply.OK_DELIVERED, envelope.id)
        self.runner.wake()

    async def settle_late(self, delivery: Delivery, judged: Judged, cell: int) -> None:
        """The late answer settles the row that was committed as in flight."""
        reports = self.results.report(delivery.envelope, delivery.content, delivery.created, judged.notices)
        delivery.open = len(judged.deferred)
        settlement = Settlement(
            delivery.lease, judged.finished, judged.deferred, reports, possible_duplicate=judged.unknown
        )
        await self.runner.settle(delivery, settlement, cell)

    # --- upkeep --------------------------------------------------------------------------------------------------------

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` to its end, whatever becomes of the session."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def busy(self) -> bool:
        """True while anything acknowledged or about to be is in memory only, or under way."""
        return bool(self._tasks) or self._committing > 0 or self.lanes.busy or self.runner.busy

    def drain(self) -> None:
        """Everything new goes to the queue; nothing more is claimed."""
        self._draining = True
        self.lanes.drain()
        self.runner.drain()
        self.background(self.copies.flush())


def _renumbered(number: int, deferral: Deferral) -> Deferral:
    return replace(deferral, number=number)
