"""Owns: the form of an intake log's segment on disk: a block with its epoch, then records, each with a checksum.

======  =======================================================================================================
octets  what
======  =======================================================================================================
0       header: magic, epoch (random, new each time the segment is begun again), version of the queue's schema
4096    records, one behind the other: checksum, length of the payload, key, kind; then the payload
======  =======================================================================================================

A record counts when its checksum, which the epoch goes into, is right; the first that is not is the end. So what is left
of an earlier round is never taken for a record of this one. ``put`` carries a message as its rows, ``done`` says that
the message of that key is finished or in the database. Must not know when anything is written or synced.
"""

from __future__ import annotations

import json
import secrets
import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from relay.queue.rows import KeptRows, NewRows, Row

MAGIC: Final = b"DMZINTK1"
START: Final = 4096
"""Records begin on a block of their own: a torn write of the first cannot take the header along."""

_HEADER: Final = struct.Struct("<8sQI")
_RECORD: Final = struct.Struct("<IIQB")
_CHECKED: Final = struct.Struct("<IQB")
_SUM: Final = struct.Struct("<I")
_META: Final = struct.Struct("<I")
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode

DONE_OCTETS: Final = _RECORD.size


class Kind(IntEnum):
    """What a record says."""

    PUT = 1
    DONE = 2


def new_epoch() -> int:
    """Random, positive, fits SQLite's integers."""
    return secrets.randbits(62) + 1


def header(epoch: int, schema: int) -> bytes:
    """The first block of a segment."""
    return _HEADER.pack(MAGIC, epoch, schema).ljust(START, b"\0")


def seed_of(epoch: int) -> int:
    """What the checksums of an epoch start from."""
    return zlib.crc32(epoch.to_bytes(8, "little"))


def _record(seed: int, key: int, kind: int, payload: bytes) -> bytes:
    checked = _CHECKED.pack(len(payload), key, kind)
    return _SUM.pack(zlib.crc32(payload, zlib.crc32(checked, seed))) + checked + payload


def put_record(seed: int, rows: NewRows) -> bytes:
    """A message held in memory."""
    meta = _encode((rows.message, rows.recipients)).encode("ascii")
    assert rows.octets is not None
    return _record(seed, rows.key, Kind.PUT, _META.pack(len(meta)) + meta + rows.octets)


def done_record(seed: int, key: int) -> bytes:
    """The message is finished, or in the database."""
    return _record(seed, key, Kind.DONE, b"")


@dataclass(frozen=True, slots=True)
class Found:
    """A segment as it was left: its epoch, the messages put in it, the keys said to be done in it."""

    epoch: int
    puts: dict[int, KeptRows]
    done: frozenset[int]


def read(path: Path) -> Found | None:
    """What a segment says; None when it was never begun. Raises OSError."""
    octets = path.read_bytes()
    if len(octets) < START:
        return None
    magic, epoch, _ = _HEADER.unpack_from(octets)
    if magic != MAGIC:
        return None
    puts: dict[int, KeptRows] = {}
    done: set[int] = set()
    for kind, key, payload in _records(memoryview(octets), seed_of(epoch)):
        if kind == Kind.PUT:
            puts[key] = _rows(key, payload)
        else:
            done.add(key)
    return Found(epoch, puts, frozenset(done))


def _records(octets: memoryview, seed: int) -> Iterator[tuple[int, int, memoryview]]:
    position = START
    while position + _RECORD.size <= len(octets):
        checksum, length, key, kind = _RECORD.unpack_from(octets, position)
        end = position + _RECORD.size + length
        if end > len(octets) or zlib.crc32(octets[position + _SUM.size : end], seed) != checksum:
            return
        yield kind, key, octets[position + _RECORD.size : end]
        position = end


def _rows(key: int, payload: memoryview) -> KeptRows:
    (length,) = _META.unpack_from(payload)
    message, recipients = json.loads(bytes(payload[_META.size : _META.size + length]))
    kept: list[Row] = [tuple(each) for each in recipients]
    return KeptRows(key, tuple(message), kept, bytes(payload[_META.size + length :]))


def undone(found: Sequence[Found], known: Collection[int]) -> list[KeptRows]:
    """The messages in these segments that nobody is done with, in the order of their keys.

    ``known``: epochs whose messages were taken before; what they say is done still counts.
    """
    done = frozenset().union(*(each.done for each in found))
    fresh = [each for each in found if each.epoch not in known]
    puts = {key: rows for each in fresh for key, rows in each.puts.items() if key not in done}
    return [puts[key] for key in sorted(puts)]


def segments(folder: Path, slot: int | None = None) -> list[Path]:
    """The segments of a worker, or of all."""
    return sorted(folder.glob(f"intake-{'*' if slot is None else slot}-[ab]"))


def segment_name(slot: int, letter: str) -> str:
    """File name of one of a worker's two segments."""
    return f"intake-{slot}-{letter}"


def read_all(paths: list[Path]) -> list[Found]:
    """Those of the segments that were begun. Raises OSError."""
    return [found for path in paths if (found := read(path)) is not None]
