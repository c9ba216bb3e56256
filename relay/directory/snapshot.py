"""Owns: the meaning of a snapshot's sections, the look-up, and which generation a process uses.

========  ==============  ===================================================================================
section   items           meaning
========  ==============  ===================================================================================
hashes    8 octets        keyed BLAKE2b of every address in lower case, ascending
fanout    4 octets        where the hashes begin whose top bits are 0, 1, 2, …; the last item is their count
index     1 or 2 octets   for each hash, the number of its record
records   20 octets       distinct sets of attributes: flags, place of text, place of next hop, size limit
strings   1 octet         texts, each with its length (2 octets) in front; place 0 holds the empty one
rulings   24 octets       only where there are any: number of a record, places of its action and its comment, a time
origin    1 octet         JSON, not required: what the snapshot was built from, for ``relay directory status``
========  ==============  ===================================================================================

Beside addresses there are keys of two more kinds among the hashes: ``@domain`` for what is said of a whole domain, and
``exact_key`` for the spelling of an address in a domain with case = "sensitive".

Must not decide what a flag means for mail, nor write. Later columns (accounts, grants) come as sections of their own.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import struct
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from relay.directory.answers import Answers
from relay.directory.key import address_state, key_id
from relay.directory.layout import Header, Image, SnapshotError, read
from relay.directory.primary import Primaries, path_of
from relay.directory.primary import load as load_primaries
from relay.mail.reply import OperatorText, operator_text
from relay.mail.ruling import Ruling, parse_ruling

ACCEPT: Final = 1
"""The address is a valid recipient."""
RESTRICTED: Final = 2
"""Mail from this address is refused; alone, without ACCEPT, for addresses that only send."""
NEEDS_AUTH: Final = 4
"""Only authenticated clients may write to this address."""

RULED: Final = 8
"""The entry has a ruling: the rest of the flags holds where the ruling has ended."""
OVERRIDE: Final = 16
"""The ruling stands over all sources."""
EXACT: Final = 32
"""This spelling of an address is valid (``exact_key``)."""
WIDE: Final = 64
"""The entry is of a whole domain."""

IMAP: Final = 128
"""The account may read mail over IMAP: shown, no rule of the relay's."""
PARTICULAR: Final = 1 << 31
"""In memory alone: the entry has NEEDS_AUTH or a size limit, so that its flags do not say everything about a RCPT."""

PLACED: Final = 1 << 30
"""In memory alone: the entry names a host of its own."""

RECORD: Final = struct.Struct("=IIIQ")
RULING: Final = struct.Struct("=IIIIQ")
"""Record, action, comment, nothing, end in seconds since 1970 or 0."""
STRING_LENGTH: Final = struct.Struct("=H")

_REQUIRED: Final = ("hashes", "fanout", "index", "records", "strings")
KNOWN: Final = frozenset((*_REQUIRED, "rulings", "origin"))
_INDEX_FORMATS: Final[dict[int, Literal["B", "H"]]] = {1: "B", 2: "H"}

RECORDS: Final = 1 << 16
"""Most distinct sets of attributes: what an index of two octets can name. Real directories have a handful."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the snapshot knows about one address.

    ``text``: own wording of a restriction, "" for the configured one. ``next_hop`` "" and ``size_limit`` 0 (octets):
    none of its own. ``ruling`` is an operator's word that comes before the flags until ``until``, seconds since 1970,
    0 for ever; ``comment`` is for people.
    """

    flags: int
    text: OperatorText = OperatorText("")
    next_hop: str = ""
    size_limit: int = 0
    ruling: Ruling | None = None
    until: int = 0
    comment: str = ""


def exact_key(mailbox: str) -> str:
    """What stands among the hashes for one spelling of an address; look-ups go without regard to case."""
    local, _, domain = mailbox.rpartition("@")
    return f"={local.encode().hex()}@{domain.lower()}"


def previous_path(path: Path) -> Path:
    """Where the generation before the one at ``path`` is kept."""
    return path.with_name(path.name + ".previous")


class Tables(NamedTuple):
    """Hashes, ascending, with the place of each one's entry."""

    hashes: memoryview[int]
    places: memoryview[int]
    records: list[Entry]


