"""Owns: what a lane asks of whoever gives it a message to deliver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from relay.mail.address import Mailbox
from relay.mail.answer import Answer
from relay.mail.content import Content
from relay.mail.terms import Terms


class Attempt(Protocol):
    """One message for one next hop. Implemented by ``dispatch`` (express) and ``outbound.runner`` (queue)."""

    sender: Mailbox
    recipients: Sequence[Mailbox]
    content: Content
    body_8bit: bool
    terms: Terms
    told: bool
    """Set by the connection: the next hop was told which reports are wanted, and sends those it owes (RFC 3461 §5.2.1)."""
    started: float
    """When it was handed to its lane, on the lane's clock."""

    def may_finish(self) -> bool:
        """Asked just before the final dot leaves; False breaks the delivery off without it (lost or short lease)."""
        ...

    def done(self, answers: list[Answer], next_hop: str) -> None:
        """The result, one answer for each recipient, in their order. Called exactly once; never raises."""
        ...
