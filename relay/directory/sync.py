"""Owns: one synchronisation: read every source and directory, compare, put in place or refuse, remember how it went.

The same function serves the schedule and the commands. Must run where it may be killed at any moment: a snapshot is put in
place by one rename (``directory.build``). Only a whole, successful reading ever replaces a snapshot (rows R5, R6).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from relay.config.schema import Config
from relay.directory import history, push
from relay.directory import names as named
from relay.directory.build import Place, day_of, only_build, origin, replace_whole
from relay.directory.failure import CURES, LdapFailure, Reason
from relay.directory.guard import NAMED, Difference, Refused, counts, difference, judge
from relay.directory.key import new_key
from relay.directory.layout import SnapshotError
from relay.directory.ledger import Ledger
from relay.directory.placement import unlisted
from relay.directory.push import Arrival
from relay.directory.reading import Progress, Reading, read_profile
from relay.directory.snapshot import Snapshot
from relay.directory.sources import EXAMPLES, Collection, Ours, Tally, gather
from relay.directory.state import read_state, state_path, write_state
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
) -> Outcome:
    """Do it; what is wrong is in the outcome. ``now``: seconds since 1970. Never raises for what can be expected."""
    began = time.monotonic()
    readings: list[Reading] = []
    arrivals: list[Arrival] = []
    aside: list[tuple[Path, str]] = []
    found, refused = Difference(), None
    tally = Tally()
    numbers: dict[str, int] = {}
    generation = twice = 0
    twice_names: tuple[str, ...] = ()
    try:
        with only_build(config, key) as place:
            path = state_path(place.path)
            state = read_state(path)
            if purpose is Purpose.SCHEDULED and state.held:
                return _waiting(began, state.held)
            try:
                known = place.known_key()
                key = known or new_key()
                wanted = purpose is Purpose.DRY_RUN or config.directory.names_max_age_s > 0
                names: dict[int, str] | None = {} if wanted else None
                parts = _read(config, passwords, tally, readings, progress, now, key, names)
                parts.append(_arrived(config, place, tally, readings, arrivals, aside, now))
                whole = Whole(parts, key, names)
                del parts
                tally.skipped.update(unlisted(config, whole))
                twice = len(whole.twice)
                twice_names = tuple(sorted(names[h] for h in whole.twice if h in names)[:EXAMPLES]) if names else ()
                old = _in_place(place, known)
                found = difference(old, whole)
                before = old.generation if old is not None else 0
                del old  # its memory is needed
                if before and found.removed:
                    found.removed_names = named.gone(config, before, whole, NAMED)
                numbers = counts(whole)
                directory = config.directory
                refused = judge(
                    found, whole, directory.canaries, directory.restricted_canaries,
                    directory.shrink, directory.shrink_floor, state.refused if purpose is Purpose.ACCEPT else None,
                )  # fmt: skip
                if refused is not None:
                    raise _Refusal(refused)
                if purpose is not Purpose.DRY_RUN:
                    if before and not found.none:
                        history.keep(place, before, directory.history)
                    created = min(now, *(arrival.header.created for arrival in arrivals)) if arrivals else now
                    said = {**origin(config), "counts": numbers, "skipped": dict(tally.skipped)}
                    said["directories"] = directory.scheduled_names
                    same = bool(before) and found.none
                    generation = replace_whole(place, whole, key, created, said, new_key=not known, unchanged=same)
                    named.keep(config, place, generation, whole.named(), before if same else None)
                    profiles = {reading.profile: asdict(reading) for reading in readings}
                    state = state.taken(now, time.monotonic() - began, profiles)
                    write_state(path, state, place.owner, place.group)
                    for arrival in arrivals:
                        push.settle(config, arrival, place)
            except (LdapFailure, SnapshotError, _Refusal) as error:
                reason, why, cure = _told(error)
                if purpose is not Purpose.DRY_RUN:
                    kept = refused.plain() if refused is not None else {}
                    state = state.failed(now, reason, why, cure, kept)
                    write_state(path, state, place.owner, place.group)
                raise
            finally:
                if purpose is not Purpose.DRY_RUN:
                    push.set_aside(aside)
    except (LdapFailure, SnapshotError, _Refusal) as error:
        reason, why, cure = _told(error)
    else:
        reason = why = cure = ""
    return Outcome(
        reason, why, cure, generation, time.monotonic() - began, numbers, dict(tally.skipped),
        tuple(tally.examples), tuple(asdict(reading) for reading in readings), asdict(found),
        unchanged=found.none, twice=twice, twice_names=twice_names,
    )  # fmt: skip


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


def _read(
    config: Config,
    passwords: Mapping[str, str],
    tally: Tally,
    readings: list[Reading],
    progress: Progress,
    now: float,
    key: bytes,
    names: dict[int, str] | None,
) -> list[Collection | Ledger]:
    """The files, whose overrides come over everything, then all directories. Raises LdapFailure and SnapshotError."""
    files, left_out = gather(config, day_of(now))
    tally.skipped.update(left_out.skipped)
    tally.examples += left_out.examples
    parts: list[Collection | Ledger] = [files]
    for profile in config.directory.readings:
        one, reading = read_profile(config, profile, passwords[profile.name], tally, progress, key, names)
        readings.append(reading)
        parts.append(one)
    return parts


def _arrived(
    config: Config,
    place: Place,
    tally: Tally,
    readings: list[Reading],
    arrivals: list[Arrival],
    aside: list[tuple[Path, str]],
    now: float,
) -> Collection:
    """What was pushed, which comes last of all. Raises LdapFailure."""
    collection = Collection()
    for source in config.directory.push:
        began = time.monotonic()
        arrival = push.arrive(config, source, place, now, aside)
        used = push.take(arrival, Ours.of(config), collection, tally)
        arrivals.append(arrival)
        said = tuple(f"{path}: {why}" for path, why in arrival.aside)
        known = arrival.header.addresses
        took = time.monotonic() - began
        readings.append(Reading(source.name, str(source.folder), known, 0, used, took, None, said))
    return collection


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
