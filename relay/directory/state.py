"""Owns: the file that remembers how readings of directories went: for status, metrics, ``accept``, and across restarts.

Written whole beside and renamed, never in place. Holds no address but canaries, and no secret. Must not decide anything.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

STATE_OCTETS: Final = 1 << 20
"""Largest state file read: a few lines for each profile."""
FILE_MODE: Final = 0o640


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered. Times in seconds since 1970, 0 for never."""

    tried: float = 0.0
    succeeded: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    """Why the last reading was not taken; empty when it was."""
    why: str = ""
    cure: str = ""
    refused: dict[str, Any] = field(default_factory=dict)
    """What a guard held back, for ``relay directory accept`` to let through."""
    held: str = ""
    """Why scheduled readings wait; empty when they do not."""
    failures: dict[str, int] = field(default_factory=dict)
    """Readings that were not taken, by reason."""
    successes: int = 0
    kind: str = ""
    """Of the last reading that was taken: ``full`` or ``incremental``."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Readings taken, by kind."""
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of the last one taken, by kind."""
    bad: dict[str, list[float]] = field(default_factory=dict)
    """Servers that failed lately (``directory.servers``)."""
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: server, entries, addresses, seconds, certificate_expires, failed."""

    def failed(self, now: float, reason: str, why: str, cure: str, refused: dict[str, Any]) -> State:
        """After a reading that was not taken."""
        counted = {**self.failures, reason: self.failures.get(reason, 0) + 1}
        return replace(self, tried=now, reason=reason, why=why, cure=cure, refused=refused, failures=counted)

    def taken(self, now: float, seconds: float, profiles: dict[str, dict[str, Any]], kind: str) -> State:
        """After a reading that is in place."""
        return replace(
            self, tried=now, succeeded=now, seconds=seconds, reason="", why="", cure="", refused={}, held="",
            successes=self.successes + 1, profiles=profiles, kind=kind, kinds={**self.kinds, kind: self.kinds.get(kind, 0) + 1},
            took={**self.took, kind: seconds},
        )  # fmt: skip


def state_path(snapshot: Path) -> Path:
    """Beside the snapshot."""
    return snapshot.with_name("state.json")


def read_state(path: Path) -> State:
    """What is remembered; nothing when the file is not there or makes no sense: it is no reason to stop. Never raises."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(STATE_OCTETS))
        known = {name: found[name] for name in State.__dataclass_fields__ if name in found}
        defaults = asdict(State())
        if all(isinstance(value, type(defaults[name]) | int) for name, value in known.items()):
            return State(**known)
    except (OSError, ValueError, TypeError):
        pass
    return State()


def write_state(path: Path, state: State, owner: int = -1, group: int = -1) -> None:
    """Replace it. Raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    with open(descriptor, "w", encoding="ascii") as file:
        json.dump(asdict(state), file)
        file.flush()
        os.fchown(file.fileno(), owner, group)
        os.fchmod(file.fileno(), FILE_MODE)
    beside.rename(path)
