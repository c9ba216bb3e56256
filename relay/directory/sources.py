"""Owns: what lists, maps and LDIF files say about addresses, and gathering it into one set of entries.

Of contradicting words about one address those of ``overrides`` files come first, then those of the other sources in their
order. What is said of a whole domain is kept beside the addresses, under ``@domain``.

Reads the files of ``[[directory.sources]]`` and nothing else. Every line that is left out is counted under its reason;
whatever makes the whole doubtful refuses the build, because a snapshot that lacks addresses refuses good mail and one
that lacks restrictions lets bad mail out.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final, assert_never

from relay.config.directory import Source
from relay.config.schema import Config
from relay.directory import ldif
from relay.directory.layout import SnapshotError
from relay.directory.lines import lines
from relay.directory.maps import MapLine, alias_lines, map_lines
from relay.directory.snapshot import ACCEPT, EXACT, OVERRIDE, RECORDS, RESTRICTED, RULED, WIDE, Entry, exact_key
from relay.mail.address import AddressFault, domain_of, is_domain, parse_utf8_mailbox, unquoted
from relay.mail.reply import operator_text
from relay.mail.ruling import end_of

EXAMPLES: Final = 20
"""Bad lines reported one by one: enough to see the pattern, and a broken export does not fill the screen."""

VERIFIED: Final = frozenset({"directory", "static"})
"""Values of ``recipients`` for which the snapshot is asked."""

MAIL: Final = "mail"
PROXY: Final = "proxyaddresses"


class Skip(StrEnum):
    """Why an address was left out although its line can be read."""

    FOREIGN = "not of a domain with recipients = directory"
    OTHER_KIND = "not an SMTP address (X400, X500, SIP)"
    EXPIRED = "expired"
    SAID_BEFORE = "an earlier source says otherwise"
    NO_DOMAIN = "not of a [[domain]]"
    SYNTAX = "not an address"
    ENCODING = "line is not UTF-8"
    LONG = "line too long"


@dataclass(slots=True)
class Tally:
    """What was left out: counts by reason, and the first bad lines as ``file:line: reason``."""

    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def skip(self, reason: str) -> None:
        """Count something that is in order but not for the snapshot."""
        self.skipped[reason] += 1

    def bad(self, path: Path, line: int, reason: str) -> None:
        """Count a line that somebody should look at."""
        self.skipped[reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{path}:{line}: {reason}")


class Collection:
    """Every address once, in lower case, with the number of its record; equal sets of attributes share a record."""

    __slots__ = ("_numbers", "addresses", "records")

    def __init__(self) -> None:
        self.addresses: Final[dict[str, int]] = {}
        self.records: Final[list[Entry]] = []
        self._numbers: Final[dict[Entry, int]] = {}

    def add(self, address: str, entry: Entry) -> None:
        """Note what one source says. Said twice, flags add up, and of two texts the later one counts.

        Raises SnapshotError when there are too many different sets of attributes.
        """
        address = address.lower()
        known = self.addresses.get(address)
        if known is not None:
            entry = merged(self.records[known], entry)
        self._put(address, entry)

    def rule(self, key: str, entry: Entry) -> bool:
        """Note a ruling about an address or ``@domain``; False, and nothing is noted, when one was given before.

        An address that an earlier source accepts is decided, too. Raises as ``add``.
        """
        key = key.lower()
        known = self.addresses.get(key)
        if known is not None:
            old = self.records[known]
            if old.flags & (ACCEPT | RULED):
                return False
            entry = replace(entry, flags=entry.flags | old.flags, text=old.text)
        self._put(key, entry)
        return True

    def add_all(self, addresses: Iterable[str], entry: Entry) -> None:
        """As ``add`` for several addresses in lower case that have an entry in common."""
        known = self.addresses
        number = self._number(entry)
        for address in addresses:
            if known.setdefault(address, number) != number:
                self.add(address, entry)

    def _put(self, address: str, entry: Entry) -> None:
        self.addresses[address] = self._number(entry)

    def _number(self, entry: Entry) -> int:
        number = self._numbers.get(entry)
        if number is None:
            number = len(self.records)
            if number >= RECORDS:
                raise SnapshotError(
                    f"the sources give more than {RECORDS} different sets of attributes; "
                    "restriction texts that differ for every account are the likely cause"
                )
            self._numbers[entry] = number
            self.records.append(entry)
        return number

    def said(self) -> Iterator[tuple[str, Entry]]:
        """Every address and what is said of it."""
        for address, number in self.addresses.items():
            yield address, self.records[number]

    def count(self, flag: int) -> int:
        """How many addresses carry the flag."""
        carrying = {number for number, record in enumerate(self.records) if record.flags & flag}
        return sum(number in carrying for number in self.addresses.values())

    def accepts(self) -> bool:
        """Whether there is anybody to whom mail is taken."""
        taken = {number for number, record in enumerate(self.records) if takes(record)}
        return any(number in taken for number in self.addresses.values())


def takes(entry: Entry) -> bool:
    """Whether mail is taken to whom this is said of."""
    return bool(entry.flags & ACCEPT) or (entry.ruling is not None and entry.ruling.kind is None)


def merged(old: Entry, new: Entry) -> Entry:
    """Both said of one address. A ruling counts where nothing before it has decided, as in ``Collection.rule``."""
    if new.ruling is not None:
        if old.flags & (ACCEPT | RULED):
            return old
        return replace(new, flags=new.flags | old.flags, text=old.text)
    return replace(
        old,
        flags=old.flags | new.flags,
        text=new.text or old.text,
        next_hop=new.next_hop or old.next_hop,
        size_limit=new.size_limit or old.size_limit,
    )


def gather(config: Config, today: dt.date = dt.date.min) -> tuple[Collection, Tally]:
    """Read all sources of the configuration. ``today`` (UTC) tells which rulings have ended.

    Raises SnapshotError when the result cannot be trusted.
    """
    directory = config.directory
    ours = Ours.of(config)
    if not directory.sources and not directory.scheduled:
        raise SnapshotError("directory.sources: no source is configured; add a [[directory.sources]] table")
    collection, tally = Collection(), Tally()
    for source in sorted(directory.sources, key=lambda one: one.type != "overrides"):
        reader = _Reader(source.path, ours, directory.restriction_attribute.lower(), today, collection, tally)
        try:
            with source.path.open("rb") as file:
                reader.read(source, file)
        except OSError as error:
            raise SnapshotError(
                f"{source.path}: cannot be read: {error.strerror}; the snapshot stays as it is"
            ) from None
        if source.type not in ("restricted", "overrides") and not reader.used:
            raise SnapshotError(
                f"{source.path}: has no usable address{_because(tally)}; "
                "was the export cut short? The snapshot stays as it is"
            )
    if directory.scheduled:  # the directories come to it, and directory.sync judges the whole
        return collection, tally
    if not collection.addresses or (ours.verified and not collection.accepts()):
        raise SnapshotError(
            "the sources give no recipient at all, so that all mail would be refused; the snapshot stays as it is"
        )
    return collection, tally


def ending(config: Config) -> Iterator[tuple[Path, MapLine]]:
    """The entries with a last day in maps and overrides. What cannot be read is passed over: a build tells of it."""
    for source in config.directory.sources:
        if source.type in ("map", "overrides"):
            with suppress(OSError), source.path.open("rb") as file:
                for line in map_lines(file, lambda *_: None):
                    if line.until is not None:
                        yield source.path, line


def _because(tally: Tally) -> str:
    if not tally.skipped:
        return ""
    reason, count = tally.skipped.most_common(1)[0]
    return f" (left out so far: {count} × {reason})"


@dataclass(frozen=True, slots=True)
class Ours:
    """Domains of the configuration: those whose recipients stand in the snapshot, all, those with case = "sensitive", and
    those of the first for which files alone count (recipients = "static").
    """

    verified: frozenset[str]
    all: frozenset[str]
    sensitive: frozenset[str]
    static: frozenset[str] = frozenset()

    @property
    def of_directories(self) -> frozenset[str]:
        """Those for which directories count as well."""
        return self.verified - self.static

    @classmethod
    def of(cls, config: Config) -> Ours:
        """From the whole configuration."""
        return cls(
            frozenset(name for domain in config.domain if domain.recipients in VERIFIED for name in domain.names),
            frozenset(name for domain in config.domain for name in domain.names),
            frozenset(name for domain in config.domain if domain.case == "sensitive" for name in domain.names),
            frozenset(name for domain in config.domain if domain.recipients == "static" for name in domain.names),
        )


@dataclass(slots=True)
class _Reader:
    """One source on its way into the collection. ``used`` counts the addresses it brought."""

    path: Path
    ours: Ours
    restriction: str
    today: dt.date
    collection: Collection
    tally: Tally
    used: int = 0

    def read(self, source: Source, file: BinaryIO) -> None:
        match source.type:
            case "list":
                self._text(file, self._listed)
            case "restricted":
                self._text(file, self._restricted)
            case "ldif":
                self._ldif(file)
            case "map" | "overrides":
                for line in map_lines(file, self._bad):
                    self._ruled(line, OVERRIDE if source.type == "overrides" else 0)
            case "aliases":
                for number, kind, value in alias_lines(file, self._bad):
                    if kind == "smtp":
                        self._add(number, value, _ACCEPTED)
                    else:
                        self.tally.skip(Skip.OTHER_KIND)
            case never:
                assert_never(never)

    def _bad(self, number: int, reason: str) -> None:
        self.tally.bad(self.path, number, reason)

    def _ruled(self, line: MapLine, override: int) -> None:
        """An entry of a map. ``OK`` without an end in an ordinary one says no more than a line of a list."""
        wide = line.key.startswith("@")
        key: str | AddressFault
        if wide:
            key = line.key if is_domain(line.key[1:]) else AddressFault.SYNTAX
        else:
            key = parse_utf8_mailbox(line.key)
            if not isinstance(key, AddressFault) and not key.isascii():
                key = unquoted(key)
        if isinstance(key, AddressFault):
            self.tally.bad(self.path, line.number, Skip.SYNTAX)
            return
        if domain_of(key) not in self.ours.all:
            self.tally.skip(Skip.NO_DOMAIN)
            return
        if line.until is not None and line.until < self.today:
            self.tally.skip(Skip.EXPIRED)
            return
        if not (wide or override or line.until or line.ruling.kind):
            self._add(line.number, line.key, _ACCEPTED)
            return
        flags = RULED | override | (WIDE if wide else 0)
        comment = operator_text(line.comment)
        entry = Entry(flags, ruling=line.ruling, until=end_of(line.until), comment=comment)
        if self.collection.rule(key, entry):
            self.used += 1
        else:
            self.tally.skip(Skip.SAID_BEFORE)

    def _text(self, file: BinaryIO, take: Callable[[int, str], None]) -> None:
        for number, raw, whole in lines(file):
            if not whole:
                self.tally.bad(self.path, number, Skip.LONG)
                continue
            try:
                text = raw.decode("utf-8").strip()
            except UnicodeDecodeError:
                self.tally.bad(self.path, number, Skip.ENCODING)
                continue
            if text and not text.startswith("#"):
                take(number, text)

    def _listed(self, number: int, text: str) -> None:
        # A # belongs to a comment only behind white space: it may stand in a local part.
        address, _, rest = text.replace("\t", " ").partition(" ")
        if rest and not rest.lstrip().startswith("#"):
            self.tally.bad(self.path, number, Skip.SYNTAX)
            return
        self._add(number, address, _ACCEPTED)

    def _restricted(self, number: int, text: str) -> None:
        address, _, wording = text.replace("\t", " ").partition(" ")
        self._add(number, address, Entry(RESTRICTED, operator_text(wording.strip())))

    def _ldif(self, file: BinaryIO) -> None:
        def report(number: int, fault: ldif.LdifFault) -> None:
            self.tally.bad(self.path, number, fault)

        for record in ldif.records(file, frozenset((MAIL, PROXY, self.restriction)), report):
            entry = self._entry(record)
            for number, attribute, value in record.values:
                if attribute == MAIL:
                    self._add(number, value, entry)
                elif attribute == PROXY:
                    kind, colon, address = value.partition(":")
                    if colon and kind.lower() == "smtp":
                        self._add(number, address, entry)
                    else:
                        self.tally.skip(Skip.OTHER_KIND)

    def _entry(self, record: ldif.Record) -> Entry:
        """What all addresses of one LDIF entry have in common.

        A restriction that cannot be read restricts: taking it for FALSE would open what somebody meant to close.
        """
        entry = Entry(ACCEPT | RESTRICTED) if self.restriction in record.broken else _ACCEPTED
        for _, attribute, value in record.values:
            if attribute == self.restriction and value.upper() not in ("FALSE", ""):
                entry = Entry(ACCEPT | RESTRICTED, operator_text("" if value.upper() == "TRUE" else value))
        return entry

    def _add(self, number: int, text: str, entry: Entry) -> None:
        mailbox = parse_utf8_mailbox(text)
        if isinstance(mailbox, AddressFault) or "@" not in mailbox:
            self.tally.bad(self.path, number, Skip.SYNTAX)
            return
        if entry.flags & ACCEPT and domain_of(mailbox) not in self.ours.verified:
            if not entry.flags & RESTRICTED:
                self.tally.skip(Skip.FOREIGN)
                return
            entry = replace(entry, flags=entry.flags & ~ACCEPT)
        mailbox = unquoted(mailbox)
        self.collection.add(mailbox, entry)
        if entry.flags & ACCEPT and self.ours.sensitive and domain_of(mailbox) in self.ours.sensitive:
            self.collection.add(exact_key(mailbox), Entry(EXACT))
        self.used += 1


_ACCEPTED: Final = Entry(ACCEPT)
