"""Owns: the books. What was sent, what the clients were told, what the next hop got, and whether it adds up.

For every acknowledged message and each of its recipients there must be, under the queue id of the acknowledgement, a
whole copy at the next hop or a report to the sender. Every further copy needs one of two reasons:

* the *journal*: the relay named that queue id as a possible duplicate (log event ``possible_duplicate``);
* the *missing reply*: the copy has another queue id, that of a transmission whose client got no final reply and
  therefore sent the message again. There are never more such ids than such transmissions.

It must not know the relay, sockets or processes.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum


class Told(StrEnum):
    """What the client knows after one transmission."""

    DELIVERED = "delivered"
    """250, with the next hop's word for it."""
    QUEUED = "queued"
    """250, with the queue's."""
    REFUSED = "refused"
    """5xx after the final dot."""
    LATER = "later"
    """4xx after the final dot."""
    NO_REPLY = "no final reply"
    """The final dot was sent, and the connection ended or nothing came."""
    NOT_SENT = "not sent"
    """It ended before the final dot."""


ACKNOWLEDGED = frozenset({Told.DELIVERED, Told.QUEUED})


@dataclass(frozen=True, slots=True)
class Transmission:
    """One try of a client. ``at``: seconds since 1970, as in the relay's log."""

    at: float
    told: Told
    reply: str
    queue_id: str


