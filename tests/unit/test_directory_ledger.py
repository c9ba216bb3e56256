"""What is read from a directory, as hashes: the short way says what the long way says; rows come and go; words add up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from relay.config.ldap import LdapProfile
from relay.directory import ber
from relay.directory.guard import counts
from relay.directory.harvest import Harvest
from relay.directory.key import address_hasher
from relay.directory.lean import Lean
from relay.directory.ledger import Kind, Ledger
from relay.directory.presets import plan
from relay.directory.snapshot import ACCEPT, NEEDS_AUTH, RESTRICTED, Entry
from relay.directory.sources import Collection, Ours, Tally
from relay.directory.unique import Unique
from relay.directory.whole import Whole
from relay.mail.reply import operator_text

KEY = bytes(32)
OURS = frozenset(("corp.test", "office.corp.test"))
GUID = bytes(range(16))

ODD: list[dict[str, list[bytes]]] = [
    {"proxyAddresses": [b"SMTP:First.Last@corp.test", b"smtp:first@office.corp.test", b"X400:C=US;A= ;P=x"]},
    {"PROXYADDRESSES": [b"SmTp:Odd.Case@CORP.test"]},
    {"proxyAddresses": [b"smtp:foreign@elsewhere.example", b"smtp:ours@corp.test"]},
    {"proxyAddresses": [b"sip:call@corp.test", b"EUM:12@corp.test;phone-context=x", b"smtp:a@corp.test"]},
    {"proxyAddresses": [b"smtp:dot..dot@corp.test", b"smtp:.a@corp.test", b"smtp:a%b@corp.test", b"smtp:a!b@corp.test"]},
    {"proxyAddresses": [b'smtp:"quoted"@corp.test', b'smtp:"a b"@corp.test', b"smtp: spaced@corp.test ", b"smtp:x@corp.test\n"]},
    {"proxyAddresses": [b"smtp:" + b"l" * 64 + b"@corp.test", b"smtp:" + b"l" * 65 + b"@corp.test"]},
    {"proxyAddresses": [b"smtp:twice@corp.test"], "mail": [b"Twice@corp.test"]},
    {"mail": [b"one@corp.test, two@corp.test;three@corp.test"]},
    {"mail": [b"\xff\xfe@corp.test"], "proxyAddresses": [b"", b"@corp.test", b"smtp:@corp.test", b"nobody", b"smtp:"]},
    {"proxyAddresses": [b"ex:cn=x@corp.test", b"smtp:smtp:a@corp.test", b"notes:x@corp.test"]},
    {"mail": [b"r@corp.test"], "smtpdSenderRestrictions": [b"TRUE"]},
    {"mail": [b"t@corp.test", b"t@elsewhere.example"], "smtpdSenderRestrictions": [b"On leave"]},
    {"mail": [b"f@corp.test"], "smtpdSenderRestrictions": [b"FALSE"]},
    {"mail": [b"d@corp.test"], "userAccountControl": [b"514"], "msExchRecipientTypeDetails": [b"1"]},
    {"mail": [b"room@corp.test"], "userAccountControl": [b"514"], "msExchRecipientTypeDetails": [b"16"]},
    {"mail": [b"n@corp.test"], "msExchRequireAuthToSendTo": [b"TRUE"], "delivContLength": [b"10"]},
    {"mail": [b"v%d@corp.test" % n for n in range(200)]},
    {"objectClass": [b"computer", b"user"], "mail": [b"machine$@corp.test"]},
]  # fmt: skip
NAMES = ["cn=a,dc=x", "CN=HealthMailbox7,dc=x", "cn=" + "n" * 200, "cn=ü"]


def encoded(name: str, attributes: dict[str, list[bytes]], guid: bytes) -> bytes:
    """A search result entry under number 7, ids and stamps included."""
    whole = {"objectClass": [b"top", b"user"], **attributes, "objectGUID": [guid], "uSNChanged": [b"4711"]}
    listed = b"".join(
        ber.tlv(0x30, ber.tlv(4, kind.encode()) + ber.tlv(0x31, b"".join(ber.tlv(4, value) for value in values)))
        for kind, values in whole.items()
    )
    entry = ber.tlv(ber.SEARCH_ENTRY, ber.tlv(4, name.encode()) + ber.tlv(0x30, listed))
    return ber.tlv(0x30, ber.integer(7) + entry)


class Read:
    """A ledger filled from messages, the short way where that is taken, or the long way alone."""

    def __init__(self, messages: list[bytes], changes: dict[str, Any], way: str) -> None:
        profile = LdapProfile(name="ad", preset="active-directory", servers=["ldaps://dc1.corp.test"], **changes)
        self.ledger, self.tally, self.unique, self.short = Ledger(KEY), Tally(), Unique(is_ad=True), 0
        ours = Ours(OURS, OURS, frozenset())
        harvest = Harvest(profile, plan(profile, "smtpdSenderRestrictions"), ours, self.ledger, self.tally)
        take = Lean(harvest, self.ledger, KEY, self.unique).take
        data, at = b"".join(messages), 0
        while at < len(data):
            if way == "short":
                at, taken = ber.entries(data, at, 7, take)
                self.short += taken
            if at < len(data):
                found = ber.message(data, at)
                assert found is not None
                name, attributes = ber.entry(found)
                harvest.add(name, attributes)
                self.ledger.end_row(self.unique.of(attributes))
                at = found.whole
        self.used, self.entries = harvest.used, harvest.entries

    @property
    def rows(self) -> list[tuple[int, frozenset[tuple[int, Kind]]]]:
        return rows(self.ledger)


def rows(ledger: Ledger) -> list[tuple[int, frozenset[tuple[int, Kind]]]]:
    found, at = [], 0
    for key, size in zip(ledger.keys, ledger.sizes, strict=True):
        mine = range(at, at + size)
        found.append((key, frozenset((ledger.hashes[n], ledger.table[ledger.kinds[n]]) for n in mine)))
        at += size
    return found


@pytest.mark.parametrize("changes", [{}, {"disabled_users": False}, {"system_mailboxes": True}, {"kinds": ["shared"]}])
def test_the_short_way_of_an_entry_says_what_the_long_way_says(changes: dict[str, Any]) -> None:
    dice = random.Random(1)
    messages = [
        encoded(dice.choice(NAMES), attributes, dice.randbytes(16)) for attributes in ODD * 3 for _ in range(len(NAMES))
    ]
    short, long = Read(messages, changes, "short"), Read(messages, changes, "long")
    assert short.rows == long.rows
    assert short.tally.skipped == long.tally.skipped
    assert short.entries == long.entries == len(messages)
    assert 0 < short.short < len(messages)  # both ways were gone


def test_an_entry_that_is_cut_or_broken_is_left_to_the_long_way_which_says_so() -> None:
    message = encoded("cn=a,dc=x", {"proxyAddresses": [b"smtp:a@corp.test", b"smtp:b@corp.test"]}, GUID)
    dice = random.Random(2)
    for _ in range(3000):
        broken = bytearray(message)
        broken[dice.randrange(2, len(broken))] = dice.randrange(256)
        results = []
        for way in ("short", "long"):
            try:
                results.append(Read([bytes(broken)], {}, way).rows)
            except (ber.Garbled, AssertionError):
                results.append([])
        at = next((n for n, (a, b) in enumerate(zip(broken, message, strict=True)) if a != b), 0)
        assert results[0] == results[1], (at, bytes(broken[at - 4 : at + 4]), message[at - 4 : at + 4])


def test_entries_without_an_id_are_counted() -> None:
    plain = ber.tlv(0x30, ber.tlv(4, b"mail") + ber.tlv(0x31, ber.tlv(4, b"a@corp.test")))
    bare = ber.tlv(0x30, ber.integer(7) + ber.tlv(ber.SEARCH_ENTRY, ber.tlv(4, b"cn=a") + ber.tlv(0x30, plain)))
    read = Read([bare], {}, "short")
    assert (read.unique.missing, read.entries, len(read.ledger.hashes)) == (1, 1, 1)


def ledger_of(*entries: tuple[int, list[str], Entry]) -> Ledger:
    ledger = Ledger(KEY)
    for key, addresses, entry in entries:
        ledger.add_all(addresses, entry)
        ledger.end_row(key)
    return ledger


def test_rows_are_dropped_and_taken_by_their_key() -> None:
    text = Entry(ACCEPT | RESTRICTED, operator_text("no"))
    entries = [
        (n, [f"a{n}-{i}@corp.test" for i in range(n % 4)], text if n % 5 == 0 else Entry(ACCEPT)) for n in range(40)
    ]
    ledger = ledger_of(*entries)
    gone = {0, 1, 17, 18, 39, 1000}
    assert ledger.drop(gone) == 5
    assert rows(ledger) == rows(ledger_of(*(one for one in entries if one[0] not in gone)))
    ledger.take(ledger_of(*(one for one in entries if one[0] in gone)))
    assert dict(rows(ledger)) == dict(rows(ledger_of(*entries)))
    assert ledger.drop(()) == 0


def test_what_several_say_of_one_address_adds_up_and_the_later_text_counts() -> None:
    files = Collection()
    files.add("both@corp.test", Entry(RESTRICTED, operator_text("of the file")))
    files.add("file@corp.test", Entry(ACCEPT))
    first = ledger_of(
        (1, ["both@corp.test", "one@corp.test"], Entry(ACCEPT)),
        (2, ["two@corp.test"], Entry(ACCEPT | RESTRICTED, operator_text("first"))),
    )
    second = ledger_of(
        (1, ["two@corp.test"], Entry(ACCEPT | RESTRICTED, operator_text("second"))),
        (2, ["one@corp.test"], Entry(ACCEPT | NEEDS_AUTH, size_limit=5)),
    )
    whole = Whole([files, first, second], KEY)
    assert list(whole.hashes) == sorted(
        map(address_hasher(KEY), {f"{n}@corp.test" for n in ("both", "file", "one", "two")})
    )
    assert whole.entry("Both@corp.test") == Entry(ACCEPT | RESTRICTED, operator_text("of the file"))
    assert whole.entry("two@corp.test") == Entry(ACCEPT | RESTRICTED, operator_text("second"))
    assert whole.entry("one@corp.test") == Entry(ACCEPT | NEEDS_AUTH, size_limit=5)
    assert whole.entry("nobody@corp.test") is None
    assert counts(whole) == {
        "recipients": 4, "recipients of corp.test": 4, "restricted senders": 2, "needs authentication": 1, "size limits": 1,
    }  # fmt: skip
