"""Owns: what one transaction of the queue does: a group of operations, in few statements.

Statements hand Python's interpreter lock over at each step; while the event loop is busy each such hand-over can
take as long as the loop's work. So what nearly every message needs (put, settle of all recipients) is done for the
whole group in one step a table. Must not begin, commit or lock; must not know the event loop.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

from relay.queue.bodies import Bodies, key_of
from relay.queue.intake_file import Found, undone
from relay.queue.journal import marked_in
from relay.queue.layout import Layout
from relay.queue.rows import KeptRows, NewRows, Row
from relay.queue.statements import SQL
from relay.queue.store import Lease, QueueError, Settlement, shared

T = TypeVar("T")

_ROWS_A_STATEMENT: Final = 64
"""Largest number of rows one INSERT names; above _EXACT_ROWS it takes powers of two, so few statements are prepared."""

_EXACT_ROWS: Final = 16
"""Groups are mostly this small: one INSERT a table, whatever their number."""

SWEEP_FILES: Final = 1000
"""Orphans removed in one transaction, for nobody else writes meanwhile."""


@dataclass(slots=True)
class Circumstances:
    """What a transaction knows besides the rows. ``unlink`` collects files to remove once it is committed."""

    connection: sqlite3.Connection
    holder: int
    now: float
    lease_s: float
    bodies: Bodies
    layout: Layout
    unlink: list[str]

    def one(self, name: str, *parameters: Any) -> Any:
        """The only column of the only row."""
        return self.connection.execute(SQL[name], parameters).fetchone()[0]

    def run(self, name: str, *parameters: Any) -> int:
        """Rows changed."""
        return self.connection.execute(SQL[name], parameters).rowcount


class Operation(ABC, Generic[T]):
    """Something a caller waits for. ``result`` is set by the transaction, ``future`` is resolved on the loop."""

    __slots__ = ("begun", "deadline", "future", "octets", "result", "waiting")

    patient: ClassVar[bool] = False
    """Nobody waits for it: it may wait a moment for others to share a transaction with."""

    def __init__(self, octets: int = 0) -> None:
        self.future: asyncio.Future[T] | None = None
        self.deadline = 0.0
        self.waiting = True
        """May still be withdrawn."""
        self.begun = False
        """Was part of a transaction: even one that failed may show up in the log after a crash."""
        self.octets = octets
        self.result: T | QueueError | None = None

    @abstractmethod
    def perform(self, at: Circumstances) -> T:
        """Do it by itself. Raises sqlite3.Error, OSError, QueueError."""

    def undo(self) -> Operation[Any] | None:
        """What makes it undone if its commit was told as failed and is in the log all the same.

        None where that does no harm: a settlement that is tried again finds its lease gone.
        """
        return None


class Put(Operation[None]):
    """Insert messages; their body files are in place."""

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[NewRows]) -> None:
        super().__init__(sum(len(row.octets) for row in rows if row.octets is not None))
        self.rows = rows

    def perform(self, at: Circumstances) -> None:
        insert(at, self.rows)

    def undo(self) -> Operation[Any]:
        return TakeBack([row.lease for row in self.rows])


class Move(Operation[None]):
    """Insert messages that an intake log holds, lease and all; the log may not say so before the process dies."""

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[KeptRows]) -> None:
        super().__init__(sum(len(row.octets) for row in rows if row.octets is not None))
        self.rows = rows

    def perform(self, at: Circumstances) -> None:
        insert(at, self.rows)
        at.run("remember_moved", json.dumps([row.key for row in self.rows]))

    def undo(self) -> Operation[Any]:
        return UndoMove([row.key for row in self.rows])


class UndoMove(Operation[None]):
    """Delete what a move committed that was told as failed: the log has it still."""

    __slots__ = ("keys",)

    def __init__(self, keys: Sequence[int]) -> None:
        super().__init__()
        self.keys = keys

    def perform(self, at: Circumstances) -> None:
        delete(at, self.keys)
        at.run("forget_moved", json.dumps(self.keys))


class ForgetMoved(Operation[None]):
    """The log says by now that these are no longer in it."""

    __slots__ = ("keys",)
    patient = True

    def __init__(self, keys: Sequence[int]) -> None:
        super().__init__()
        self.keys = keys

    def perform(self, at: Circumstances) -> None:
        at.run("forget_moved", json.dumps(self.keys))


class Import(Operation[int]):
    """Insert what the intake log of a dead worker still held."""

    __slots__ = ("found",)

    def __init__(self, found: Sequence[Found]) -> None:
        super().__init__()
        self.found = found

    def perform(self, at: Circumstances) -> int:
        return take_in(at.connection, self.found)


class Settle(Operation[bool]):
    """Record one attempt. The client has its reply; until this is committed the journal names the message."""

    __slots__ = ("deferred", "finished", "keep", "lease", "possible_duplicate", "reports", "waits_for", "warned")
    patient = True

    def __init__(self, settlement: Settlement, reports: Sequence[NewRows]) -> None:
        super().__init__(sum(len(row.octets) for row in reports if row.octets is not None))
        self.lease = settlement.lease
        self.finished = settlement.finished
        self.deferred = settlement.deferred
        self.reports = reports
        self.keep = settlement.keep
        self.possible_duplicate = settlement.possible_duplicate
        self.waits_for = settlement.waits_for
        self.warned = settlement.warned

    @property
    def may_be_last(self) -> bool:
        """True when it may be enough to delete the message: recipients 0 to n-1 are finished, nothing else."""
        return (
            not self.deferred
            and not self.reports
            and not self.keep
            and (self.finished == (0,) or sorted(self.finished) == list(range(len(self.finished))))
        )

    def perform(self, at: Circumstances) -> bool:
        key = self.lease.key
        held = leases(at, [key]).get(key)
        if held is None or held.token != self.lease.token:
            return False
        insert(at, self.reports)
        if self.finished:
            at.run("finish_recipients", key, json.dumps(self.finished))
        for d in self.deferred:
            at.run("defer_recipient", d.attempts, d.due, d.code, d.enhanced, d.text, d.host, key, d.number)
        if not at.one("recipients_left", key):
            delete(at, [key])
            if held.file:
                at.unlink.append(held.file)
            return True
        if self.deferred or self.finished:
            at.run("set_due", key)
        if not self.keep:
            at.run("end_lease", 1 if self.possible_duplicate else 0, self.waits_for, 1 if self.warned else 0, key)
        elif self.possible_duplicate:
            # The caller clears its journal cell now; should it die before its last attempt is settled, this remains.
            at.run("mark_duplicates", json.dumps([key]))
        return True


class Claim(Operation[tuple[list[int], float | None]]):
    """Lease due messages, and those that wait for a next hop that is ``ready``; the keys, and when to ask again."""

    __slots__ = ("limit", "parked", "ready")

    def __init__(self, limit: int, ready: Sequence[str], parked: int) -> None:
        super().__init__()
        self.parked = parked
        self.limit = limit
        self.ready = ready

    def perform(self, at: Circumstances) -> tuple[list[int], float | None]:
        given = {"now": at.now, "limit": self.limit}
        found = at.connection.execute(SQL["due_keys"], given).fetchone()[0]
        due: list[tuple[int, int | None, int]] = json.loads(found)
        ordinary = [key for key, _, parked in due if not parked]
        keys = shared(ordinary, [key for key, _, parked in due if parked][: self.parked], self.limit)
        for hops in self.ready:
            if len(keys) < self.limit:
                waiting = at.connection.execute(SQL["waiting_keys"], {"hops": hops, "limit": self.limit}).fetchone()[0]
                keys += [key for key in json.loads(waiting) if key not in keys][: self.limit - len(keys)]
        if keys:
            # A lease that ran out: its holder may hang between the final dot and the reply.
            hanging = {slot for _, slot, _ in due if slot is not None}
            marked = set().union(*(marked_in(at.layout.journal(slot)) for slot in hanging)).intersection(keys)
            if marked:
                at.run("mark_duplicates", json.dumps(sorted(marked)))
            at.run("lease_keys", at.holder, at.now + at.lease_s, json.dumps(keys))
        return keys, at.one("next_due")

    def undo(self) -> Operation[Any] | None:
        return Release(self.result[0], 0.0) if isinstance(self.result, tuple) else None


class Renew(Operation[list[Lease | None]]):
    """Extend leases."""

    __slots__ = ("leases",)

    def __init__(self, leases: Sequence[Lease]) -> None:
        super().__init__()
        self.leases = leases

    def perform(self, at: Circumstances) -> list[Lease | None]:
        until = at.now + at.lease_s
        held = leases(at, [lease.key for lease in self.leases])
        renewed = [
            Lease(lease.key, lease.token, until) if lease.key in held and held[lease.key].token == lease.token else None
            for lease in self.leases
        ]
        at.run("renew_keys", until, json.dumps([lease.key for lease in renewed if lease is not None]))
        return renewed


class Release(Operation[None]):
    """Give leases back: the messages may be claimed after ``delay_s``."""

    __slots__ = ("delay_s", "keys")

    def __init__(self, keys: Sequence[int], delay_s: float) -> None:
        super().__init__()
        self.keys = keys
        self.delay_s = delay_s

    def perform(self, at: Circumstances) -> None:
        given = {"owner": at.holder, "keys": json.dumps(self.keys), "due": at.now + self.delay_s}
        at.connection.execute(SQL["release_keys"], given)


class TakeBack(Operation[None]):
    """Delete what a put committed that was cancelled or told as failed, if its lease is still ours."""

    __slots__ = ("given",)

    def __init__(self, given: Sequence[Lease]) -> None:
        super().__init__()
        self.given = given

    def perform(self, at: Circumstances) -> None:
        keys = [lease.key for lease in self.given]
        held = leases(at, keys)
        ours = [lease.key for lease in self.given if lease.key in held and held[lease.key].token == lease.token]
        # Put without a lease: nobody holds it yet, or somebody does and delivers it.
        ours += [lease.key for lease in self.given if lease.token == 0 and lease.key not in held]
        delete(at, ours)
        at.unlink.extend(file for key in ours if key in held and (file := held[key].file))


class Aside(Operation[list[int]]):
    """Set entries aside that we hold: nobody claims them, nothing of them is deleted. The keys of those that were ours: who
    stood still past a lease may have met what another has finished meanwhile, and nothing is wrong with that.
    """

    __slots__ = ("entries",)

    def __init__(self, entries: Sequence[tuple[int, str]]) -> None:
        super().__init__()
        self.entries = entries

    def perform(self, at: Circumstances) -> list[int]:
        return [key for key, reason in self.entries if at.run("set_aside", reason, key, at.holder)]


class Void(Operation[tuple[int, list[bytes]]]):
    """Void the leases of earlier incarnations of a slot; mark what their journal names."""

    __slots__ = ("inherited", "slot")

    def __init__(self, slot: int, inherited: Sequence[int]) -> None:
        super().__init__()
        self.slot = slot
        self.inherited = inherited

    def perform(self, at: Circumstances) -> tuple[int, list[bytes]]:
        marked = json.dumps(self.inherited)
        at.run("mark_duplicates", marked)
        names = [row[0] for row in at.connection.execute(SQL["ids_of"], (marked,))]
        given = {"slot": self.slot, "number": at.holder}
        voided = at.connection.execute(SQL["void_slot"], given).rowcount
        at.connection.execute(SQL["forget_slot"], given)
        return voided, names


class Sweep(Operation[int]):
    """Remove files that no message names. In the transaction: no put can name one meanwhile."""

    __slots__ = ("names",)

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def perform(self, at: Circumstances) -> int:
        return remove_orphans(at.connection, at.bodies, self.names)


def take_in(connection: sqlite3.Connection, found: Sequence[Found]) -> int:
    """Insert the messages of these segments that are neither done nor in the database; how many. Under the write lock.

    Their leases are those of the dead worker, and are voided like its others. Raises sqlite3.Error, QueueError.
    """
    epochs = json.dumps([each.epoch for each in found])
    known = set(json.loads(connection.execute(SQL["known_epochs"], (epochs,)).fetchone()[0]))
    rows = undone(found, known)
    keys = json.dumps([row.key for row in rows])
    there = set(json.loads(connection.execute(SQL["keys_there"], {"keys": keys}).fetchone()[0]))
    fresh = [row for row in rows if row.key not in there]
    for row in fresh:  # one by one: those of an earlier release have fewer columns
        insert_rows(connection, [row])
    connection.execute(SQL["remember_epochs"], (epochs,))
    connection.execute(SQL["forget_moved"], (keys,))
    return len(fresh)


def remove_orphans(connection: sqlite3.Connection, bodies: Bodies, names: Sequence[str]) -> int:
    """Remove those body files that no message names; how many. Under the write lock. Raises sqlite3.Error."""
    keys = json.dumps([key_of(name) for name in names])
    used = set(json.loads(connection.execute(SQL["files_in_use"], (keys,)).fetchone()[0]))
    orphans = [name for name in names if name not in used]
    bodies.remove(*orphans)
    return len(orphans)


@dataclass(frozen=True, slots=True)
class Held:
    """A leased message as ``leases_of`` tells it."""

    token: int
    highest: int | None
    file: str


def leases(at: Circumstances, keys: Sequence[int]) -> dict[int, Held]:
    """Those of the messages that are leased."""
    found = json.loads(at.one("leases_of", json.dumps(keys)))
    return {key: Held(token, highest, file) for key, token, highest, file in found}


def insert(at: Circumstances, rows: Sequence[NewRows | KeptRows]) -> None:
    """Insert whole messages. Raises QueueError when a body file has vanished meanwhile."""
    for row in rows:
        if row.file and not at.bodies.exists(row.file):
            raise QueueError(f"body file {row.file} has vanished before its message was committed")
    insert_rows(at.connection, rows)


def insert_rows(connection: sqlite3.Connection, rows: Sequence[NewRows | KeptRows]) -> None:
    """Insert whole messages whose bodies are in place. Raises sqlite3.Error."""
    _insert(connection, "insert_messages", [row.message for row in rows])
    _insert(connection, "insert_bodies", [(row.key, row.octets) for row in rows if row.octets is not None])
    _insert(connection, "insert_recipients", [recipient for row in rows for recipient in row.recipients])


def _insert(connection: sqlite3.Connection, name: str, rows: Sequence[Row]) -> None:
    position, columns = 0, len(rows[0]) if rows else 0
    while position < len(rows):
        left = len(rows) - position
        count = left if left <= _EXACT_ROWS else min(_ROWS_A_STATEMENT, 1 << left.bit_length() - 1)
        values = [value for row in rows[position : position + count] for value in row]
        connection.execute(_with_rows(name, columns, count), values)
        position += count


_INSERTS: Final[dict[tuple[str, int, int], str]] = {}


def _with_rows(name: str, columns: int, count: int) -> str:
    text = _INSERTS.get((name, columns, count))
    if text is None:
        head, _, names = SQL[name].partition("(")
        named = ",".join(names.partition(")")[0].split(",")[:columns])
        row = "(" + ", ".join("?" * columns) + ")"
        text = _INSERTS[name, columns, count] = f"{head}({named}) VALUES " + ", ".join([row] * count)
    return text


def delete(at: Circumstances, keys: Sequence[int]) -> None:
    """Delete whole messages; their files are the caller's to name."""
    if keys:
        wanted = json.dumps(keys)
        at.run("delete_recipients", wanted)
        at.run("delete_bodies", wanted)
        at.run("delete_messages", wanted)