class Snapshot:
    """One generation, in private memory: no file can change or take away what it answers."""

    __slots__ = (
        "_entry",
        "addresses",
        "created",
        "generation",
        "key_id",
        "lookup",
        "origin",
        "particular",
        "path",
        "placed",
        "recipients",
        "restricted",
        "ruled",
        "sensitive",
        "size",
        "tables",
        "wide",
    )

    lookup: Callable[[str], int]
    """Flags of an address in any case, PARTICULAR and PLACED among them, 0 when it is unknown. Costs about 1.3 µs, hit or miss, at 500,000 addresses."""

    def __init__(self, path: Path, image: Image, key: bytes) -> None:
        """Raise SnapshotError when the key is not the file's or its sections contradict each other."""
        header = image.header
        if header.key_id != key_id(key):
            raise SnapshotError(
                f"{path}: was made with key {header.key_id}, but the key in use is {key_id(key)}; "
                "reload the relay if the key file was renewed, else run relay directory build"
            )
        self.path = path
        self.generation: Final = header.generation
        self.created: Final = header.created
        self.size: Final = header.size
        self.key_id: Final = header.key_id
        self.addresses: Final = header.addresses
        self.recipients: Final = header.recipients
        self.restricted: Final = header.restricted
        self.origin: Final = _origin(image)
        self.lookup, self._entry, flags, self.tables = _readers(path, image, key)
        self.ruled: Final = bool(flags & RULED)
        """Whether any entry has a ruling; where none has, nobody need ask."""
        self.particular: Final = bool(flags & PARTICULAR)
        """Whether any entry is PARTICULAR; where none is, nobody need ask."""
        self.placed: Final = bool(flags & PLACED)
        """Whether any entry names a host of its own."""
        self.wide: Final = bool(flags & WIDE)
        """Whether anything is said of whole domains."""
        self.sensitive: Final = frozenset(map(str, self.origin.get("case_sensitive", ())))
        """Domains that had case = "sensitive" at the build: only of these the spellings are known."""

    @classmethod
    def open(cls, path: Path, key: bytes) -> Snapshot:
        """Read and verify the file. Raises SnapshotError, which says what is wrong with it."""
        return cls(path, read(path, KNOWN), key)

    def entry(self, address: str) -> Entry | None:
        """All attributes of an address in any case; None when it is unknown."""
        return self._entry(address)


def inspect(path: Path) -> Header:
    """Verify a snapshot without its key and return its header. Raises SnapshotError."""
    return read(path, KNOWN).header


def _origin(image: Image) -> dict[str, Any]:
    section = image.sections.get("origin")
    if section is None:
        return {}
    try:
        found = json.loads(bytes(section.data))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _readers(
    path: Path, image: Image, key: bytes
) -> tuple[Callable[[str], int], Callable[[str], Entry | None], int, Tables]:
    """The look-ups as closures, all flags that occur, and the tables: what they use is a local of theirs, which halves the cost around
    the hash.

    What is checked here is what they rely on, so that a file with good checksums and wrong contents is refused now
    and not met by an IndexError in the middle of a session.
    """

    def wrong(what: str) -> SnapshotError:
        return SnapshotError(f"{path}: contradicts itself: {what}; run relay directory build with this version")

    missing = [name for name in _REQUIRED if name not in image.sections]
    if missing:
        raise wrong(f"no section {missing[0]!r}")
    sections = image.sections
    if sections["hashes"].item_octets != 8 or sections["fanout"].item_octets != 4:
        raise wrong("hashes or fan-out of another width")
    if sections["index"].item_octets not in _INDEX_FORMATS or sections["records"].item_octets != RECORD.size:
        raise wrong("index or records of another width")
    if len(sections["records"].data) > RECORDS * RECORD.size:
        raise wrong("more records than the index can name")
    hashes = memoryview(sections["hashes"].data).cast("Q")
    fanout = memoryview(sections["fanout"].data).cast("I")
    index = memoryview(sections["index"].data).cast(_INDEX_FORMATS[sections["index"].item_octets])
    records = [
        _entry(path, fields, sections["strings"].data) for fields in RECORD.iter_unpack(sections["records"].data)
    ]
    _rule(path, image, records)
    flags = [
        record.flags
        | (PARTICULAR if record.flags & NEEDS_AUTH or record.size_limit else 0)
        | (PLACED if record.next_hop else 0)
        for record in records
    ]
    if not len(hashes) == len(index) == image.header.addresses:
        raise wrong("hashes, index and header count differently")
    buckets = len(fanout) - 1
    if (
        buckets < 1
        or buckets & (buckets - 1)
        or fanout[0] != 0
        or fanout[-1] != len(hashes)
        or max(fanout) > len(hashes)
    ):
        raise wrong("the fan-out does not fit the hashes")
    if len(index) and max(index) >= len(records):
        raise wrong("the index names a record that is not there")
    shift = 64 - (buckets.bit_length() - 1)
    fresh = address_state(key).copy
    number = int.from_bytes

    def place(address: str) -> int:
        """Position of the address in the tables, -1 when it is unknown."""
        state = fresh()
        state.update(address.lower().encode())
        wanted = number(state.digest(), "little")
        bucket = wanted >> shift
        end = fanout[bucket + 1]
        found = bisect_left(hashes, wanted, fanout[bucket], end)
        return found if found < end and hashes[found] == wanted else -1

    def lookup(address: str) -> int:
        # The same as place, whose call costs a tenth of it.
        state = fresh()
        state.update(address.lower().encode())
        wanted = number(state.digest(), "little")
        bucket = wanted >> shift
        end = fanout[bucket + 1]
        found = bisect_left(hashes, wanted, fanout[bucket], end)
        return flags[index[found]] if found < end and hashes[found] == wanted else 0

    def entry(address: str) -> Entry | None:
        found = place(address)
        return records[index[found]] if found >= 0 else None

    return lookup, entry, functools.reduce(operator.or_, flags, 0), Tables(hashes, index, records)


