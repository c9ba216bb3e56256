"""Owns: one connection to the queue's database: settings, faults, the length of the log, checkpoints.

Every checkpoint, and so every reuse of the log, happens under the write lock. SQLite before 3.51.3 can lose committed
pages when a checkpoint of one connection meets the log's reset by another one's commit (sqlite.org/wal.html, "the
WAL-reset bug"); where all of that is under one lock they cannot meet. Hence also: no automatic checkpoints, and the
readers' connections are read-only. Must not know what the rows mean.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import Final

from relay.queue.layout import Layout, grow
from relay.queue.store import QueueCorrupt, QueueError, QueueFull

PAGE_OCTETS: Final = 4096
"""Larger pages make each commit write more: 27k messages/s at 4 KB, 15k at 16 KB in groups of 20."""

_WAL_HEADER: Final = 32  # sqlite.org/fileformat2.html section 4.1
_FRAME_HEADER: Final = 24
_SALT: Final = slice(16, 24)  # salts in the log's header
_FRAME_SALT: Final = slice(8, 16)  # and in each frame's

_LOCK_WAIT_S: Final = 5.0
"""SQLite's own locks are only contended while a log is recovered or a reader looks."""

_CACHED_STATEMENTS: Final = 256
_CACHE_KIB: Final = 8192

_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_PRIMARY: Final = 0xFF  # extended result codes carry the primary one in their low octet


def code_of(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for errors of the Python module itself."""
    return int(getattr(error, "sqlite_errorcode", 0)) & _PRIMARY


def is_corrupt(error: sqlite3.Error) -> bool:
    """True when the file, not the statement, is at fault."""
    return code_of(error) in _CORRUPT


def fault(error: sqlite3.Error | OSError, path: Path) -> QueueError:
    """What the caller is told: QueueFull, QueueCorrupt with advice, or QueueError."""
    if isinstance(error, OSError):
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        text = f"{error.filename or path}: {error.strerror or error}"
        return QueueFull(text) if full else QueueError(text)
    if code_of(error) == sqlite3.SQLITE_FULL:
        return QueueFull(f"{path}: {error}")
    if is_corrupt(error):
        return QueueCorrupt(
            f"{path} is damaged ({error}). Nothing was deleted. Stop the relay and copy {path.parent} away; "
            f"`sqlite3 queue.db .recover | sqlite3 new.db` saves what is readable; put new.db in its place, or move "
            f"queue.db, queue.db-wal and queue.db-shm away to start with an empty queue. See docs/queue.md."
        )
    return QueueError(f"{path}: {error}")


def connect(layout: Layout) -> sqlite3.Connection:
    """A connection that may write, for one thread. Raises sqlite3.Error.

    ``secure_delete`` is off (Debian builds SQLite with it on): zeros over each delivered message would double the
    log. What was deleted can be read from the file until its pages are used again.
    """
    connection = sqlite3.connect(
        layout.database, timeout=_LOCK_WAIT_S, isolation_level=None, cached_statements=_CACHED_STATEMENTS
    )
    try:
        for setting in (
            "synchronous = FULL",
            "wal_autocheckpoint = 0",
            "journal_size_limit = -1",
            "secure_delete = OFF",
            "temp_store = MEMORY",
            f"cache_size = -{_CACHE_KIB}",
        ):
            connection.execute(f"PRAGMA {setting}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def connect_readonly(layout: Layout) -> sqlite3.Connection:
    """A connection that never writes; may be used by several threads one after the other. Raises sqlite3.Error."""
    uri = layout.database.absolute().as_uri() + "?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=_LOCK_WAIT_S, isolation_level=None, check_same_thread=False)


class Log:
    """The write-ahead log as a file: whether it is long enough to be copied back. Reading it takes no lock."""

    def __init__(self, layout: Layout, octets: int, checkpoint_octets: int) -> None:
        """Grow the log to ``octets``; only under the write lock, after connecting. Raises OSError."""
        grow(layout.wal, octets)
        self._descriptor = os.open(layout.wal, os.O_RDONLY | os.O_CLOEXEC)
        frame = PAGE_OCTETS + _FRAME_HEADER
        self._position = _WAL_HEADER + checkpoint_octets // frame * frame

    def is_long(self) -> bool:
        """True when the frame at the checkpoint length is of the log's present round (same salt). Raises OSError."""
        frame = os.pread(self._descriptor, _FRAME_HEADER, self._position)
        if len(frame) < _FRAME_HEADER:
            return False
        return frame[_FRAME_SALT] == os.pread(self._descriptor, _WAL_HEADER, 0)[_SALT] != bytes(8)

    def close(self) -> None:
        os.close(self._descriptor)


def checkpoint(connection: sqlite3.Connection) -> bool:
    """Copy the log into the database; under the write lock only. False when a reader kept part of it from being
    reused. Raises sqlite3.Error.
    """
    busy, frames, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return not busy and frames == copied


def truncate(connection: sqlite3.Connection) -> None:
    """Copy all of the log into the database, sync it, empty the log: afterwards nothing depends on what an earlier
    sync may have failed to write. Under the write lock only. Raises sqlite3.Error.
    """
    busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("the log is being read; it will be tried again")
