"""Owns: finding what is said of one recipient: overrides, tags, spelling, whole domains, each in its turn (rows R11, R16).

For addresses of which one look-up does not say everything; the others are asked of ``Snapshot.lookup`` alone. Must not
decide about mail, and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from relay.directory.snapshot import ACCEPT, EXACT, OVERRIDE, Entry, Snapshot, exact_key
from relay.mail.address import NULL_SENDER, Mailbox, without_tag
from relay.mail.ruling import Ruling, action_of
from relay.policy.recipient import OVERRIDES_RULE, SOURCES_RULE, DomainRule


class Found(NamedTuple):
    """``known``, ``ruling``, ``ruled_by`` and ``instead`` are as in ``policy.recipient.RecipientFacts``."""

    known: bool | None
    ruling: Ruling | None = None
    ruled_by: str = OVERRIDES_RULE
    instead: Mailbox = NULL_SENDER


def look_up(
    mailbox: Mailbox,
    rule: DomainRule,
    snapshot: Snapshot | None,
    now: float,
    note: Callable[[str], object] = len,
) -> Found:
    """Overrides of the configuration first, then those of files, then the sources; an address before its domain.

    A tag is taken off only where nothing is said of the address with it. ``mailbox`` without needless quotes; ``now`` in
    seconds since 1970; ``note`` takes each step in words.
    """
    bare = without_tag(mailbox, rule.delimiter) if rule.delimiter else NULL_SENDER
    names = [mailbox, bare] if bare else [mailbox]
    keys = [*names, f"@{mailbox.rpartition('@')[2]}"]
    instead = bare if rule.tag == "remove" else NULL_SENDER
    for key in keys:
        override = rule.overrides.get(key.lower())
        if override is not None:
            note(f"{key}: override of the configuration{_ended(override.until, now)}{_remark(override.comment)}")
            if not override.until or now < override.until:
                return Found(None, override.ruling, OVERRIDES_RULE, instead if key == bare else NULL_SENDER)
    if snapshot is None:
        note("there is no snapshot")
        return Found(None)
    entries = [(key, snapshot.entry(key)) for key in keys]
    for key, ruled in _ruled(entries, OVERRIDE, now, note):
        return Found(None, ruled.ruling, OVERRIDES_RULE, instead if key == bare else NULL_SENDER)
    if rule.verified_by not in {"directory", "static"}:
        for key, ruled in _ruled(entries, 0, now, note):
            return Found(None, ruled.ruling, SOURCES_RULE, instead if key == bare else NULL_SENDER)
        return Found(None)
    for key, entry in entries:
        for _, ruled in _ruled([(key, entry)], 0, now, note):
            return Found(None, ruled.ruling, SOURCES_RULE, instead if key == bare else NULL_SENDER)
        if key not in names:
            continue
        if entry is None or not entry.flags & ACCEPT:
            note(f"{key}: {'not in the snapshot' if entry is None else 'no recipient'}")
        elif rule.sensitive and not _spelt(snapshot, key):
            note(f"{key}: in the snapshot with other capitals")
        else:
            note(f"{key}: a recipient")
            return Found(known=True, instead=instead if key == bare else NULL_SENDER)
    return Found(known=False)


def _ruled(
    entries: list[tuple[str, Entry | None]], flag: int, now: float, note: Callable[[str], object]
) -> Iterator[tuple[str, Entry]]:
    """Those with a ruling in force that is an override, or is none."""
    for key, entry in entries:
        if entry is not None and entry.ruling is not None and entry.flags & OVERRIDE == flag:
            said = "override of a file" if flag else "map"
            note(f"{key}: {said}: {action_of(entry.ruling)}{_ended(entry.until, now)}{_remark(entry.comment)}")
            if not entry.until or now < entry.until:
                yield key, entry


def _spelt(snapshot: Snapshot, mailbox: str) -> bool:
    """Whether this spelling is known. A snapshot built before case = "sensitive" knows none, and then every one is right."""
    domain = mailbox.rpartition("@")[2].lower()
    return domain not in snapshot.sensitive or bool(snapshot.lookup(exact_key(mailbox)) & EXACT)


def _ended(until: int, now: float) -> str:
    return ", ended" if until and now >= until else ""


def _remark(comment: str) -> str:
    return f" ({comment})" if comment else ""
