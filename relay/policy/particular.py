"""Owns: MAY this message go to this recipient in particular, by what the directory says of it alone (row R18). Pure.

Asked of recipients that are accepted otherwise, and of those alone of whom the directory says such a thing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from relay.config.schema import Mode, Recipients
from relay.mail.reply import INTERNAL_RECIPIENT, RECIPIENT_SIZE, Kind
from relay.policy.verdict import Verdict

INTERNAL_RULE: Final = "recipients.internal"
SIZE_RULE: Final = "recipients.size_limit"


@dataclass(frozen=True, slots=True)
class ParticularRules:
    """The modes of ``[recipients]``."""

    internal: Mode
    size_limit: Mode

    @classmethod
    def of(cls, config: Recipients) -> ParticularRules:
        """From the configuration."""
        return cls(config.internal, config.size_limit)


class Question(NamedTuple):
    """A rule, what its answer rests on, and the answer; None: no objection."""

    rule: str
    why: str
    verdict: Verdict | None


def questions(
    internal: bool,  # noqa: FBT001 - facts
    limit: int,
    trusted: bool,  # noqa: FBT001
    size: int,
    rules: ParticularRules,
) -> tuple[Question, ...]:
    """What is asked. ``internal``: the recipient wants authenticated senders; ``limit`` in octets, 0 for none; ``trusted``:
    the client logged in or comes from a trusted network; ``size`` as declared with MAIL, 0 when it was not.
    """
    asked: list[Question] = []
    if internal:
        who = "the client is trusted" if trusted else "the client is a stranger"
        objection = None if trusted else _refusal(INTERNAL_RECIPIENT, INTERNAL_RULE, rules.internal)
        asked.append(Question(INTERNAL_RULE, f"the recipient wants authenticated senders, and {who}", objection))
    if limit:
        said = f"{size} octets are announced" if size else "no size is announced, so that the message itself will tell"
        objection = _refusal(RECIPIENT_SIZE, SIZE_RULE, rules.size_limit) if size > limit else None
        asked.append(Question(SIZE_RULE, f"the recipient takes {limit} octets, and {said}", objection))
    return tuple(asked)


def _refusal(kind: Kind, rule: str, mode: Mode) -> Verdict | None:
    refusal = Verdict(kind, rule)
    match mode:
        case Mode.ENFORCE:
            return refusal
        case Mode.LOG:
            return Verdict(None, "accept", shadow=(refusal,))
        case Mode.OFF:
            return None


def decide(accepted: Verdict, asked: Iterable[Question]) -> Verdict:
    """The first refusal, or ``accepted`` with what rules in mode log would have said."""
    verdict = accepted
    for one in asked:
        if one.verdict is None:
            continue
        if one.verdict.kind is not None:
            return replace(one.verdict, shadow=(*verdict.shadow, *one.verdict.shadow))
        verdict = replace(verdict, shadow=(*verdict.shadow, *one.verdict.shadow))
    return verdict
