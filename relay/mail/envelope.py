"""Owns: the envelope of a message (RFC 5321 §2.3.1) and the identifier the relay gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from relay.mail.address import Mailbox
from relay.mail.terms import PLAIN, Terms

QueueId = NewType("QueueId", str)
"""What log lines, replies, Received and the queue call one message: unique over workers and restarts."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Who sent it and who gets it; ``sender`` is empty for the null sender.

    ``body_8bit``: the client said BODY=8BITMIME (RFC 6152). ``client`` is ``host[address]`` for logs. ``terms``: which
    reports the sender wants, and whether UTF-8 was announced.
    """

    id: QueueId
    sender: Mailbox
    recipients: tuple[Mailbox, ...]
    body_8bit: bool
    listener: str
    client: str
    terms: Terms = PLAIN
