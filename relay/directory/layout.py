"""Owns: the frame of a snapshot file: header, table of sections, checksums; reading it so that nothing can hurt later.

Must not know what the sections hold (``directory.snapshot`` reads them, ``directory.encode`` writes them), nor touch
names in the file system other than the one file it is asked to read.

::

    header   96 octets : magic, version, count of sections, generation, time, size, key id, counts, checksum
    table    56 octets a section: name, required flag, octets an item, offset, length, checksum
    sections one behind the other, each filled up with zeros to a multiple of 8 octets

Numbers are in the machine's own byte order, so that the tables can be used as they lie; on a machine of the other
order the version number reads as another one and the file is refused. The header's checksum covers header and table,
each section's covers the section with its filling: there is no octet in the file that could change unnoticed.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from pathlib import Path
from typing import Final

MAGIC: Final = b"\x89DMZSNAP"
VERSION: Final = 1

FILE_OCTETS: Final = 1 << 30
"""Largest snapshot read: over a hundred million addresses. Bounds what a wrong file can make a worker allocate."""

SECTIONS: Final = 64
"""Most sections in a file: ten times what is known today, small enough to check the table in no time."""

CHECKSUM_OCTETS: Final = 16
_ALIGN: Final = 8
# magic, version, sections, generation, created, size, key id, addresses, recipients, restricted, checksum
_HEADER: Final = struct.Struct("=8sIIQdQ16sQQQ16s")
# name, required, octets an item, offset, length, checksum
_ENTRY: Final = struct.Struct("=16sIIQQ16s")

_REBUILD: Final = "run relay directory build"


class SnapshotError(Exception):
    """A snapshot, its key or its sources cannot be used. The message says what, where and what to do."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a snapshot says about itself. ``created`` in seconds since 1970, ``size`` in octets."""

    generation: int
    created: float
    size: int
    key_id: str
    addresses: int
    recipients: int
    restricted: int


class Need(IntEnum):
    """Whether a reader that does not know a section may use the file."""

    OPTIONAL = 0
    REQUIRED = 1


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the file: ``data`` is a whole number of items of ``item_octets``."""

    name: str
    need: Need
    item_octets: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Image:
    """A verified snapshot, wholly in memory of this process."""

    header: Header
    sections: Mapping[str, Section]


def pack(header: Header, sections: Sequence[Section]) -> list[bytes | memoryview]:
    """The pieces of a file, in order. ``header.size`` is filled in here, whatever the caller put there."""
    position = _HEADER.size + _ENTRY.size * len(sections)
    entries: list[bytes] = []
    bodies: list[bytes | memoryview] = []
    for section in sections:
        name = section.name.encode("ascii")
        if len(name) > 16 or len(section.data) % section.item_octets:
            raise ValueError(f"section {section.name!r} has a long name or a broken last item")
        filling = bytes(-len(section.data) % _ALIGN)
        checksum = _checksum(section.data, filling)
        entries.append(_ENTRY.pack(name, section.need, section.item_octets, position, len(section.data), checksum))
        bodies += [section.data, filling]
        position += len(section.data) + len(filling)
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        len(sections),
        header.generation,
        header.created,
        position,
        header.key_id.encode("ascii"),
        header.addresses,
        header.recipients,
        header.restricted,
        bytes(CHECKSUM_OCTETS),
    )[:-CHECKSUM_OCTETS]
    table = b"".join(entries)
    return [head, _checksum(head, table), table, *bodies]


def read(path: Path, known: frozenset[str]) -> Image:
    """Copy the file into private memory and verify every octet of the copy.

    A copy and not a mapping of the file: a mapped file that someone truncates in place kills its readers with SIGBUS.
    ``known`` are the names of the sections the caller understands. Raises SnapshotError.
    """
    data = memoryview(_copy(path)).toreadonly()
    try:
        return _verify(data, known)
    except _Damage as damage:
        raise SnapshotError(f"{path}: {damage}") from None


class _Damage(Exception):
    """What is wrong with a file, without its name."""


def _copy(path: Path) -> mmap.mmap:
    """The file's octets in an anonymous mapping, which goes back to the system as a whole when it is dropped."""
    try:
        # O_NONBLOCK: a FIFO under this name must not hang a worker.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SnapshotError(f"{path}: there is no snapshot here; {_REBUILD}") from None
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be opened: {error.strerror}; check its owner and mode") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotError(f"{path}: is not a regular file; remove it and {_REBUILD}")
        if status.st_size < _HEADER.size:
            raise SnapshotError(f"{path}: truncated: {status.st_size} octets are less than a header; {_REBUILD}")
        if status.st_size > FILE_OCTETS:
            raise SnapshotError(f"{path}: {status.st_size} octets are more than a snapshot can have; {_REBUILD}")
        copy = mmap.mmap(-1, status.st_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with memoryview(copy) as room:
            filled = 0
            while filled < status.st_size:
                count = os.preadv(descriptor, [room[filled:]], filled)
                if count == 0:
                    raise SnapshotError(f"{path}: truncated while it was read; {_REBUILD}")
                filled += count
        return copy
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error.strerror}; check the disk, then {_REBUILD}") from None
    finally:
        os.close(descriptor)


def _verify(data: memoryview, known: frozenset[str]) -> Image:
    (
        magic,
        version,
        count,
        generation,
        created,
        size,
        key_id,
        addresses,
        recipients,
        restricted,
        checksum,
    ) = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise _Damage(f"is not a snapshot; {_REBUILD}")
    if version != VERSION:
        raise _Damage(f"has format version {version}, this relay reads version {VERSION}; {_REBUILD}")
    if size > len(data):
        raise _Damage(f"truncated: {len(data)} of {size} octets; {_REBUILD}")
    if size < len(data):
        raise _Damage(f"too long: {len(data)} octets instead of {size}; {_REBUILD}")
    table_end = _HEADER.size + _ENTRY.size * count
    if count > SECTIONS or table_end > size:
        raise _Damage(f"damaged: {count} sections cannot be; {_REBUILD}")
    if _checksum(data[: _HEADER.size - CHECKSUM_OCTETS], data[_HEADER.size : table_end]) != checksum:
        raise _Damage(f"damaged: checksum of the header is wrong; {_REBUILD}")
    sections: dict[str, Section] = {}
    position = table_end
    for number in range(count):
        raw, required, item, offset, length, section_checksum = _ENTRY.unpack_from(
            data, _HEADER.size + number * _ENTRY.size
        )
        name = raw.rstrip(b"\0").decode("ascii", "backslashreplace")
        end = offset + length + -length % _ALIGN
        if offset != position or end > size or not item or length % item:
            raise _Damage(f"damaged: section {name!r} does not fit; {_REBUILD}")
        if name not in known and required:
            raise _Damage(f"needs section {name!r}, which this relay does not know; {_REBUILD} with this version")
        if _checksum(data[offset:end]) != section_checksum:
            raise _Damage(f"damaged: checksum of section {name!r} is wrong; {_REBUILD}")
        sections[name] = Section(
            name, Need.REQUIRED if required else Need.OPTIONAL, item, data[offset : offset + length]
        )
        position = end
    if position != size:
        raise _Damage(f"damaged: {size - position} octets belong to no section; {_REBUILD}")
    header = Header(generation, created, size, key_id.decode("ascii"), addresses, recipients, restricted)
    return Image(header, sections)


def _checksum(*pieces: bytes | memoryview) -> bytes:
    state = blake2b(digest_size=CHECKSUM_OCTETS)
    for piece in pieces:
        state.update(piece)
    return state.digest()
