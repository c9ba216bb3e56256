"""Owns: changing the queue from outside, running or stopped, for the command line: the same ``Act`` that a store does.

Under the writers' lock, in transactions of its own, so a relay that runs meanwhile sees either nothing or all of a step.
Must not decide which messages are meant (``queue.selection``), nor wake anybody: workers look at the queue by themselves.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from relay.queue.bodies import Bodies
from relay.queue.boot import Clock, boot_clock
from relay.queue.database import checkpoint, connect, fault
from relay.queue.layout import Layout, WriteLock
from relay.queue.operations import Circumstances
from relay.queue.requests import REQUESTED, Act
from relay.queue.statements import MIGRATIONS
from relay.queue.store import Acted, Action, QueueError

_CHECKPOINT_STEPS: Final = 10
"""Transactions after which the log is copied back: it must not grow because somebody deletes a hundred thousand messages
while the workers have nothing to write."""


def request(spool: Path, keys: Sequence[int], action: Action, clock: Clock = boot_clock) -> Acted:
    """Do it to the messages of these keys; what became of it. Raises QueueError: then the rest was not done."""
    layout = Layout.of(spool)
    acted = Acted()
    with writing(layout) as (connection, lock, bodies):
        for step, start in enumerate(range(0, len(keys), REQUESTED), 1):
            unlink: list[str] = []
            with lock.held():
                at = Circumstances(connection, 0, clock(), 0.0, bodies, layout, unlink)
                connection.execute("BEGIN IMMEDIATE")
                acted += Act(keys[start : start + REQUESTED], action).perform(at)
                connection.execute("COMMIT")
                if step % _CHECKPOINT_STEPS == 0:
                    checkpoint(connection)
            bodies.remove(*unlink)
    return acted


@contextmanager
def writing(layout: Layout) -> Iterator[tuple[sqlite3.Connection, WriteLock, Bodies]]:
    """A connection, the lock to hold around each transaction, and the body files. Raises QueueError."""
    if not layout.database.exists():
        raise QueueError(f"{layout.database} does not exist; is server.spool the folder of a relay?")
    try:
        lock = WriteLock(layout)
        try:
            with lock.held():
                connection = connect(layout)
            try:
                check_version(connection, layout)
                bodies = Bodies(layout.bodies, 0)
                try:
                    yield connection, lock, bodies
                finally:
                    bodies.close()
            finally:
                # The last one to go copies the log back and removes it: nobody may write meanwhile.
                with lock.held():
                    connection.close()
        finally:
            lock.close()
    except (sqlite3.Error, OSError) as error:
        raise fault(error, layout.database) from None


def check_version(connection: sqlite3.Connection, layout: Layout) -> None:
    """Raises QueueError where the queue is of another version of the relay; sqlite3.Error."""
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found != len(MIGRATIONS):
        which = "an older" if found < len(MIGRATIONS) else "a newer"
        raise QueueError(
            f"{layout.database} is of {which} relay (schema {found}, this one knows {len(MIGRATIONS)}); "
            "use the command of the version that serves, or start this one first"
        )
