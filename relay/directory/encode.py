"""Owns: turning gathered addresses into the sections of a snapshot.

Pure: no file, clock or randomness. The counterpart of ``directory.snapshot``, which documents the sections.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, islice
from operator import eq
from typing import Any, Final

from relay.directory.key import address_hasher, key_id
from relay.directory.layout import Header, Need, Section, pack
from relay.directory.snapshot import ACCEPT, RECORD, RESTRICTED, RULING, STRING_LENGTH, Entry
from relay.mail.ruling import action_of

FANOUT_BITS: Final = 20
"""At most a million buckets (4 MB); below that one for some eight addresses, so that three comparisons find one."""

_BUCKET_BITS: Final = 3
_RECORD_BITS: Final = 16


class HashCollision(Exception):
    """Two addresses have one hash under this key: take another key."""


def encode(
    addresses: Mapping[str, int],
    records: Sequence[Entry],
    key: bytes,
    generation: int,
    created: float,
    origin: Mapping[str, Any],
    hasher: Callable[[bytes], Callable[[str], int]] = address_hasher,
) -> list[bytes | memoryview]:
    """The pieces of a snapshot file. ``addresses`` (lower case) give the number of their record.

    Raises HashCollision. ``hasher`` is there for a test that needs one.
    """
    hash_of = hasher(key)
    # Hash and record number in one integer: sorts fast, and takes half the memory of pairs.
    order = [hash_of(address) << _RECORD_BITS | number for address, number in addresses.items()]
    order.sort()
    hashes = array("Q", (item >> _RECORD_BITS for item in order))
    if any(map(eq, hashes, islice(hashes, 1, None))):
        raise HashCollision
    mask = (1 << _RECORD_BITS) - 1
    index = array("B" if len(records) <= 256 else "H", (item & mask for item in order))
    del order
    return encode_sorted(hashes, index, records, key, generation, created, origin)


def encode_sorted(
    hashes: array[int],
    index: array[int],
    records: Sequence[Entry],
    key: bytes,
    generation: int,
    created: float,
    origin: Mapping[str, Any],
) -> list[bytes | memoryview]:
    """The same of hashes that ascend and are unique, each with the number of its record."""
    carriers = {flag: {n for n, r in enumerate(records) if r.flags & flag} for flag in (ACCEPT, RESTRICTED)}
    times = Counter(index)
    counts = {flag: sum(times[number] for number in carriers[flag]) for flag in carriers}
    table, rulings, strings = _records(records)
    header = Header(generation, created, 0, key_id(key), len(hashes), counts[ACCEPT], counts[RESTRICTED])
    return pack(
        header,
        [
            Section("hashes", Need.REQUIRED, 8, memoryview(hashes).cast("B")),
            Section("fanout", Need.REQUIRED, 4, memoryview(_fanout(hashes)).cast("B")),
            Section("index", Need.REQUIRED, index.itemsize, memoryview(index).cast("B")),
            Section("records", Need.REQUIRED, RECORD.size, table),
            Section("strings", Need.REQUIRED, 1, strings),
            # A relay that does not know rulings must not take the rest for the whole; without any, it may read the file.
            *([Section("rulings", Need.REQUIRED, RULING.size, rulings)] if rulings else []),
            Section("origin", Need.OPTIONAL, 1, json.dumps(origin, ensure_ascii=True).encode("ascii")),
        ],
    )


def _fanout(hashes: array[int]) -> array[int]:
    bits = min(max(len(hashes).bit_length() - _BUCKET_BITS, 0), FANOUT_BITS)
    sizes = [0] * ((1 << bits) + 1)
    shift = 64 - bits
    for value in hashes:
        sizes[(value >> shift) + 1] += 1
    return array("I", accumulate(sizes))


def _records(records: Sequence[Entry]) -> tuple[bytes, bytes, bytes]:
    """The record table, the rulings, and the texts they point to; place 0 is the empty text."""
    strings = bytearray()
    places: dict[str, int] = {}

    def place(text: str) -> int:
        if text not in places:
            places[text] = len(strings)
            octets = text.encode()
            strings.extend(STRING_LENGTH.pack(len(octets)) + octets)
        return places[text]

    place("")
    table = b"".join(
        RECORD.pack(entry.flags, place(entry.text), place(entry.next_hop), entry.size_limit) for entry in records
    )
    rulings = b"".join(
        RULING.pack(number, place(action_of(entry.ruling)), place(entry.comment), 0, entry.until)
        for number, entry in enumerate(records)
        if entry.ruling is not None
    )
    return table, rulings, bytes(strings)
