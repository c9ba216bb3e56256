"""Owns: what directory entries say about addresses: values to addresses, restrictions, limits, who is left out and why.

Pure but for the tally it counts into. Must not ask the directory, nor take an address that its profile has no business with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from relay.config.ldap import LdapProfile
from relay.directory.presets import EXCHANGE_OWN, Plan
from relay.directory.primary import Gathered
from relay.directory.snapshot import ACCEPT, EXACT, IMAP, NEEDS_AUTH, RESTRICTED, Entry, exact_key
from relay.directory.sources import Ours, Skip, Tally
from relay.mail.address import PLAIN_MAILBOX, AddressFault, Mailbox, parse_utf8_mailbox, unquoted
from relay.mail.reply import OperatorText, operator_text

_PREFIX: Final = re.compile(r"([A-Za-z][A-Za-z0-9-]*):")
_PLAIN: Final = re.compile(PLAIN_MAILBOX).fullmatch
_SMTP: Final = frozenset((b"smtp:", b"SMTP:"))
_X400: Final = frozenset((b"X400:", b"x400:", b"X500:", b"x500:"))
_SIP: Final = frozenset((b"SIP:", b"sip:", b"EUM:", b"eum:"))
_LIST: Final = re.compile(r"[,;]\s*")
_DISABLED: Final = 2  # userAccountControl, ADS_UF_ACCOUNTDISABLE
_USER_MAILBOX: Final = {"", "1", "2", "8", "128", "2147483648", "8589934592"}
"""msExchRecipientTypeDetails of persons: user, linked, legacy, mail user, remote user mailbox; absent: no Exchange. All
others (4 shared, 16 room, 32 equipment, …) belong to nobody, and their accounts are disabled by design."""

_ESCAPED: Final = re.compile(rb"\\([0-9A-Fa-f]{2})")
_SPACED: Final = re.compile(r"\s*([,+=])\s*")
_SPECIAL: Final = b',+"\\<>;='

SYSTEM: Final = "one of Exchange's own mailboxes"
OUTSIDE: Final = "not a member of the chosen groups"
DISABLED: Final = "account of a person, disabled"
KIND: Final = "of a kind that was not chosen"


def dn_key(dn: str) -> str:
    """A name to compare by: member values and entries spell case, spaces and escapes differently (RFC 4514 §2.4)."""
    if "\\" in dn:
        raw = _ESCAPED.sub(
            lambda at: b"\\" + c if (c := bytes((int(at[1], 16),))) in _SPECIAL else c, dn.encode("utf-8", "replace")
        )
        dn = raw.decode("utf-8", "replace")
    return _SPACED.sub(r"\1", dn).lower()


@dataclass(frozen=True, slots=True)
class Members:
    """Who belongs to chosen groups: names of entries, user names, and the numbers of groups as primary ones."""

    names: frozenset[str]
    users: frozenset[str] = frozenset()
    primary: frozenset[str] = frozenset()

    def has(self, dn: str, attributes: Mapping[str, list[bytes]], user_name: str) -> bool:
        """Whether the entry belongs to them."""
        if dn_key(dn) in self.names:
            return True
        if self.users and not self.users.isdisjoint(_text(value).lower() for value in attributes.get(user_name, ())):
            return True
        return bool(self.primary) and _first(attributes, "primarygroupid") in self.primary


class Gathering(Protocol):
    """Where addresses go: a collection, or a ledger."""

    def add(self, address: str, entry: Entry) -> None:
        """One address, in any case."""

    def add_all(self, addresses: Iterable[str], entry: Entry) -> None:
        """Several in lower case that have their entry in common."""


class Harvest:
    """One profile's entries on their way into a collection. ``used`` counts the addresses that were taken."""

    def __init__(
        self,
        profile: LdapProfile,
        plan: Plan,
        ours: Ours,
        collection: Gathering,
        tally: Tally,
        members: Members | None = None,
        restricted: Members | None = None,
        primaries: Gathered | None = None,
    ) -> None:
        self._primaries = primaries
        self._profile = profile
        self._plan = self.plan = plan
        mine = ours.of_directories
        self._ours = self.ours = mine & frozenset(profile.domains) if profile.domains else mine
        self._sensitive = ours.sensitive
        self._collection = collection
        self._tally = tally
        self._members = members
        self._restricted = restricted
        self._text = operator_text(profile.restriction_text)
        self._kinds = None if profile.kinds is None else frozenset(profile.kinds)
        self._values = frozenset(value.lower() for value in profile.restriction_values)
        self.takes_system = profile.system_mailboxes
        self.used = 0
        self.entries = 0

    def add(self, dn: str, attributes: Mapping[str, list[bytes]]) -> None:
        """Take what one entry says."""
        self.entries += 1
        left_out = self._left_out(dn, attributes)
        if left_out:
            self._tally.skip(left_out)
        entry = self._entry(dn, attributes, left_out)
        if not entry.flags & (ACCEPT | RESTRICTED):
            return
        # Nearly all values are plain addresses of ours, or of a kind that is none: they take the short way.
        plain: list[str] = []
        others = 0
        short = entry.flags & ACCEPT and not self._sensitive
        for name in self._plan.addresses:
            for raw in attributes.get(name, ()):
                if raw[:5] in _SMTP and short:
                    address = raw[5:].decode("utf-8", "replace").lower()
                    if _PLAIN(address) is not None and address.rpartition("@")[2] in self._ours:
                        plain.append(address)
                        continue
                elif raw[:5] in _X400 or raw[:4] in _SIP:
                    others += 1
                    continue
                for text in self._addresses(raw):
                    self._add(text, entry)
        if plain:
            self._collection.add_all(plain, entry)
            self.used += len(plain)
        if others:
            self._tally.skipped[Skip.OTHER_KIND] += others
        if self._primaries is not None:
            self._note_primary(attributes, self._primaries)

    def _note_primary(self, attributes: Mapping[str, list[bytes]], primaries: Gathered) -> None:
        """The one that SMTP: in capitals says (Exchange), else the one value of the first attribute without prefixes. Where
        that is not clear, nobody is renamed.
        """
        found: list[str] = []
        capitals: list[str] = []
        bare: list[list[str]] = []
        for name in self._plan.addresses:
            texts = [raw.decode("utf-8", "replace").strip() for raw in attributes.get(name, ())]
            bare.append([text for text in texts if _PREFIX.match(text) is None])
            capitals += [text[5:] for text in texts if text.startswith("SMTP:")]
            found += [*bare[-1], *(text[5:] for text in texts if text[:5].lower() == "smtp:")]
        clear = capitals or next(filter(None, bare), [])
        mine = [one for one in found if _PLAIN(one) is not None and one.rpartition("@")[2].lower() in self._ours]
        if len(clear) == 1 and clear[0] in mine:
            primaries.note(clear[0], [one for one in mine if one.lower() != clear[0].lower()])

    def judged(self, attributes: Mapping[str, list[bytes]]) -> Entry:
        """What all addresses have in common of an entry of which nothing but this matters; only while ``plain``."""
        return self._entry("", attributes, self._left_out("", attributes))

    def taken(self, used: int, others: int, foreign: int) -> None:
        """An entry was taken another way: so many addresses, values of kinds that are none, addresses of foreign domains."""
        self.entries += 1
        self.used += used
        if others:
            self._tally.skipped[Skip.OTHER_KIND] += others
        if foreign:
            self._tally.skipped[Skip.FOREIGN] += foreign

    @property
    def plain(self) -> bool:
        """Whether an entry's attributes say everything, and addresses are compared without regard to case."""
        return self._members is None and self._restricted is None and not self._sensitive and self._primaries is None

    def _entry(self, dn: str, attributes: Mapping[str, list[bytes]], left_out: str) -> Entry:
        """What all addresses of the entry have in common: whoever may not send by one may not by another (row S2)."""
        plan = self._plan
        flags = 0 if left_out else ACCEPT
        text = self._restriction(dn, attributes)
        if text is not None:
            flags |= RESTRICTED
        limit = 0
        if plan.is_ad:
            if _first(attributes, plan.needs_auth).upper() == "TRUE":
                flags |= NEEDS_AUTH
            kilobytes = _first(attributes, plan.size_limit_kb)
            # Exchange counts KB. 0 and what is no number are no limit.
            limit = int(kilobytes) * 1024 if kilobytes.isdecimal() and len(kilobytes) < 10 else 0
        if plan.imap_access and _first(attributes, plan.imap_access).upper() == "TRUE":
            flags |= IMAP
        hop = operator_text(_first(attributes, plan.next_hop).lower()) if plan.next_hop else ""
        return Entry(flags, text or OperatorText(""), hop, limit)

    def _left_out(self, dn: str, attributes: Mapping[str, list[bytes]]) -> str:
        if self._members is not None and not self._members.has(dn, attributes, self._plan.user_name):
            return OUTSIDE
        if not self._plan.is_ad:
            return ""
        if not self._profile.system_mailboxes and dn.lower().removeprefix("cn=").startswith(EXCHANGE_OWN):
            return SYSTEM
        kind = _first(attributes, "msexchrecipienttypedetails")
        classes = {value.lower() for value in attributes.get("objectclass", ())}
        if b"computer" in classes:
            return KIND
        if b"user" not in classes and classes:
            return ""
        shared = kind not in _USER_MAILBOX
        if self._kinds is not None and ("shared" if shared else "users") not in self._kinds:
            return KIND
        control = _first(attributes, "useraccountcontrol")
        if not self._profile.disabled_users and not shared and control.isdecimal() and int(control) & _DISABLED:
            return DISABLED
        return ""

    def _restriction(self, dn: str, attributes: Mapping[str, list[bytes]]) -> OperatorText | None:
        if self._restricted is not None and self._restricted.has(dn, attributes, self._plan.user_name):
            return self._text
        for raw in attributes.get(self._plan.restriction, ()):
            value = _text(raw).strip()
            if self._values:
                if value.lower() in self._values:
                    return self._text
            elif value.upper() not in {"FALSE", ""}:
                return self._text if value.upper() == "TRUE" else operator_text(value)
        return None

    def _addresses(self, raw: bytes) -> Iterator[str]:
        try:
            value = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            self._tally.skip(Skip.ENCODING)
            return
        prefix = _PREFIX.match(value)
        if prefix is None:
            yield from (_LIST.split(value) if "," in value or ";" in value else (value,))
        elif prefix[1].lower() == "smtp":
            yield value[prefix.end() :].strip()
        else:
            self._tally.skip(Skip.OTHER_KIND)

    def _add(self, address: str, entry: Entry) -> None:
        if _PLAIN(address) is not None:  # what parse_utf8_mailbox takes unchanged, nearly all there are
            mailbox = Mailbox(address)
        else:
            parsed = parse_utf8_mailbox(address)
            if isinstance(parsed, AddressFault) or "@" not in parsed:
                self._tally.skip(Skip.SYNTAX)
                return
            mailbox = unquoted(parsed)
        domain = mailbox.rpartition("@")[2].lower()
        if entry.flags & ACCEPT and domain not in self._ours:
            if not entry.flags & RESTRICTED:
                self._tally.skip(Skip.FOREIGN)
                return
            entry = replace(entry, flags=entry.flags & ~ACCEPT)
        self._collection.add(mailbox, entry)
        if self._sensitive and entry.flags & ACCEPT and domain in self._sensitive:
            self._collection.add(exact_key(mailbox), Entry(EXACT))
        self.used += 1


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _first(attributes: Mapping[str, list[bytes]], name: str) -> str:
    values = attributes.get(name) if name else None
    return values[0].decode("ascii", "replace").strip() if values else ""
