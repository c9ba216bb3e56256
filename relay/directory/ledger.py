"""Owns: what one directory says, entry by entry, as hashes alone: the form in which a reading is gathered and kept.

A row is an entry: a number made of its unique id, and the hashes of its addresses, each with its kind (attributes and
domain). Packed arrays, because half a million entries as objects would take half a gigabyte. No readable address is in it,
unless somebody asks for names. Must not ask a directory, nor touch a file.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import accumulate
from typing import Final, NamedTuple

from relay.directory.key import address_hasher
from relay.directory.layout import SnapshotError
from relay.directory.primary import Gathered
from relay.directory.snapshot import RECORDS, Entry

KINDS: Final = 4 * RECORDS
"""Most kinds: a snapshot holds RECORDS sets of attributes, and few of them occur in more than a few domains."""


class Kind(NamedTuple):
    """What is said of an address, and the domain it counts for."""

    entry: Entry
    domain: str


def too_many() -> SnapshotError:
    """There are more sets of attributes than a snapshot can hold."""
    return SnapshotError(
        f"the sources give more than {RECORDS} different sets of attributes; "
        "restriction texts that differ for every account are the likely cause"
    )


class Ledger:
    """Rows. ``names`` maps hashes to addresses where somebody wants to read them; None where nobody does."""

    __slots__ = ("_closed", "_numbers", "hash_of", "hashes", "keys", "kinds", "names", "primaries", "sizes", "table")

    def __init__(self, key: bytes, names: dict[int, str] | None = None) -> None:
        self.keys = array("Q")
        self.sizes = array("I")
        """Addresses of each row."""
        self.hashes = array("Q")
        self.kinds = array("I")
        """For each address its place in ``table``."""
        self.table: list[Kind] = []
        self.names = names
        self.primaries: Gathered | None = None
        """Which addresses are primary ones, where somebody wants to know."""
        self.hash_of: Final[Callable[[str], int]] = address_hasher(key)
        self._numbers: dict[Kind, int] = {}
        self._closed = 0

    def kind(self, entry: Entry, domain: str) -> int:
        """The number of a kind. Raises SnapshotError when there are too many."""
        kind = Kind(entry, domain)
        number = self._numbers.get(kind)
        if number is None:
            number = len(self.table)
            if number >= KINDS:
                raise too_many()
            self._numbers[kind] = number
            self.table.append(kind)
        return number

    def add(self, address: str, entry: Entry) -> None:
        """An address, in any case, of the entry that is being read. Raises as ``kind``."""
        self.add_all((address.lower(),), entry)

    def add_all(self, addresses: Iterable[str], entry: Entry) -> None:
        """Several in lower case that have their attributes in common."""
        for address in addresses:
            hashed = self.hash_of(address)
            kind = self.kind(entry, address.rpartition("@")[2])
            if hashed in self.hashes[self._closed :] and kind in self.kinds[self._closed :]:
                continue  # mail and proxyAddresses say the same
            self.hashes.append(hashed)
            self.kinds.append(kind)
            if self.names is not None:
                self.names[hashed] = address

    def end_row(self, key: int) -> None:
        """What was added since the last row belongs to the entry with this key."""
        self.keys.append(key)
        self.sizes.append(len(self.hashes) - self._closed)
        self._closed = len(self.hashes)

    def named(self) -> Iterator[tuple[str, Entry]]:
        """Every address and what is said of it; only of a ledger with ``names``."""
        names = self.names or {}
        for hashed, kind in zip(self.hashes, self.kinds, strict=True):
            yield names[hashed], self.table[kind].entry

    def drop(self, keys: Collection[int]) -> int:
        """Take out the rows with these keys; how many there were."""
        gone = [row for row, key in enumerate(self.keys) if key in keys]
        if not gone:
            return 0
        ends = array("Q", accumulate(self.sizes))
        before = (self.keys, self.sizes, self.hashes, self.kinds)
        self.keys, self.sizes, self.hashes, self.kinds = array("Q"), array("I"), array("Q"), array("I")
        row = address = 0
        for out in [*gone, len(before[0])]:
            end = ends[out - 1] if out else 0
            self.keys += before[0][row:out]
            self.sizes += before[1][row:out]
            self.hashes += before[2][address:end]
            self.kinds += before[3][address:end]
            row, address = out + 1, ends[out] if out < len(ends) else end
        self._closed = len(self.hashes)
        return len(gone)

    def take(self, other: Ledger) -> None:
        """The rows of another ledger, which must have other keys. Raises as ``kind``."""
        numbers = [self.kind(*kind) for kind in other.table]
        self.keys += other.keys
        self.sizes += other.sizes
        self.hashes += other.hashes
        self.kinds.extend(map(numbers.__getitem__, other.kinds))
        if other.primaries is not None:
            if self.primaries is None:
                self.primaries = other.primaries
            else:
                self.primaries.merge(other.primaries)
        self._closed = len(self.hashes)

    def adopt(self, table: Iterable[Kind], *columns: bytes | memoryview) -> None:
        """Fill an empty ledger with kept columns: keys, sizes, hashes, kinds. Raises ValueError when they do not fit."""
        for kind in table:
            self.kind(*kind)
        for column, data in zip((self.keys, self.sizes, self.hashes, self.kinds), columns, strict=True):
            column.frombytes(data)
        if (
            len(self.keys) != len(self.sizes)
            or len(self.hashes) != len(self.kinds)
            or sum(self.sizes) != len(self.hashes)
        ):
            raise ValueError("the columns have different lengths")
        if self.kinds and max(self.kinds) >= len(self.table):
            raise ValueError("a kind is not there")
        self._closed = len(self.hashes)
