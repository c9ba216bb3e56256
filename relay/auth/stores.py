"""Owns: the stores of a configuration as the hub holds them: read, read again when a file changes, and what they can do.

A file that cannot be used leaves the one before in force. It must not check passwords.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from relay.auth import filestore
from relay.auth.abilities import Abilities
from relay.auth.filestore import Accounts, StoreError
from relay.auth.ldapstore import LdapStore, abilities
from relay.config.auth import Mechanism, Store
from relay.config.ldap import LdapProfile
from relay.config.origin import Origin, Problem
from relay.config.schema import Config, Listener
from relay.config.whole import Fault
from relay.directory.failure import LdapFailure
from relay.directory.lockout import Lockout

ORDER: Final = (
    Mechanism.SCRAM_SHA_256_PLUS,
    Mechanism.SCRAM_SHA_256,
    Mechanism.CRAM_MD5,
    Mechanism.PLAIN,
    Mechanism.LOGIN,
)
"""Strongest first, as clients that take the first they know expect."""

Chain: TypeAlias = tuple[Accounts | LdapStore, ...]
"""The stores of a listener in their order; the first one that has a name counts."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a look at a store's file brought. ``problem`` is empty when it was taken; ``accounts`` None: not counted."""

    store: str
    problem: str
    accounts: int | None = 0


class Stores:
    """All stores of one configuration."""

    def __init__(self, config: Config, passwords: Mapping[str, str]) -> None:
        """``passwords``: the relay's own for each directory, by the name of its profile."""
        self._config = config
        self._passwords = passwords
        self._files = [store for store in config.auth.stores if store.type == "file"]
        self._held: dict[str, Accounts | LdapStore] = {}
        self._seen: dict[str, tuple[int, int, int] | None] = {}
        self._taken: dict[str, tuple[int, int, int] | None] = {}
        self._chains: dict[str, Chain | None] = {}

    def load(self) -> list[Change]:
        """Read every file now and make ready every directory; one result each."""
        changes = [self._read(store) for store in self._files]
        for store in self._config.auth.stores:
            if store.type == "ldap":
                profile = profile_of(self._config, store)
                try:
                    held = LdapStore(store, profile, self._passwords.get(profile.name, ""), self._config)
                except LdapFailure as failure:
                    changes.append(Change(store.name, str(failure)))
                else:
                    self._held[store.name] = held
                    changes.append(Change(store.name, "", None))
        return changes

    def close(self) -> None:
        """Hang up on directories; logins under way are answered still."""
        for held in self._held.values():
            if isinstance(held, LdapStore):
                held.close()

    def look(self) -> list[Change]:
        """Read again what has changed and has been the same for two looks; results for those alone."""
        changes = []
        for store in self._files:
            stamp = _stamp(_path(store))
            if stamp != self._taken.get(store.name) and stamp == self._seen.get(store.name):
                changes.append(self._read(store))
            self._seen[store.name] = stamp
        return changes

    def _read(self, store: Store) -> Change:
        path = _path(store)
        self._taken[store.name] = self._seen[store.name] = _stamp(path)
        try:
            accounts = filestore.read(path)
        except OSError as error:
            return Change(store.name, f"{path}: {error.strerror}")
        except StoreError as error:
            return Change(store.name, str(error))
        before = self._held.get(store.name)
        self._held[store.name] = accounts
        faults = list(lacking(self._config, self.abilities()))
        if faults and before is not None:
            self._held[store.name] = before
            return Change(store.name, "; ".join(fault.what for fault in faults))
        self._chains.clear()
        return Change(store.name, "", len(accounts.entries))

    def chain(self, listener: str) -> Chain | None:
        """The stores of a listener; None when there is none, or one cannot be read."""
        if listener not in self._chains:
            found = [self._held.get(store.name) for store in stores_of(self._config, listener)]
            held = tuple(store for store in found if store is not None)
            self._chains[listener] = held if held and len(held) == len(found) else None
        return self._chains[listener]

    def digest(self, listener: str) -> bytes:
        """Something secret that stays the same as long as the accounts do: what invented salts are made from."""
        held = [self._held[store.name] for store in stores_of(self._config, listener)]
        return b"".join(store.digest if isinstance(store, Accounts) else store.salt for store in held)

    def lockout(self) -> Lockout | None:
        """The strictest of the directories that are shown passwords, as far as known: one budget serves all accounts."""
        known = [one.lockout for one in self._held.values() if isinstance(one, LdapStore) and one.lockout is not None]
        if not known:
            return None
        return Lockout(min(one.failures for one in known), max(one.window_s for one in known))

    def abilities(self) -> dict[str, Abilities]:
        """What each store that can be used is able to verify."""
        return {name: store.abilities for name, store in self._held.items()}

    def offers(self) -> dict[str, list[Mechanism]]:
        """What each listener may offer now."""
        held = self.abilities()
        return {
            listener.name: offered(self._config, listener, held)
            for listener in self._config.listener
            if listener.takes_logins
        }


def prepare(config: Config, passwords: Mapping[str, str]) -> tuple[Stores, list[str]]:
    """The stores of a new configuration, read, and what is wrong with them."""
    stores = Stores(config, passwords)
    return stores, [f"auth.stores: {change.problem}" for change in stores.load() if change.problem]


def profile_of(config: Config, store: Store) -> LdapProfile:
    """The directory of a store; ``config.whole`` has seen to it that there is one."""
    return next(profile for profile in config.directory.ldap if profile.name == store.directory)


def _path(store: Store) -> Path:
    assert store.path is not None, "config.whole refuses a file without a path"
    return store.path


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


def offered(config: Config, listener: Listener, held: Mapping[str, Abilities]) -> list[Mechanism]:
    """The mechanisms of a listener (row A2): those every account of every store can use, or those set by hand."""
    stores = stores_of(config, listener.name)
    if not stores:
        return []
    wanted = set(config.auth.mechanisms) or set(Mechanism)
    if not config.auth.by_hand or not config.auth.mechanisms:
        for store in stores:
            wanted &= held[store.name].mechanisms if store.name in held else set()
    return [mechanism for mechanism in ORDER if mechanism in wanted]


def lacking(config: Config, held: Mapping[str, Abilities]) -> Iterator[Fault]:
    """Mechanisms that ``auth.mechanisms`` names and a store cannot verify: a client would pick one and fail."""
    if config.auth.by_hand:
        return
    used = {store.name for entry in config.listener if entry.takes_logins for store in stores_of(config, entry.name)}
    for index, mechanism in enumerate(config.auth.mechanisms):
        cannot = [
            f"{name} ({held[name].lacking[mechanism]})"
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
    held: dict[str, Abilities] = {}
    for index, store in enumerate(config.auth.stores):
        at = ("auth", "stores", index)
        try:
            if store.type == "ldap":
                LdapStore(store, profile_of(config, store), "", config)
                held[store.name] = abilities(store)
            else:
                held[store.name] = filestore.read(_path(store)).abilities
        except LdapFailure as failure:
            found.append(Fault((*at, "filter"), failure.what, "mend the filter; %u, %U, %d and %s stand for values"))
        except OSError as error:
            found.append(
                Fault((*at, "path"), f"{store.path}: {error.strerror}", "write the path of a file of accounts")
            )
        except StoreError as error:
            found += [Fault((*at, "path"), line, "mend the line") for line in str(error).splitlines()]
    return found or list(lacking(config, held))