def _rule(path: Path, image: Image, records: list[Entry]) -> None:
    """Put the rulings into the records they belong to."""
    section, strings = image.sections.get("rulings"), image.sections["strings"].data
    ruled = {number for number, record in enumerate(records) if record.flags & RULED}
    found: set[int] = set()
    try:
        if section is not None:
            for number, action, comment, _, until in RULING.iter_unpack(section.data):
                ruling = parse_ruling(_string(strings, action))
                if ruling is None or number not in ruled:
                    raise ValueError("no ruling")
                found.add(number)
                records[number] = replace(
                    records[number], ruling=ruling, until=until, comment=_string(strings, comment)
                )
        if found != ruled:
            raise ValueError("a ruling is missing")
    except (struct.error, ValueError):
        raise SnapshotError(
            f"{path}: contradicts itself: the rulings do not fit the records; run relay directory build"
        ) from None


def _entry(path: Path, fields: tuple[int, int, int, int], strings: bytes | memoryview) -> Entry:
    flags, text, next_hop, size_limit = fields
    try:
        return Entry(flags, operator_text(_string(strings, text)), _string(strings, next_hop), size_limit)
    except (struct.error, ValueError):
        raise SnapshotError(f"{path}: contradicts itself: a record names a text that is not there") from None


def _string(strings: bytes | memoryview, place: int) -> str:
    (length,) = STRING_LENGTH.unpack_from(strings, place)
    start = place + STRING_LENGTH.size
    if start + length > len(strings):
        raise ValueError("text beyond the section")
    return bytes(strings[start : start + length]).decode("utf-8")


_Identity = tuple[int, int, int]
"""Inode, time of change in nanoseconds, size: what tells one file under a name from the next."""


class Directory:
    """A worker's view of the snapshot.

    ``snapshot`` is the generation in use, None as long as there is none (then unknown means 451). ``refused`` says why
    the newest file was not taken, and is empty when it was. ``stale``: it is too old to say that an address is unknown.
    Reading them is safe while another thread refreshes.
    """

    __slots__ = ("_key", "_path", "_previous", "_tried", "answers", "primaries", "refused", "snapshot", "stale")

    def __init__(self, path: Path, key: bytes) -> None:
        """Take the current generation, or the previous one when the current one cannot be used. Never raises."""
        self._path = path
        self._previous = previous_path(path)
        self._key = key
        self._tried: tuple[_Identity | None, _Identity | None] | None = None
        self.snapshot: Snapshot | None = None
        self.refused = ""
        self.stale = False
        self.answers: Final = Answers()
        """What next hops said, for domains with recipients = "callout"."""
        self.primaries: Primaries | None = None
        """Which addresses stand for which primary ones; None unless senders are rewritten (``senders.rewrite``)."""
        self.refresh()

    def note_age(self, now: float, max_age_s: float | None) -> None:
        """Decide ``stale``; told from outside now and then, so that no RCPT reads a clock (row R7)."""
        snapshot = self.snapshot
        self.stale = max_age_s is not None and snapshot is not None and now - snapshot.created > max_age_s

    def changed(self) -> bool:
        """Whether ``refresh`` would read a file: one ``stat`` (two while there is no snapshot)."""
        return self._look() != self._tried

    def refresh(self) -> bool:
        """Take the file if it is another one; True when another generation is in use now.

        A file that was refused is not read again until it changes. Takes some 20 ms for 500,000 addresses.
        """
        seen = self._look()
        if seen == self._tried:
            return False
        before = self.snapshot
        try:
            found = Snapshot.open(self._path, self._key)
            self.refused = ""
        except SnapshotError as refusal:
            self.refused = str(refusal)
            found = None
            if before is None:
                try:
                    found = Snapshot.open(self._previous, self._key)
                except SnapshotError:
                    # The current file's reason is what the operator has to mend.
                    found = None
        if found is not None:
            self.snapshot = found
            path = path_of(self._path)
            self.primaries = load_primaries(path, self._key) if path.exists() else None
        # The previous generation matters only as long as there is no other.
        self._tried = (seen[0], seen[1] if self.snapshot is None else None)
        if found is None:
            return False
        return before is None or (before.generation, before.created) != (found.generation, found.created)

    def rekey(self, key: bytes) -> None:
        """Use another key from the next ``refresh`` on, which reads the file whether it changed or not."""
        self._key = key
        self._tried = None

    def _look(self) -> tuple[_Identity | None, _Identity | None]:
        return _identity(self._path), _identity(self._previous) if self.snapshot is None else None


def _identity(path: Path) -> _Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
