"""Owns: a message with 8-bit content as one of 7 bits (RFC 6152 §3): which parts become quoted-printable or base64, and when
that must not be done.

Pure, and bounded in memory: two passes over the wire form, line by line. ``plan`` finds out what has to change, ``convert``
says it again with the change. Left alone, so refused when they hold 8-bit octets: what is signed or encrypted (RFC 1847 §2.1),
messages inside (RFC 2046 §5.2.1), headers, whose character set nobody knows, what is encoded already, and what is not MIME
as it should be.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator
from email.message import Message
from enum import Enum
from typing import Final, NamedTuple

LINE_OCTETS: Final = 64 * 1024
"""Longest line that is converted: RFC 5321 §4.5.3.1.6 allows 1,000 octets; memory is bounded by it."""
PARTS: Final = 1000
"""Most parts of a message that are looked at; real ones have a few."""
DEPTH: Final = 20
"""Deepest nesting; each level is a boundary that every line is compared with."""
PIECE_OCTETS: Final = 128 * 1024

_BASE64_OCTETS: Final = 57  # RFC 2045 §6.8: 76 characters a line
_FIELD: Final = re.compile(rb"([!-9;-~]+)[ \t]*:(.*)", re.DOTALL)
_IDENTITY: Final = frozenset({"", "7bit", "8bit", "binary"})


class Unconvertible(Exception):
    """It has to stay as it is; the text says why."""


class _Kind(Enum):
    LEAF = "leaf"
    OPAQUE = "opaque"
    """Not to be touched inside."""
    MULTIPART = "multipart"


class _Header:
    """The header of a message or part: its fields as they came, and what they say of its content."""

    __slots__ = ("boundary", "default_inside", "encoding", "fields", "is_top", "kind", "named", "text")

    def __init__(self, fields: list[bytes], default: str, *, is_top: bool) -> None:
        self.fields = fields
        self.is_top = is_top
        self.named = {_name(field) for field in fields}
        said = Message()
        said.set_default_type(default)
        for field in fields:
            found = _FIELD.match(field)
            if found is not None and found[1].lower() in (b"content-type", b"content-transfer-encoding"):
                name = found[1].decode("ascii")
                if name not in said:  # the first one counts
                    said[name] = found[2].decode("ascii", "replace").replace("\r\n", "").strip()
        self.encoding = str(said.get("content-transfer-encoding", "")).partition(";")[0].strip().lower()
        kind, sub = said.get_content_maintype(), said.get_content_subtype()
        self.text = kind == "text"
        self.default_inside = "message/rfc822" if sub == "digest" else "text/plain"  # RFC 2046 §5.1.5
        self.boundary = b""
        self.kind = _Kind.OPAQUE if kind == "message" else _Kind.LEAF
        if kind == "multipart":
            try:
                boundary = said.get_boundary("") or ""
            except (ValueError, LookupError):  # of RFC 2231's forms, written wrongly
                boundary = ""
            sealed = sub in ("signed", "encrypted") or not boundary or not boundary.isascii()
            self.kind = _Kind.OPAQUE if sealed else _Kind.MULTIPART
            self.boundary = b"" if sealed else boundary.encode("ascii")

    def encoded_as(self, encoding: str) -> list[bytes]:
        """The fields with another Content-Transfer-Encoding."""
        kept = [field for field in self.fields if _name(field) != b"content-transfer-encoding"]
        if self.is_top and b"mime-version" not in self.named:
            kept.append(b"MIME-Version: 1.0\r\n")
        if self.is_top and b"content-type" not in self.named:
            kept.append(b"Content-Type: text/plain; charset=unknown-8bit\r\n")  # RFC 1428 §3
        return [*kept, f"Content-Transfer-Encoding: {encoding}\r\n".encode("ascii")]


def _name(field: bytes) -> bytes:
    return field.partition(b":")[0].rstrip(b" \t").lower()


class _Place(Enum):
    HEADER = "header"
    """The fields of a header are complete."""
    BODY = "body"
    OUTSIDE = "outside"
    """Of a multipart: delimiters, and what stands before the first and behind the last part."""


class _Event(NamedTuple):
    place: _Place
    number: int
    """Of the part, counted as their headers come."""
    header: _Header
    line: bytes
    """Without CR LF and dot-stuffing; in a header unused."""


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without CR LF, dots unstuffed."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\r\n")
        for line in whole:
            if len(line) > LINE_OCTETS:
                raise Unconvertible("a line is too long to be converted")
            yield line[1:] if line[:1] == b"." else line
        if len(rest) > LINE_OCTETS:
            raise Unconvertible("a line is too long to be converted")
    if rest:
        raise Unconvertible("the last line has no end")


def _walk(pieces: Iterable[bytes]) -> Iterator[_Event]:
    """The message as it is built."""
    around: list[_Header] = []
    fields: list[bytes] | None = []
    number = 0
    current: _Header | None = None  # the part whose body this is; None outside of parts
    for line in _lines(pieces):
        level = _delimiter(line, around)
        if level is None and fields is not None:
            if line[:1] in (b" ", b"\t") and fields:
                fields[-1] += line + b"\r\n"
                continue
            if line:
                fields.append(line + b"\r\n")
                continue
        if fields is not None:
            default = around[-1].default_inside if around else "text/plain"
            current = _Header(fields, default, is_top=not number)
            number += 1
            if number > PARTS:
                raise Unconvertible("it has too many parts")
            yield _Event(_Place.HEADER, number, current, b"")
            fields = None
            if current.kind is _Kind.MULTIPART:
                around.append(current)
                if len(around) > DEPTH:
                    raise Unconvertible("its parts are nested too deeply")
                current = None
            if level is None:
                continue  # the empty line
        if level is not None:
            depth, is_last = level
            del around[depth + 1 :]
            yield _Event(_Place.OUTSIDE, number, around[depth], line)
            current = None
            if is_last:
                around.pop()
            else:
                fields = []
        elif current is not None:
            yield _Event(_Place.BODY, number, current, line)
        else:
            yield _Event(_Place.OUTSIDE, number, around[-1] if around else _NOWHERE, line)
    if fields:  # a header and nothing else
        yield _Event(_Place.HEADER, number + 1, _Header(fields, "text/plain", is_top=not number), b"")


def _delimiter(line: bytes, around: list[_Header]) -> tuple[int, bool] | None:
    """Which multipart's delimiter the line is, counted from outside, and whether it is the last one (RFC 2046 §5.1.1)."""
    if line[:2] != b"--" or not around:
        return None
    stripped = line.rstrip(b" \t")
    for depth in range(len(around) - 1, -1, -1):
        delimiter = b"--" + around[depth].boundary
        if stripped == delimiter:
            return depth, False
        if stripped == delimiter + b"--":
            return depth, True
    return None


