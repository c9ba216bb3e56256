"""Owns: everything that has to be right before the first process of a tree starts, in order; else nothing starts.

Users, lock, folders, sockets, queue. All of it is the supervisor's for the life of the tree.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from relay.config.schema import Config
from relay.mail.envelope import QueueId
from relay.queue.boot import boot_id
from relay.queue.prepare import PrepareReport, prepare
from relay.queue.store import QueueError
from relay.supervisor import sockets, spool
from relay.supervisor.child import fork, settle
from relay.supervisor.errors import Refusal
from relay.supervisor.privileges import Identities, Identity, identities
from relay.telemetry import valuefiles

_REPORT_MAX: Final = 256 * 1024  # characters: ten times the thousand names a report holds at most


@dataclass(frozen=True, slots=True)
class Ground:
    """What a tree stands on. ``lock``: descriptor, inherited by all."""

    identities: Identities
    lock: int
    listening: sockets.Listening
    boot_id: str
    workers: int
    queue: PrepareReport
    """What was found in the queue."""
    sessions: memoryview
    """Open sessions of each worker, 64 bits each: memory that children inherit and share."""


def lay(config: Config) -> Ground:
    """Take and open everything. Raises Refusal, with everything let go again."""
    who = identities(config.process)
    _raise_descriptor_limit()
    descriptor = spool.lock(config.server.spool)
    try:
        run = spool.furnish(
            config.server.spool, who.worker, who.hub if config.directory.ldap or config.directory.push else None
        )
        try:
            valuefiles.empty(config.server.spool / "metrics", -1 if who.worker is None else who.worker.gid)
            spool.share_log(config.log.file, who.worker)
        except OSError as error:
            raise Refusal(f"{error.filename}: {error.strerror}; check owner and mode") from None
        listening = sockets.open_all(config, run, None if who.worker is None else who.worker.gid)
        try:
            report = _prepare_queue(config.server.spool, who.worker)
        except Refusal:
            listening.close()
            raise
    except Refusal:
        os.close(descriptor)
        raise
    # One worker per core that this process may use; 64 is the most that server.workers allows.
    workers = config.server.workers or min(len(os.sched_getaffinity(0)), 64)
    sessions = memoryview(mmap.mmap(-1, 8 * workers)).cast("Q")
    return Ground(who, descriptor, listening, boot_id(), workers, report, sessions)


def _raise_descriptor_limit() -> None:
    """Every session and delivery takes a descriptor; the usual soft limit of 1024 protects programs with select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _prepare_queue(spool_path: Path, worker: Identity | None) -> PrepareReport:
    """Make or upgrade the queue as the workers' user, in a process of its own: the supervisor opens no database."""
    reader, writer = os.pipe()
    parent = os.getpid()

    def body() -> int:
        os.close(reader)
        with open(writer, "w", encoding="utf-8") as pipe:
            settle(worker, parent, "relay-prepare")
            try:
                json.dump(asdict(prepare(spool_path)), pipe)
            except QueueError as error:
                json.dump(str(error), pipe)
        return 0

    pid = fork(body)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        said = pipe.read(_REPORT_MAX)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise Refusal(f"server.spool: the queue cannot be used: the process ended with status {status}; see above")
    result = json.loads(said)
    if not isinstance(result, dict):
        raise Refusal(f"server.spool: the queue cannot be used: {result}")
    return PrepareReport(**{**result, "duplicates": tuple(map(QueueId, result["duplicates"]))})


def leave(ground: Ground) -> None:
    """Tidy up at the end; the lock is free when the last process is gone."""
    Path(ground.listening.hub_address).unlink(missing_ok=True)
    ground.listening.close()
    os.close(ground.lock)
