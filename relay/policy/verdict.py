"""Owns: what a decision is. A verdict is a value; whoever asked renders, logs and counts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.reply import Kind, OperatorText


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind`` is the refusal, None for "go on". ``rule`` names the rule that decided, as the configuration does.

    ``shadow`` holds the refusals of rules in ``mode = "log"`` that were passed over on the way (row O13): to be
    logged and counted, not enforced. ``instead``: the mailbox that an accepted recipient's mail goes to, when it is
    another one (a configured postmaster, an address without its tag).
    """

    kind: Kind | None
    rule: str
    text: OperatorText = OperatorText("")
    shadow: tuple[Verdict, ...] = ()
    instead: Mailbox = NULL_SENDER


ACCEPT: Final = Verdict(None, "accept")
