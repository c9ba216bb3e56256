"""Owns: the names behind the generations, in a folder of its own, off by default (rows R9 and R17).

A snapshot holds hashes, so what a generation lacks can be counted and not named. With ``directory.names_max_age_s`` each
generation's addresses are kept in plain text, compressed, in ``names/GENERATION`` beside the snapshot: mode 0600, of the user
who builds, for nobody else. They go when their generation was replaced longer ago than that, or is not kept any more, or when it is
switched off. Must not decide anything; without the names everything works as before.
"""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from relay.config.schema import Config
from relay.directory import history
from relay.directory.build import Place
from relay.directory.layout import SnapshotError
from relay.directory.snapshot import ACCEPT, EXACT, NEEDS_AUTH, RESTRICTED, Entry, inspect, previous_path
from relay.directory.whole import Whole
from relay.mail.ruling import action_of, last_day

FOLDER: Final = "names"
_LEVEL: Final = 1
"""500,000 addresses in half a second, to a fifth of their size."""
LIST_OCTETS: Final = 1 << 30
"""Most that a list is unfolded to."""
_WORDED: Final = frozenset({"flags", "text", "ruling", "until", "comment", "size_limit", "next_hop"})


class NoNames(Exception):
    """The names of a generation are not there; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Named:
    """What one generation says differently from another: addresses, and for the changed ones what they were and are."""

    old: int
    new: int
    added: dict[str, str]
    removed: dict[str, str]
    changed: dict[str, tuple[str, str]]


Said = Iterable[tuple[str, Entry]]
"""Every address and what is said of it."""


def folder_of(snapshot: Path) -> Path:
    """Where they are."""
    return snapshot.parent / FOLDER


def known(config: Config) -> list[int]:
    """The generations whose names are there, newest first."""
    with suppress(OSError):
        return sorted(map(int, filter(str.isdecimal, os.listdir(folder_of(config.snapshot_path)))), reverse=True)
    return []


def keep(config: Config, place: Place, generation: int, said: Said, was: int | None = None) -> None:
    """Note the names of the generation just put in place, and let old ones go. Raises OSError.

    ``was``: the generation that said exactly the same, whose list goes on under the new number.
    """
    folder = folder_of(place.path)
    if config.directory.names_max_age_s <= 0:
        _drop(folder, known(config))
        return
    _furnish(folder, place)
    file = folder / str(generation)
    if was is None or not (folder / str(was)).exists():
        _write(file, place, said)
    elif was != generation:
        (folder / str(was)).rename(file)
    before = [one for one in known(config) if one < generation]
    if before and was is None:
        with suppress(FileNotFoundError):
            os.utime(folder / str(before[0]))  # its age counts from when it was replaced
    _prune(config, generation)


def keep_again(config: Config, place: Place, old: int, generation: int) -> None:
    """An earlier generation is in place again as ``generation``. Raises OSError."""
    folder = folder_of(place.path)
    with suppress(FileNotFoundError):
        if config.directory.names_max_age_s > 0:
            (folder / str(generation)).unlink(missing_ok=True)
            os.link(folder / str(old), folder / str(generation))


def _prune(config: Config, current: int) -> None:
    folder = folder_of(config.snapshot_path)
    kept = {header.generation for _, header in history.generations(config.snapshot_path)} | {current}
    with suppress(SnapshotError):
        kept.add(inspect(previous_path(config.snapshot_path)).generation)
    oldest = time.time() - config.directory.names_max_age_s
    gone = [
        one for one in known(config)
        if one not in kept or (one != current and (folder / str(one)).stat().st_mtime < oldest)
    ]  # fmt: skip
    _drop(folder, gone)


def _drop(folder: Path, generations: Iterable[int]) -> None:
    for generation in generations:
        (folder / str(generation)).unlink(missing_ok=True)


def _furnish(folder: Path, place: Place) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.lstat(folder).st_uid == os.geteuid():
        os.chown(folder, place.owner, -1, follow_symlinks=False)
        folder.chmod(0o700)


def _write(file: Path, place: Place, said: Said) -> None:
    beside = file.with_name(f".{file.name}.new")
    beside.unlink(missing_ok=True)
    words: dict[Entry, str] = {}
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as raw:
        with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=_LEVEL, filename="", mtime=0) as packed:
            for address, entry in said:
                if not entry.flags & EXACT:
                    if entry not in words:
                        words[entry] = json.dumps(described(entry), ensure_ascii=False)
                    packed.write(f"{words[entry]}\t{address}\n".encode())
        raw.flush()
        os.fchown(raw.fileno(), place.owner, -1)
    beside.rename(file)


def described(entry: Entry) -> str:
    """An entry in words: everything in which two can differ."""
    said = [
        word
        for flag, word in (
            (ACCEPT, "recipient"),
            (RESTRICTED, "restricted sender"),
            (NEEDS_AUTH, "needs authentication"),
        )
        if entry.flags & flag
    ]
    if entry.text:
        said.append(f'text "{entry.text}"')
    if entry.size_limit:
        said.append(f"at most {entry.size_limit} octets")
    if entry.next_hop:
        said.append(f"by {entry.next_hop}")
    if entry.ruling is not None:
        said.append(f"ruled {action_of(entry.ruling)}{f' until {last_day(entry.until)}' if entry.until else ''}")
    said += [
        f"{field.name} {getattr(entry, field.name)}"
        for field in fields(entry)
        if field.name not in _WORDED and getattr(entry, field.name)
    ]
    return ", ".join(said)


def read(config: Config, generation: int) -> dict[str, str]:
    """What each address was said to be in that generation. Raises NoNames."""
    file = folder_of(config.snapshot_path) / str(generation)
    found: dict[str, str] = {}
    try:
        with gzip.open(file) as packed:
            left = LIST_OCTETS
            for line in packed:
                left -= len(line)
                words, _, address = line.decode().rstrip("\n").partition("\t")
                found[address] = json.loads(words)
                if left < 0:
                    raise ValueError
    except FileNotFoundError:
        raise NoNames(_absent(config, generation)) from None
    except (gzip.BadGzipFile, ValueError, EOFError, zlib.error):
        raise NoNames(f"{file}: is damaged; remove it, the next generations have lists of their own") from None
    except OSError as error:
        raise NoNames(f"{file}: cannot be read: {error.strerror or error}; run this as root") from None
    return found


def _absent(config: Config, generation: int) -> str:
    if config.directory.names_max_age_s <= 0:
        return (
            "the names of generations are not kept; write directory.names_max_age_s = 604800.0 to keep them for a week "
            "(plain text, readable to root and process.hub_user alone)"
        )
    there = ", ".join(map(str, known(config))) or "none yet"
    return f"the names of generation {generation} are not there; there are: {there}"


def compare(config: Config, old: int, new: int) -> Named:
    """The difference by name. Raises NoNames."""
    before, now = read(config, old), read(config, new)
    return Named(
        old, new,
        {address: words for address, words in now.items() if address not in before},
        {address: words for address, words in before.items() if address not in now},
        {address: (before[address], words) for address, words in now.items() if before.get(address, words) != words},
    )  # fmt: skip


def gone(config: Config, generation: int, whole: Whole, most: int) -> list[str]:
    """Addresses of a generation that a reading has not, no more than ``most``; none when its names are not there."""
    try:
        before = read(config, generation)
    except NoNames:
        return []
    return sorted(address for address in before if whole.entry(address) is None)[:most]
