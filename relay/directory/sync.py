"""Owns: one synchronisation: read every source and directory, compare, put in place or refuse, remember how it went.

The same function serves the schedule and the commands. Must run where it may be killed at any moment: a snapshot is put in
place by one rename (``directory.build``). Only a whole, successful reading ever replaces a snapshot (rows R5, R6).
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from relay.config.ldap import LdapProfile
from relay.config.schema import Config
from relay.directory import history, primary, push
from relay.directory import names as named
from relay.directory.asking import Progress
from relay.directory.build import Place, day_of, only_build, origin, replace_whole
from relay.directory.failure import CURES, LdapFailure, Reason
from relay.directory.guard import NAMED, Difference, Refused, counts, difference, judge
from relay.directory.kept import Kept, forget, load, settle, write
from relay.directory.key import new_key
from relay.directory.layout import SnapshotError
from relay.directory.ledger import Ledger
from relay.directory.placement import unlisted
from relay.directory.primary import Gathered
from relay.directory.push import Arrival
from relay.directory.reading import FULL, INCREMENTAL, Reading, read_profile
from relay.directory.servers import Memory
from relay.directory.snapshot import Snapshot
from relay.directory.sources import EXAMPLES, Collection, Ours, Tally, gather
from relay.directory.state import State, read_state, state_path, write_state
from relay.directory.whole import Whole


class Purpose(Enum):
    """What becomes of a reading."""

    SCHEDULED = "scheduled"
    """In place, unless readings are held."""
    ASKED = "asked"
    """In place."""
    ACCEPT = "accept"
    """In place, with the losses that the last reading was refused for."""
    DRY_RUN = "dry-run"
    """Compared, and nothing else."""


class Extent(Enum):
    """How much is read."""

    CHANGES = "changes"
    """What changed since the last reading, where that can be told; everything now and then (``directory.full_every_s``)."""
    EVERYTHING = "everything"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went. ``reason`` is empty when the reading was good; ``generation`` is 0 when nothing was put in place."""

    reason: str
    why: str
    cure: str
    generation: int
    seconds: float
    counts: dict[str, int]
    skipped: dict[str, int]
    examples: tuple[str, ...]
    readings: tuple[dict[str, Any], ...]
    difference: dict[str, Any]
    unchanged: bool = False
    held: str = ""
    twice: int = 0
    """Addresses on two entries of one directory; what is said of them adds up. ``twice_names``: some, where names are known."""
    twice_names: tuple[str, ...] = ()
    kind: str = ""
    """``incremental`` when no directory was read as a whole, else ``full``."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def synchronise(
    config: Config,
    passwords: Mapping[str, str],
    purpose: Purpose,
    now: float,
    progress: Progress,
    key: bytes = b"",
    extent: Extent = Extent.CHANGES,
) -> Outcome:
    """Do it; what is wrong is in the outcome. ``now``: seconds since 1970. Never raises for what can be expected."""
    began = time.monotonic()
    run = _Run(config, passwords, purpose, now, progress)
    generation = 0
    try:
        with only_build(config, key) as place:
            path = state_path(place.path)
            state = read_state(path)
            if purpose is Purpose.SCHEDULED and state.held:
                return _waiting(began, state.held)
            run.remember(state)
            try:
                accepted = state.refused if purpose is Purpose.ACCEPT else None
                whole = run.judged(place, extent, accepted)
                if purpose is not Purpose.DRY_RUN:
                    generation = run.put(place, whole)
                    profiles = {reading.profile: asdict(reading) for reading in run.readings}
                    state = state.taken(now, time.monotonic() - began, profiles, run.kind)
                    state = dataclasses.replace(state, bad=run.memory.plain())
                    write_state(path, state, place.owner, place.group)
                    settle(config, run.written)
                    for arrival in run.arrivals:
                        push.settle(config, arrival, place)
            except (LdapFailure, SnapshotError, _Refusal) as error:
                reason, why, cure = _told(error)
                if purpose is not Purpose.DRY_RUN:
                    kept = error.refused.plain() if isinstance(error, _Refusal) else {}
                    state = state.failed(now, reason, why, cure, kept)
                    state = dataclasses.replace(state, bad=run.memory.plain())
                    write_state(path, state, place.owner, place.group)
                raise
            finally:
                forget(run.written)
                if purpose is not Purpose.DRY_RUN:
                    push.set_aside(run.aside)
    except (LdapFailure, SnapshotError, _Refusal) as error:
        reason, why, cure = _told(error)
    else:
        reason = why = cure = ""
    return Outcome(
        reason, why, cure, generation, time.monotonic() - began, run.numbers, dict(run.tally.skipped),
        tuple(run.tally.examples), tuple(asdict(reading) for reading in run.readings), asdict(run.found),
        unchanged=run.found.none, kind=run.kind if run.readings else "", twice=run.twice, twice_names=run.twice_names,
    )  # fmt: skip


class _Run:
    """One synchronisation on its way: what was read so far, and what that comes to."""

    def __init__(
        self, config: Config, passwords: Mapping[str, str], purpose: Purpose, now: float, progress: Progress
    ) -> None:
        self._config = config
        self._passwords = passwords
        self._purpose = purpose
        self._now = now
        self.memory = Memory({}, now)
        self._last: dict[str, str] = {}
        self._progress = progress
        self._known = self._key = b""
        self._before = 0
        self._wants_names = purpose is Purpose.DRY_RUN or config.directory.names_max_age_s > 0
        self.arrivals: list[Arrival] = []
        self.aside: list[tuple[Path, str]] = []
        self.written: list[Path] = []
        self.numbers: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        self.tally = Tally()
        self.readings: list[Reading] = []
        self.found = Difference()
        self._primaries: list[Gathered] = []
        self.twice = 0
        self.twice_names: tuple[str, ...] = ()

    def remember(self, state: State) -> None:
        """How the servers did before, and which one was read."""
        self.memory = Memory(state.bad, self._now)
        self._last = {name: str(reading.get("server", "")) for name, reading in state.profiles.items()}

    @property
    def kind(self) -> str:
        """How the directories were read."""
        return INCREMENTAL if any(reading.kind == INCREMENTAL for reading in self.readings) and not any(
            reading.kind == FULL and reading.pages for reading in self.readings
        ) else FULL  # fmt: skip

    def judged(self, place: Place, extent: Extent, accepted: Mapping[str, Any] | None) -> Whole:
        """Everything, read and found fit to replace what is in place. Raises LdapFailure, SnapshotError, _Refusal."""
        self._known = place.known_key()
        self._key = self._known or new_key()
        whole = self._compared(place, extent)
        refused = self._refused(whole, accepted)
        if refused is not None and any(reading.kind == INCREMENTAL for reading in self.readings):
            # What an operator is to decide about comes from a whole reading.
            forget(self.written)
            self.written.clear()
            self.arrivals.clear()
            self._begin()
            whole = self._compared(place, Extent.EVERYTHING)
            refused = self._refused(whole, accepted)
        if refused is not None:
            raise _Refusal(refused)
        return whole

    def _refused(self, whole: Whole, accepted: Mapping[str, Any] | None) -> Refused | None:
        directory = self._config.directory
        return judge(
            self.found, whole, directory.canaries, directory.restricted_canaries,
            directory.shrink, directory.shrink_floor, accepted,
        )  # fmt: skip

    def _compared(self, place: Place, extent: Extent) -> Whole:
        names: dict[int, str] | None = {} if self._wants_names else None
        whole = Whole(self._parts(place, extent, names), self._key, names)
        _give_back()
        self.tally.skipped.update(unlisted(self._config, whole))
        self.twice = len(whole.twice)
        if names:
            self.twice_names = tuple(sorted(names[h] for h in whole.twice if h in names)[:EXAMPLES])
        old = _in_place(place, self._known)
        self.found = difference(old, whole)
        self._before = old.generation if old is not None else 0
        del old  # its memory is needed
        if self._before and self.found.removed:
            self.found.removed_names = named.gone(self._config, self._before, whole, NAMED)
        self.numbers = counts(whole)
        return whole

    def _parts(self, place: Place, extent: Extent, names: dict[int, str] | None) -> list[Collection | Ledger]:
        """The files, whose overrides come over everything, then all directories, then what was pushed."""
        config, tally, key = self._config, self.tally, self._key
        files, left_out = gather(config, day_of(self._now))
        tally.skipped.update(left_out.skipped)
        tally.examples += left_out.examples
        parts: list[Collection | Ledger] = [files]
        for profile in config.directory.readings:
            kept = self._kept(profile, extent)
            password = self._passwords[profile.name]
            came = read_profile(
                config, profile, password, tally, self._progress, key, names, kept,
                self.memory, self._last.get(profile.name, ""),
            )  # fmt: skip
            self.readings.append(came.reading)
            parts.append(came.ledger)
            if came.ledger.primaries is not None:
                self._primaries.append(came.ledger.primaries)
            if self._purpose is not Purpose.DRY_RUN and not self._always and not came.mark.why:
                full = self._now if isinstance(kept, str) or came.reading.kind == FULL else kept.full
                self.written.append(
                    write(config, profile, place, key, Kept(came.ledger, came.mark, full, came.skipped))
                )
        parts.append(self._arrived(place))
        return parts

    @property
    def _always(self) -> bool:
        """Whether every reading is a full one, so that nothing need be kept."""
        return self._wants_names or self._config.directory.full_every_s <= 0

    def _kept(self, profile: LdapProfile, extent: Extent) -> Kept | str:
        if extent is Extent.EVERYTHING or self._purpose in {Purpose.ACCEPT, Purpose.DRY_RUN}:
            return "asked for"
        if self._always:
            return "names are kept" if self._wants_names else "full_every_s = 0"
        if self._config.senders.rewrite != "off" and not primary.is_there(self._config, self._key):
            return "the primary addresses are not there"
        kept = load(self._config, profile, self._key)
        if not isinstance(kept, str) and not 0 <= self._now - kept.full < self._config.directory.full_every_s:
            return "the last full one is full_every_s ago"
        return kept

    def _arrived(self, place: Place) -> Collection:
        """What was pushed. Raises LdapFailure."""
        collection = Collection()
        for source in self._config.directory.push:
            began = time.monotonic()
            arrival = push.arrive(self._config, source, place, self._now, self.aside)
            used = push.take(arrival, Ours.of(self._config), collection, self.tally)
            self.arrivals.append(arrival)
            said = tuple(f"{path}: {why}" for path, why in arrival.aside)
            known = arrival.header.addresses
            took = time.monotonic() - began
            self.readings.append(Reading(source.name, str(source.folder), known, 0, used, took, None, said))
        return collection

    def put(self, place: Place, whole: Whole) -> int:
        """Put it in place; its generation. Raises SnapshotError and OSError."""
        config, arrivals = self._config, self.arrivals
        if self._before and not self.found.none:
            history.keep(place, self._before, config.directory.history)
        created = min(self._now, *(arrival.header.created for arrival in arrivals)) if arrivals else self._now
        said = {**origin(config), "counts": self.numbers, "skipped": dict(self.tally.skipped)}
        said["directories"] = config.directory.scheduled_names
        if config.senders.rewrite == "off":
            primary.forget(place)
        else:  # before the snapshot, which is what workers look for
            primary.save(place, self._key, self._primaries, whole.hashes, self._now)
        same = bool(self._before) and self.found.none
        generation = replace_whole(place, whole, self._key, created, said, new_key=not self._known, unchanged=same)
        named.keep(config, place, generation, whole.named(), self._before if same else None)
        return generation


def _give_back() -> None:
    """What many small tables took goes back to the system; the process would keep it, and the snapshots need room."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


