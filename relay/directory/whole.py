"""Owns: everything that sources and directories say, put together: each hash once, in order, with its kind.

Of several words about one address flags add up, and of two texts the one of the later source counts. Pure. Must not judge
(``directory.guard``), nor know the form of a snapshot (``directory.encode``).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from relay.directory.key import address_hasher
from relay.directory.ledger import Kind, Ledger
from relay.directory.snapshot import Entry
from relay.directory.sources import Collection, merged, takes

_BUCKET_BITS: Final = 8
"""Sorting in 256 parts keeps the objects that it takes to a 256th of them."""
_SHIFT: Final = 64 - _BUCKET_BITS
_STEP: Final = 1 << 16


class Whole:
    """``hashes`` ascend and are unique, ``kinds`` are places in ``table``; ``names`` as in ``Ledger``."""

    __slots__ = ("_hash", "hashes", "kinds", "names", "table", "times", "twice")

    def __init__(self, parts: Iterable[Collection | Ledger], key: bytes, names: dict[int, str] | None = None) -> None:
        """The parts in their order. Ledgers are empty after it: their memory is needed."""
        self._hash: Final[Callable[[str], int]] = address_hasher(key)
        self.table: list[Kind] = []
        self.names = names
        self.twice = array("Q")
        """Addresses that stand on two entries of one directory."""
        hashes, kinds = _buckets("Q"), _buckets("I")
        directories: set[int] = set()
        ranks: list[tuple[int, str, str, int]] = []
        for place, part in enumerate(parts):
            offset = len(self.table)
            if isinstance(part, Collection):
                self._take(part, hashes, kinds)
                ranks += [(place, "", "", number) for number in range(offset, len(self.table))]
                continue
            directories.add(place)
            self.table += part.table
            # Within a directory no entry is the later one: whatever the server's order, the outcome is to be the same.
            ranks += [(place, e.text, e.next_hop, e.size_limit) for e, _ in part.table]
            part.keys, part.sizes = array("Q"), array("I")
            while part.hashes:  # from the end, so that its memory goes while that of the buckets comes
                start = max(0, len(part.hashes) - _STEP)
                for hashed, kind in zip(part.hashes[start:], part.kinds[start:], strict=True):
                    bucket = hashed >> _SHIFT
                    hashes[bucket].append(hashed)
                    kinds[bucket].append(kind + offset)
                del part.hashes[start:], part.kinds[start:]
        self.hashes, self.kinds = array("Q"), array("I")
        joined: dict[tuple[int, ...], int] = {}
        for bucket in range(1 << _BUCKET_BITS):
            found, says = hashes[bucket], kinds[bucket]
            hashes[bucket], kinds[bucket] = array("Q"), array("I")
            of = dict(zip(found, says, strict=True))
            if len(of) != len(found):
                several = Counter(
                    (h, place) for h, k in zip(found, says, strict=True) if (place := ranks[k][0]) in directories
                )
                self.twice.extend({hashed for (hashed, _), times in several.items() if times > 1})
                of = self._joined(zip(found, says, strict=True), ranks, joined)
            order = sorted(of)
            self.hashes.extend(order)
            self.kinds.extend(map(of.__getitem__, order))
        self.times: Final = Counter(self.kinds)
        """How many addresses there are of each kind."""

    def _take(self, collection: Collection, hashes: list[array[int]], kinds: list[array[int]]) -> None:
        numbers: dict[tuple[int, str], int] = {}
        for address, record in collection.addresses.items():
            domain = address.rpartition("@")[2]
            kind = numbers.get((record, domain))
            if kind is None:
                kind = numbers[record, domain] = len(self.table)
                self.table.append(Kind(collection.records[record], domain))
            hashed = self._hash(address)
            hashes[hashed >> _SHIFT].append(hashed)
            kinds[hashed >> _SHIFT].append(kind)
            if self.names is not None:
                self.names[hashed] = address

    def _joined(
        self,
        said: Iterable[tuple[int, int]],
        ranks: list[tuple[int, str, str, int]],
        joined: dict[tuple[int, ...], int],
    ) -> dict[int, int]:
        """Of hashes that come more than once, a kind that says it all."""
        every: dict[int, list[int]] = {}
        for hashed, kind in said:
            every.setdefault(hashed, []).append(kind)
        found: dict[int, int] = {}
        for hashed, several in every.items():
            kind = several[0]
            if len(set(several)) > 1:
                parts = tuple(sorted(set(several), key=ranks.__getitem__))
                known = joined.get(parts)
                if known is None:
                    entry, domain = self.table[parts[0]]
                    for part in parts[1:]:
                        entry = merged(entry, self.table[part].entry)
                    known = joined[parts] = len(self.table)
                    self.table.append(Kind(entry, domain))
                kind = known
            found[hashed] = kind
        return found

    def entry(self, address: str) -> Entry | None:
        """What is said of an address in any case."""
        wanted = self._hash(address.lower())
        place = bisect_left(self.hashes, wanted)
        if place < len(self.hashes) and self.hashes[place] == wanted:
            return self.table[self.kinds[place]].entry
        return None

    def named(self) -> Iterator[tuple[str, Entry]]:
        """Every address and what is said of it, as far as its name is known."""
        names = self.names or {}
        for hashed, kind in zip(self.hashes, self.kinds, strict=True):
            if hashed in names:
                yield names[hashed], self.table[kind].entry

    def accepts(self) -> bool:
        """Whether there is anybody to whom mail is taken."""
        return any(takes(self.table[kind].entry) for kind in self.times)


def _buckets(code: str) -> list[array[int]]:
    return [array(code) for _ in range(1 << _BUCKET_BITS)]
