"""Owns: the promise every queue store keeps, the values it trades in, and the table of recipient states.

One attempt, one transaction. A message is leased as a whole to one worker; the lease carries a token, and ``settle``
and ``renew`` work only with the current one, so a worker that was thought dead can do no harm when it wakes up.

=========  ==========================================================================================
state      meaning
=========  ==========================================================================================
pending    to be tried at ``due``
held       not tried, and not expired, until an operator releases it
(no row)   delivered, or refused and reported: finished; a message without recipients is deleted
=========  ==========================================================================================

An entry that cannot be read whole is *set aside*: nobody claims it, nothing of it is deleted, an operator may
``RELEASE`` it once the damage is mended. Must not touch a disk or a clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeVar

from relay.mail.address import Mailbox
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.mail.terms import PLAIN_RECIPIENT, RecipientTerms

T = TypeVar("T")


class QueueError(Exception):
    """The store could not do it (disk, database, time-out); nothing was changed. The client gets 451."""


class QueueFull(QueueError):
    """The disk is (nearly) full; the client gets 452 4.3.1."""


class QueueCorrupt(QueueError):
    """The database as a whole cannot be read; the text names the file and what an operator does about it."""


class RecipientState(StrEnum):
    """Where one recipient stands; see the table above."""

    PENDING = "pending"
    HELD = "held"


class Action(StrEnum):
    """What an operator does to a message. One that somebody holds a lease of is being delivered: of these only HOLD and
    RELEASE are done at once, the others leave it alone and say so.

    ==========  ========================================================================================
    HOLD        pending recipients become held; an attempt under way goes on for those it was made for
    RELEASE     held recipients become due now; an entry set aside may be claimed again
    RETRY       pending recipients are due now
    REROUTE     the same, and it waits for no next hop any more
    BOUNCE      due now for everybody, held ones too, and claimed as given up
    DELETE      it is gone, nobody is told
    ==========  ========================================================================================
    """

    HOLD = "hold"
    RELEASE = "release"
    RETRY = "retry"
    REROUTE = "reroute"
    BOUNCE = "bounce"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Acted:
    """What became of a request: messages and recipients it changed, and messages left alone because somebody holds them."""

    messages: int = 0
    recipients: int = 0
    busy: int = 0

    def __add__(self, other: Acted) -> Acted:
        return Acted(self.messages + other.messages, self.recipients + other.recipients, self.busy + other.busy)


@dataclass(frozen=True, slots=True)
class QueuedRecipient:
    """One recipient of a queued message. ``number`` is its index in the envelope as it was put.

    ``due`` is on the boot clock (seconds, ``time.clock_gettime(CLOCK_BOOTTIME)``), so clock jumps do not move it.
    The ``last_*`` fields are the most recent failure: code 0 and empty texts before the first. ``terms`` says which
    reports the sender wants about this recipient.
    """

    number: int
    mailbox: Mailbox
    state: RecipientState
    attempts: int
    due: float
    last_code: int
    last_enhanced: str
    last_text: str
    last_host: str
    terms: RecipientTerms = PLAIN_RECIPIENT


@dataclass(frozen=True, slots=True)
class Deferral:
    """The new row of a recipient that stays in the queue."""

    number: int
    attempts: int
    due: float
    code: int
    enhanced: str
    text: str
    host: str


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to be put: ``envelope`` names only recipients still to be served.

    ``leased``: the putting worker owns it at once and delivers from memory; otherwise it is claimed at ``due``.
    ``deferrals`` gives recipients (by number) that were already tried once their first failure.
    ``created`` is wall-clock seconds; ``expires_in`` seconds from now.
    ``possible_duplicate``: an attempt is in flight, or ended without a reply to its final dot (RFC 1047).
    """

    envelope: Envelope
    content: Content
    created: float
    expires_in: float
    due: float
    leased: bool
    deferrals: tuple[Deferral, ...] = ()
    possible_duplicate: bool = False
    waits_for: str = ""
    """See ``Settlement``."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to settle one message: row key and fencing token, valid to ``until`` on the boot clock.

    Keys are never used again. A put that was not ``leased`` gives token 0, which settles nothing.
    """

    key: int
    token: int
    until: float


@dataclass(frozen=True, slots=True)
class Claimed:
    """A message with its lease. ``recipients`` are those pending and due; all pending ones when ``expired``.

    ``envelope`` names all recipients still queued; numbers count in the envelope as it was put, so an attempt goes by
    ``QueuedRecipient.mailbox``.

    ``possible_duplicate``: an earlier attempt ended between final dot and reply (the journal names it).
    ``waits_for``: see ``Settlement``. ``warned``: its sender was told that it is late. ``given_up``: an operator wants
    it returned; ``recipients`` are all, and it counts as expired.
    """

    lease: Lease
    envelope: Envelope
    content: Content
    created: float
    expired: bool
    recipients: tuple[QueuedRecipient, ...]
    possible_duplicate: bool
    waits_for: str = ""
    warned: bool = False
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class Settlement:
    """The whole result of one attempt: finished recipients, deferred ones, reports to put, in one transaction.

    The lease ends, unless ``keep`` is set (another attempt for other recipients of the message is still running).
    ``leased`` of a report counts for nothing: reports wait for the next claim.

    ``waits_for``: nobody is left but those for whom no connection came about; the next hops, as one text that a claim can
    name. Such a message is *parked*. ``warned``: among the reports is the one that says it is late. Both are recorded
    when the lease ends.
    """

    lease: Lease
    finished: tuple[int, ...]
    deferred: tuple[Deferral, ...]
    reports: tuple[NewMessage, ...] = ()
    keep: bool = False
    possible_duplicate: bool = False
    waits_for: str = ""
    warned: bool = False