def perform_group(at: Circumstances, group: Iterable[Operation[Any]]) -> None:
    """Do all of a group, setting each result. Raises sqlite3.Error, OSError, QueueError: then nothing may be kept.

    Puts come first (nobody else knows their keys yet), claims last (they may take what is released here); the rest
    keeps its order, except that settles that only delete are gathered. Those look at the leases after everything
    else was done, so they cannot delete what another operation of the group has taken from them.
    """
    puts: list[Put] = []
    last: dict[int, Settle] = {}
    others: list[Operation[Any]] = []
    claims: list[Operation[Any]] = []
    for operation in group:
        if isinstance(operation, Put):
            puts.append(operation)
        elif isinstance(operation, Claim):
            claims.append(operation)
        elif isinstance(operation, Settle) and operation.may_be_last and operation.lease.key not in last:
            last[operation.lease.key] = operation
        else:
            others.append(operation)
    insert(at, [row for put in puts for row in put.rows])
    for operation in others:
        operation.result = operation.perform(at)
    if last:
        claims[:0] = _settle_last(at, last)
    for operation in claims:
        operation.result = operation.perform(at)


def _settle_last(at: Circumstances, settles: dict[int, Settle]) -> list[Operation[Any]]:
    """Delete the messages whose recipients are all finished; returns those to be done one by one."""
    held = leases(at, list(settles))
    slow: list[Operation[Any]] = []
    finished: list[int] = []
    for key, settle in settles.items():
        lease = held.get(key)
        if lease is None or lease.token != settle.lease.token:
            settle.result = False
        elif lease.highest is not None and lease.highest >= len(settle.finished):
            slow.append(settle)
        else:
            settle.result = True
            finished.append(key)
            if lease.file:
                at.unlink.append(lease.file)
    delete(at, finished)
    return slow
