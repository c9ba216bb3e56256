"""Owns: what one attempt comes to: answers become finished recipients, deferrals and reports; each is logged and counted.

The judgement is ``policy.outcome``'s, the date of the next attempt ``policy.retry``'s; here they meet clock, dice, log and
metrics. It must not touch the queue: it returns what one ``settle`` or ``put`` has to record.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from relay.config.schema import Config
from relay.mail.address import Mailbox
from relay.mail.answer import Answer, Stage
from relay.mail.content import Content
from relay.mail.dsn import Cause, Notice
from relay.mail.envelope import Envelope, QueueId
from relay.mail.reply import Kind
from relay.mail.terms import PLAIN, PLAIN_RECIPIENT, RecipientTerms
from relay.outbound.attempt import Attempt
from relay.outbound.copies import Copies
from relay.outbound.lane import Lane
from relay.outbound.pace import HELD_BACK
from relay.outbound.reports import Reports, arrival
from relay.policy.outcome import Outcome, advice, classify
from relay.policy.retry import next_attempt
from relay.policy.route import Route
from relay.queue.store import Deferral, NewMessage
from relay.telemetry.maillog import MailLog, Status, Via
from relay.telemetry.metrics import Metrics
from relay.telemetry.metrics import Outcome as Outcomes


def boot_clock() -> float:
    """Seconds on the clock that never jumps and counts suspension: due times and leases are on it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


NO_HOP: Final = "none"
"""Metrics label of what no next hop was asked about."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One recipient of an attempt: its number in the queued envelope, the attempts made before, the reports wanted."""

    number: int
    mailbox: Mailbox
    attempts: int
    terms: RecipientTerms = PLAIN_RECIPIENT


def first_tries(envelope: Envelope) -> list[Tried]:
    """All recipients of a message that just came in."""
    terms = envelope.terms
    if not terms.recipients:
        return [Tried(number, mailbox, 0) for number, mailbox in enumerate(envelope.recipients)]
    return [Tried(number, mailbox, 0, terms.recipients[number]) for number, mailbox in enumerate(envelope.recipients)]


def everybody_served(answers: Sequence[Answer]) -> bool:
    """True when the message was taken for every recipient: what nearly every attempt ends with."""
    if len(answers) == 1:
        answer = answers[0]
        return answer.stage is Stage.FINAL and 200 <= answer.code <= 299
    return all(answer.stage is Stage.FINAL and 200 <= answer.code <= 299 for answer in answers)


def owes_report(attempt: Attempt) -> bool:
    """True when somebody's arrival has to be reported by the relay, because the next hop does not (RFC 3461 §5.2.2)."""
    return attempt.terms is not PLAIN and not attempt.told and any(r.wants_success for r in attempt.terms.recipients)


@dataclass(frozen=True, slots=True)
class Judged:
    """The result. ``unknown``: some answer is missing after the final dot (RFC 1047). ``arrivals``: deliveries that the
    relay has to report on. ``delays``: who is late, once the message is old enough for a warning.
    """

    delivered: int
    finished: tuple[int, ...]
    deferred: tuple[Deferral, ...]
    failures: tuple[Notice, ...]
    unknown: bool
    arrivals: tuple[Notice, ...] = ()
    delays: tuple[Notice, ...] = ()

    @property
    def notices(self) -> tuple[Notice, ...]:
        """All that a report may go out about."""
        return self.failures + self.arrivals


