"""Owns: holding queued mail by its sender, with a reason that ``relay queue list`` shows. Under the writers' lock, in
transactions of its own, like ``queue.change``. Must not decide who is meant.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from relay.mail.reply import OperatorText
from relay.queue.boot import Clock, boot_clock
from relay.queue.change import writing
from relay.queue.layout import Layout
from relay.queue.operations import Circumstances, Operation
from relay.queue.requests import REQUESTED
from relay.queue.statements import SQL
from relay.queue.store import Acted
from relay.queue.view import reading

DETAINED: Final = (554, "5.7.1")
"""Code and enhanced code of a recipient that was held for its sender: those of the refusal in a session."""


def by_sender(spool: Path) -> dict[str, list[int]]:
    """Keys of the messages with somebody to be tried, by sender, but for those that were detained once: who released them
    knew why. Raises QueueError.
    """
    found: defaultdict[str, list[int]] = defaultdict(list)
    with reading(Layout.of(spool)) as (connection,):
        for sender, key in connection.execute(SQL["senders_waiting"], DETAINED):
            found[str(sender)].append(key)
    return found


class Detain(Operation[Acted]):
    """Hold the pending recipients of messages, for a reason."""

    __slots__ = ("keys", "reason")

    def __init__(self, keys: Sequence[int], reason: OperatorText) -> None:
        super().__init__()
        self.keys = keys
        self.reason = reason

    def perform(self, at: Circumstances) -> Acted:
        keys = json.dumps(list(self.keys))
        messages = at.one("messages_with", "pending", keys)
        recipients = at.run("detain_recipients", *DETAINED, self.reason, keys)
        at.run("date_messages", keys)
        return Acted(messages, recipients)


def detain(spool: Path, keys: Sequence[int], reason: OperatorText, clock: Clock = boot_clock) -> Acted:
    """Hold them; an attempt under way goes on for those it was made for. Raises QueueError: then the rest was not done."""
    layout = Layout.of(spool)
    acted = Acted()
    with writing(layout) as (connection, lock, bodies):
        for start in range(0, len(keys), REQUESTED):
            with lock.held():
                at = Circumstances(connection, 0, clock(), 0.0, bodies, layout, [])
                connection.execute("BEGIN IMMEDIATE")
                acted += Detain(keys[start : start + REQUESTED], reason).perform(at)
                connection.execute("COMMIT")
    return acted
