"""Owns: what lists and LDIF files say about addresses, and gathering it into one set of entries.

Reads the files of ``[[directory.sources]]`` and nothing else. Every line that is left out is counted under its reason;
whatever makes the whole doubtful refuses the build, because a snapshot that lacks addresses refuses good mail and one
that lacks restrictions lets bad mail out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final, assert_never

from relay.config.schema import Config, Source
from relay.directory import ldif
from relay.directory.layout import SnapshotError
from relay.directory.lines import lines
from relay.directory.snapshot import ACCEPT, RECORDS, RESTRICTED, Entry
from relay.mail.address import AddressFault, domain_of, parse_mailbox
from relay.mail.reply import operator_text

EXAMPLES: Final = 20
"""Bad lines reported one by one: enough to see the pattern, and a broken export does not fill the screen."""

MAIL: Final = "mail"
PROXY: Final = "proxyaddresses"


class Skip(StrEnum):
    """Why an address was left out although its line can be read."""

    FOREIGN = "not of a domain with recipients = directory"
    OTHER_KIND = "not an SMTP address (X400, X500, SIP)"
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
            entry = _merged(self.records[known], entry)
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
        self.addresses[address] = number

    def count(self, flag: int) -> int:
        """How many addresses carry the flag."""
        carrying = {number for number, record in enumerate(self.records) if record.flags & flag}
        return sum(number in carrying for number in self.addresses.values())


def _merged(old: Entry, new: Entry) -> Entry:
    return Entry(
        old.flags | new.flags, new.text or old.text, new.next_hop or old.next_hop, new.size_limit or old.size_limit
    )


def gather(config: Config) -> tuple[Collection, Tally]:
    """Read all sources of the configuration. Raises SnapshotError when the result cannot be trusted."""
    directory = config.directory
    ours = frozenset(name for domain in config.domain if domain.recipients == "directory" for name in domain.names)
    if not directory.sources:
        raise SnapshotError("directory.sources: no source is configured; add a [[directory.sources]] table")
    collection, tally = Collection(), Tally()
    for source in directory.sources:
        reader = _Reader(source.path, ours, directory.restriction_attribute.lower(), collection, tally)
        try:
            with source.path.open("rb") as file:
                reader.read(source, file)
        except OSError as error:
            raise SnapshotError(
                f"{source.path}: cannot be read: {error.strerror}; the snapshot stays as it is"
            ) from None
        if source.type != "restricted" and not reader.used:
            raise SnapshotError(
                f"{source.path}: has no usable address{_because(tally)}; "
                "was the export cut short? The snapshot stays as it is"
            )
    if not collection.addresses or (ours and not collection.count(ACCEPT)):
        raise SnapshotError(
            "the sources give no recipient at all, so that all mail would be refused; the snapshot stays as it is"
        )
    return collection, tally


def _because(tally: Tally) -> str:
    if not tally.skipped:
        return ""
    reason, count = tally.skipped.most_common(1)[0]
    return f" (left out so far: {count} × {reason})"


@dataclass(slots=True)
class _Reader:
    """One source on its way into the collection. ``used`` counts the addresses it brought."""

    path: Path
    ours: frozenset[str]
    restriction: str
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
            case never:
                assert_never(never)

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
        mailbox = parse_mailbox(text)
        if isinstance(mailbox, AddressFault) or "@" not in mailbox:
            self.tally.bad(self.path, number, Skip.SYNTAX)
            return
        if entry.flags & ACCEPT and domain_of(mailbox) not in self.ours:
            if not entry.flags & RESTRICTED:
                self.tally.skip(Skip.FOREIGN)
                return
            entry = replace(entry, flags=entry.flags & ~ACCEPT)
        self.collection.add(mailbox, entry)
        self.used += 1


_ACCEPTED: Final = Entry(ACCEPT)
