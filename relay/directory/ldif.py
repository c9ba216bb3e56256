"""Owns: reading LDIF (RFC 2849) content records as far as addresses need it, a line at a time.

Only the wanted attributes are kept; a photograph costs nothing but the reading. Must not know what a value means:
``directory.sources`` does.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import BinaryIO, Final

from relay.directory.lines import lines

VALUE_OCTETS: Final = 1 << 16
"""Longest wanted value, unfolded. An address has at most 320 octets."""

ENTRY_VALUES: Final = 10_000
"""Most wanted values of one entry; Active Directory stops at some 1,300. Bounds what a broken file can collect."""


class LdifFault(StrEnum):
    """Why a line or a record was left out."""

    LINE = "not a line of LDIF"
    LONG = "line or value too long"
    BASE64 = "broken base64"
    ENCODING = "value is not UTF-8"
    URL = "value by URL is not fetched"
    CHANGE = "change record, only content records count"
    CROWDED = "entry has too many values"


Report = Callable[[int, LdifFault], None]
"""Takes the number of a line that cannot be used, and why."""


@dataclass(slots=True)
class Record:
    """The wanted values of one entry in the file's order: line, attribute in lower case, value.

    ``broken`` names the wanted attributes that had a value which could not be used, so that whoever takes absence
    for permission can tell the difference.
    """

    values: list[tuple[int, str, str]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)


def records(file: BinaryIO, wanted: frozenset[str], report: Report) -> Iterator[Record]:
    """The entries of an LDIF file that have a wanted attribute.

    ``wanted`` are attribute names in lower case; options behind a name (``;lang-en``) are ignored.
    Each line that cannot be used is reported with its number and left out. Raises OSError.
    """
    record = Record()
    change = False
    for number, line, fault in _unfolded(file, wanted, report):
        if not line:
            if (record.values or record.broken) and not change:
                yield record
            record, change = Record(), False
            continue
        name, colon, rest = line.partition(b":")
        if not colon:
            if not change:
                report(number, LdifFault.LINE)
            continue
        attribute = _base(name)
        if attribute == "changetype" and rest.strip().lower() != b"add":
            report(number, LdifFault.CHANGE)
            change = True
        if attribute not in wanted or change:
            continue
        value = fault or _value(rest)
        if not isinstance(value, LdifFault) and len(record.values) >= ENTRY_VALUES:
            value = LdifFault.CROWDED
        if isinstance(value, LdifFault):
            report(number, value)
            record.broken.add(attribute)
        else:
            record.values.append((number, attribute, value))
    if (record.values or record.broken) and not change:
        yield record


@lru_cache(maxsize=1024)  # an export has some dozen different names; a file full of other ones only loses the speed
def _base(name: bytes) -> str:
    """The attribute's name without options, in lower case."""
    return name.partition(b";")[0].strip().lower().decode("ascii", "replace")


def _value(rest: bytes) -> str | LdifFault:
    """What stands behind the first colon: plain, ``: base64`` or ``< URL`` (RFC 2849, value-spec)."""
    if rest.startswith(b"<"):
        return LdifFault.URL
    if rest.startswith(b":"):
        try:
            raw = base64.b64decode(rest[1:].strip(), validate=True)
        except binascii.Error:
            return LdifFault.BASE64
    else:
        raw = rest.strip(b" ")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return LdifFault.ENCODING


def _unfolded(file: BinaryIO, wanted: frozenset[str], report: Report) -> Iterator[tuple[int, bytes, LdifFault | None]]:
    """Logical lines with the number of their first physical one; comments are gone, an empty line stays.

    Attributes nobody wants do not come through, and their continuations are dropped instead of joined. Of wanted ones
    that are too long the name comes, with the fault.
    """
    keep = wanted | {"changetype"}
    parts: list[bytes] = []
    octets = first = 0
    # Whether a continuation belongs to something that is not kept: a comment, an attribute nobody wants.
    dropping = False
    for number, line, whole in lines(file):
        if line.startswith(b" "):
            if parts:
                octets += len(line)
                if whole and octets <= VALUE_OCTETS:
                    parts.append(line[1:])
                else:
                    yield first, parts[0].partition(b":")[0] + b":", LdifFault.LONG
                    parts, dropping = [], True
            elif not dropping:
                report(number, LdifFault.LINE)
            continue
        if parts:
            yield first, b"".join(parts), None
            parts = []
        dropping = line.startswith(b"#")
        if dropping:
            continue
        name, colon, _ = line.partition(b":")
        # A name may itself be folded: without its colon the line has to be joined before anything is known about it.
        if colon and _base(name) not in keep:
            dropping = True
        elif not whole:
            dropping = True
            if colon:
                yield number, name + colon, LdifFault.LONG
            else:
                report(number, LdifFault.LONG)
        elif line:
            parts, octets, first = [line], len(line), number
        else:
            yield number, line, None
    if parts:
        yield first, b"".join(parts), None
