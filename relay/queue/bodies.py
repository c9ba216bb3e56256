"""Owns: bodies too large for the database: unnamed files while they arrive, named and synced ones in the queue.

A file gets its name and is synced, folder included, before the transaction that names it; it is removed after the
one that forgets it. So a row always has its file, and a file without a row is an orphan that may go when it is old.
Must not know SQL.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from relay.mail.content import CHUNK_OCTETS
from relay.queue.layout import FILE_MODE
from relay.queue.store import QueueError, QueueFull

SUFFIX: Final = ".body"

_FAILED_FILES: Final = 10_000
"""Files whose sync failed, remembered by inode until the inode is used anew; more than any process may have open."""


def file_name(key: int) -> str:
    """Name of a message's body file: 16 hex digits and the suffix."""
    return f"{key:016x}{SUFFIX}"


def key_of(name: str) -> int:
    """The message whose body file has that name. Raises ValueError for a name that ``file_name`` does not give."""
    key = int(name.removesuffix(SUFFIX), 16)
    if file_name(key) != name:
        raise ValueError(f"{name!r} is no body file")
    return key


class Bodies:
    """The folder SPOOL/queue/bodies. Every method may be called from any thread."""

    def __init__(self, folder: Path, reserve_octets: int) -> None:
        """Raises OSError."""
        self.folder: Final = folder
        self._reserve = reserve_octets
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._failed: dict[int, None] = {}

    def close(self) -> None:
        os.close(self._descriptor)

    def check_space(self, octets: int = 0) -> None:
        """Raise QueueFull when less than the reserve would be free after ``octets``. Raises OSError."""
        status = os.fstatvfs(self._descriptor)
        if status.f_bavail * status.f_frsize - octets < self._reserve:
            raise QueueFull(
                f"{self.folder}: less than {self._reserve >> 20} MB free; nothing new is taken until there is"
            )
        if status.f_files and not status.f_favail:
            raise QueueFull(f"{self.folder}: the file system has no inodes left; nothing new is taken until it has")

    def open_new(self) -> int:
        """A new unnamed file, read and write. Raises OSError."""
        descriptor = os.open(self.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
        self._failed.pop(os.fstat(descriptor).st_ino, None)
        return descriptor

    def place(self, descriptor: int, size: int, name: str) -> None:
        """Give the file a name and bring file and folder to the disk. Raises OSError, QueueError.

        A file whose sync failed once is never taken again: the next sync would succeed and prove nothing, for the
        kernel reports a lost page only once.
        """
        status = os.fstat(descriptor)
        if status.st_size != size:
            raise QueueError(f"message body has {status.st_size} octets instead of {size}")
        if status.st_ino in self._failed:
            raise QueueError(f"{self.folder}: this body could not be synced before; it is not taken again")
        self._name(descriptor, size, name)
        try:
            os.fsync(descriptor)
            os.fsync(self._descriptor)
        except OSError:
            while len(self._failed) >= _FAILED_FILES:
                self._failed.pop(next(iter(self._failed)))
            self._failed[status.st_ino] = None
            self.remove(name)
            raise

    def _name(self, descriptor: int, size: int, name: str) -> None:
        try:
            # linkat(2) with AT_SYMLINK_FOLLOW: the folder descriptors are what makes Python use it.
            os.link(
                f"/proc/self/fd/{descriptor}",
                name,
                src_dir_fd=self._descriptor,
                dst_dir_fd=self._descriptor,
                follow_symlinks=True,
            )
        except OSError as error:
            # ENOENT: it had a name once and lost it, so it cannot get another one; EXDEV: it lies elsewhere.
            if error.errno not in {errno.ENOENT, errno.EXDEV}:
                raise
            self._copy(descriptor, size, name)

    def _copy(self, descriptor: int, size: int, name: str) -> None:
        copy = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE, dir_fd=self._descriptor)
        try:
            position = 0
            while position < size:
                piece = os.pread(descriptor, min(CHUNK_OCTETS, size - position), position)
                if not piece:
                    raise QueueError(f"message body ends at {position} of {size} octets")
                position += os.write(copy, piece)
            os.fsync(copy)
        except (OSError, QueueError):
            self.remove(name)
            raise
        finally:
            os.close(copy)

    def open_named(self, name: str) -> int:
        """A fresh descriptor of a queued body, for reading. Raises OSError."""
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._descriptor)

    def exists(self, name: str) -> bool:
        """Raises OSError."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def remove(self, *names: str) -> None:
        """Remove files; one that cannot be removed now is an orphan and goes later."""
        for name in names:
            with suppress(OSError):
                os.unlink(name, dir_fd=self._descriptor)

    def older_than(self, age_s: float) -> Iterable[str]:
        """Names of bodies whose last change (of content or name) is that old. Raises OSError."""
        before = time.time() - age_s
        with os.scandir(self._descriptor) as entries:
            for entry in entries:
                with suppress(FileNotFoundError, ValueError):
                    if key_of(entry.name) and entry.stat(follow_symlinks=False).st_ctime <= before:
                        yield entry.name
