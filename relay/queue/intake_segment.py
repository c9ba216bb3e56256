"""Owns: what an intake log is made of while it is written: live messages, the two segments, groups of records.

Must not know when a group is written, nor the database.
"""

from __future__ import annotations

import asyncio
import os

from relay.queue import intake_file
from relay.queue.rows import NewRows


class Entry:
    """A live message. ``moving`` is set while it is being put into the database, and says when that is over."""

    __slots__ = ("moving", "rows", "segment", "since", "until")

    def __init__(self, rows: NewRows, segment: Segment, since: float) -> None:
        self.rows = rows
        self.segment = segment
        self.since = since
        self.until = rows.lease.until
        self.moving: asyncio.Future[None] | None = None


class Segment:
    """One of the two files. ``reserved``: where the next record will lie; ``live``: messages put in it and not over."""

    __slots__ = ("begun", "descriptor", "epoch", "live", "path", "position", "reserved", "seed")

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor = descriptor
        self.path = path
        self.live = 0
        self.begin()

    def begin(self) -> None:
        """Start again from the first record, in a new epoch."""
        self.epoch = intake_file.new_epoch()
        self.seed = intake_file.seed_of(self.epoch)
        self.begun = False
        self.position = self.reserved = intake_file.START


class Group:
    """What is written and synced together: all in one segment."""

    __slots__ = ("deadline", "futures", "header", "offset", "parts", "segment", "size")

    def __init__(self, segment: Segment, deadline: float, schema: int) -> None:
        self.segment = segment
        self.deadline = deadline
        self.offset = segment.reserved
        self.size = 0
        self.parts: list[bytes] = []
        self.futures: list[tuple[int, asyncio.Future[None] | asyncio.Future[bool]]] = []
        self.header = b"" if segment.begun else intake_file.header(segment.epoch, schema)
        segment.begun = True

    def write(self) -> None:
        """In the thread. Raises OSError."""
        descriptor = self.segment.descriptor
        if self.header:
            # By itself: what follows must not be on the disk while the header still names the epoch before.
            _write(descriptor, self.header, 0)
            os.fdatasync(descriptor)
        _write(descriptor, b"".join(self.parts), self.offset)
        os.fdatasync(descriptor)


def _write(descriptor: int, octets: bytes, position: int) -> None:
    view = memoryview(octets)
    while view:
        count = os.pwrite(descriptor, view, position)
        position += count
        view = view[count:]