_NOWHERE: Final = _Header([], "text/plain", is_top=False)


def plan(pieces: Iterable[bytes]) -> frozenset[int]:
    """The numbers of the parts that have to be encoded; empty when everything is ASCII. Raises Unconvertible."""
    eight: set[int] = set()
    for event in _walk(pieces):
        if event.place is _Place.HEADER:
            if not all(field.isascii() for field in event.header.fields):
                raise Unconvertible("a header has 8-bit characters")
        elif not event.line.isascii():
            header = event.header
            if event.place is _Place.OUTSIDE:
                raise Unconvertible("there are 8-bit characters outside of its parts")
            if header.kind is _Kind.OPAQUE:
                raise Unconvertible("8-bit content is signed, encrypted, or inside another message")
            if header.encoding not in _IDENTITY:
                raise Unconvertible("encoded content has 8-bit characters")
            eight.add(event.number)
    return frozenset(eight)


def convert(pieces: Iterable[bytes], encoded: frozenset[int]) -> Iterator[bytes]:
    """The wire form with the parts of ``plan`` encoded, in pieces. Raises Unconvertible where ``plan`` does."""
    out: list[bytes] = []
    size = 0
    pending: bytearray | None = None  # the rest of a part in base64
    first = True
    for event in _walk(pieces):
        if pending is not None and event.place is not _Place.BODY:
            made = _base64(pending, len(pending))
            pending = None
        else:
            made = b""
        if event.place is _Place.HEADER:
            made += b"".join(_stuffed(field) for field in _fields(event, encoded)) + b"\r\n"
            first = True
        elif event.place is _Place.OUTSIDE or event.number not in encoded:
            made += _stuffed(event.line + b"\r\n")
        elif event.header.text:
            made += _quoted(event.line)
        else:
            pending = bytearray() if pending is None else pending
            pending += event.line if first else b"\r\n" + event.line
            first = False
            made += _base64(pending, len(pending) // _BASE64_OCTETS * _BASE64_OCTETS)
        out.append(made)
        size += len(made)
        if size > PIECE_OCTETS:
            yield b"".join(out)
            out, size = [], 0
    if pending is not None:
        out.append(_base64(pending + b"\r\n", len(pending) + 2))
    yield b"".join(out)


def _fields(event: _Event, encoded: frozenset[int]) -> list[bytes]:
    header = event.header
    if event.number in encoded:
        return header.encoded_as("quoted-printable" if header.text else "base64")
    return header.encoded_as("7bit") if header.encoding == "8bit" else header.fields


def _stuffed(octets: bytes) -> bytes:
    return b"." + octets if octets[:1] == b"." else octets


def _quoted(line: bytes) -> bytes:
    """A line in quoted-printable, soft breaks included."""
    coded = binascii.b2a_qp(line, quotetabs=False, istext=False).replace(b"=\n", b"=\r\n") + b"\r\n"
    coded = coded.replace(b"\r\n.", b"\r\n..")
    return _stuffed(coded)


def _base64(pending: bytearray, count: int) -> bytes:
    """Take ``count`` octets away, as lines of base64."""
    lines = [
        binascii.b2a_base64(bytes(pending[start : min(start + _BASE64_OCTETS, count)]), newline=False) + b"\r\n"
        for start in range(0, count, _BASE64_OCTETS)
    ]
    del pending[:count]
    return b"".join(lines)
