"""Owns: which address is the primary one of an account, for senders of outgoing mail (row R15): found, kept, looked up.

Beside the snapshot lies the file ``primary``, only where ``senders.rewrite`` is on: the keyed hash of each further address, and the
primary address it stands for, in clear, because mail goes out under it. The snapshot itself does not change by it. Without the
file, or with a damaged one, senders stay as they are. Must not decide whose mail is rewritten.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from relay.directory.key import address_hasher, key_id, sync_folder
from relay.directory.layout import Header, Need, Section, SnapshotError, pack, read
from relay.mail.address import AddressFault, Mailbox, parse_mailbox, unquoted

if TYPE_CHECKING:
    from relay.config.schema import Config
    from relay.directory.build import Place

FILE: Final = "primary"
_SECTIONS: Final = frozenset(("others", "places", "primaries"))
_MODE: Final = 0o640


def path_of(snapshot: Path) -> Path:
    """Beside the snapshot."""
    return snapshot.with_name(FILE)


class Gathered:
    """What a reading found: for the hash of an address its primary one, "" for one that is primary itself."""

    __slots__ = ("_hash", "of")

    def __init__(self, hash_of: Callable[[str], int]) -> None:
        self._hash = hash_of
        self.of: Final[dict[int, str]] = {}

    def note(self, primary: str, others: Iterable[str]) -> None:
        """One entry. All of them valid addresses, in any case."""
        self.of[self._hash(primary.lower())] = ""
        for other in others:
            self.of.setdefault(self._hash(other.lower()), primary)

    def merge(self, later: Gathered) -> None:
        """Take over what was found later."""
        self.of.update(later.of)


class Primaries:
    """The file in memory: some 40 octets for each further address."""

    __slots__ = ("_hash", "_others", "_places", "_texts")

    def __init__(self, others: array[int], places: array[int], texts: bytes, hash_of: Callable[[str], int]) -> None:
        self._others, self._places, self._texts, self._hash = others, places, texts, hash_of

    def get(self, mailbox: str) -> Mailbox | None:
        """The primary address of an account, for one of its others; None for every other address."""
        return self.by_hash(self._hash(mailbox.lower()))

    def by_hash(self, wanted: int) -> Mailbox | None:
        """The same by the hash."""
        at = bisect_left(self._others, wanted)
        if at == len(self._others) or self._others[at] != wanted:
            return None
        start = self._places[at]
        found = parse_mailbox(self._texts[start : self._texts.index(b"\n", start)].decode())
        return None if isinstance(found, AddressFault) or "@" not in found else unquoted(found)

    def all(self) -> dict[int, str]:
        """Everything, for merging."""
        return {hashed: found for hashed in self._others if (found := self.by_hash(hashed)) is not None}


def load(path: Path, key: bytes) -> Primaries | None:
    """The file, whole and under this key, or None: then senders stay as they are. Raises nothing."""
    try:
        image = read(path, _SECTIONS)
        if image.header.key_id != key_id(key) or set(image.sections) != _SECTIONS:
            return None
        others, places = array("Q"), array("I")
        others.frombytes(image.sections["others"].data)
        places.frombytes(image.sections["places"].data)
        texts = bytes(image.sections["primaries"].data)
    except (SnapshotError, ValueError):
        return None
    if len(others) != len(places) or not texts.endswith(b"\n") or (places and max(places) >= len(texts)):
        return None
    return Primaries(others, places, texts, address_hasher(key))


def is_there(config: Config, key: bytes) -> bool:
    """Whether there is something that a reading of changes alone can be added to."""
    return load(path_of(config.snapshot_path), key) is not None


def save(place: Place, key: bytes, found: Iterable[Gathered], known: array[int], now: float) -> None:
    """Put what was found in place, over what was known of addresses that are there still. Raises OSError.

    ``known``: the hashes of the new snapshot, ascending. So a reading of a few entries changes theirs alone, and an address that
    is gone is forgotten.
    """
    path = path_of(place.path)
    before = load(path, key)
    whole = before.all() if before is not None else {}
    for one in found:
        whole.update(one.of)
    texts = bytearray(b"\n")
    places, others, starts = array("I"), array("Q"), dict[str, int]()
    for hashed in sorted(whole):
        primary = whole[hashed]
        at = bisect_left(known, hashed)
        if primary and at < len(known) and known[at] == hashed:
            if primary not in starts:
                starts[primary] = len(texts)
                texts += primary.encode() + b"\n"
            others.append(hashed)
            places.append(starts[primary])
    pieces = pack(
        Header(0, now, 0, key_id(key), len(others), 0, 0),
        [
            Section("others", Need.REQUIRED, 8, others.tobytes()),
            Section("places", Need.REQUIRED, 4, places.tobytes()),
            Section("primaries", Need.REQUIRED, 1, bytes(texts)),
        ],
    )
    beside = path.with_name(f".{FILE}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fchown(file.fileno(), place.owner, place.group)
        os.fchmod(file.fileno(), _MODE)
        os.fsync(file.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def forget(place: Place) -> None:
    """It is switched off: the addresses go. Never raises."""
    with suppress(OSError):
        path_of(place.path).unlink(missing_ok=True)
