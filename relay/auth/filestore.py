"""Owns: the file of local accounts: ``NAME:PASSWORD:ADDRESSES`` a line, read as a whole or refused as a whole.

Must not check passwords, nor say a password in an error.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from relay.auth.abilities import Abilities, Entry
from relay.auth.secret import SecretError, read_secret, verifies
from relay.config.auth import Mechanism
from relay.mail.address import AddressFault, Mailbox, is_domain, parse_mailbox, unquoted
from relay.policy.ownership import Account, Grant

FILE_OCTETS: Final = 64 * 1024 * 1024
"""Half a million accounts; a larger file is not this file."""
FAULTS_TOLD: Final = 20
ANY_SENDER: Final = "*"
OWN_DOMAINS: Final = "*@own"


class StoreError(Exception):
    """The file cannot be used; every line of the text says what is wrong and where."""


@dataclass(frozen=True, slots=True)
class Accounts:
    """All accounts of a file. ``digest`` changes with it and is as secret as the file."""

    entries: dict[str, Entry]
    abilities: Abilities
    """What every account can use (row A2); for each other mechanism the first account that cannot."""
    digest: bytes = field(repr=False)


def fold(name: str) -> str:
    """One spelling for all: compatibility forms and case do not make another account."""
    return unicodedata.normalize("NFKC", name).casefold()


def read(path: Path) -> Accounts:
    """The accounts of a file. Raises StoreError, OSError."""
    with path.open("rb") as file:
        octets = file.read(FILE_OCTETS + 1)
    if len(octets) > FILE_OCTETS:
        raise StoreError(f"{path}: more than {FILE_OCTETS} octets; is this the file of accounts?")
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        raise StoreError(f"{path}: not UTF-8") from None
    entries: dict[str, Entry] = {}
    faults: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            entry = read_line(line)
        except (SecretError, StoreError) as fault:
            faults.append(f"{path}:{number}: {fault}")
            continue
        if entries.setdefault(fold(entry.account.name), entry) is not entry:
            faults.append(f"{path}:{number}: this account stands above already; remove one of the two")
    if faults:
        more = [f"{path}: {len(faults) - FAULTS_TOLD} more like these"] if len(faults) > FAULTS_TOLD else []
        raise StoreError("\n".join([*faults[:FAULTS_TOLD], *more]))
    return _accounts(entries, hashlib.blake2b(octets, digest_size=32).digest())


def _accounts(entries: dict[str, Entry], digest: bytes) -> Accounts:
    lacking: dict[Mechanism, str] = {}
    for entry in entries.values():
        for mechanism in frozenset(Mechanism) - verifies(entry.secrets[0]) - lacking.keys():
            lacking[mechanism] = f"account {entry.account.name}"
    return Accounts(entries, Abilities(frozenset(Mechanism) - lacking.keys(), lacking), digest)


def read_line(line: str) -> Entry:
    """One line. Raises StoreError, SecretError. Colons may stand in a cleartext password: addresses have none."""
    name, first, rest = line.partition(":")
    secret, second, addresses = rest.rpartition(":")
    if not first or not second:
        raise StoreError("write NAME:PASSWORD:ADDRESSES")
    name = name.strip()
    if not name or not name.isprintable():
        raise StoreError("the name is empty or has control characters")
    owned, grant = _addresses(addresses.replace(",", " ").split())
    if not owned and not addresses.strip() and "@" in name:
        owned, _ = _addresses([name])
    return Entry(Account(name, owned, grant), (read_secret(secret),))


def _addresses(words: list[str]) -> tuple[frozenset[Mailbox], Grant]:
    owned: set[Mailbox] = set()
    grant = Grant.OWN
    for word in words:
        if word == ANY_SENDER:
            grant = Grant.ANY
        elif word == OWN_DOMAINS:
            grant = Grant.ANY if grant is Grant.ANY else Grant.DOMAINS
        elif word.startswith("@") and is_domain(word[1:]):
            owned.add(Mailbox(word.lower()))
        else:
            mailbox = parse_mailbox(word)
            if isinstance(mailbox, AddressFault) or "@" not in mailbox:
                raise StoreError(f'"{word}" is no address; write user@example.com, @example.com, *@own or *')
            owned.add(Mailbox(unquoted(mailbox).lower()))
    return frozenset(owned), grant
