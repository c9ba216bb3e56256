"""Owns: the short way of an entry from the wire into a ledger, for the many entries that have nothing special.

The same as ``ber.entry`` and ``Harvest`` say, four times as fast: addresses stay octets, and what else is said of an entry
(class, account control, limits) is looked up as the octets it came in, which hardly ever differ. Whatever it does not
understand it leaves to those two; it must never take an entry in another way than they would.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from relay.directory import ber
from relay.directory.harvest import Harvest
from relay.directory.key import address_state
from relay.directory.ledger import Ledger
from relay.directory.presets import EXCHANGE_OWN
from relay.directory.snapshot import ACCEPT, RESTRICTED, Entry
from relay.directory.unique import Unique
from relay.mail.address import DOMAIN_PATTERN, LOCAL_PART_OCTETS
from relay.mail.domain import DOMAIN_OCTETS

FACTS: Final = 4096
"""Different sets of facts remembered; Active Directory has some tens. Where every entry has its own, the long way is gone."""
FOREIGN: Final = 4096
"""Domains remembered that are not ours: a company's partners and old names."""
NAMES: Final = 256
"""Different spellings of attribute names remembered: a server answers with the few that it was asked for."""

_ATEXT: Final = rb"[a-z0-9#$&'*+/=?^_`{|}~-]"
# A local part that mail.address.PLAIN_MAILBOX takes; the domain is one of ours and so in order.
_LOCAL: Final = re.compile(rb"%s++(?:\.%s++)*+" % (_ATEXT, _ATEXT)).fullmatch
_DOMAIN: Final = re.compile(DOMAIN_PATTERN.encode()).fullmatch
_OTHERS: Final = frozenset((b"x400:", b"x500:"))
_SIP: Final = frozenset((b"sip:", b"eum:"))
_OWN: Final = re.compile(
    rb"(?:cn=)?(?:%s)" % b"|".join(re.escape(name.encode()) for name in EXCHANGE_OWN), re.IGNORECASE
).match

_ADDRESSES, _KEY, _STAMP, _FACT = range(4)


_Judged = tuple[Entry, dict[bytes, int]]
"""What the facts come to, and the numbers of its kinds by domain."""


