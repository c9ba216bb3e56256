"""Owns: the promise every queue store keeps, the values it trades in, and the table of recipient states.

One attempt, one transaction. A message is leased as a whole to one worker; the lease carries a token, and ``settle``
and ``renew`` work only with the current one, so a worker that was thought dead can do no harm when it wakes up.

=========  ==========================================================================================
state      meaning
=========  ==========================================================================================
pending    to be tried at ``due``
held       not tried until an operator releases it
(no row)   delivered, or refused and reported: finished; a message without recipients is deleted
=========  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from relay.mail.address import Mailbox
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId


class QueueError(Exception):
    """The store could not do it (disk, database, time-out); nothing was changed. The client gets 451."""


class QueueFull(QueueError):
    """The disk is (nearly) full; the client gets 452 4.3.1."""


class RecipientState(StrEnum):
    """Where one recipient stands; see the table above."""

    PENDING = "pending"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class QueuedRecipient:
    """One recipient of a queued message. ``number`` is its index in the envelope as it was put.

    ``due`` is on the boot clock (seconds, ``time.clock_gettime(CLOCK_BOOTTIME)``), so clock jumps do not move it.
    The ``last_*`` fields are the most recent failure: code 0 and empty texts before the first.
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
    """

    envelope: Envelope
    content: Content
    created: float
    expires_in: float
    due: float
    leased: bool
    deferrals: tuple[Deferral, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to settle one message: row key and fencing token, valid to ``until`` on the boot clock."""

    key: int
    token: int
    until: float


@dataclass(frozen=True, slots=True)
class Claimed:
    """A message with its lease. ``recipients`` are those pending and due (all of them after a put).

    ``possible_duplicate``: an earlier attempt ended between final dot and reply (the journal names it).
    """

    lease: Lease
    envelope: Envelope
    content: Content
    created: float
    expired: bool
    recipients: tuple[QueuedRecipient, ...]
    possible_duplicate: bool


@dataclass(frozen=True, slots=True)
class Settlement:
    """The whole result of one attempt: finished recipients, deferred ones, reports to put, in one transaction.

    The lease ends, unless ``keep`` is set (another attempt for other recipients of the message is still running).
    """

    lease: Lease
    finished: tuple[int, ...]
    deferred: tuple[Deferral, ...]
    reports: tuple[NewMessage, ...] = ()
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Listed:
    """One message as ``relay queue list`` and ``show`` print it. Times are wall-clock seconds."""

    id: QueueId
    sender: str
    size: int
    created: float
    expires: float
    owner: str
    possible_duplicate: bool
    recipients: tuple[QueuedRecipient, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """Depth and age of the queue. ``oldest`` is the wall-clock time of the oldest message, 0 when empty."""

    messages: int
    recipients: int
    held: int
    leased: int
    octets: int
    oldest: float
    corrupt: int


class Store(Protocol):
    """What SQLite, memory (and later PostgreSQL) do. Every method raises QueueError and nothing else."""

    def open_body(self) -> int:
        """A descriptor of a new unnamed file on the spool's file system, read and write. Raises QueueFull."""
        ...

    async def put(self, messages: Sequence[NewMessage]) -> list[Lease]:
        """Commit all or none, body files first; returns after the commit is on disk. Contents stay the caller's."""
        ...

    async def settle(self, settlement: Settlement) -> bool:
        """Record one attempt; False when the lease was lost meanwhile (then nothing was changed)."""
        ...

    async def claim(self, limit: int) -> tuple[list[Claimed], float | None]:
        """Lease up to ``limit`` due messages; second value: the boot clock of the next due one, None when none."""
        ...

    async def renew(self, leases: Sequence[Lease]) -> list[Lease | None]:
        """Extend leases by the configured time; None in the place of each one that was lost."""
        ...

    async def stats(self) -> Stats:
        """Depth and age."""
        ...

    async def close(self) -> None:
        """Finish what is under way and let go of the files."""
        ...
