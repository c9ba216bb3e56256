"""Owns: what happens to a spool before the first worker of a new process tree opens it.

Synchronous, for a short-lived child of the supervisor that runs as the workers' user while the tree's lock on the
spool is held: nobody else has the queue open for writing. Must not be called while workers run.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from relay.mail.envelope import QueueId
from relay.queue.bodies import Bodies
from relay.queue.boot import Clock, boot_clock, boot_id
from relay.queue.database import PAGE_OCTETS, connect, fault
from relay.queue.intake_file import Found, read_all, segments
from relay.queue.journal import Journal
from relay.queue.layout import FILE_MODE, Layout, Tuning, WriteLock, grow
from relay.queue.operations import remove_orphans, take_in
from relay.queue.statements import MIGRATIONS, SQL, migration
from relay.queue.store import QueueError

NAMED_DUPLICATES: Final = 1000
"""Identifiers the report names; the number is exact in any case."""


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was found and done, for one log line. ``migrated_from`` is the schema version found, 0 for a new queue.

    ``voided``: leases of the tree before. ``marked``: messages that may reach their recipients twice, because a
    final dot was on its way (``duplicates`` names up to ``NAMED_DUPLICATES`` of them). ``orphans``: body files removed.
    """

    messages: int
    migrated_from: int
    voided: int
    restarted: bool
    marked: int
    duplicates: tuple[QueueId, ...]
    orphans: int


def prepare(
    spool: Path,
    *,
    clock: Clock = boot_clock,
    boot: str | None = None,
    tuning: Tuning = Tuning(),  # noqa: B008  frozen
) -> PrepareReport:
    """Make or migrate the queue of ``spool``, void what the last tree held, sweep. Raises QueueError."""
    layout = Layout.of(spool)
    try:
        layout.make()
        lock = WriteLock(layout)
    except OSError as error:
        raise fault(error, layout.queue) from None
    try:
        with lock.held():
            return _prepare(layout, clock, boot or boot_id(), tuning)
    except (sqlite3.Error, OSError) as error:
        raise fault(error, layout.database) from None
    finally:
        lock.close()


def _prepare(layout: Layout, clock: Clock, boot: str, tuning: Tuning) -> PrepareReport:
    # With this mode from the start: SQLite gives its other files the mode of the database.
    os.close(os.open(layout.database, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE))
    connection = connect(layout)
    try:
        connection.execute(f"PRAGMA page_size = {PAGE_OCTETS}")
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise QueueError(f"{layout.database}: this file system cannot hold the queue; use a local disk")
        found = _migrate(connection, layout)
        logs = read_all(segments(layout.queue))
        journals = _Journals(layout, boot)
        try:
            report = _take_over(connection, journals, logs, clock(), boot, found)
            journals.forget()
        finally:
            journals.close()
        orphans = _sweep(connection, layout, tuning)
    finally:
        connection.close()
    # After closing: the last connection to go removes the log.
    grow(layout.wal, tuning.wal_octets)
    return PrepareReport(orphans=orphans, **report)


def _migrate(connection: sqlite3.Connection, layout: Layout) -> int:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > len(MIGRATIONS):
        raise QueueError(
            f"{layout.database} was written by a newer relay (schema {found}, this one knows {len(MIGRATIONS)}); "
            "start that version again, or let it empty the queue first"
        )
    if found < len(MIGRATIONS):
        connection.execute("BEGIN IMMEDIATE")
        for version in range(found + 1, len(MIGRATIONS) + 1):
            for statement in migration(version):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    return found


class _Journals:
    """All journals of the spool, of slots that may no longer exist as well."""

    def __init__(self, layout: Layout, boot: str) -> None:
        self._journals = [Journal(path, boot) for path in layout.journals()]

    def keys(self) -> list[int]:
        return [key for journal in self._journals for key in journal.inherited]

    def forget(self) -> None:
        for journal in self._journals:
            journal.forget_inherited()

    def close(self) -> None:
        for journal in self._journals:
            journal.close()


def _take_over(
    connection: sqlite3.Connection, journals: _Journals, logs: list[Found], now: float, boot: str, found: int
) -> dict[str, Any]:
    """One transaction: leases, duplicates, and after a restart of the machine all boot-clock values."""
    connection.execute("BEGIN IMMEDIATE")
    take_in(connection, logs)
    connection.execute(SQL["forget_epochs"], (json.dumps([log.epoch for log in logs]),))
    connection.execute(SQL["forget_all_moved"])
    row = connection.execute(SQL["boot_of"]).fetchone()
    restarted = row is not None and row[0] != boot
    marked = json.dumps(journals.keys())
    # The journal is memory: after a restart it is gone, so every message somebody worked on counts.
    names = connection.execute(SQL["leased_ids"]) if restarted else connection.execute(SQL["ids_of"], (marked,))
    duplicates = [QueueId(bytes(each[0]).decode("ascii", "replace")) for each in names]
    connection.execute(SQL["mark_duplicates"], (marked,))
    voided = connection.execute(SQL["void_all"], (1 if restarted else 0,)).rowcount
    connection.execute(SQL["forget_holders"])
    if restarted:
        connection.execute(SQL["redate_messages"], {"now": now, "wall": time.time()})
        connection.execute(SQL["redate_recipients"], (now,))
    connection.execute(SQL["forget_boot"])
    connection.execute(SQL["set_boot"], (boot,))
    messages = connection.execute(SQL["message_count"]).fetchone()[0]
    connection.execute("COMMIT")
    return {
        "messages": messages,
        "migrated_from": found,
        "voided": voided,
        "restarted": restarted,
        "marked": len(duplicates),
        "duplicates": tuple(duplicates[:NAMED_DUPLICATES]),
    }


def _sweep(connection: sqlite3.Connection, layout: Layout, tuning: Tuning) -> int:
    bodies = Bodies(layout.bodies, tuning.reserve_octets)
    try:
        return remove_orphans(connection, bodies, list(bodies.older_than(tuning.orphan_age_s)))
    finally:
        bodies.close()