class Lean:
    """``take`` is for ``Connection.pages``. Only for a harvest that is ``plain``."""

    def __init__(self, harvest: Harvest, ledger: Ledger, key: bytes, unique: Unique) -> None:
        self._harvest = harvest
        self._ledger = ledger
        self._unique = unique
        self._fresh = address_state(key).copy
        self._roles: dict[bytes, int] = {}
        self._addresses = frozenset(harvest.plan.addresses)
        self._own = harvest.plan.is_ad and not harvest.takes_system
        self._foreign: set[bytes] = set()
        self._facts: dict[bytes, _Judged | None] = {}
        self._domains = {name.encode(): name for name in harvest.ours if name.isascii()}

    def take(self, data: bytes, at: int, end: int) -> bool:
        """Take the entry between these places; False leaves it, and then nothing of it has been taken."""
        try:
            return self._take(data, at, end)
        except IndexError:
            return False

    def _take(self, data: bytes, at: int, end: int) -> bool:
        if data[at] != 4:
            return False
        length = data[at + 1]
        start = at + 2
        if length >= 0x80:
            _, start, at = ber.header(data, at)
        else:
            at = start + length
        if self._own and _OWN(data, start, at) is not None:
            return False
        length = data[at + 1]
        if data[at] != 0x30:
            return False
        start = at + 2
        if length >= 0x80:
            _, start, at = ber.header(data, at)
        else:
            at = start + length
        if at != end:
            return False
        at = start
        facts: list[bytes] = []
        holders: list[tuple[int, int]] = []
        key = stamp = b""
        roles = self._roles
        while at < end:
            length = data[at + 1]
            start = at + 2
            if length >= 0x80:
                _, start, stop = ber.header(data, at)
            else:
                stop = start + length
            if data[at] != 0x30 or stop > end:
                return False
            place = start + 2 + data[start + 1]
            name = data[start:place]
            role = roles.get(name)
            if role is None:
                role = self._role(name)
            if role == _FACT:
                facts.append(data[at:stop])
            elif role == _ADDRESSES:
                holders.append((place, stop))
            else:  # one value, in a set of its own
                inner = place + 2
                last = inner + data[place + 1]
                if data[place + 1] >= 0x80:
                    _, inner, last = ber.header(data, place)
                if data[place] != 0x31 or last != stop or data[inner] != 4 or inner + 2 + data[inner + 1] != stop:
                    return False
                if role == _KEY:
                    key = data[inner + 2 : stop]
                else:
                    stamp = data[inner + 2 : stop]
            at = stop
        known = b"".join(facts)
        try:
            judged = self._facts[known]
        except KeyError:
            judged = self._learn(known, facts)
        if judged is None or at != end:
            return False
        return self._keep(data, holders, judged, key, stamp)

    def _keep(self, data: bytes, holders: list[tuple[int, int]], judged: _Judged, key: bytes, stamp: bytes) -> bool:
        unique, domains, (entry, kinds) = self._unique, self._domains, judged
        found: dict[bytes, int] = {}
        others = foreign = 0
        for place, stop in holders:
            length = data[place + 1]
            if data[place] != 0x31:
                return False
            at = place + 2
            last = at + length
            if length >= 0x80:
                _, at, last = ber.header(data, place)
            if last != stop:
                return False
            while at < stop:
                if data[at] != 4:
                    return False
                length = data[at + 1]
                if length >= 0x80:
                    return False
                first = at + 2
                at = first + length
                value = data[first:at].lower()
                head = value[:5]
                if head == b"smtp:":
                    value = value[5:]
                elif head in _OTHERS or head[:4] in _SIP:
                    others += 1
                    continue
                local, _, domain = value.rpartition(b"@")
                kind = kinds.get(domain)
                if _LOCAL(local) is None or len(local) > LOCAL_PART_OCTETS:
                    return False
                if kind is None:
                    name = domains.get(domain)
                    if name is None:
                        if not self._is_foreign(domain):
                            return False
                        foreign += 1
                        continue
                    kind = kinds[domain] = self._ledger.kind(entry, name)
                found[value] = kind
            if at != stop:
                return False
        number = 0
        if not key or not stamp:
            unique.missing += 1
        else:
            number = unique.number(key)
            if number < 0 or not unique.note(stamp):
                return False
        ledger, fresh, of = self._ledger, self._fresh, int.from_bytes
        add = ledger.hashes.append
        for address in found:
            state = fresh()
            state.update(address)
            add(of(state.digest(), "little"))
        ledger.kinds.extend(found.values())
        if ledger.names is not None:
            for address, hashed in zip(found, ledger.hashes[-len(found) :] if found else (), strict=True):
                ledger.names[hashed] = address.decode("ascii")
        ledger.end_row(number)
        self._harvest.taken(len(found), others, foreign)
        return True

    def _is_foreign(self, domain: bytes) -> bool:
        """Whether it is a domain at all; it is none of ours."""
        if domain in self._foreign:
            return True
        if len(domain) > DOMAIN_OCTETS or _DOMAIN(domain) is None:
            return False
        if len(self._foreign) < FOREIGN:
            self._foreign.add(domain)
        return True

    def _role(self, name: bytes) -> int:
        text = name[2:].decode("ascii", "replace").lower()
        role = _FACT
        if name[0] != 4 or ";" in text or len(self._roles) >= NAMES:
            return role  # the long way knows parts of an attribute, and what is broken
        if text in self._addresses:
            role = _ADDRESSES
        elif text == self._unique.key_attribute:
            role = _KEY
        elif text == self._unique.stamp_attribute:
            role = _STAMP
        self._roles[name] = role
        return role

    def _learn(self, known: bytes, facts: Iterable[bytes]) -> _Judged | None:
        """What the facts come to, asked of the harvest; None for what is left to it."""
        whole = ber.tlv(4, b"") + ber.tlv(0x30, b"".join(facts))
        _, attributes = ber.entry(ber.Message(0, ber.SEARCH_ENTRY, whole, 0, len(whole), len(whole)))
        entry = None if any(";" in name for name in attributes) else self._harvest.judged(attributes)
        if entry is not None and entry.flags & (ACCEPT | RESTRICTED) != ACCEPT:
            entry = None
        judged = None if entry is None else (entry, dict[bytes, int]())
        if len(self._facts) < FACTS:
            self._facts[known] = judged
        return judged
