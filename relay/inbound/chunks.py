"""Owns: messages that come in chunks (BDAT, RFC 3030): the octets of each are counted, whatever becomes of them.

A chunk's octets are no lines: no dot is doubled in them and none ends them. They are brought into the wire form that the
``Receiver`` takes, block by block, so that everything behind it (rules for bare line ends, limits, where it is kept) is one
code for both ways. It must not speak to the client.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from relay.inbound.receiver import Receiver
from relay.inbound.transaction import Transaction
from relay.mail.reply import Kind

SIZE_DIGITS: Final = 20
"""As SIZE has them (RFC 1870 §4); what is more cannot be waited for."""

_CHUNK: Final = re.compile(rb"(\d{1,%d})( +LAST)?" % SIZE_DIGITS, re.IGNORECASE | re.ASCII)


class Announced(NamedTuple):
    """What BDAT says of the octets behind it."""

    size: int
    last: bool


def is_chunk(data: bytes, at: int) -> bool:
    """Whether a BDAT command begins there."""
    return data[at : at + 5].upper() == b"BDAT "


def announced(argument: bytes) -> Announced | None:
    """``SIZE [LAST]`` (RFC 3030 §2); None for anything else: where the next command begins is not known then."""
    found = _CHUNK.fullmatch(argument)
    return None if found is None else Announced(int(found[1]), bool(found[2]))


class Assembly:
    """A message between its first chunk and its last. ``transaction`` is whose it is."""

    __slots__ = ("_tail", "receiver", "transaction")

    def __init__(self, transaction: Transaction, receiver: Receiver) -> None:
        self.transaction = transaction
        self.receiver = receiver
        self._tail = b"\r\n"

    def take(self, piece: bytes) -> None:
        """Some octets. A dot behind CR LF is doubled (RFC 5321 §4.5.2); one behind a bare LF is the receiver's matter."""
        wire = piece.replace(b"\r\n.", b"\r\n..") if b"\n." in piece else piece
        if piece[:1] == b"." and self._tail == b"\r\n":
            wire = b"." + wire
        elif piece[:2] == b"\n." and self._tail[-1:] == b"\r":
            wire = b"\n.." + wire[2:]
        self._tail = (self._tail + piece)[-2:] if len(piece) < 2 else piece[-2:]
        self.receiver.feed(wire)


class Chunk:
    """The octets behind one BDAT. Fed like a ``Receiver``; where they are not wanted they are counted and dropped.

    ``refusal``: what is said once they are over (RFC 3030 §2: only then); None when they belong to ``assembly``.
    """

    __slots__ = ("_left", "assembly", "last", "refusal", "size")

    def __init__(self, size: int, last: bool, assembly: Assembly | None, refusal: Kind | None) -> None:  # noqa: FBT001
        self.size = self._left = size
        self.last = last
        self.assembly = assembly
        self.refusal = refusal

    @property
    def octets(self) -> int:
        """How many came so far, wanted or not."""
        return self.size - self._left

    @property
    def held(self) -> int:
        """How many of the message are in memory."""
        return 0 if self.assembly is None else self.assembly.receiver.held

    def feed(self, data: bytes) -> int:
        """Take one block; the index in ``data`` just after the last octet, or -1 when more are to come."""
        piece = data if len(data) <= self._left else data[: self._left]
        self._left -= len(piece)
        if self.assembly is not None:
            self.assembly.take(piece)
        return -1 if self._left else len(piece)

    def discard(self) -> None:
        """The session died amid the chunk."""
        if self.assembly is not None:
            self.assembly.receiver.discard()
