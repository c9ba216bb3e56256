"""Owns: what was gathered from the sources, written as text that Postfix reads. Pure: no file, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from relay.directory.snapshot import ACCEPT, RESTRICTED, Entry
from relay.mail.reply import SENDER_RESTRICTED
from relay.mail.ruling import action_of, last_day


def recipient_lines(said: Mapping[str, Entry]) -> Iterator[str]:
    """A recipient map: ``ADDRESS OK``, ``ADDRESS 550 5.1.1 TEXT``, and ``@DOMAIN`` lines.

    A ruling hides what the other sources say of the address, as it does for mail.
    """
    for key, entry in said.items():
        if key.startswith("="):  # a spelling, which the line of its address stands for
            continue
        if entry.ruling is not None:
            ends = f"until {last_day(entry.until)}" if entry.until else ""
            if ends or entry.comment:  # Postfix knows no end: for people
                yield f"# {': '.join(filter(None, (ends, entry.comment)))}"
            yield f"{key} {action_of(entry.ruling)}"
        elif entry.flags & ACCEPT:
            yield f"{key} OK"


def sender_lines(said: Mapping[str, Entry], text: str) -> Iterator[str]:
    """An access map for senders: ``ADDRESS 554 5.7.1 TEXT``; ``text`` where an entry has none of its own."""
    for key, entry in said.items():
        if entry.flags & RESTRICTED:
            yield f"{key} {SENDER_RESTRICTED.code} {SENDER_RESTRICTED.enhanced} {entry.text or text}"
