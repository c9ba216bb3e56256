"""Owns: the stores of a configuration as the hub holds them: read, read again when a file changes, and what they can do.

A file that cannot be used leaves the one before in force. It must not check passwords.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.auth import filestore
from relay.auth.filestore import Accounts, Entry, StoreError
from relay.config.auth import Mechanism, Store
from relay.config.origin import Origin, Problem
from relay.config.schema import Config, Listener
from relay.config.whole import Fault

ORDER: Final = (
    Mechanism.SCRAM_SHA_256_PLUS,
    Mechanism.SCRAM_SHA_256,
    Mechanism.CRAM_MD5,
    Mechanism.PLAIN,
    Mechanism.LOGIN,
)
"""Strongest first, as clients that take the first they know expect."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a look at a store's file brought. ``problem`` is empty when it was taken."""

    store: str
    problem: str
    accounts: int = 0


class Stores:
    """All stores of one configuration."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._held: dict[str, Accounts] = {}
        self._seen: dict[str, tuple[int, int, int] | None] = {}
        self._taken: dict[str, tuple[int, int, int] | None] = {}
        self._chains: dict[str, Mapping[str, Entry] | None] = {}

    def load(self) -> list[Change]:
        """Read every store now; one result each."""
        return [self._read(store) for store in self._config.auth.stores]

    def look(self) -> list[Change]:
        """Read again what has changed and has been the same for two looks; results for those alone."""
        changes = []
        for store in self._config.auth.stores:
            stamp = _stamp(store.path)
            if stamp != self._taken.get(store.name) and stamp == self._seen.get(store.name):
                changes.append(self._read(store))
            self._seen[store.name] = stamp
        return changes

    def _read(self, store: Store) -> Change:
        self._taken[store.name] = self._seen[store.name] = _stamp(store.path)
        try:
            accounts = filestore.read(store.path)
        except OSError as error:
            return Change(store.name, f"{store.path}: {error.strerror}")
        except StoreError as error:
            return Change(store.name, str(error))
        before = self._held.get(store.name)
        self._held[store.name] = accounts
        faults = list(lacking(self._config, self._held))
        if faults and before is not None:
            self._held[store.name] = before
            return Change(store.name, "; ".join(fault.what for fault in faults))
        self._chains.clear()
        return Change(store.name, "", len(accounts.entries))

    def accounts(self, listener: str) -> Mapping[str, Entry] | None:
        """The accounts of a listener by folded name, the first store that has a name counts; None when one is missing."""
        if listener not in self._chains:
            held = [self._held.get(store.name) for store in stores_of(self._config, listener)]
            maps = [accounts.entries for accounts in held if accounts is not None]
            self._chains[listener] = ChainMap(*maps) if maps and len(maps) == len(held) else None
        return self._chains[listener]

    def digest(self, listener: str) -> bytes:
        """Something secret that stays the same as long as the accounts do: what invented salts are made from."""
        return b"".join(self._held[store.name].digest for store in stores_of(self._config, listener))

    def offers(self) -> dict[str, list[Mechanism]]:
        """What each listener may offer now."""
        return {
            listener.name: offered(self._config, listener, self._held)
            for listener in self._config.listener
            if listener.takes_logins
        }


def prepare(config: Config) -> tuple[Stores, list[str]]:
    """The stores of a new configuration, read, and what is wrong with them."""
    stores = Stores(config)
    return stores, [f"auth.stores: {change.problem}" for change in stores.load() if change.problem]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def stores_of(config: Config, listener: str) -> list[Store]:
    """The stores of a listener, in the order they are asked."""
    names = next((entry.stores for entry in config.listener if entry.name == listener), [])
    return [store for store in config.auth.stores if not names or store.name in names]


def offered(config: Config, listener: Listener, held: Mapping[str, Accounts]) -> list[Mechanism]:
    """The mechanisms of a listener (row A2): those every account of every store can use, or those set by hand."""
    stores = stores_of(config, listener.name)
    if not stores:
        return []
    wanted = set(config.auth.mechanisms) or set(Mechanism)
    if not config.auth.by_hand or not config.auth.mechanisms:
        for store in stores:
            wanted &= held[store.name].mechanisms if store.name in held else set()
    return [mechanism for mechanism in ORDER if mechanism in wanted]


def lacking(config: Config, held: Mapping[str, Accounts]) -> Iterator[Fault]:
    """Mechanisms that ``auth.mechanisms`` names and a store cannot verify: a client would pick one and fail."""
    if config.auth.by_hand:
        return
    used = {store.name for entry in config.listener if entry.takes_logins for store in stores_of(config, entry.name)}
    for index, mechanism in enumerate(config.auth.mechanisms):
        cannot = [
            f"{name} (account {held[name].lacking[mechanism]})"
            for name in sorted(used & held.keys())
            if mechanism in held[name].lacking
        ]
        if cannot:
            yield Fault(
                ("auth", "mechanisms", index),
                f"{mechanism} cannot be verified by {', '.join(cannot)}",
                "remove it, store those passwords for it (relay hash-password), or write auth.by_hand = true",
            )


def check_stores(config: Config, origin: Origin) -> list[Problem]:
    """Everything about stores that keeps the relay from starting with ``config``, as this process can see it."""
    return [origin.told(fault) for fault in faults(config)]


def faults(config: Config) -> list[Fault]:
    """The same, by key."""
    found: list[Fault] = []
    held: dict[str, Accounts] = {}
    for index, store in enumerate(config.auth.stores):
        at = ("auth", "stores", index, "path")
        try:
            held[store.name] = filestore.read(store.path)
        except OSError as error:
            found.append(Fault(at, f"{store.path}: {error.strerror}", "write the path of a file of accounts"))
        except StoreError as error:
            found += [Fault(at, line, "mend the line") for line in str(error).splitlines()]
    return found or list(lacking(config, held))
