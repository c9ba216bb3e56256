"""Owns: the octets of LDAP messages (RFC 4511, BER as its §5.1 has it): reading answers, writing searches. No I/O.

A reader of search results, six times as fast as ldap3's own loop: a sync of 100,000 entries is mostly this. Anything that
is not LDAP raises ``Garbled``, never another exception; lengths are bounded before memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

MESSAGE_OCTETS: Final = 64 << 20
"""Largest message read. A group of 5,000 members has half a megabyte; Active Directory hands out ranges beyond 1,500."""

BIND_RESPONSE: Final = 0x61
SEARCH_ENTRY: Final = 0x64
SEARCH_DONE: Final = 0x65
SEARCH_REFERENCE: Final = 0x73
EXTENDED_RESPONSE: Final = 0x78
PAGED_RESULTS: Final = b"1.2.840.113556.1.4.319"


class Garbled(Exception):
    """These octets are no LDAP."""


class Message(NamedTuple):
    """One message: the operation's tag, and where its content and the controls behind it stand in ``data``."""

    number: int
    operation: int
    data: bytes
    start: int
    end: int
    whole: int


@dataclass(frozen=True, slots=True)
class Result:
    """An LDAPResult. ``cookie`` is None when the answer carries no paging control, empty on the last page."""

    code: int
    diagnostic: str
    cookie: bytes | None


def header(data: bytes, at: int) -> tuple[int, int, int]:
    """Tag, and where the content begins and ends. Raises IndexError when ``data`` is too short for the header."""
    length = data[at + 1]
    start = at + 2
    if length >= 0x80:
        count = length & 0x7F
        if not 0 < count <= 8:
            raise Garbled("a length has a form that LDAP does not know")
        start += count
        if start > len(data):
            raise IndexError
        length = int.from_bytes(data[at + 2 : start], "big")
    return data[at], start, start + length


def message(data: bytes, at: int) -> Message | None:
    """The message that begins at ``at``; None while it is not wholly there. Raises Garbled."""
    if len(data) - at >= 1 and data[at] != 0x30:
        raise Garbled("the answer is no LDAP message")
    try:
        _, start, end = header(data, at)
    except IndexError:
        return None
    if end - at > MESSAGE_OCTETS:
        raise Garbled(f"a message of {end - at} octets is announced")
    if end > len(data):
        return None
    try:
        tag, first, last = header(data, start)
        if tag != 2 or last > end or not 0 < last - first <= 4:
            raise Garbled("a message has no number")
        operation, begin, stop = header(data, last)
    except IndexError:
        raise Garbled("a message is cut short") from None
    if stop > end:
        raise Garbled("an operation is longer than its message")
    return Message(int.from_bytes(data[first:last], "big"), operation, data, begin, stop, end)


Take = Callable[[bytes, int, int], bool]
"""Takes the entry between two places of the octets, or leaves it to ``entry``."""


def entries(data: bytes, at: int, number: int, take: Take) -> tuple[int, int]:
    """Hand entries of the request ``number`` to ``take``, as long as they are whole, plain and taken.

    Returns where the first message begins that was not, and how many were. ``message`` says what is wrong with that one.
    """
    mine = integer(number) + bytes((SEARCH_ENTRY,))
    step, count, size = len(mine), 0, len(data)
    try:
        while data[at] == 0x30:
            length = data[at + 1]
            start = at + 2
            if length >= 0x80:
                start += length & 0x7F
                length = int.from_bytes(data[at + 2 : start], "big")
            end = start + length
            begin = start + step
            if end > size or data[start:begin] != mine:
                break
            length = data[begin]
            begin += 1
            if length >= 0x80:
                start = begin
                begin += length & 0x7F
                length = int.from_bytes(data[start:begin], "big")
            if begin + length > end or not take(data, begin, begin + length):
                break
            at = end
            count += 1
    except IndexError:
        pass
    return at, count


Entry = tuple[str, dict[str, list[bytes]]]
"""DN, and the values by attribute in lower case, options included (``member;range=0-1499``)."""


