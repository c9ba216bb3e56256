"""Owns: what an operator asks of messages (``Action``), as part of a transaction. Must not begin, commit or lock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from relay.queue.operations import Circumstances, Operation, delete
from relay.queue.store import Acted, Action

REQUESTED: int = 500
"""Messages changed in one transaction: more would hold the write lock for too long."""


@dataclass(frozen=True, slots=True)
class _Found:
    key: int
    leased: int
    aside: int
    file: str


class Act(Operation[Acted]):
    """One request about some messages, by the table of ``Action``."""

    __slots__ = ("action", "keys")

    def __init__(self, keys: Sequence[int], action: Action) -> None:
        super().__init__()
        self.keys = keys
        self.action = action

    def perform(self, at: Circumstances) -> Acted:
        found = [_Found(*each) for each in json.loads(at.one("state_of", json.dumps(self.keys)))]
        free = [each for each in found if not each.leased]
        busy = len(found) - len(free)
        match self.action:
            case Action.HOLD:
                keys = _keys(found)
                acted = Acted(at.one("messages_with", "pending", keys), at.run("hold_recipients", keys))
                at.run("date_messages", keys)
                return acted
            case Action.RELEASE:
                return _release(at, found)
            case Action.RETRY | Action.REROUTE:
                keys = _keys([each for each in free if not each.aside])
                if self.action is Action.REROUTE:
                    at.run("forget_waits", keys)
                acted = Acted(at.one("messages_with", "pending", keys), at.run("hasten_recipients", at.now, keys), busy)
                at.run("date_messages", keys)
                return acted
            case Action.BOUNCE:
                whole = [each for each in free if not each.aside]
                keys = _keys(whole)
                at.run("release_recipients", at.now, keys)
                at.run("give_up", at.now, keys)
                return Acted(len(whole), at.one("recipients_of", keys), busy)
            case Action.DELETE:
                recipients = at.one("recipients_of", _keys(free))
                delete(at, [each.key for each in free])
                at.unlink.extend(each.file for each in free if each.file)
                return Acted(len(free), recipients, busy)
            case _:
                assert_never(self.action)


def _release(at: Circumstances, found: Sequence[_Found]) -> Acted:
    """Held recipients are due now; of an entry that was set aside everybody is, for it was not tried."""
    mended = [each for each in found if each.aside]
    whole = _keys([each for each in found if not each.aside])
    acted = Acted(at.one("messages_with", "held", whole), at.run("release_recipients", at.now, whole))
    if mended:
        keys = _keys(mended)
        at.run("clear_aside", keys)
        at.run("release_recipients", at.now, keys)
        at.run("hasten_recipients", at.now, keys)
        acted += Acted(len(mended), at.one("recipients_of", keys))
    at.run("date_messages", _keys(found))
    return acted


def _keys(found: Sequence[_Found]) -> str:
    return json.dumps([each.key for each in found])
