"""Owns: what the supervisor remembers of each place in the tree: its process, its heartbeats, when it may start again.

Pure bookkeeping on the monotonic clock (seconds), handed in as ``now``. Must not fork, wait or send.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, assert_never

from relay.control import HUB_SLOT, WEB_SLOT, Link, Secrets

START_TIMEOUT_S: Final = 60.0
"""A process that is not ready after this long is stuck; opening a large queue on a slow disk takes seconds."""

LOST_TIMEOUT_S: Final = 1.0
"""A process without control socket has ended by then, or never will."""

STABLE_S: Final = 10.0
"""A process that lived for longer than this after it became ready starts again without a pause."""

PAUSES_S: Final = (0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0)
"""Pause before the next process after so many quick deaths in a row; the last one repeats."""


class Part(StrEnum):
    """What a process is for."""

    HUB = "hub"
    WEB = "web"
    WORKER = "worker"


@dataclass(slots=True)
class Process:
    """One running child."""

    pid: int
    link: Link
    started: float
    heard: float
    """Last sign of life."""
    ready: bool = False
    why: str = ""
    """Its own words, when it said why it failed."""
    killed_because: str = ""
    """Why the supervisor killed it, once it did."""
    lost: bool = False
    """It closed its control socket, and is about to end."""
    blameless: bool = False
    """Its death says nothing about the next one's chances."""


@dataclass(slots=True)
class Slot:
    """A place in the tree; it has a process, or one is due."""

    part: Part
    number: int
    incarnation: int = 0
    process: Process | None = None
    due: float = 0.0
    """When the next process may start, while there is none."""
    quick_deaths: int = 0

    @property
    def name(self) -> str:
        """For log and metrics: ``worker-0``, ``hub``, ``web``."""
        return f"{self.part}-{self.number}" if self.part is Part.WORKER else str(self.part)

    @property
    def ready(self) -> bool:
        """Whether it serves."""
        return self.process is not None and self.process.ready

    def died(self, now: float) -> float:
        """Its process is gone; returns the pause before the next one, seconds."""
        process = self.process
        assert process is not None
        self.process = None
        if process.ready and now - process.started > STABLE_S:
            self.quick_deaths = 0
        pause = 0.0
        if not process.blameless:
            pause = PAUSES_S[min(self.quick_deaths, len(PAUSES_S) - 1)]
            self.quick_deaths += 1
        self.due = now + pause
        return pause

    def deadline(self, heartbeat_timeout_s: float) -> float | None:
        """When its process counts as stuck; None when there is none, or it was killed already."""
        process = self.process
        if process is None or process.killed_because:
            return None
        if process.lost:
            return process.heard + LOST_TIMEOUT_S
        return process.heard + heartbeat_timeout_s if process.ready else process.started + START_TIMEOUT_S


def places(workers: int, *, web: bool) -> tuple[Slot, ...]:
    """Every place of a tree, in the order of their first start."""
    hub = Slot(Part.HUB, HUB_SLOT)
    pages = (Slot(Part.WEB, WEB_SLOT),) if web else ()
    return (hub, *pages, *(Slot(Part.WORKER, number) for number in range(workers)))


def secrets_for(part: Part, secrets: Secrets) -> Secrets:
    """What this part may know: the hub reads directories and builds snapshots, workers do neither, web nothing at all."""
    match part:
        case Part.WORKER:
            return replace(secrets, directory_passwords={})
        case Part.HUB:
            return Secrets(snapshot_key=secrets.snapshot_key, directory_passwords=secrets.directory_passwords)
        case Part.WEB:
            return Secrets()
        case never:
            assert_never(never)