def entry(found: Message) -> Entry:
    """A search result entry. The header lengths are read in place: calls would take twice as long. Raises Garbled."""
    data, at, end = found.data, found.start, found.end
    attributes: dict[str, list[bytes]] = {}
    try:
        tag, at, stop = header(data, at)
        if tag != 4 or stop > end:
            raise Garbled("an entry has no name")
        name = str(data[at:stop], "utf-8", "backslashreplace")
        tag, at, stop = header(data, stop)
        if tag != 0x30 or stop > end:
            raise Garbled("an entry has no attributes")
        end = stop
        while at < end:
            # PartialAttribute ::= SEQUENCE { type OCTET STRING, vals SET OF OCTET STRING }
            tag, length = data[at], data[at + 1]
            at += 2
            if length >= 0x80:
                _, at, stop = header(data, at - 2)
            else:
                stop = at + length
            if tag != 0x30 or stop > end or data[at] != 4:
                raise Garbled("an attribute is broken")
            length = data[at + 1]
            at += 2
            if length >= 0x80:
                raise Garbled("an attribute's name is longer than a name can be")
            kind = str(data[at : at + length], "ascii", "backslashreplace").lower()
            at += length
            tag, length = data[at], data[at + 1]
            if length >= 0x80:
                _, at, last = header(data, at)
            else:
                at += 2
                last = at + length
            if tag != 0x31 or last > stop:
                raise Garbled("an attribute has no values")
            values: list[bytes] = []
            while at < last:
                if data[at] != 4:
                    raise Garbled("a value is broken")
                length = data[at + 1]
                at += 2
                if length >= 0x80:
                    count = length & 0x7F
                    length = int.from_bytes(data[at : at + count], "big")
                    at += count
                at += length
                if at > last:
                    raise Garbled("a value is longer than its attribute")
                values.append(data[at - length : at])
            attributes[kind] = values
            at = stop
    except IndexError:
        raise Garbled("an entry is cut short") from None
    return name, attributes


def result(found: Message) -> Result:
    """The result that ends an operation. Raises Garbled."""
    data, at = found.data, found.start
    try:
        tag, at, stop = header(data, at)
        if tag != 0x0A or stop > found.end:
            raise Garbled("a result has no code")
        code = int.from_bytes(data[at:stop], "big")
        _, _, stop = header(data, stop)  # matchedDN
        tag, at, stop = header(data, stop)
        if tag != 4 or stop > found.end:
            raise Garbled("a result has no message")
        diagnostic = str(data[at:stop], "utf-8", "replace")
        return Result(code, diagnostic.rstrip("\0"), _cookie(found))
    except IndexError:
        raise Garbled("a result is cut short") from None


def _cookie(found: Message) -> bytes | None:
    for kind, value in _controls(found):
        if kind == PAGED_RESULTS:
            _, at, _ = header(value, 0)
            _, _, at = header(value, at)  # the server's estimate
            tag, at, stop = header(value, at)
            if tag != 4 or stop > len(value):
                raise Garbled("a paging control is broken")
            return value[at:stop]
    return None


def _controls(found: Message) -> Iterator[tuple[bytes, bytes]]:
    at = found.end
    if at >= found.whole:
        return
    tag, at, end = header(found.data, at)
    if tag != 0xA0 or end > found.whole:
        raise Garbled("controls are broken")
    while at < end:
        _, at, stop = header(found.data, at)
        _, at, place = header(found.data, at)
        kind, value = found.data[at:place], b""
        while place < stop:
            tag, at, place = header(found.data, place)
            if tag == 4:
                value = found.data[at:place]
        yield kind, value
        at = stop


def tlv(tag: int, content: bytes) -> bytes:
    """One element."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content


def integer(value: int) -> bytes:
    """An INTEGER that is not negative."""
    return tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def paged(size: int, cookie: bytes) -> bytes:
    """The paged results control (RFC 2696), critical: a server that cannot page has to say so."""
    value = tlv(0x30, integer(size) + tlv(4, cookie))
    return tlv(0xA0, tlv(0x30, tlv(4, PAGED_RESULTS) + tlv(1, b"\xff") + tlv(4, value)))


def search(base: str, scope: int, compiled: bytes, attributes: Iterable[str], most: int = 0) -> bytes:
    """A SearchRequest (RFC 4511 §4.5.1) that follows no alias; ``most``: entries wanted, 0 for all."""
    limits = b"\x0a\x01\x00" + integer(most) + integer(0) + b"\x01\x01\x00"
    names = b"".join(tlv(4, name.encode()) for name in attributes)
    return tlv(0x63, tlv(4, base.encode()) + bytes((0x0A, 1, scope)) + limits + compiled + tlv(0x30, names))


def bind(name: str, password: bytes) -> bytes:
    """A simple BindRequest of version 3 (RFC 4511 §4.2). The caller has refused empty passwords: they log in nobody."""
    return tlv(0x60, integer(3) + tlv(4, name.encode()) + tlv(0x80, password))


STARTTLS: Final = tlv(0x77, tlv(0x80, b"1.3.6.1.4.1.1466.20037"))
"""An ExtendedRequest (RFC 4511 §4.14)."""
UNBIND: Final = b"\x42\x00"
