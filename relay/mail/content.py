"""Owns: the octets of a message between the client's DATA and the next hop's.

A message is kept in *wire form*: CR LF lines, dots still stuffed (RFC 5321 §4.5.2), the relay's trace header in
front, without the final ``.`` line; so what came in can go out without a copy being changed. Small ones are one
``bytes``; larger ones lie in a file whose descriptor this object owns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

MEMORY_OCTETS: Final = 64 * 1024
"""Up to this size a body stays in memory (and in the database); above, it lies in a file of the spool."""

CHUNK_OCTETS: Final = 256 * 1024
"""How much of a file is in memory at once while it is sent."""


class Content:
    """Wire-form octets, in memory (``memory``) or in a file (``descriptor``), never both.

    ``size`` counts octets of the wire form. ``path`` is the name of the body file once it has one (queue), else "".
    The owner calls ``close()`` exactly when nobody will read it again; reading does not move any file position.
    """

    __slots__ = ("descriptor", "memory", "path", "size")

    def __init__(self, memory: bytes | None, descriptor: int, size: int, path: str = "") -> None:
        self.memory = memory
        self.descriptor = descriptor
        self.size = size
        self.path = path

    @classmethod
    def of(cls, octets: bytes) -> Content:
        """Content held in memory."""
        return cls(octets, -1, len(octets))

    def chunks(self) -> Iterator[bytes]:
        """The octets in pieces of at most ``CHUNK_OCTETS``. Raises OSError when the file fails or is short."""
        if self.memory is not None:
            yield self.memory
            return
        position = 0
        while position < self.size:
            piece = os.pread(self.descriptor, min(CHUNK_OCTETS, self.size - position), position)
            if not piece:
                raise OSError(f"message body ends at {position} of {self.size} octets")
            position += len(piece)
            yield piece

    def head(self, limit: int) -> bytes:
        """The first ``limit`` octets at most: enough for the header in reports."""
        if self.memory is not None:
            return self.memory[:limit]
        return os.pread(self.descriptor, min(limit, self.size), 0)

    def close(self) -> None:
        """Give the file back; harmless when called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
