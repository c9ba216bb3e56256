"""Owns: making a snapshot and putting it in place of the one before, so that at every moment a good one is there.

Order: write beside, fsync, read back, keep the present one as ``snapshot.previous`` (hard link), rename, fsync the
folder. Must not touch a snapshot that is in place in any other way: workers may be reading it.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import pwd
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.config.schema import Config
from relay.directory.encode import HashCollision, encode, encode_sorted
from relay.directory.key import address_hasher, read_key, sync_folder, write_key
from relay.directory.key import new_key as fresh_key
from relay.directory.layout import SnapshotError
from relay.directory.ledger import too_many
from relay.directory.snapshot import RECORDS, Entry, Snapshot, inspect, previous_path
from relay.directory.sources import Collection, Tally, gather
from relay.directory.whole import Whole

KEYS: Final = 3
"""Keys tried before a build gives up: a second collision in a row means a fault and not bad luck."""

SNAPSHOT_MODE: Final = 0o640
"""The workers' group reads it, nobody else: texts of restrictions are in clear."""


@dataclass(frozen=True, slots=True)
class Built:
    """What a build did. ``skipped`` counts by reason, ``examples`` are the first bad lines as ``file:line: reason``."""

    snapshot: Snapshot
    skipped: Counter[str]
    examples: tuple[str, ...]
    new_key: bool


def build(
    config: Config,
    created: float,
    hasher: Callable[[bytes], Callable[[str], int]] = address_hasher,
    kept: Keeper | None = None,
) -> Built:
    """Read the sources, make the next generation, put it in place. ``created``: seconds since 1970.

    Raises SnapshotError, and then the snapshot in use is as it was. ``hasher`` is there for a test of collisions, ``kept``
    hears of what is in place (``directory.names.keep``).
    """
    with only_build(config) as place:
        collection, tally = gather(config, day_of(created))
        built = replace(place, collection, tally, created, origin(config), hasher)
        if kept is not None:
            kept(config, place, built.snapshot.generation, collection.said())
        return built


def day_of(now: float) -> dt.date:
    """The day (UTC) that decides which rulings have ended."""
    return dt.datetime.fromtimestamp(now, dt.UTC).date()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a snapshot goes, and whose it becomes; -1 leaves owner or group as they come."""

    path: Path
    key_path: Path
    owner: int
    group: int
    key: bytes = b""
    """Where the builder was handed it: the file may be somebody else's to read."""

    def known_key(self) -> bytes:
        """The key there is; empty when there is none yet. Raises SnapshotError."""
        return self.key or (read_key(self.key_path) if self.key_path.exists() else b"")


Keeper = Callable[[Config, Place, int, Iterable[tuple[str, Entry]]], None]
"""Notes the names of a generation."""


@contextmanager
def only_build(config: Config, key: bytes = b"") -> Iterator[Place]:
    """The place to build in, with the folders made, and nobody else building. Raises SnapshotError."""
    path, key_path = config.snapshot_path, config.key_path
    try:
        owner, group = _hub_owner(config), _workers_group(config)
        for folder in {path.parent, key_path.parent}:
            _make_folder(folder, group)
        with _only_build(path, owner):
            yield Place(path, key_path, owner, group, key)
    except OSError as error:
        raise SnapshotError(
            f"{error.filename or path}: {error.strerror}; the snapshot stays as it is; "
            "check owner, mode and free space of the folder"
        ) from None


def replace(
    place: Place,
    collection: Collection,
    tally: Tally,
    created: float,
    origin: dict[str, object],
    hasher: Callable[[bytes], Callable[[str], int]] = address_hasher,
) -> Built:
    """Put the collection in place as the next generation. Raises SnapshotError and OSError, and then the snapshot in use is
    as it was.
    """
    path = place.path
    key = place.known_key()
    new_key = not key
    origin["skipped"] = dict(tally.skipped)
    for _ in range(KEYS):
        key = key or fresh_key()
        try:
            pieces = encode(
                collection.addresses, collection.records, key, next_generation(path), created, origin, hasher
            )
            break
        except HashCollision:
            key, new_key = b"", True
    else:
        raise SnapshotError(f"{path}: addresses share a hash under {KEYS} keys in a row; this is a fault, report it")
    snapshot = put(place, pieces, key, new_key=new_key)
    return Built(snapshot, tally.skipped, tuple(tally.examples), new_key)


