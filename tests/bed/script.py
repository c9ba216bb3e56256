"""Owns: what a test can tell the scripted next hop to do, and what it can read from it afterwards."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import StrEnum

from tests.bed.waiting import PATIENCE_S
from tests.bed.wire import unstuffed


class Step(StrEnum):
    """Where a rule can step in."""

    BANNER = "banner"
    EHLO = "EHLO"
    HELO = "HELO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    BODY = "body"
    """In the middle of the message, after its first octets. A reply makes no sense here."""
    FINAL = "final dot"
    RSET = "RSET"
    NOOP = "NOOP"
    QUIT = "QUIT"


@dataclass(frozen=True)
class Say:
    """Answer so: one line with its code, or several joined by CR LF."""

    reply: str


@dataclass(frozen=True)
class Drop:
    """Close the connection; ``reset``: by RST."""

    reset: bool = False


@dataclass(frozen=True)
class Hold:
    """Wait until the test says ``release``; ``reached`` tells the test that the client is there."""

    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait_reached(self) -> None:
        """Wait until a client is held here."""
        assert self.reached.wait(PATIENCE_S), "no client reached the step where it was to be held"

    def release(self) -> None:
        """Let this client, and every later one, go on."""
        self.released.set()


Action = Say | Drop | Hold


@dataclass(eq=False)
class Rule:
    """What happens at a step. ``left`` counts down; ``used`` up."""

    step: Step
    actions: tuple[Action, ...]
    only: str
    left: int
    used: int = 0

    @property
    def hold(self) -> Hold:
        """The Hold among the actions."""
        return next(action for action in self.actions if isinstance(action, Hold))


@dataclass(frozen=True)
class Transaction:
    """One message as the next hop saw it, acknowledged or not. ``wire`` is without the final dot."""

    session: int
    tls: bool
    helo: str
    sender: str
    parameters: str
    recipients: tuple[str, ...]
    """Those it accepted."""
    refused: tuple[str, ...]
    wire: bytes
    reply: str
    """What was said to the final dot; empty when the connection was dropped without an answer."""

    @property
    def accepted(self) -> bool:
        """Whether the next hop took it over."""
        return self.reply.startswith("2")

    @property
    def message(self) -> bytes:
        """The message, dots unstuffed."""
        return unstuffed(self.wire)
