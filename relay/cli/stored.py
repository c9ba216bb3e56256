"""Owns: what ``relay check`` says of stores: what each can verify, stored passwords that are as good as the password.

Mistakes that keep the relay from starting are ``auth.stores``' to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from relay.auth.abilities import Abilities
from relay.auth.filestore import StoreError, read
from relay.auth.ldapstore import abilities
from relay.auth.secret import is_equivalent
from relay.cli.grade import Finding, Grade
from relay.config.auth import Mechanism, Store
from relay.config.schema import Config

ALIKE: Final = "who reads it can log in as them, without guessing"


def stores(config: Config) -> Iterator[Finding]:
    """Each store, and mechanisms set by hand that one of them cannot verify (row A2)."""
    held: dict[str, Abilities] = {}
    for store in config.auth.stores:
        if store.path is None:
            held[store.name] = abilities(store)
            yield _directory(store)
            continue
        try:
            accounts = read(store.path)
        except (OSError, StoreError):
            continue  # an error, told already
        held[store.name] = accounts.abilities
        alike = sum(any(map(is_equivalent, entry.secrets)) for entry in accounts.entries.values())
        if alike:
            what = f"{alike:,} of {len(accounts.entries):,} accounts have a password in clear or for CRAM-MD5: {ALIKE}"
            hint = "store them as relay hash-password does by default, unless clients need CRAM-MD5"
            yield Finding(Grade.WARNING, f"store {store.name}", what, hint)
        else:
            yield Finding(Grade.OK, f"store {store.name}", f"{len(accounts.entries):,} accounts in {store.path}")
    for mechanism in config.auth.mechanisms if config.auth.by_hand else ():
        cannot = [f"{name} ({able.lacking[mechanism]})" for name, able in held.items() if mechanism in able.lacking]
        if cannot:
            what = f"{mechanism} is offered by hand, and cannot be verified by {', '.join(cannot)}"
            yield Finding(Grade.WARNING, "auth", what, "clients that pick it fail with the right password; remove it")


def _directory(store: Store) -> Finding:
    topic = f"store {store.name}"
    if Mechanism.CRAM_MD5 in store.mechanisms:
        what = f"{store.password_attribute} in {store.directory} serves CRAM-MD5: {ALIKE}"
        return Finding(Grade.WARNING, topic, what, "let nobody but the relay's account read it")
    return Finding(Grade.OK, topic, f"directory {store.directory}, {store.check}")