def replace_whole(
    place: Place, whole: Whole, key: bytes, created: float, origin: dict[str, object], *, new_key: bool, unchanged: bool
) -> int:
    """The same with what was read from directories, hashed with ``key``; its generation. ``unchanged``: it says the same as
    the one in place, which then needs not be kept.
    """
    numbers: dict[Entry, int] = {}
    table = [
        numbers.setdefault(entry, len(numbers)) if n in whole.times else 0 for n, (entry, _) in enumerate(whole.table)
    ]
    if len(numbers) > RECORDS:
        raise too_many()
    index = array("B" if len(numbers) <= 256 else "H", map(table.__getitem__, whole.kinds))
    pieces = encode_sorted(whole.hashes, index, list(numbers), key, next_generation(place.path), created, origin)
    return put(place, pieces, key, new_key=new_key, keep_previous=not unchanged).generation


def put(
    place: Place, pieces: Sequence[bytes | memoryview], key: bytes, *, new_key: bool = False, keep_previous: bool = True
) -> Snapshot:
    """Write a snapshot's pieces and put them in place. Raises SnapshotError and OSError."""
    path = place.path
    beside = path.with_name(f".{path.name}.new")
    _write(beside, pieces, place)
    # Read back before it replaces anything: a disk that returns something else must not win.
    Snapshot.open(beside, key)
    if new_key:
        write_key(place.key_path, key)
        if place.owner != -1:
            os.chown(place.key_path, place.owner, -1, follow_symlinks=False)
    if keep_previous:
        _keep_previous(path)
    os.rename(beside, path)
    sync_folder(path.parent)
    return Snapshot.open(path, key)


def _write(beside: Path, pieces: Sequence[bytes | memoryview], place: Place) -> None:
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fchown(file.fileno(), place.owner, place.group)
        os.fchmod(file.fileno(), SNAPSHOT_MODE)
        os.fsync(file.fileno())


def _keep_previous(path: Path) -> None:
    """Keep the present generation under its second name, unless it is damaged: then the older one is worth more."""
    try:
        inspect(path)
    except SnapshotError:
        return
    beside = path.with_name(f".{path.name}.previous.new")
    beside.unlink(missing_ok=True)
    os.link(path, beside)
    os.rename(beside, previous_path(path))
    # Where both names are already one file, rename(2) does nothing and leaves both.
    beside.unlink(missing_ok=True)


def created_of(path: Path) -> float | None:
    """When the snapshot in place was built; None when there is none that can be used."""
    try:
        return inspect(path).created
    except SnapshotError:
        return None


def next_generation(path: Path) -> int:
    """Above everything in place: generations count up, whatever becomes of a file."""
    newest = 0
    for known in (path, previous_path(path)):
        try:
            newest = max(newest, inspect(known).generation)
        except SnapshotError:
            continue
    return newest + 1


def origin(config: Config) -> dict[str, object]:
    """What a snapshot says about where it came from."""
    return {
        "sources": [{"type": source.type, "path": str(source.path)} for source in config.directory.sources],
        "case_sensitive": sorted(
            name for domain in config.domain if domain.case == "sensitive" for name in domain.names
        ),
    }


def _workers_group(config: Config) -> int:
    """The group that must be able to read the snapshot; -1 leaves it as it comes. Only root can give files away."""
    if os.geteuid() != 0 or not config.process.user:
        return -1
    try:
        return pwd.getpwnam(config.process.user).pw_gid
    except KeyError:
        raise SnapshotError(
            f"process.user: there is no user {config.process.user!r}; make it, "
            'or set process.user = "" to keep the user that starts the relay'
        ) from None


def _hub_owner(config: Config) -> int:
    """The hub reads directories on its schedule, so what a command of root's builds has to be the hub's to replace."""
    if os.geteuid() != 0 or not config.process.hub_user or not config.directory.scheduled:
        return -1
    try:
        return pwd.getpwnam(config.process.hub_user).pw_uid
    except KeyError:
        raise SnapshotError(
            f"process.hub_user: there is no user {config.process.hub_user!r}; make it, "
            'or set process.hub_user = "" to keep the user that starts the relay'
        ) from None


def _make_folder(folder: Path, group: int) -> None:
    """As the supervisor makes it: the workers' group may enter, and what is built there is that group's."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        os.chown(folder, -1, group)
        folder.chmod(0o750 if group == -1 else 0o2750)


@contextmanager
def _only_build(path: Path, owner: int) -> Iterator[None]:
    """Two builds at once would write the same file; the second is told so instead of waiting unseen."""
    descriptor = os.open(
        path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        if owner != -1:
            os.fchown(descriptor, owner, -1)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnapshotError(f"{path}: another build is running; wait for it and try again") from None
        yield
    finally:
        os.close(descriptor)
