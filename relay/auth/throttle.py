"""Owns: how many wrong guesses are let through: per account, client and network, over all workers (row A8). Pure.

Time is an argument (monotonic, seconds). The budget of an account is what keeps it from being locked in the directory: it is
below the directory's threshold where that is known, and failures are forgotten only when a whole window passed without one,
which holds for directories that count so (Active Directory) and for those that count within a window (ppolicy). A part of it is kept for clients that the
account has logged in from before, so that strangers who guess do not shut its owner out.

It must not ask a store, nor know a password: of those that just failed it is given keyed hashes.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Generic, TypeVar

from relay.config.auth import Auth
from relay.directory.lockout import Lockout

ACCOUNTS_MAX: Final = 50_000
"""Names that failed, known or invented (some 300 octets each). The one that failed longest ago is forgotten first."""
CLIENTS_MAX: Final = 50_000
KNOWN_MAX: Final = 50_000
"""Pairs of account and client that logged in before."""
FAILED_MAX: Final = 20_000
"""Passwords that just failed, as keyed hashes."""
REMEMBER_S: Final = 600.0
"""How long a wrong password is refused without asking: a phone with an old one asks every few minutes."""
KNOWN_S: Final = 30 * 86400.0
"""How long a client counts as known after its last success."""

_KeyT = TypeVar("_KeyT")


class _Failures(Generic[_KeyT]):
    """Times of failures by key, at most ``limit`` each."""

    __slots__ = ("_bound", "_by_gap", "_times", "limit", "window_s")

    def __init__(self, limit: int, window_s: float, bound: int, *, by_gap: bool = False) -> None:
        """``by_gap``: all are forgotten together, when ``window_s`` pass without one, as Active Directory counts."""
        self._by_gap = by_gap
        self.limit = limit
        self.window_s = window_s
        self._bound = bound
        self._times: OrderedDict[_KeyT, deque[float]] = OrderedDict()

    def count(self, key: _KeyT, now: float) -> int:
        times = self._times.get(key)
        if times is None:
            return 0
        if self._by_gap:
            if times[-1] <= now - self.window_s:
                times.clear()
        else:
            while times and times[0] <= now - self.window_s:
                times.popleft()
        if not times:
            del self._times[key]
        return len(times)

    def add(self, key: _KeyT, now: float) -> None:
        self._times.setdefault(key, deque()).append(now)
        self._times.move_to_end(key)
        if len(self._times[key]) > self.limit:
            self._times[key].popleft()
        if len(self._times) > self._bound:
            self._times.popitem(last=False)

    def free_at(self, key: _KeyT, limit: int) -> float:
        """When there will be less than ``limit`` again."""
        times = self._times.get(key, deque())
        return times[-1 if self._by_gap else -limit] + self.window_s if len(times) >= limit else 0.0

    def forget(self, key: _KeyT) -> bool:
        return self._times.pop(key, None) is not None

    def keys(self) -> Iterator[_KeyT]:
        return iter(tuple(self._times))


@dataclass(frozen=True, slots=True)
class Block:
    """What is blocked, for the operator: ``what`` is account, client or network. ``failures`` in the window."""

    what: str
    name: str
    failures: int
    left_s: float


@dataclass(slots=True)
class _Pending:
    """Checks under way for an account: each counts as a failure until it is known to be none."""

    accounts: dict[str, int] = field(default_factory=dict)

    def change(self, account: str, by: int) -> None:
        left = self.accounts.get(account, 0) + by
        if left:
            self.accounts[account] = left
        else:
            self.accounts.pop(account, None)


class Throttle:
    """Ask ``blocked`` first, then ``begin``, then ``end`` with what came of it."""

    def __init__(self, rules: Auth) -> None:
        self._accounts: _Failures[str] = _Failures(rules.account_failures, rules.window_s, ACCOUNTS_MAX, by_gap=True)
        self._clients: _Failures[str] = _Failures(rules.client_failures, rules.window_s, CLIENTS_MAX)
        self._networks: _Failures[str] = _Failures(rules.network_failures, rules.window_s, CLIENTS_MAX)
        self._known: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._failed: OrderedDict[bytes, float] = OrderedDict()
        self._uncertain: OrderedDict[bytes, float] = OrderedDict()
        self._rules = rules
        self._lockout: Lockout | None = None
        self._pending = _Pending()

    def configure(self, rules: Auth) -> None:
        """Take new limits; what was counted stays."""
        for failures, limit in (
            (self._accounts, rules.account_failures),
            (self._clients, rules.client_failures),
            (self._networks, rules.network_failures),
        ):
            failures.limit = limit
            failures.window_s = rules.window_s
        self._rules, lockout = rules, self._lockout
        self._lockout = None
        self.obey(lockout)

    def obey(self, lockout: Lockout | None) -> None:
        """Stay below what a directory locks accounts at. Before anything is known the configured budget counts alone."""
        if lockout is None or lockout == self._lockout:
            return
        self._lockout = lockout
        self._accounts.limit = max(1, min(self._rules.account_failures, lockout.failures - 1))
        self._accounts.window_s = max(self._rules.window_s, lockout.window_s)

    def _stranger_limit(self) -> int:
        """What strangers may use of an account's budget: a third, one at least, is for clients it knows."""
        limit = self._accounts.limit
        return max(1, limit - max(1, limit // 3))

    def knows(self, account: str, client: str, now: float) -> bool:
        """Whether this account has logged in from there before."""
        return now - self._known.get((account, client_of(client)), -KNOWN_S) < KNOWN_S

    def client_blocked(self, client: str, now: float) -> bool:
        """Whether client or network have used up their budget; a client known to the account is let through anyway."""
        clients, networks = self._clients, self._networks
        return (
            clients.count(client_of(client), now) >= clients.limit
            or networks.count(network_of(client), now) >= networks.limit
        )

    def account_full(self, account: str, client: str, now: float) -> bool:
        """Whether one more wrong guess at the account could be one too many; checks under way count."""
        limit = self._accounts.limit if self.knows(account, client, now) else self._stranger_limit()
        return self._accounts.count(account, now) + self._pending.accounts.get(account, 0) >= limit

    def waits(self, account: str) -> bool:
        """Whether checks of this account are under way, whose end may make room."""
        return account in self._pending.accounts

    @property
    def has_failures(self) -> bool:
        """Whether any password is remembered as wrong."""
        return bool(self._failed)

    def just_failed(self, mark: bytes, now: float) -> bool:
        """Whether this very password failed for this account a moment ago."""
        return now - self._failed.get(mark, -REMEMBER_S) < REMEMBER_S

    def begin(self, account: str) -> None:
        """A store is about to be asked."""
        self._pending.change(account, 1)

    def end(self, account: str) -> None:
        """It has answered, whatever it said."""
        self._pending.change(account, -1)

    def failed(self, account: str, client: str, mark: bytes, now: float) -> None:
        """The password was wrong, or there is no such account."""
        self._accounts.add(account, now)
        self.guessed(client, now)
        if mark:
            self._failed[mark] = now
            self._failed.move_to_end(mark)
            if len(self._failed) > FAILED_MAX:
                self._failed.popitem(last=False)

    def uncertain(self, account: str, mark: bytes, now: float) -> None:
        """A directory was shown a password and did not answer: it may have counted a failure, once for each password."""
        if mark not in self._uncertain:
            self._accounts.add(account, now)
        self._uncertain[mark] = now
        self._uncertain.move_to_end(mark)
        if len(self._uncertain) > FAILED_MAX:
            self._uncertain.popitem(last=False)

    def guessed(self, client: str, now: float) -> None:
        """A failure that concerns no account."""
        self._clients.add(client_of(client), now)
        self._networks.add(network_of(client), now)

    def succeeded(self, account: str, client: str, now: float) -> None:
        """This account logs in from there."""
        key = (account, client_of(client))
        self._known[key] = now
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    def forget_failed_passwords(self) -> None:
        """Passwords may have changed."""
        self._failed.clear()

    def blocks(self, now: float) -> list[Block]:
        """Everything that is blocked for strangers now."""
        found: list[Block] = []
        for what, failures, limit in (
            ("account", self._accounts, self._stranger_limit()),
            ("client", self._clients, self._clients.limit),
            ("network", self._networks, self._networks.limit),
        ):
            for key in failures.keys():  # noqa: SIM118 - a method of its own, safe against changes
                count = failures.count(key, now)
                if count >= limit:
                    found.append(Block(what, key, count, max(0.0, failures.free_at(key, limit) - now)))
        return found

    def release(self, name: str) -> bool:
        """Forget the failures of an account, client or network; False when there are none."""
        released = [failures.forget(name) for failures in (self._accounts, self._clients, self._networks)]
        if any(released):
            self._failed.clear()
            self._uncertain.clear()
        return any(released)


ADDRESSES_CACHED: Final = 4096
"""Clients whose keys are remembered (a megabyte): each is needed several times a login, and parsing takes 10 µs."""


@lru_cache(ADDRESSES_CACHED)
def client_of(address: str) -> str:
    """An IPv4 address, or the /64 of an IPv6 address: what one host can choose from."""
    return _network(address, 32, 64)


@lru_cache(ADDRESSES_CACHED)
def network_of(address: str) -> str:
    """The /24 or /48."""
    return _network(address, 24, 48)


def _network(address: str, four: int, six: int) -> str:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.version == 4:
        return str(ip) if four == 32 else str(ipaddress.ip_network((ip, four), strict=False))
    return str(ipaddress.ip_network((ip, six), strict=False))
