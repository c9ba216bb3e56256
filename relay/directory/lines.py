"""Owns: reading a text file line by line without trusting it to have lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Final

LINE_OCTETS: Final = 1 << 16
"""Longest line kept. Exports fold at 76 octets, unfolded values of some KB occur; a file of one line is an accident."""


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Number, octets without the line end, and whether that is all of it: the rest of a longer line is skipped.

    A byte order mark in front of the first line is dropped. Raises OSError.
    """
    number = 0
    while line := file.readline(LINE_OCTETS):
        number += 1
        whole = True
        rest = line
        while len(rest) == LINE_OCTETS and not rest.endswith(b"\n"):
            rest = file.readline(LINE_OCTETS)
            whole = whole and not rest
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line.rstrip(b"\r\n"), whole
