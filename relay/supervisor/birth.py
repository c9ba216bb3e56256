"""Owns: the birth of one process of the tree: control socket, fork, what it closes, its user, its role.

Must not import in the child, nor keep a secret: those come through the control socket, after the fork.
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from relay.config.schema import Config
from relay.control import Child, Failed, Link, encode, pair, receive_start
from relay.supervisor.child import EXIT_CRASHED, fork, settle
from relay.supervisor.ground import Ground
from relay.supervisor.members import Part, Process, Slot


@dataclass(frozen=True, slots=True)
class Role:
    """``run`` in the final user's process; ``load`` before it, in the child: imports that no other role shares."""

    run: Callable[[Child], int]
    load: Callable[[Config], None] = lambda _: None


Roles: TypeAlias = Mapping[Part, Role]


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What every birth of a tree has in common. ``close`` drops what is the supervisor's alone, in the child."""

    ground: Ground
    roles: Roles
    close: Callable[[], None]


def birth(
    around: Circumstances, slot: Slot, config: Config, live_workers: int, others: Iterable[Link], now: float
) -> Process:
    """Start the next process of ``slot``; it waits for its start packet. Raises OSError."""
    ours, theirs = pair()
    slot.incarnation += 1
    parent = os.getpid()

    def body() -> int:
        ours.close()
        for link in others:
            link.close()
        around.close()
        return _live(around, slot, config, live_workers, theirs, parent)

    try:
        pid = fork(body)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Process(pid, Link(ours), now, now)


def _live(
    around: Circumstances, slot: Slot, config: Config, live_workers: int, control: socket.socket, parent: int
) -> int:
    ground, part = around.ground, slot.part
    listening = ground.listening
    listening.close_but(mail=part is Part.WORKER, web=part is Part.WEB, hub=part is Part.HUB)
    try:
        around.roles[part].load(config)
        who = ground.identities
        settle(who.hub if part is Part.HUB else who.worker, parent, f"relay-{slot.name}")
        child = Child(
            config=config,
            secrets=receive_start(control).secrets,
            slot=slot.number,
            incarnation=slot.incarnation,
            live_workers=live_workers,
            control=control,
            listeners=listening.listeners(config) if part is Part.WORKER else (),
            web=listening.web if part is Part.WEB else None,
            hub=listening.hub if part is Part.HUB else None,
            hub_address=listening.hub_address,
            boot_id=ground.boot_id,
            sessions=ground.sessions,
        )
        return around.roles[part].run(child)
    except Exception as error:  # noqa: BLE001 - the boundary of the process: the supervisor logs the reason
        traceback.print_exc()
        with contextlib.suppress(OSError):
            control.send(encode(Failed(f"{type(error).__name__}: {error}")))
        return EXIT_CRASHED
