"""Owns: what this worker knows of the clients' budgets: what its own sessions spent, and what it heard of the others'.

Each worker decides by itself and tells the hub every ``EXCHANGE_S`` what was spent since; the hub repeats it to the
others. So a client that spreads over W workers can overshoot by what it spends within 200 ms, and without a hub each
worker's own count holds. Must not know SMTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from relay.config.schema import Limits
from relay.hub.frames import client_key
from relay.policy.abuse import Buckets, Budget, budgets_of, network_key

EXCHANGE_S: Final = 0.2
"""How often workers tell the hub what was spent, and the hub repeats it."""

CHANGES: Final = 4096
"""Keys told in one exchange; what more clients than that spend within 200 ms counts in their worker only."""


class Budgets:
    """All budgets of one worker. ``blocked`` maps keys of clients and networks that asked for too many unknown recipients
    to the time they are free again; it is empty on a quiet day, which is all that the hot path looks at.
    """

    __slots__ = ("_buckets", "_changes", "blocked", "unknown_counts")

    def __init__(self) -> None:
        self._buckets = tuple(Buckets() for _ in Budget)
        self._changes: dict[tuple[Budget, int], int] = {}
        self.blocked: Final[dict[int, float]] = {}
        self.unknown_counts = False
        """Whether there is any budget for unknown recipients."""

    def configure(self, limits: Limits) -> None:
        """Take over (new) limits."""
        for bucket, (most, period_s) in zip(self._buckets, budgets_of(limits), strict=True):
            bucket.configure(most, period_s)
        self.unknown_counts = limits.unknown_recipients_per_client > 0 or limits.unknown_recipients_per_network > 0
        if not self.unknown_counts:
            self.blocked.clear()

    def unknown(self, address: str, now: float) -> list[tuple[Budget, float]]:
        """A client asked for a recipient that does not exist: the budgets that are spent with this one, and for how long."""
        client = client_key(address)
        network = network_key(client)
        spent: list[tuple[Budget, float]] = []
        for budget, key in ((Budget.CLIENT_UNKNOWN, client), (Budget.NETWORK_UNKNOWN, network)):
            before = key in self.blocked
            wait = self._spend(budget, key, now)
            if wait and not before:
                spent.append((budget, wait))
        return spent

    def blocks(self, address: str, now: float) -> Budget | None:
        """The budget for unknown recipients that this client, or its network, has spent."""
        client = client_key(address)
        for budget, key in ((Budget.CLIENT_UNKNOWN, client), (Budget.NETWORK_UNKNOWN, network_key(client))):
            until = self.blocked.get(key)
            if until is not None and now < until:
                return budget
        return None

    def may(self, budget: Budget, address: str, now: float) -> bool:
        """Whether the client may open one more connection, or send one more message; if so, it is counted."""
        key = client_key(address)
        bucket = self._buckets[budget]
        if bucket.most and bucket.level(key, now) + 1.0 > bucket.most:
            return False
        self._spend(budget, key, now)
        return True

    def _spend(self, budget: Budget, key: int, now: float) -> float:
        change = (budget, key)
        if change in self._changes or len(self._changes) < CHANGES:
            self._changes[change] = self._changes.get(change, 0) + 1
        return self._note(budget, key, 1, now)

    def _note(self, budget: Budget, key: int, count: int, now: float) -> float:
        wait = self._buckets[budget].spend(key, count, now)
        if wait and budget <= Budget.NETWORK_UNKNOWN:
            self.blocked[key] = now + wait
        return wait

    def hear(self, budget: int, key: int, count: int, now: float) -> None:
        """Another worker's clients spent that."""
        self._note(Budget(budget), key, count, now)

    def changes(self, now: float) -> Iterator[tuple[Budget, int, int]]:
        """What was spent since the last call: budget, key, count. Who is free again is forgotten on the way."""
        if self.blocked:
            for key in [key for key, until in self.blocked.items() if until <= now]:
                del self.blocked[key]
        changes, self._changes = self._changes, {}
        for (budget, key), count in changes.items():
            yield budget, key, count
