"""Owns: where things lie in the spool, the sizes they may have, and the lock of the writers.

===========================  ==================================================================================
SPOOL/queue/queue.db         the database; beside it ``-wal`` (the log, long and reused) and ``-shm`` (its index)
SPOOL/queue/bodies/          bodies above ``MEMORY_OCTETS``, one file each, named after the message's key
SPOOL/queue/intake-SLOT-a    and ``-b``: the intake log of a worker, for mail that is delivered at once
SPOOL/queue/journal-SLOT     whose final dot is on its way
SPOOL/queue/write.lock       flock of whoever changes the database
SPOOL/queue/turn.lock        flock of whoever is next
===========================  ==================================================================================

Must not know SQL.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER_MODE: Final = 0o700
FILE_MODE: Final = 0o600
MEGABYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes and ages that tests make small; the program uses them as they are.

    ``wal_octets``: length the log file is grown to beforehand, for a sync over allocated blocks takes a third of one
    that extends the file. ``checkpoint_octets``: length of log after which it is copied into the database and used
    again from its start; a group of ``GROUP_OCTETS`` still fits behind it. ``intake_octets``: length of each of the two
    segments of a worker's intake log. ``reserve_octets``: free space below
    which nothing new is taken, so that settling goes on. ``orphan_age_s``: files without a message are removed when
    their last change is this old; a put takes ``queue.write_timeout_s`` at most.
    """

    wal_octets: int = 16 * MEGABYTE
    checkpoint_octets: int = 8 * MEGABYTE
    intake_octets: int = 8 * MEGABYTE
    reserve_octets: int = 64 * MEGABYTE
    orphan_age_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one spool."""

    queue: Path

    @classmethod
    def of(cls, spool: Path) -> Layout:
        return cls(spool / "queue")

    @property
    def database(self) -> Path:
        return self.queue / "queue.db"

    @property
    def wal(self) -> Path:
        return self.queue / "queue.db-wal"

    @property
    def bodies(self) -> Path:
        return self.queue / "bodies"

    def journal(self, slot: int) -> Path:
        return self.queue / f"journal-{slot}"

    def journals(self) -> list[Path]:
        return sorted(self.queue.glob("journal-*"))

    def make(self) -> None:
        """The folders, durable. Raises OSError."""
        for folder in (self.queue.parent, self.queue, self.bodies):
            with suppress(FileExistsError):
                folder.mkdir(mode=FOLDER_MODE, parents=folder is self.queue.parent)
                sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriteLock:
    """One writer at a time over all processes; flock, so it is free when its holder dies.

    It stands before SQLite's own locks because those poll with sleeps, which starves one of two busy processes. Two
    files make it fair: whoever leaves the database has to take the turn again, and the one who waits holds it.
    """

    def __init__(self, layout: Layout) -> None:
        """Raises OSError."""
        self._turn = _open(layout.queue / "turn.lock")
        try:
            self._write = _open(layout.queue / "write.lock")
        except OSError:
            os.close(self._turn)
            raise

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait, without limit, until the database is ours. Raises OSError."""
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._write, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._write, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._turn)
        os.close(self._write)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)


def grow(path: Path, octets: int) -> None:
    """Append zeros to a file until it has ``octets``, and sync it; what is there stays. Raises OSError.

    Real zeros: an allocation without them would have to be converted, by a journal commit, at the first write. SQLite
    takes zeros behind the end of its log for what they are: no frame. On a full disk it stays short: it is only
    speed, and what is in the queue has to get out.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        position = os.fstat(descriptor).st_size
        if position >= octets:
            return
        try:
            while position < octets:
                position += os.pwrite(descriptor, bytes(min(MEGABYTE, octets - position)), position)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)
