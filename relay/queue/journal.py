"""Owns: which messages have their final dot on the way, in memory that outlives the process.

A slot's journal is a small file mapped MAP_SHARED: writing a cell is a plain store to memory, and the kernel keeps
the page when the process is killed. It is not synced: after a power cut every leased message counts as marked.
Must not know the database.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Final

from relay.queue.layout import FILE_MODE
from relay.queue.store import QueueError

CELLS: Final = 4096
"""More final dots than one worker can have open connections to next hops for."""

_MAGIC: Final = b"DMZJRNL1"
_HEADER: Final = struct.Struct("=8s56s")  # magic, boot id
_OCTETS: Final = _HEADER.size + CELLS * 8


def marked_in(path: Path) -> frozenset[int]:
    """Keys marked right now in the journal of a slot, another process's included. Raises OSError."""
    try:
        octets = path.read_bytes()
    except FileNotFoundError:
        return frozenset()
    if len(octets) != _OCTETS:
        return frozenset()
    return frozenset(struct.unpack_from(f"={CELLS}Q", octets, _HEADER.size)) - {0}


class Journal:
    """The journal of one slot. ``inherited``: keys an earlier process of this boot left marked."""

    def __init__(self, path: Path, boot: str) -> None:
        """Open or make the file; one of another boot, or of unknown form, is emptied. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            if os.fstat(descriptor).st_size != _OCTETS:
                os.ftruncate(descriptor, 0)
                # Written, not only extended: a full disk must show here, not as SIGBUS at a later store.
                os.pwrite(descriptor, bytes(_OCTETS), 0)
            self._map = mmap.mmap(descriptor, _OCTETS)
        finally:
            os.close(descriptor)
        header = _HEADER.pack(_MAGIC, boot.encode("ascii"))
        if self._map[: _HEADER.size] != header:
            self._map[:] = header + bytes(_OCTETS - _HEADER.size)
        self._view = memoryview(self._map)
        self._cells = self._view[_HEADER.size :].cast("Q")
        self._inherited = [cell for cell in range(CELLS) if self._cells[cell]]
        self._free = [cell for cell in range(CELLS - 1, -1, -1) if not self._cells[cell]]

    @property
    def inherited(self) -> tuple[int, ...]:
        return tuple(self._cells[cell] for cell in self._inherited)

    def forget_inherited(self) -> None:
        """Clear what was inherited: it is in the database now."""
        for cell in self._inherited:
            self.clear(cell)
        self._inherited = []

    def mark(self, key: int) -> int:
        """Name a message; returns its cell. Raises QueueError when all cells are taken."""
        if not self._free:
            raise QueueError(f"journal: {CELLS} final dots are under way already")
        cell = self._free.pop()
        self._cells[cell] = key
        return cell

    def clear(self, cell: int) -> None:
        """Un-name it."""
        self._cells[cell] = 0
        self._free.append(cell)

    def close(self) -> None:
        """Let go of the file; what is marked stays marked."""
        self._cells.release()
        self._view.release()
        self._map.close()
