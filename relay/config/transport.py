"""Owns: the transport table as Postfix writes it: lines of ``pattern transport:nexthop`` (transport(5), postmap(1)), and
the patterns, which ``[[route]]`` shares. Pure: text in, lines and faults out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from relay.config.destination import Target, parse_target
from relay.config.invalid import Invalid
from relay.mail.address import AddressFault, is_address_literal, is_domain, parse_mailbox, unquoted

DEFAULT: Final = "*"
"""The pattern for whatever no other one fits."""


@dataclass(frozen=True, slots=True)
class Line:
    """One entry. ``number`` is the line it begins in, from 1; ``target`` None: ``:``, as if the line were not there."""

    number: int
    pattern: str
    target: Target | None


@dataclass(frozen=True, slots=True)
class LineFault:
    """What is wrong in one line, and what to write instead."""

    number: int
    what: str
    hint: str


def parse_table(text: str) -> tuple[list[Line], list[LineFault]]:
    """All entries in their order, and everything that is wrong."""
    lines: list[Line] = []
    faults: list[LineFault] = []
    first: dict[str, int] = {}
    for number, entry in _logical(text, faults):
        pattern, _, result = entry.replace("\t", " ").partition(" ")
        try:
            pattern = parse_pattern(pattern)
            if not result.strip():
                raise Invalid(f'"{pattern}" has no transport:nexthop', "write it behind the pattern, a space between")
            target = parse_target(result)
        except Invalid as error:
            faults.append(LineFault(number, error.what, error.hint))
            continue
        if pattern in first:
            what = f'"{pattern}" stands in line {first[pattern]} already'
            faults.append(LineFault(number, what, "remove one of the two"))
            continue
        first[pattern] = number
        lines.append(Line(number, pattern, target))
    return lines, faults


def _logical(text: str, faults: list[LineFault]) -> Iterator[tuple[int, str]]:
    """Entries with the number of their first line: comments left out, lines that begin with white space joined on."""
    at, entry = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        if not line[0].isspace():
            if entry:
                yield at, entry
            at, entry = number, content
        elif entry:
            entry += f" {content}"
        else:
            faults.append(LineFault(number, "nothing stands above this continued line", "begin it at the margin"))
    if entry:
        yield at, entry


def parse_pattern(text: str) -> str:
    """``user@domain``, ``domain``, ``.domain`` or ``*``, in lower case as Postfix asks for it. Raises Invalid."""
    pattern = text.lower()
    if pattern == DEFAULT or is_domain(pattern.removeprefix(".")) or is_address_literal(pattern):
        return pattern
    hint = "write user@example.com, example.com, .example.com for what is below it, or * for all others"
    if pattern.startswith("*."):
        hint = f"write {pattern[1:]} for every domain below {pattern[2:]}"
    elif pattern.startswith("@"):
        hint = f"write {pattern[1:]}"
    elif pattern.startswith("/"):
        hint = "regular expressions are not there: write domains, .domains and addresses"
    elif "@" in pattern:
        mailbox = parse_mailbox(pattern)
        if not isinstance(mailbox, AddressFault):
            return unquoted(mailbox)
    raise Invalid(f'"{text}" is neither an address, a domain, a .domain nor *', hint)


def search_order(pattern: str) -> Iterator[str]:
    """The patterns that are asked one after the other (transport(5)) for an address or a domain; for ``.domain`` or ``*``,
    those that would decide in its place.
    """
    if pattern != DEFAULT and pattern:
        yield pattern
        local, at, domain = pattern.rpartition("@")
        if at and local:
            yield domain
        below = domain.removeprefix(".")
        while "." in below and not below.startswith("["):  # an address literal has no domain above it
            below = below.partition(".")[2]
            yield f".{below}"
    yield DEFAULT
