"""Owns: what a store can verify, and what an account is checked against. Plain values."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from relay.auth.secret import Secret
from relay.config.auth import Mechanism
from relay.policy.ownership import Account


@dataclass(frozen=True, slots=True)
class Abilities:
    """The mechanisms of a store (row A2), and for each other one why it cannot."""

    mechanisms: frozenset[Mechanism]
    lacking: dict[Mechanism, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a directory said to a password. ``why`` is for the log."""

    right: bool
    why: str = ""
    account: Account | None = None
    """Who it turned out to be, where that is known only afterwards."""


Bind: TypeAlias = Callable[[bytes], Awaitable[Answer]]
"""Shows a password to a directory. Raises StoreAway."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One account and what it is checked against: stored passwords, any of which will do, or a directory."""

    account: Account
    secrets: tuple[Secret, ...] = field(repr=False)
    bind: Bind | None = field(default=None, repr=False)
    stamp: bytes = b""
    """Another one when the password may have changed, where the password itself does not show it."""
    barred: str = ""
    """Why the account may not log in, whatever its password."""


class StoreAway(Exception):
    """A store cannot answer now: 454. ``shown``: a password was shown to it, and nobody knows what it made of that."""

    def __init__(self, why: str, *, shown: bool = False) -> None:
        super().__init__(why)
        self.shown = shown


class Ambiguous(Exception):
    """A name fits more than one account: refused, and nobody is asked for a password."""
