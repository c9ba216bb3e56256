"""Owns: the text forms of recipient lists that other programs have: Postfix maps, and exported ``alias: SMTP:addr`` lists.

Reads what it is given and says what each line means; what counts is for ``directory.sources``. A Postfix map here is the
text that postmap(1) reads: a line that begins with white space continues the one before, ``#`` begins a comment line.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import BinaryIO, Final, NamedTuple

from relay.directory.lines import lines
from relay.mail.address import is_domain
from relay.mail.ruling import Ruling, parse_ruling

LOGICAL_OCTETS: Final = 1 << 18
"""Longest line with its continuations: one entry, however folded, has less."""

_KEY: Final = re.compile(r'(?:"(?:[^"\\]|\\.)*"(?:@\S*)?|\S+)')
_UNTIL: Final = re.compile(r"until=(\S+)(?:\s+|$)")
_KIND: Final = re.compile(r"(?:^|[\s,;])([A-Za-z][A-Za-z0-9-]*):")


class MapFault(StrEnum):
    """Why a line of a map says nothing."""

    ENCODING = "line is not UTF-8"
    LONG = "line too long"
    KEY = "neither an address nor a domain"
    ACTION = "neither OK nor a refusal such as 550 TEXT"
    DATE = "until= is no date such as 2027-01-31"


class Logical(NamedTuple):
    """One entry: number of its first line, its text on one line, the comment lines right above it."""

    number: int
    text: str
    comment: str


@dataclass(frozen=True, slots=True)
class MapLine:
    """``key``: an address, or ``@domain``. ``until``: the last day it applies."""

    number: int
    key: str
    ruling: Ruling
    until: dt.date | None
    comment: str


Report = Callable[[int, MapFault], None]


def logical_lines(file: BinaryIO, report: Report) -> Iterator[Logical]:
    """Lines with their continuations. Blank lines end a comment, as people write it. Raises OSError."""
    pending: Logical | None = None
    comment: list[str] = []
    broken = False  # what continues a line that cannot be read belongs to it
    for number, raw, whole in lines(file):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            if raw.lstrip()[:1] == b"#":
                continue
            report(number, MapFault.ENCODING)
            if raw[:1] not in b" \t" and pending is not None:
                yield pending
            pending, broken = None, True
            continue
        stripped = text.strip()
        if not stripped:
            comment = []
            continue
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("#").strip())
            continue
        if text[0] in " \t" and (pending is not None or broken):
            if pending is not None and len(pending.text) + len(stripped) <= LOGICAL_OCTETS and whole:
                pending = pending._replace(text=f"{pending.text} {stripped}")
            elif pending is not None:
                report(number, MapFault.LONG)
                pending, broken = None, True
            continue
        if pending is not None:
            yield pending
        broken = not whole
        pending = Logical(number, stripped, " ".join(comment)) if whole else None
        if not whole:
            report(number, MapFault.LONG)
        comment = []
    if pending is not None:
        yield pending


def map_lines(file: BinaryIO, report: Report) -> Iterator[MapLine]:
    """What a Postfix map says; entries that say nothing here are reported. Raises OSError."""
    for number, text, comment in logical_lines(file, report):
        found = _KEY.match(text)
        assert found is not None  # the line is not blank
        key, action = found[0], text[found.end() :].strip()
        until: dt.date | None = None
        dated = _UNTIL.match(action)
        if dated is not None:
            try:
                until = dt.date.fromisoformat(dated[1])
            except ValueError:
                report(number, MapFault.DATE)
                continue
            action = action[dated.end() :]
        ruling = parse_ruling(action)
        if ruling is None:
            report(number, MapFault.ACTION)
        elif "@" in key and not key.endswith("@"):
            yield MapLine(number, key, ruling, until, comment)
        elif is_domain(key) and "." in key:
            yield MapLine(number, f"@{key}", ruling, until, comment)
        else:
            report(number, MapFault.KEY)


class AliasLine(NamedTuple):
    """One proxy address of a line: ``kind`` lower case (smtp, x400, …), ``value`` behind the colon."""

    number: int
    kind: str
    value: str


def alias_lines(file: BinaryIO, report: Report) -> Iterator[AliasLine]:
    """What an exported list says: ``jdoe: SMTP:john.doe@example.com, smtp:jdoe@example.com, X400:c=US;a= ;p=Example``.

    The alias in front is a name and no address. Addresses may be parted by commas, semicolons, spaces and further lines;
    one without a kind is taken as SMTP. Raises OSError.
    """
    for number, text, _ in logical_lines(file, report):
        name, colon, rest = text.partition(":")
        last = name.split()[-1] if name.strip() else ""
        if not colon:
            rest = text.partition(" ")[2]
        elif last.lower() in _KINDS:  # no colon behind the alias, or no alias
            rest = text[len(name.rstrip()) - len(last) :]
        starts = list(_KIND.finditer(rest))
        bare = rest[: starts[0].start()] if starts else rest
        for address in re.split(r"[\s,;]+", bare.strip(" \t,;")):
            if address:
                yield AliasLine(number, "smtp", address)
        for here, following in zip_longest(starts, starts[1:]):
            value = rest[here.end() : following.start() if following else len(rest)]
            yield AliasLine(number, here[1].lower(), value.strip(" \t,;"))
        if not starts and not bare.strip(" \t,;"):
            report(number, MapFault.KEY)


_KINDS: Final = frozenset({"smtp", "x400", "x500", "sip", "eum"})
