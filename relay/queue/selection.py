"""Owns: which messages an operator means: by id, sender, recipient, domain, next hop, age and state. Pure.

All that is said must hold; of several values of one kind, one has to. Patterns know ``*`` and ``?`` and no letter case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from relay.mail.address import Mailbox, domain_of
from relay.queue.store import Listed, RecipientState


class State(StrEnum):
    """Where a message stands, in the operator's words."""

    WAITING = "waiting"
    DELIVERING = "in delivery"
    HELD = "held"
    ASIDE = "set aside"


def state_of(message: Listed) -> State:
    """Held only when nobody of it is tried."""
    if message.aside:
        return State.ASIDE
    if message.owner:
        return State.DELIVERING
    held = all(recipient.state is RecipientState.HELD for recipient in message.recipients)
    return State.HELD if held else State.WAITING


def no_next_hops(_: Mailbox) -> Sequence[str]:
    """Where nobody asks by next hop."""
    return ()


@dataclass(frozen=True, slots=True)
class Selection:
    """``older`` and ``younger`` are seconds since the message came. ``goals`` tells the next hops of an address by the
    configuration; a message is of a next hop as well when its last answer came from there.
    """

    ids: frozenset[str] = frozenset()
    senders: Sequence[str] = ()
    recipients: Sequence[str] = ()
    domains: Sequence[str] = ()
    next_hops: Sequence[str] = ()
    states: Sequence[State] = ()
    older: float | None = None
    younger: float | None = None
    goals: Callable[[Mailbox], Sequence[str]] = no_next_hops

    @property
    def says_nothing(self) -> bool:
        """Everything is meant."""
        said = (self.ids, self.senders, self.recipients, self.domains, self.next_hops, self.states)
        return not any(said) and self.older is None and self.younger is None

    def means(self, message: Listed, now: float) -> bool:
        """Whether it is one of those; ``now`` is wall-clock seconds."""
        age = now - message.created
        return (
            (not self.ids or message.id in self.ids)
            and (self.older is None or age >= self.older)
            and (self.younger is None or age < self.younger)
            and (not self.states or state_of(message) in self.states)
            and (not self.senders or _like(message.sender or "<>", self.senders))
            and (not self.recipients or any(_like(one.mailbox, self.recipients) for one in message.recipients))
            and (not self.domains or any(_like(domain_of(one.mailbox), self.domains) for one in message.recipients))
            and (not self.next_hops or self._goes_there(message))
        )

    def _goes_there(self, message: Listed) -> bool:
        for one in message.recipients:
            for name in (one.last_host, *self.goals(one.mailbox)):
                if name and (_like(name, self.next_hops) or _like(name.rpartition(":")[0], self.next_hops)):
                    return True
        return False


def _like(text: str, patterns: Sequence[str]) -> bool:
    return any(_pattern(pattern).fullmatch(text) for pattern in patterns)


@cache
def _pattern(text: str) -> re.Pattern[str]:
    # Not fnmatch: brackets stand in the names of next hops by address.
    return re.compile(re.escape(text).replace(r"\*", ".*").replace(r"\?", "."), re.IGNORECASE | re.DOTALL)
