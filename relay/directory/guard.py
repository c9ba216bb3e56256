"""Owns: whether what was read may replace what is in place (row R6), and the difference between the two (row R9).

Pure. The snapshot in place holds hashes alone, so the difference is found by asking it for each address that was read:
what is new is known by name, what is gone by number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection as Sized
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from relay.directory.failure import Reason
from relay.directory.snapshot import ACCEPT, NEEDS_AUTH, RESTRICTED, Entry, Snapshot
from relay.directory.sources import Collection

NAMED: Final = 1000
"""Addresses of a difference kept by name."""
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


def counts(collection: Collection) -> dict[str, int]:
    """How many addresses there are of each kind: kept in the snapshot, for the next comparison."""
    found: Counter[str] = Counter()
    records = collection.records
    for number, times in Counter(collection.addresses.values()).items():
        record = records[number]
        for flag, what in ((ACCEPT, RECIPIENTS), (RESTRICTED, SENDERS), (NEEDS_AUTH, INTERNAL)):
            if record.flags & flag:
                found[what] += times
        if record.size_limit:
            found[LIMITED] += times
    taken = {number for number, record in enumerate(records) if record.flags & ACCEPT}
    domains = Counter(a.rpartition("@")[2] for a, number in collection.addresses.items() if number in taken)
    found.update({_of(domain): times for domain, times in domains.items()})
    return dict(found)


def difference(old: Snapshot | None, collection: Collection) -> Difference:
    """What would change. Without a snapshot in place all of it is new and nothing goes."""
    found = Difference()
    if old is None:
        found.added = len(collection.addresses)
        found.added_names = list(islice(collection.addresses, NAMED))
        return found
    kept: Counter[str] = Counter()
    kept_in: Counter[str] = Counter()
    pairs: dict[tuple[int, int], list[int]] = {}  # old and new record: how often they meet, and whether they differ
    records = collection.records
    for address, number in collection.addresses.items():
        before, now = old.entry(address), records[number]
        if before is None:
            found.added += 1
            if len(found.added_names) < NAMED:
                found.added_names.append(address)
            continue
        pair = pairs.get((id(before), number))
        if pair is None:
            pair = pairs[id(before), number] = [0, before.flags & now.flags, before != now, _limits(before, now)]
        pair[0] += 1
        if pair[1] & ACCEPT:
            kept_in[address.rpartition("@")[2]] += 1
        if pair[2]:
            found.changed += 1
            if len(found.changed_names) < NAMED:
                found.changed_names.append(address)
    for times, both, _, limited in pairs.values():
        for flag, what in ((ACCEPT, RECIPIENTS), (RESTRICTED, SENDERS), (NEEDS_AUTH, INTERNAL)):
            kept[what] += times if both & flag else 0
        kept[LIMITED] += times * limited
    kept.update({_of(domain): times for domain, times in kept_in.items()})
    found.removed = old.addresses - sum(times for times, *_ in pairs.values())
    stated = old.origin.get("counts")
    # One built by an older version has no counts but these.
    before_counts = stated if isinstance(stated, dict) else {RECIPIENTS: old.recipients, SENDERS: old.restricted}
    found.losses = [
        Loss(what, of - kept[what], of)
        for what, of in sorted(before_counts.items())
        if isinstance(of, int) and of > kept[what]
    ]
    return found


def _limits(before: Entry, now: Entry) -> bool:
    return bool(before.size_limit and now.size_limit)


def judge(
    found: Difference,
    collection: Collection,
    canaries: Sized[str],
    restricted_canaries: Sized[str],
    share: float,
    floor: int,
    accepted: Mapping[str, Any] | None = None,
) -> Refused | None:
    """Whether the reading may be taken; ``accepted`` is what an operator was told and has confirmed."""
    flags = {address.lower(): ACCEPT for address in canaries}
    missing = [a for a in flags if not _flags(collection, a) & ACCEPT]
    missing += [
        f"restricted {a.lower()}" for a in restricted_canaries if not _flags(collection, a.lower()) & RESTRICTED
    ]
    known = accepted or {}
    missing = [address for address in missing if address not in known.get("canaries", ())]
    allowed: Mapping[str, int] = known.get("losses", {})
    losses = [
        loss
        for loss in found.losses
        if loss.gone > max(floor, loss.of * share) and loss.gone > allowed.get(loss.what, -1) * SLACK
    ]
    empty = not collection.accepts()
    return Refused(tuple(losses), tuple(missing), empty) if losses or missing or empty else None


def _flags(collection: Collection, address: str) -> int:
    number = collection.addresses.get(address)
    return 0 if number is None else collection.records[number].flags


def _of(domain: str) -> str:
    return f"{RECIPIENTS} of {domain}"