@dataclass(slots=True)
class Sent:
    """One message and everything its client did."""

    recipients: tuple[str, ...]
    transmissions: list[Transmission] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One transaction at the next hop that got as far as the final dot."""

    at: float
    queue_id: str
    recipients: tuple[str, ...]
    kept: bool
    answer: str
    whole: bool


@dataclass(frozen=True, slots=True)
class Report:
    """One report to a sender, as it arrived: about ``for_id``, on these recipients."""

    at: float
    queue_id: str
    for_id: str
    recipients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """What does not add up, with its whole history. ``queue_ids`` find it in the log."""

    what: str
    history: tuple[str, ...]
    queue_ids: frozenset[str]


@dataclass(slots=True)
class Account:
    """The sums. Duplicates and lost count copies, that is message × recipient."""

    sent: int = 0
    delivered: int = 0
    queued: int = 0
    refused: int = 0
    no_reply: int = 0
    """Transmissions, not messages."""
    reports: int = 0
    named: int = 0
    """Queue ids the journal named."""
    by_journal: int = 0
    by_missing_reply: int = 0
    lost: list[Failure] = field(default_factory=list)
    unexplained: list[Failure] = field(default_factory=list)

    @property
    def balanced(self) -> bool:
        """Nothing lost, nothing unexplained."""
        return not self.lost and not self.unexplained


class Ledger:
    """Everything of one run."""

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = {}
        self._arrivals: defaultdict[str, list[Arrival]] = defaultdict(list)
        self._reports: defaultdict[str, list[Report]] = defaultdict(list)

    def send(self, message_id: str, recipients: tuple[str, ...]) -> Sent:
        """A client begins to send a message."""
        sent = self._sent[message_id] = Sent(recipients)
        return sent

    def arrived(
        self, message_id: str, queue_id: str, recipients: tuple[str, ...], *, kept: bool, answer: str, whole: bool
    ) -> None:
        """The next hop read a final dot; ``kept``: its mailboxes have the message from now on."""
        self._arrivals[message_id].append(Arrival(time.time(), queue_id, recipients, kept, answer, whole))

    def reported(self, queue_id: str, for_id: str, recipients: tuple[str, ...]) -> None:
        """A report reached the sender."""
        self._reports[for_id].append(Report(time.time(), queue_id, for_id, recipients))

    def balance(self, named: Collection[str]) -> Account:
        """The sums; ``named`` are the queue ids that the relay called possible duplicates. The queue must be empty."""
        account = Account(named=len(named))
        for message_id, sent in self._sent.items():
            _Audit(account, named, message_id, sent, self._arrivals.get(message_id, []), self._reports).run()
        for message_id in self._arrivals.keys() - self._sent.keys():
            told = f"message {message_id or 'without id'} at the next hop was never sent"
            account.unexplained.append(Failure(told, (), frozenset()))
        for reports in self._reports.values():
            account.reports += len(reports)
            for queue_id, count in Counter(report.queue_id for report in reports).items():
                if count > 1 and queue_id in named:
                    account.by_journal += count - 1
                elif count > 1:
                    told = f"report {queue_id} came {count} times and is not in the journal"
                    history = tuple(map(str, reports))
                    account.unexplained.append(Failure(told, history, frozenset({queue_id})))
        return account


class _Audit:
    """One message."""

    def __init__(
        self,
        account: Account,
        named: Collection[str],
        message_id: str,
        sent: Sent,
        arrivals: list[Arrival],
        reports: defaultdict[str, list[Report]],
    ) -> None:
        self._account = account
        self._named = named
        self._id = message_id
        self._sent = sent
        self._arrivals = arrivals
        self._reports = reports
        self._copies: defaultdict[str, Counter[str]] = defaultdict(Counter)  # queue id → recipient → copies
        for arrival in arrivals:
            if arrival.kept:
                self._copies[arrival.queue_id].update(arrival.recipients)

    def run(self) -> None:
        account, tries = self._account, self._sent.transmissions
        account.sent += 1
        without_reply = sum(one.told is Told.NO_REPLY for one in tries)
        account.no_reply += without_reply
        account.refused += any(one.told is Told.REFUSED for one in tries)
        account.delivered += any(one.told is Told.DELIVERED for one in tries)
        account.queued += any(one.told is Told.QUEUED for one in tries)
        acknowledged = {one.queue_id for one in tries if one.told in ACKNOWLEDGED}
        for queue_id in acknowledged:
            for recipient in self._sent.recipients:
                if not self._copies[queue_id][recipient] and not self._reports_on(queue_id, recipient):
                    account.lost.append(self._failure(f"acknowledged as {queue_id}, never came to {recipient}"))
        for arrival in self._arrivals:
            if arrival.kept and not arrival.whole:
                account.lost.append(self._failure(f"came damaged under {arrival.queue_id}"))
        others = {queue_id for queue_id, copies in self._copies.items() if copies} - acknowledged
        if len(others) > without_reply:
            account.unexplained.append(
                self._failure(f"{len(others)} copies beside the acknowledged one, {without_reply} missing replies")
            )
        else:
            first = sum(any(copies[r] for copies in self._copies.values()) for r in self._sent.recipients)
            account.by_missing_reply += sum(len(+copies) for copies in self._copies.values()) - first
        for queue_id, copies in self._copies.items():
            self._within(queue_id, copies)

    def _within(self, queue_id: str, copies: Counter[str]) -> None:
        """Copies of one transmission: the relay's own doing, so only the journal explains them."""
        for recipient, count in copies.items():
            reports = self._reports_on(queue_id, recipient)
            further = count - 1 + reports
            if further and queue_id in self._named:
                self._account.by_journal += further
            elif further:
                told = f"{recipient}: {count} copies and {reports} reports under {queue_id}, not in the journal"
                self._account.unexplained.append(self._failure(told))

    def _reports_on(self, queue_id: str, recipient: str) -> int:
        """Different reports; the same one twice is counted elsewhere."""
        return len({one.queue_id for one in self._reports.get(queue_id, ()) if recipient in one.recipients})

    def _failure(self, what: str) -> Failure:
        events: list[tuple[float, str]] = [
            *((one.at, f"client: {one.told}: {one.reply}") for one in self._sent.transmissions),
            *((one.at, f"next hop: {one}") for one in self._arrivals),
            *((one.at, f"sender: {one}") for queue_id in self._copies for one in self._reports.get(queue_id, ())),
        ]
        history = tuple(f"{at:.3f} {text}" for at, text in sorted(events))
        ids = {one.queue_id for one in self._arrivals} | {one.queue_id for one in self._sent.transmissions}
        return Failure(
            f"message {self._id} for {', '.join(self._sent.recipients)}: {what}", history, frozenset(ids - {""})
        )
