"""Owns: MAY this sender send (rows S1 to S3). Pure: the snapshot was asked before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from relay.config.schema import Mode, Senders
from relay.mail.reply import SENDER_RESTRICTED, OperatorText, operator_text
from relay.policy.verdict import ACCEPT, Verdict

RULE: Final = "senders.restricted"


@dataclass(frozen=True, slots=True)
class SenderRules:
    """The ``[senders]`` table as the decision needs it."""

    mode: Mode
    stage: Literal["mail", "rcpt"]
    text: OperatorText

    @classmethod
    def of(cls, config: Senders) -> SenderRules:
        """From the configuration; the default text is cleaned once."""
        return cls(config.restricted, config.stage, operator_text(config.text))


def decide(restriction: OperatorText | None, rules: SenderRules) -> Verdict:
    """``restriction``: None for an unrestricted sender, else the entry's own text ("" when it has none)."""
    if restriction is None or rules.mode is Mode.OFF:
        return ACCEPT
    refusal = Verdict(SENDER_RESTRICTED, RULE, restriction or rules.text)
    if rules.mode is Mode.LOG:
        return Verdict(None, "accept", shadow=(refusal,))
    return refusal
