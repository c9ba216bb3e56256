"""Owns: bringing a kept ledger up to date without reading every entry again (row R8).

Entries that changed come whole. What no change shows (an entry deleted, moved out of the base, one that lost its last address,
one whose parent was renamed or that was restored) shows in a list of the ids of everything that fits the profile: an id that is
gone takes its row with it, one that is new is read. The list is paged and proven like a reading. Raises LdapFailure, and
``Full`` where a whole reading is the better way; the kept ledger is then as it was. Must not judge the outcome.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from relay.directory.asking import Job
from relay.directory.ledger import Ledger
from relay.directory.marks import Mark, since
from relay.directory.unique import Unique

NEW: Final = 1000
"""Most entries read one by one because they are in the list and did not change; above that, reading everything is faster."""
TOGETHER: Final = 50
"""Ids in one filter: some two kilobytes of it."""


_TAIL_OCTETS: Final = 32


class Full(Exception):
    """Everything has to be read; the text says why."""


def update(job: Job, ledger: Ledger, old: Mark, new: Mark) -> int:
    """Make ``ledger`` say what the directory says; how many entries were read for it or dropped."""
    changes = since(old, new)
    if changes:
        job.gather(changes)
    fresh = job.ledger
    listed = _listed(job)
    known = set(ledger.keys)
    changed = set(fresh.keys)
    here = set(listed)
    strange = here - known - changed
    if strange:
        if len(strange) > NEW:
            raise Full(f"{len(strange)} entries are there that were not, and did not change")
        for also in _those(job, strange):
            job.gather(also)
        changed = set(fresh.keys)
    if job.unique.missing or len(changed) != len(fresh.keys):
        raise Full("entries have ids that are not their own, or that may not be read")
    fresh.drop(changed - here)
    dropped = ledger.drop((known - here) | changed)
    ledger.take(fresh)
    return max(len(changed), dropped)


class _Ids:
    """Takes the id of each entry; nothing else was asked for, so that it stands at the end."""

    def __init__(self, unique: Unique) -> None:
        self.numbers = array("Q")
        self._number, self._add = unique.number, self.numbers.append
        octets, name = unique.octets, unique.key_attribute.encode()
        value = bytes((4, octets))
        self._octets = octets
        self._tail = b""
        """How the entries of this server end, up to the id."""
        # The name, and the set of one value in the forms that OpenLDAP and Active Directory write.
        self._tails = tuple(
            bytes((4, len(name))) + name + head + value
            for head in (bytes((0x31, octets + 2)), b"\x31\x84\x00\x00\x00" + bytes((octets + 2,)))
        )

    def take(self, data: bytes, at: int, end: int) -> bool:
        """For ``Connection.pages``; what has another form goes the long way."""
        start = end - self._octets
        tail = self._tail
        if data[start - len(tail) : start] != tail or not tail:
            tail = data[max(at, start - _TAIL_OCTETS) : start]
            found = next((len(known) for known in self._tails if tail.lower().endswith(known)), 0)
            if not found:
                return False
            self._tail = tail[-found:]
        number = self._number(data[start:end])
        if number < 0:
            return False
        self._add(number)
        return True


def _listed(job: Job) -> array[int]:
    """The numbers of everything that fits the profile now."""
    unique = job.unique
    ids = _Ids(unique)
    for _, attributes in _names(job, ids):
        key = attributes.get(unique.key_attribute)
        number = unique.number(key[0]) if key else -1
        if number < 0:
            raise Full(f"an entry has no {unique.key_attribute} that may be read")
        ids.numbers.append(number)
    return ids.numbers


def _names(job: Job, ids: _Ids | None) -> Iterator[tuple[str, dict[str, list[bytes]]]]:
    connection, compiled = job.connection, job.connection.compiled(job.plan.filter)
    take = ids.take if ids is not None else None
    for found in connection.pages(job.base, job.scope, compiled, [job.unique.key_attribute], take):
        if found is not None:
            yield found


def _those(job: Job, wanted: set[int]) -> Iterator[str]:
    """Filters that find the entries with these numbers. Asked for a second time, because numbers are no ids."""
    unique = job.unique
    keys = [
        attributes[unique.key_attribute][0]
        for _, attributes in _names(job, None)
        if unique.key_attribute in attributes and unique.number(attributes[unique.key_attribute][0]) in wanted
    ]
    for start in range(0, len(keys), TOGETHER):
        yield f"(|{''.join(unique.filter(key) for key in keys[start : start + TOGETHER])})"
