"""Owns: HOW MUCH one client and its network may take: budgets that refill with time, and who is counted together. Pure:
the time is an argument.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from relay.config.schema import Limits

KEYS: Final = 32_768
"""Clients that one budget remembers, the ones heard of longest ago forgotten first: 5 MB. Whoever has more addresses
than that is still met by the budget of the network."""

MINUTE_S: Final = 60.0

_NETWORK_OF_IPV4: Final = 1 << 48
_NETWORK_OF_IPV6: Final = 1 << 49
"""Both mark keys below 2^50, which are addresses in ::/14: reserved (RFC 4291 §2.4), so no client has such a key."""


class Budget(IntEnum):
    """What is budgeted. The numbers travel to the hub and back."""

    CLIENT_UNKNOWN = 0
    NETWORK_UNKNOWN = 1
    CONNECTIONS = 2
    MESSAGES = 3


RULES: Final = (
    "limits.unknown_recipients_per_client",
    "limits.unknown_recipients_per_network",
    "limits.connections_per_minute",
    "limits.messages_per_minute",
)
"""The key that sets each budget."""


def network_key(client: int) -> int:
    """The key of the network around a client's key (``hub.frames.client_key``): IPv4 /24, IPv6 /48."""
    if client < 1 << 32:
        return _NETWORK_OF_IPV4 | client >> 8
    return _NETWORK_OF_IPV6 | client >> 16


class Buckets:
    """One budget for many keys: each may spend ``most`` at once and gets that back within ``period_s``."""

    __slots__ = ("_levels", "_per_s", "most", "period_s")

    def __init__(self) -> None:
        self._levels: dict[int, tuple[float, float]] = {}
        self.most = 0
        self.period_s = MINUTE_S
        self._per_s = 0.0

    def configure(self, most: int, period_s: float) -> None:
        """0 switches it off; what was spent stays spent."""
        self.most = most
        self.period_s = period_s
        self._per_s = most / period_s
        if not most:
            self._levels.clear()

    def level(self, key: int, now: float) -> float:
        """What is spent and not given back yet."""
        level, at = self._levels.get(key, (0.0, now))
        return max(0.0, level - (now - at) * self._per_s)

    def spend(self, key: int, count: int, now: float) -> float:
        """Note it; seconds until the key may spend again, 0 when it still may. More than twice the budget is not held
        against anybody, so after silence everybody is free again in known time.
        """
        if not self.most:
            return 0.0
        level = min(self.level(key, now) + count, 2.0 * self.most)
        self._levels.pop(key, None)
        while len(self._levels) >= KEYS:
            del self._levels[next(iter(self._levels))]
        self._levels[key] = (level, now)
        return max(0.0, level + 1.0 - self.most) / self._per_s

    def __len__(self) -> int:
        return len(self._levels)


def budgets_of(limits: Limits) -> tuple[tuple[int, float], ...]:
    """Size and period of each ``Budget``, in their order."""
    return (
        (limits.unknown_recipients_per_client, limits.unknown_recipients_period_s),
        (limits.unknown_recipients_per_network, limits.unknown_recipients_period_s),
        (limits.connections_per_minute, MINUTE_S),
        (limits.messages_per_minute, MINUTE_S),
    )
