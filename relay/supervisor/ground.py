"""Owns: everything that has to be right before the first process of a tree starts, in order; else nothing starts.

Users, lock, folders, sockets, queue. All of it is the supervisor's for the life of the tree.
"""

from __future__ import annotations

import importlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.config.schema import Config
from relay.supervisor import sockets, spool
from relay.supervisor.child import fork, settle
from relay.supervisor.errors import Refusal
from relay.supervisor.privileges import Identities, Identity, identities
from relay.telemetry import valuefiles

_REASON_MAX: Final = 4096  # octets: fits a pipe without a reader


@dataclass(frozen=True, slots=True)
class Ground:
    """What a tree stands on. ``lock``: descriptor, inherited by all."""

    identities: Identities
    lock: int
    listening: sockets.Listening
    boot_id: str
    workers: int


def lay(config: Config) -> Ground:
    """Take and open everything. Raises Refusal, with everything let go again."""
    who = identities(config.process)
    _raise_descriptor_limit()
    descriptor = spool.lock(config.server.spool)
    try:
        run = spool.furnish(config.server.spool, who.worker)
        try:
            valuefiles.empty(config.server.spool / "metrics", -1 if who.worker is None else who.worker.gid)
            spool.share_log(config.log.file, who.worker)
        except OSError as error:
            raise Refusal(f"{error.filename}: {error.strerror}; check owner and mode") from None
        listening = sockets.open_all(config, run, None if who.worker is None else who.worker.gid)
        try:
            _prepare_queue(config, who.worker)
        except Refusal:
            listening.close()
            raise
    except Refusal:
        os.close(descriptor)
        raise
    # One worker per core that this process may use; 64 is the most that server.workers allows.
    workers = config.server.workers or min(len(os.sched_getaffinity(0)), 64)
    return Ground(who, descriptor, listening, spool.boot_id(), workers)


def _raise_descriptor_limit() -> None:
    """Every session and delivery takes a descriptor; the usual soft limit of 1024 protects programs with select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _prepare_queue(config: Config, worker: Identity | None) -> None:
    """Make or upgrade the queue as the workers' user, in a process of its own: the supervisor opens no database."""
    # By name: the store is chosen by configuration once there is a second one.
    prepare = importlib.import_module("relay.queue.sqlite").prepare
    reader, writer = os.pipe()
    parent = os.getpid()

    def body() -> int:
        os.close(reader)
        settle(worker, parent, "relay: prepare")
        try:
            prepare(config.server.spool)
        except Exception as error:  # noqa: BLE001 - the boundary of this process: every reason goes to the operator
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:_REASON_MAX])
            return 1
        return 0

    pid = fork(body)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    reason = os.read(reader, _REASON_MAX).decode("utf-8", "replace")
    os.close(reader)
    if status != 0:
        why = reason or f"the process ended with code {os.waitstatus_to_exitcode(status)}"
        raise Refusal(f"server.spool: the queue in {config.server.spool} cannot be used: {why}")


def leave(ground: Ground) -> None:
    """Tidy up at the end; the lock is free when the last process is gone."""
    Path(ground.listening.hub_address).unlink(missing_ok=True)
    ground.listening.close()
    os.close(ground.lock)
