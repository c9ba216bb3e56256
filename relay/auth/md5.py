"""Owns: HMAC-MD5 resumed from dovecot's ``{CRAM-MD5}`` context. Pure.

The context is the state of MD5 after one block of the key, outer and inner, so that a store need not hold the password.
hashlib cannot start from a state; the compression function below (RFC 1321 §3.4) does it in some 40 µs a block.
"""

from __future__ import annotations

import hashlib
from math import floor, sin
from struct import Struct
from typing import Final

_STATE: Final = Struct("<4I")
_WORDS: Final = Struct("<16I")
_LENGTH: Final = Struct("<Q")
_START: Final = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
BLOCK: Final = 64

_SHIFTS: Final = ((7, 12, 17, 22), (5, 9, 14, 20), (4, 11, 16, 23), (6, 10, 15, 21))
_SINES: Final = tuple(floor(abs(sin(number + 1)) * 2**32) for number in range(64))
_STEPS: Final = tuple(
    (number // 16, (number, 5 * number + 1, 3 * number + 5, 7 * number)[number // 16] % 16, _SINES[number],
     _SHIFTS[number // 16][number % 4])
    for number in range(64)
)  # fmt: skip

_State = tuple[int, int, int, int]


def _compress(state: _State, block: bytes) -> _State:
    a, b, c, d = state
    words = _WORDS.unpack(block)
    for turn, index, sine, shift in _STEPS:
        if turn == 0:
            mixed = (b & c) | (~b & d)
        elif turn == 1:
            mixed = (d & b) | (~d & c)
        elif turn == 2:
            mixed = b ^ c ^ d
        else:
            mixed = c ^ (b | (~d & 0xFFFFFFFF))
        total = (a + mixed + sine + words[index]) & 0xFFFFFFFF
        a, d, c, b = d, c, b, (b + ((total << shift) | (total >> (32 - shift)))) & 0xFFFFFFFF
    return (
        (state[0] + a) & 0xFFFFFFFF,
        (state[1] + b) & 0xFFFFFFFF,
        (state[2] + c) & 0xFFFFFFFF,
        (state[3] + d) & 0xFFFFFFFF,
    )


def _resume(state: bytes, text: bytes) -> bytes:
    """The digest of one block that led to ``state``, and ``text``."""
    current: _State = _STATE.unpack(state)
    padded = text + b"\x80" + bytes(-(len(text) + 9) % BLOCK) + _LENGTH.pack((BLOCK + len(text)) * 8)
    for start in range(0, len(padded), BLOCK):
        current = _compress(current, padded[start : start + BLOCK])
    return _STATE.pack(*current)


def context(password: bytes) -> bytes:
    """The 32 octets dovecot stores for a password: the outer state, then the inner one."""
    key = hashlib.md5(password, usedforsecurity=False).digest() if len(password) > BLOCK else password
    key = key.ljust(BLOCK, b"\0")
    states = (_compress(_START, bytes(octet ^ pad for octet in key)) for pad in (0x5C, 0x36))
    return b"".join(_STATE.pack(*state) for state in states)


def hmac_md5(stored: bytes, challenge: bytes) -> str:
    """HMAC-MD5 of ``challenge`` in hexadecimal (RFC 2195 §2), from the 32 octets of ``context``."""
    return _resume(stored[:16], _resume(stored[16:], challenge)).hex()
