"""Owns: whether what was read may replace what is in place (row R6), and the difference between the two (row R9).

Pure. The snapshot in place and what was read are hashes, so the difference is one of numbers; what is new is known by name
where the reading kept names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection as Sized
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from relay.directory.failure import Reason
from relay.directory.snapshot import ACCEPT, NEEDS_AUTH, RESTRICTED, Entry, Snapshot
from relay.directory.whole import Whole

NAMED: Final = 1000
"""Addresses of a difference kept by name."""
_PART: Final = 1 << 52
"""The span of hashes compared at a time, a 4096th of all: few are objects at once, and most spans are the same octets."""
SLACK: Final = 1.05
"""What was accepted may be this much more when it is read again: people leave meanwhile."""
RECIPIENTS: Final = "recipients"
SENDERS: Final = "restricted senders"
INTERNAL: Final = "needs authentication"
LIMITED: Final = "size limits"


@dataclass(frozen=True, slots=True)
class Loss:
    """So many of so many would go. ``what`` is one of the names above, or ``recipients of DOMAIN``."""

    what: str
    gone: int
    of: int

    def __str__(self) -> str:
        return f"{self.gone} of {self.of} {self.what} would go"


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a reading is not taken. ``canaries`` are the addresses that are missing."""

    losses: tuple[Loss, ...] = ()
    canaries: tuple[str, ...] = ()
    empty: bool = False

    @property
    def reason(self) -> Reason:
        """As a label."""
        return Reason.EMPTY if self.empty else Reason.CANARY if self.canaries else Reason.SHRUNK

    def __str__(self) -> str:
        said = ["there would be no recipient at all"] if self.empty else []
        said += [f"{address} is missing" for address in self.canaries]
        return "; ".join([*said, *map(str, self.losses)])

    def plain(self) -> dict[str, Any]:
        """For the state file."""
        return {"losses": {loss.what: loss.gone for loss in self.losses}, "canaries": list(self.canaries)}


@dataclass(slots=True)
class Difference:
    """Between the snapshot in place and a reading. Names stop at ``NAMED``, numbers do not."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    added_names: list[str] = field(default_factory=list)
    changed_names: list[str] = field(default_factory=list)
    removed_names: list[str] = field(default_factory=list)
    """Only where names are kept (``directory.names``): the snapshot holds hashes."""
    losses: list[Loss] = field(default_factory=list)

    @property
    def none(self) -> bool:
        """Whether both say the same."""
        return not (self.added or self.changed or self.removed)


def counts(whole: Whole) -> dict[str, int]:
    """How many addresses there are of each kind: kept in the snapshot, for the next comparison."""
    found: Counter[str] = Counter()
    for kind, times in whole.times.items():
        record, domain = whole.table[kind]
        for flag, what in ((ACCEPT, RECIPIENTS), (RESTRICTED, SENDERS), (NEEDS_AUTH, INTERNAL)):
            if record.flags & flag:
                found[what] += times
        if record.size_limit:
            found[LIMITED] += times
        if record.flags & ACCEPT:
            found[_of(domain)] += times
    return dict(found)


def difference(old: Snapshot | None, whole: Whole) -> Difference:
    """What would change. Without a snapshot in place all of it is new and nothing goes."""
    found = Difference()
    if old is None:
        found.added = len(whole.hashes)
        found.added_names = list(islice((whole.names or {}).values(), NAMED))
        return found
    kept: Counter[str] = Counter()
    records = old.tables.records
    for (was, kind), times in _pairs(old, whole, found).items():
        before, (now, domain) = records[was], whole.table[kind]
        both = before.flags & now.flags
        for flag, what in ((ACCEPT, RECIPIENTS), (RESTRICTED, SENDERS), (NEEDS_AUTH, INTERNAL)):
            kept[what] += times if both & flag else 0
        kept[LIMITED] += times * _limits(before, now)
        kept[_of(domain)] += times if both & ACCEPT else 0
        found.changed += times if before != now else 0
    stated = old.origin.get("counts")
    # One built by an older version has no counts but these.
    before_counts = stated if isinstance(stated, dict) else {RECIPIENTS: old.recipients, SENDERS: old.restricted}
    found.losses = [
        Loss(what, of - kept[what], of)
        for what, of in sorted(before_counts.items())
        if isinstance(of, int) and of > kept[what]
    ]
    return found


def _pairs(old: Snapshot, whole: Whole, found: Difference) -> Counter[tuple[int, int]]:
    """How often which old record meets which kind. Part by part, so that few objects are alive at once; counts and names
    of what is new or gone go into ``found``.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    before, places, records = old.tables
    hashes, kinds = memoryview(whole.hashes), memoryview(whole.kinds)
    came = went = 0
    for end in (*range(_PART, 1 << 64, _PART), 1 << 64):
        was, now = bisect_left(before, end, went), bisect_left(hashes, end, came)
        same = before[went:was] == hashes[came:now]
        if same and whole.names is None:
            pairs.update(zip(places[went:was], kinds[came:now], strict=True))
            went, came = was, now
            continue
        mine = dict(zip(before[went:was], places[went:was], strict=True))
        theirs = dict(zip(hashes[came:now], kinds[came:now], strict=True))
        went, came = was, now
        if same:
            pairs.update(zip(mine.values(), theirs.values(), strict=True))
        else:
            added = theirs.keys() - mine.keys()
            found.added += len(added)
            found.removed += len(mine.keys() - theirs.keys())
            _name(found.added_names, added, whole)
            pairs.update((mine[both], theirs[both]) for both in mine.keys() & theirs.keys())
        if whole.names is not None:
            changed = (h for h in mine.keys() & theirs.keys() if records[mine[h]] != whole.table[theirs[h]].entry)
            _name(found.changed_names, changed, whole)
    return pairs


def _name(names: list[str], hashes: Iterable[int], whole: Whole) -> None:
    if whole.names is not None:
        known = (whole.names[hashed] for hashed in hashes if hashed in whole.names)
        names += islice(known, NAMED - len(names))


def _limits(before: Entry, now: Entry) -> bool:
    return bool(before.size_limit and now.size_limit)


def judge(
    found: Difference,
    whole: Whole,
    canaries: Sized[str],
    restricted_canaries: Sized[str],
    share: float,
    floor: int,
    accepted: Mapping[str, Any] | None = None,
) -> Refused | None:
    """Whether the reading may be taken; ``accepted`` is what an operator was told and has confirmed."""
    flags = {address.lower(): ACCEPT for address in canaries}
    missing = [a for a in flags if not _flags(whole, a) & ACCEPT]
    missing += [f"restricted {a.lower()}" for a in restricted_canaries if not _flags(whole, a.lower()) & RESTRICTED]
    known = accepted or {}
    missing = [address for address in missing if address not in known.get("canaries", ())]
    allowed: Mapping[str, int] = known.get("losses", {})
    losses = [
        loss
        for loss in found.losses
        if loss.gone > max(floor, loss.of * share) and loss.gone > allowed.get(loss.what, -1) * SLACK
    ]
    empty = not whole.accepts()
    return Refused(tuple(losses), tuple(missing), empty) if losses or missing or empty else None


def _flags(whole: Whole, address: str) -> int:
    entry = whole.entry(address)
    return 0 if entry is None else entry.flags


def _of(domain: str) -> str:
    return f"{RECIPIENTS} of {domain}"