@dataclass(frozen=True, slots=True)
class Listed:
    """One message as ``relay queue list`` and ``show`` print it. Times are wall-clock seconds.

    ``owner`` is empty while nobody holds the lease; ``aside`` says why the entry was set aside, empty otherwise.
    ``waits_for`` names the next hops whose return it waits for, if that is all it waits for. ``key`` is the row's.
    """

    id: QueueId
    sender: str
    size: int
    created: float
    expires: float
    owner: str
    possible_duplicate: bool
    aside: str
    recipients: tuple[QueuedRecipient, ...]
    waits_for: str = ""
    key: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Depth and age of the queue. ``oldest`` is the wall-clock time of the oldest message, 0 when empty.

    ``held`` counts recipients; ``corrupt`` counts entries set aside, which the other figures leave out.
    """

    messages: int
    recipients: int
    held: int
    leased: int
    octets: int
    oldest: float
    corrupt: int


@dataclass(frozen=True, slots=True)
class TakeOver:
    """What a worker found of earlier incarnations of its slot: leases it voided, and who may get a message twice."""

    voided: int
    duplicates: tuple[QueueId, ...]


@dataclass(frozen=True, slots=True)
class SetAside:
    """An entry that could not be read, for the log. ``id`` may be empty when even that was unreadable."""

    key: int
    id: QueueId
    reason: str


PARKED_SHARE: Final = 5
"""One part in so many of a claim is for parked messages when others are due as well."""


MANY: Final = 1_000_000
"""No bound but the claim's own."""


AWAITED: Final = 1000
"""Next hops looked after at once for which mail is parked; the others' mail goes by its own dates."""


def shared(ordinary: Sequence[T], parked: Sequence[T], limit: int) -> list[T]:
    """What a claim takes of those due, by the rule of ``Store.claim``."""
    return [*ordinary[: limit - min(len(parked), limit // PARKED_SHARE)], *parked][:limit]


class Store(Protocol):
    """What SQLite, memory (and later PostgreSQL) do. Every method raises QueueError and nothing else.

    A cancelled ``put`` leaves nothing behind: what waits is dropped, what was already in a transaction is waited for
    and then taken back. A cancelled ``claim`` gives its leases back.
    """

    async def take_over_slot(self) -> TakeOver:
        """First call of a worker: void the leases of earlier incarnations of its slot, read their journal."""
        ...

    def open_body(self) -> int:
        """A descriptor of a new unnamed file on the spool's file system, read and write. Raises QueueFull."""
        ...

    async def put(self, messages: Sequence[NewMessage]) -> list[Lease]:
        """Commit all or none, body files first; returns after the commit is on disk. Contents stay the caller's."""
        ...

    def put_soon(self, message: NewMessage) -> tuple[Lease, asyncio.Future[None]]:
        """``put`` of one message held in memory, for the hot path: no task. The lease is good once the future is done.

        Raises QueueError, or the future does.
        """
        ...

    async def settle(self, settlement: Settlement) -> bool:
        """Record one attempt; False when the lease was lost meanwhile (then nothing was changed)."""
        ...

    def settle_soon(self, settlement: Settlement) -> asyncio.Future[bool]:
        """``settle`` without reports, for the hot path: no task. The future raises QueueError."""
        ...

    async def claim(
        self, limit: int, ready: Sequence[str] = (), parked: int = MANY
    ) -> tuple[list[Claimed], float | None]:
        """Lease up to ``limit`` due messages, the oldest due first, expired ones included.

        Parked messages come behind the others, no more than ``parked`` of them, and never take more than a ``PARKED_SHARE``
        of what others want too, so that a backlog for a next hop that is away delays nobody. Where there is room those
        that wait for one of ``ready`` come too, due or not: their next hop is back.

        Second value: the boot clock when the next one may become claimable (due, or its lease over); None: nothing
        waits. Entries that cannot be read are set aside, so fewer than due may come.
        """
        ...

    async def awaited(self) -> list[str]:
        """What parked mail waits for, each text once, no more than ``AWAITED``."""
        ...

    async def renew(self, leases: Sequence[Lease]) -> list[Lease | None]:
        """Extend leases by the configured time; None in the place of each one that was lost."""
        ...

    async def act(self, queue_id: QueueId, action: Action) -> Acted:
        """What an operator asks for; all zeros: no such message."""
        ...

    def mark(self, key: int) -> int:
        """Journal: the final dot of this message goes out now. Returns the cell to clear; no I/O.

        First mark, then look whether the lease still lasts, then send the dot: who claims a message whose lease ran
        out looks at the mark.

        Raises QueueError when all cells are taken: then the dot must not be sent.
        """
        ...

    def clear(self, cell: int) -> None:
        """Journal: the outcome is known and settled, or the dot was never sent. No I/O."""
        ...

    async def stats(self) -> Stats:
        """Depth and age."""
        ...

    async def close(self) -> None:
        """Finish what is under way and let go of the files."""
        ...