class _Refusal(Exception):
    def __init__(self, refused: Refused) -> None:
        super().__init__(f"{refused}; the snapshot stays as it is")
        self.refused = refused


def _waiting(began: float, held: str) -> Outcome:
    return Outcome("", "", "", 0, time.monotonic() - began, {}, {}, (), (), {}, unchanged=True, held=held)


def _told(error: LdapFailure | SnapshotError | _Refusal) -> tuple[str, str, str]:
    match error:
        case LdapFailure():
            return error.reason, str(error), error.cure
        case _Refusal():
            return error.refused.reason, str(error), CURES[error.refused.reason]
        case _:
            return Reason.SOURCES, str(error), CURES[Reason.SOURCES]


def _in_place(place: Place, key: bytes) -> Snapshot | None:
    """The snapshot to compare with; none when it cannot be read, which a good reading mends."""
    try:
        return Snapshot.open(place.path, key)
    except SnapshotError:
        return None


def failed(config: Config, now: float, reason: Reason, why: str) -> Outcome:
    """Remember a reading that ended without a word: it was killed at its deadline, or crashed. Never raises."""
    cure = CURES[reason]
    path = state_path(config.snapshot_path)
    with suppress(OSError):
        status = os.stat(config.snapshot_path.parent)
        write_state(path, read_state(path).failed(now, reason, why, cure, {}), -1, status.st_gid)
    return Outcome(reason, why, cure, 0, 0.0, {}, {}, (), (), {})
