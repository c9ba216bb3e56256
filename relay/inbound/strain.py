"""Owns: what a worker is short of: places, memory, descriptors. Looked at twice a second, so that the hot path has nothing
to measure. Must not end anybody: listeners act on what is said here.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from relay.config.schema import Config
from relay.hub.client import HubClient
from relay.inbound.listener import Listener
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics, Shortage

CALM: Final = 0.8
"""Stress ends when this share of what began it is left: else it would begin and end with every session."""

DESCRIPTORS_KEPT: Final = 8
"""One of so many descriptors is kept for what sessions need later: body files and connections to next hops."""

MEMORY_SHARE: Final = 4
"""Messages on their way in get a quarter of the memory unless ``limits.memory_octets`` says something else."""

NEARLY_ALL: Final = 0.95
"""A container this full takes no more mail: at its limit the kernel kills."""

_CGROUP: Final = Path("/sys/fs/cgroup")


class Strain:
    """One worker's."""

    def __init__(self, config: Config, live_workers: int, hub: HubClient, log: MailLog, metrics: Metrics) -> None:
        self._hub = hub
        self._log = log
        self._metrics = metrics
        self._short: set[Shortage] = set()
        self._group = Container()
        self.configure(config, live_workers)

    def configure(self, config: Config, live_workers: int) -> None:
        """Take over a (new) configuration, or number of workers."""
        limits = config.limits
        self._busy = limits.sessions * limits.stress_percent / 100 or float("inf")
        octets = limits.memory_octets or min(_machine_octets(), self._group.limit or _machine_octets()) // MEMORY_SHARE
        self._memory = octets // live_workers
        self._descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def look(self, listeners: Sequence[Listener]) -> None:
        """Look at everything and tell the listeners."""
        load = self._hub.load
        stressed = load >= self._busy * (CALM if "places" in self._short else 1.0)
        held = sum(listener.held() for listener in listeners)
        spare = self._memory - held
        full = spare <= 0 or self._group.share() > NEARLY_ALL
        room = self._room()
        self._say("places", stressed, f"{load} sessions are open")
        self._say("memory", full, f"messages on their way in hold {held} octets")
        self._say("descriptors", room <= 0, f"of {self._descriptors} all but a reserve are in use")
        for listener in listeners:
            listener.strain(stressed=stressed, memory_low=full, spare=max(0, spare), room=room)

    def _room(self) -> int:
        """Sessions for which there are descriptors. A new descriptor gets the lowest free number, so that tells."""
        try:
            lowest = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return 0
        os.close(lowest)
        return self._descriptors - self._descriptors // DESCRIPTORS_KEPT - lowest

    def _say(self, what: Shortage, short: bool, why: str) -> None:  # noqa: FBT001 - a fact
        if short == (what in self._short):
            return
        if short:
            self._short.add(what)
            self._log.note("warning", "short_of", what=what, why=why)
        else:
            self._short.discard(what)
            self._log.note("info", "enough_of", what=what)
        self._metrics.short_of(what, int(short))


class Container:
    """The memory of the control group (cgroup v2) that the relay runs in; without a limit there is nothing to read."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or _own_group()
        self.limit = self._number("memory.max")

    def share(self) -> float:
        """What is in use of the limit, caches that can go not counted; 0 without one."""
        if not self.limit:
            return 0.0
        used = self._number("memory.current")
        try:
            for line in (self._folder / "memory.stat").read_text().splitlines():
                if line.startswith("inactive_file "):
                    used -= int(line.split()[1])
        except (OSError, ValueError):
            return 0.0
        return used / self.limit

    def _number(self, name: str) -> int:
        try:
            return int((self._folder / name).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            return 0


def _own_group() -> Path:
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":
                return _CGROUP / path.lstrip("/")
    except (OSError, ValueError):
        pass
    return _CGROUP


def _machine_octets() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
