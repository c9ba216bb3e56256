"""Owns: the spool as the supervisor finds it: its lock, its folders and their owners; and the pidfile.

The spool itself stays the supervisor's, only folders in it belong to the workers: a worker that was broken into must
not be able to lay a link where root writes. Must not know what is in the folders.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from relay.supervisor.errors import Refusal
from relay.supervisor.privileges import Identity

LOCK_WAIT_S: Final = 5.0
"""A previous tree whose supervisor was killed needs milliseconds to die; one that drains is not waited for longer."""

_LOCK_POLL_S: Final = 0.05

RUN: Final = "run"
"""Folder of the hub's socket."""
QUEUE: Final = "queue"
"""Folder of the queue: the workers' own."""
DIRECTORY: Final = "directory"
"""Folder of snapshot and key: written by ``relay directory build``, read by workers; its key is the supervisor's."""


def lock(spool: Path, wait_s: float = LOCK_WAIT_S) -> int:
    """Descriptor of the locked SPOOL/lock; the spool is made if needed. Raises Refusal.

    flock belongs to the open file, which every child inherits: it is free when the last process of a tree is gone.
    """
    try:
        spool.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(spool / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Refusal(f"server.spool: cannot use {spool}: {error.strerror}; it has to be a folder of ours") from None
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_LOCK_POLL_S)
                continue
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise Refusal(
                f"server.spool: {spool} is in use by another relay (supervisor's pid {holder}); "
                "stop that one first, or give this one a spool of its own"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise Refusal(f"server.spool: cannot lock {spool}/lock: {error.strerror}; use a local disk") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor


def furnish(spool: Path, worker: Identity | None, builder: Identity | None = None) -> Path:
    """Make the folders and give the workers theirs; returns the folder of the hub's socket. Raises Refusal.

    ``builder``: who builds snapshots besides root; its is their folder.
    """
    gid = -1 if worker is None else worker.gid
    if worker is not None:
        closed = _closed_to(worker, spool)
        if closed is not None:
            raise Refusal(f"server.spool: {worker.name} may not enter {closed}; choose another spool, or chmod o+x it")
    try:
        with _folder(spool / QUEUE, 0o700) as folder:
            if worker is not None:
                _hand_over(folder, spool / QUEUE, worker)
        with _folder(spool / RUN, 0o700) as folder:
            if worker is not None:
                os.fchown(folder, os.geteuid(), gid)
                os.fchmod(folder, 0o750)
        with _folder(spool / DIRECTORY, 0o750) as folder:
            if worker is not None and os.fstat(folder).st_uid == os.geteuid():
                # Set-group-ID: what is built there later is the workers' to read.
                os.fchown(folder, -1, gid)
                os.fchmod(folder, 0o2750)
            if builder is not None and os.fstat(folder).st_uid == os.geteuid():
                for name in os.listdir(folder):  # the folder was root's so far: nobody can have laid a link there
                    os.chown(name, builder.uid, -1, dir_fd=folder, follow_symlinks=False)
                os.fchown(folder, builder.uid, gid)
                os.fchmod(folder, 0o2750)
    except OSError as error:
        raise Refusal(f"server.spool: cannot prepare {spool}: {error}; check owner and mode of its folders") from None
    return spool / RUN


def share_log(path: Path | None, worker: Identity | None) -> None:
    """Let the children append to the log although its folder may be root's alone. Raises OSError.

    The file stays root's; workers, web and hub have the workers' group in common.
    """
    if path is None or worker is None:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            os.fchown(descriptor, -1, worker.gid)
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode) | stat.S_IRGRP | stat.S_IWGRP)
    finally:
        os.close(descriptor)


def _closed_to(identity: Identity, path: Path) -> Path | None:
    """The first folder on the way to ``path`` that ``identity`` may not enter."""
    path = path.resolve()
    for folder in (*reversed(path.parents), path):
        status = folder.stat()
        if status.st_uid == identity.uid:
            needed = stat.S_IXUSR
        elif status.st_gid in identity.groups:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not status.st_mode & needed:
            return folder
    return None


@contextlib.contextmanager
def _folder(path: Path, mode: int) -> Iterator[int]:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _hand_over(folder: int, path: Path, owner: Identity) -> None:
    """Give a folder of root's to ``owner``, with what is in it: nobody else can have laid a link there.

    A folder that is the owner's already is left alone, and any other one is refused.
    """
    uid = os.fstat(folder).st_uid
    if uid == owner.uid:
        return
    if uid != os.geteuid():
        raise PermissionError(f"{path} belongs to uid {uid}, not to {owner.name}: chown -R {owner.name} {path}")
    for _, folders, files, at in os.fwalk(".", dir_fd=folder, follow_symlinks=False):
        for name in (*folders, *files):
            os.chown(name, owner.uid, owner.gid, dir_fd=at, follow_symlinks=False)
    os.fchown(folder, owner.uid, owner.gid)


def write_pidfile(path: Path) -> None:
    """This process's pid, whole or not at all: readers may wait for the file to appear. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(f"{os.getpid()}\n", "ascii")
    beside.rename(path)


def remove_pidfile(path: Path, *, stale: bool = False) -> None:
    """Remove the pidfile if it is ours, or (``stale``) whatever a tree that was killed has left there."""
    with contextlib.suppress(OSError):
        if stale or path.read_text("ascii").strip() == str(os.getpid()):
            path.unlink()
