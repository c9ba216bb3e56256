"""Owns: what a worker is short of: places, memory, descriptors. Looked at twice a second, so that the hot path has nothing
to measure. Must not end anybody: listeners act on what is said here.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Names:
    """How one version of control groups names what is read: limit, use, and in ``memory.stat`` the cache that can go."""

    limit: str
    used: str
    cache: str


_V1: Final = Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
_V2: Final = Names("memory.max", "memory.current", "inactive_file ")


class Container:
    """The memory of the control group that the relay runs in, of either version; without a limit there is nothing to read."""

    def __init__(self, group: Path | None = None, names: Names = _V2) -> None:
        self._group, self._names = (group, names) if group is not None else _own_group()

    @property
    def limit(self) -> int:
        """Octets; 0 without a limit, or with one that is beyond the machine."""
        found = self._number(self._names.limit)
        return found if found < _machine_octets() else 0

    def share(self) -> float:
        """What is in use of the limit, caches that can go not counted; 0 without one."""
        limit = self.limit
        if not limit:
            return 0.0
        used = self._number(self._names.used)
        try:
            for line in (self._group / "memory.stat").read_text().splitlines():
                if line.startswith(self._names.cache):
                    used -= int(line.split()[1])
        except (OSError, ValueError):
            return 0.0
        return used / limit

    def _number(self, name: str) -> int:
        try:
            return int((self._group / name).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            return 0


def _own_group() -> tuple[Path, Names]:
    """Where this process's memory is counted. A container often sees its own group as the root of all."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = _CGROUP, _V2
        elif "memory" in controllers.split(","):
            top, names = _CGROUP / "memory", _V1
        else:
            continue
        for group in (top / path.lstrip("/"), top):
            if (group / names.limit).exists():
                return group, names
    return _CGROUP, _V2


def _machine_octets() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