class Results:
    """Judges attempts for one worker."""

    def __init__(
        self, config: Config, log: MailLog, metrics: Metrics, next_id: Callable[[], QueueId], copies: Copies
    ) -> None:
        self._log = log
        self._metrics = metrics
        self._reports = Reports(config, log, next_id, copies)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a (new) configuration."""
        self._waits = config.queue.retry_s
        self._jitter = config.queue.retry_jitter
        self._soft_bounce = config.server.soft_bounce
        self._warn_after_s = config.queue.delay_warning_after_s
        self._expire_s = config.queue.expire_after_s
        self._reports.configure(config)

    def delivered(
        self, queue_id: QueueId, recipients: Sequence[Mailbox], answers: Sequence[Answer], lane: Lane, size: int,
        created: float, via: Via, attempts: int = 1,
    ) -> None:  # fmt: skip
        """Log and count an attempt in which everybody was served: the hot path."""
        log, metrics = self._log, self._metrics
        delay = time.time() - created
        host, label = lane.name, lane.label
        metrics.sent(label, size)
        for mailbox, answer in zip(recipients, answers, strict=True):
            metrics.delivery(label, "delivered")
            log.result(queue_id, mailbox, host, "sent", answer.code, answer.enhanced, answer.text, delay, via, attempts)
        if lane.misconfigured:
            self._mended(lane)

    def discarded(
        self,
        queue_id: QueueId,
        recipients: Sequence[Mailbox],
        route: Route,
        created: float,
        via: Via,
        attempts: int = 1,
    ) -> None:
        """Log and count recipients whose route throws mail away."""
        delay = time.time() - created
        for mailbox in recipients:
            self._metrics.delivery(NO_HOP, "discarded")
            self._log.result(queue_id, mailbox, "discard", "sent", 0, "2.0.0", route.text, delay, via, attempts)

    def _mended(self, lane: Lane) -> None:
        self._log.alarm("next_hop_mended", next_hop=lane.name)
        lane.misconfigured = ""
        self._metrics.next_hop_state(lane.name, "up")

    def judge(
        self, envelope: Envelope, tried: Sequence[Tried], answers: Sequence[Answer], lane: Lane | None, size: int,
        created: float, via: Via, *, expired: bool, told: bool = False,
    ) -> Judged:  # fmt: skip
        """Everything an attempt means, recipient by recipient. ``expired``: what is not delivered now never will be.
        ``told``: the next hop knows which reports are wanted.
        """
        finished: list[int] = []
        deferred: list[Deferral] = []
        failures: list[Notice] = []
        arrivals: list[Notice] = []
        delays: list[Notice] = []
        delivered, unknown = 0, False
        host, label = (lane.name, lane.label) if lane is not None else ("", NO_HOP)
        delay = time.time() - created
        late = 0 < self._warn_after_s <= delay and via == "queue"
        now, dice = boot_clock(), random.random()  # one of each: recipients that failed together are tried together
        for one, answer in zip(tried, answers, strict=True):
            outcome = classify(answer) if lane is None else lane.classify(answer)
            if outcome is Outcome.REFUSED and self._soft_bounce:
                outcome = Outcome.DEFERRED
            unknown = unknown or (answer.stage is Stage.FINAL and not answer.code)
            status: Status = "deferred"
            counted: Outcomes = "deferred"
            match outcome:
                case Outcome.DELIVERED:
                    delivered += 1
                    finished.append(one.number)
                    status, counted = "sent", "delivered"
                    if one.terms.wants_success and lane is not None and not told:
                        cause = arrival(lane.next_hop.protocol)
                        arrivals.append(Notice(one.mailbox, cause, answer, host, one.terms))
                case Outcome.REFUSED:
                    finished.append(one.number)
                    failures.append(Notice(one.mailbox, Cause.REFUSED, answer, host, one.terms))
                    status, counted = "bounced", "bounced"
                case Outcome.DEFERRED | Outcome.OUR_FAULT:
                    if outcome is Outcome.OUR_FAULT and lane is not None:
                        counted = "our_fault"
                        self._misconfigured(lane, answer)
                    if expired:
                        finished.append(one.number)
                        failures.append(Notice(one.mailbox, Cause.EXPIRED, answer, host, one.terms))
                        status = "expired"
                    else:
                        deferred.append(self._deferral(one, answer, lane, now, dice))
                        if late:
                            delays.append(Notice(one.mailbox, Cause.DELAYED, answer, host, one.terms))
            self._metrics.delivery(label, counted)
            self._log.result(
                envelope.id, one.mailbox, host, status, answer.code, answer.enhanced, answer.text, delay, via,
                one.attempts + 1,
            )  # fmt: skip
        if delivered:
            self._metrics.sent(label, size)
            if lane is not None and lane.misconfigured:
                self._mended(lane)
        return Judged(
            delivered, tuple(finished), tuple(deferred), tuple(failures), unknown, tuple(arrivals), tuple(delays)
        )

    def _deferral(self, one: Tried, answer: Answer, lane: Lane | None, now: float, dice: float) -> Deferral:
        if answer is HELD_BACK and lane is not None:  # its turn, not a failure that makes the next wait longer
            due = now + lane.turn_in_s()
            return Deferral(one.number, one.attempts, due, answer.code, answer.enhanced, answer.text, lane.name)
        attempts = one.attempts + 1
        due = next_attempt(attempts, now, self._waits, self._jitter, dice)
        if lane is not None and not lane.up:
            due = max(due, now + lane.retry_at - lane.now())
        host = lane.name if lane is not None else ""
        return Deferral(one.number, attempts, due, answer.code, answer.enhanced, answer.text, host)

    def _misconfigured(self, lane: Lane, answer: Answer) -> None:
        cause = advice(answer)
        if lane.misconfigured != cause:
            lane.misconfigured = cause
            self._log.alarm(
                "next_hop_misconfigured", next_hop=lane.name, stage=answer.stage, code=answer.code,
                enhanced=answer.enhanced, answer=answer.text, advice=cause,
            )  # fmt: skip
            self._metrics.next_hop_state(lane.name, "misconfigured")

    def refused(
        self, envelope: Envelope, numbers: Collection[int], kind: Kind, content: Content
    ) -> tuple[NewMessage, ...]:
        """Log and count recipients, by their numbers, of a message that just came in and is not for them, whatever anybody
        would say; and make the report on them.
        """
        notices: list[Notice] = []
        now = time.time()
        for one in first_tries(envelope):
            if one.number in numbers:
                text = kind.line(one.mailbox).removeprefix(f"{kind.code} {kind.enhanced} ")
                answer = Answer(Stage.ROUTE, kind.code, kind.enhanced, text)
                notices.append(Notice(one.mailbox, Cause.REFUSED, answer, "", one.terms))
                self._metrics.delivery(NO_HOP, "bounced")
                self._log.result(
                    envelope.id, one.mailbox, "", "bounced", kind.code, kind.enhanced, text, 0.0, "express", 1
                )  # fmt: skip
        return self.report(envelope, content, now, notices)

    def report(
        self, envelope: Envelope, content: Content, created: float, notices: Sequence[Notice]
    ) -> tuple[NewMessage, ...]:
        """The reports to the sender, to be put in the same transaction; none when nobody may get one."""
        return self._reports.make(envelope, content, created, notices)

    def warning(
        self, envelope: Envelope, content: Content, created: float, delays: Sequence[Notice]
    ) -> tuple[NewMessage, ...]:
        """The same about mail that is late: once for a message, and it goes on being tried."""
        return self._reports.make(envelope, content, created, delays, created + self._expire_s)
