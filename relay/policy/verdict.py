"""Owns: what a decision is. A verdict is a value; whoever asked renders, logs and counts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from relay.mail.reply import Kind, OperatorText


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind`` is the refusal, None for "go on". ``rule`` names the rule that decided, as the configuration does.

    ``shadow`` holds the refusals of rules in ``mode = "log"`` that were passed over on the way (row O13): to be
    logged and counted, not enforced.
    """

    kind: Kind | None
    rule: str
    text: OperatorText = OperatorText("")
    shadow: tuple[Verdict, ...] = ()


ACCEPT: Final = Verdict(None, "accept")
