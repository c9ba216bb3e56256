"""Owns: MAY mail go to this recipient (rows R1, F4). Pure: facts in, verdict out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from relay.config.schema import Config, Mode
from relay.mail.reply import DIRECTORY_UNAVAILABLE, RELAY_DENIED, RELAY_FORM, UNKNOWN_RECIPIENT
from relay.policy.verdict import ACCEPT, Verdict

UNKNOWN_RULE: Final = "recipients.unknown"
RELAY_RULE: Final = "relay"

_UNKNOWN: Final = Verdict(UNKNOWN_RECIPIENT, UNKNOWN_RULE)
_UNAVAILABLE: Final = Verdict(DIRECTORY_UNAVAILABLE, UNKNOWN_RULE)
_DENIED: Final = Verdict(RELAY_DENIED, RELAY_RULE)
_FORM: Final = Verdict(RELAY_FORM, RELAY_RULE)
_UNKNOWN_LOGGED: Final = Verdict(None, "accept", shadow=(_UNKNOWN,))


class RecipientFacts(NamedTuple):
    """What is known about one RCPT.

    ``verified_by``: "directory" or "any" for the relay's own domains, "" for every other.
    ``known``: True or False from the snapshot, None when there is no usable snapshot or it was not asked.
    ``relay_form``: the local part hides another address (``a%b``, ``a!b``, ``"a@b"``).
    ``trusted``: the client may relay. ``postmaster``: local part of RFC 5321 §4.5.1.
    ``refused``: what the recipient's route says when it is ``error:``.
    """

    verified_by: str
    known: bool | None
    relay_form: bool
    trusted: bool
    postmaster: bool
    refused: Verdict | None = None


@dataclass(frozen=True, slots=True)
class RecipientRules:
    """The configuration as the decision needs it; ``domains`` maps own domain to its verifier."""

    domains: dict[str, str]
    unknown: Mode

    @classmethod
    def of(cls, config: Config) -> RecipientRules:
        """From the whole configuration."""
        return cls({name: d.recipients for d in config.domain for name in d.names}, config.recipients.unknown)


def decide(facts: RecipientFacts, rules: RecipientRules) -> Verdict:
    """Relaying first: no route opens it. Then ``error:`` in a route, then existence. Unknown means 451, never 550, while
    the snapshot cannot be asked.
    """
    if facts.relay_form and not facts.trusted:
        return _FORM
    if not facts.verified_by and not facts.trusted:
        return _DENIED
    if facts.refused is not None:
        return facts.refused
    if not facts.verified_by:
        return ACCEPT
    if facts.verified_by == "any" or facts.known or facts.postmaster or rules.unknown is Mode.OFF:
        return ACCEPT
    if facts.known is None:
        return _UNAVAILABLE
    return _UNKNOWN if rules.unknown is Mode.ENFORCE else _UNKNOWN_LOGGED
