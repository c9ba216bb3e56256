"""Owns: MAY mail go to this recipient (rows R1, R11, R16, F4). Pure: facts in, verdict out.

``RULES`` is the one list of what is asked, in its order: ``decide`` goes through it, and so does ``relay explain``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from relay.config.schema import Config, Domain, Mode
from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.reply import DIRECTORY_UNAVAILABLE, RELAY_DENIED, RELAY_FORM, UNKNOWN_RECIPIENT
from relay.mail.ruling import Ruling, action_of, end_of, parse_ruling
from relay.policy.verdict import ACCEPT, Verdict

UNKNOWN_RULE: Final = "recipients.unknown"
RELAY_RULE: Final = "relay"
POSTMASTER_RULE: Final = "postmaster"
OVERRIDES_RULE: Final = "directory.overrides"
SOURCES_RULE: Final = "directory.sources"
CALLOUT_RULE: Final = "recipients.callout"

UNKNOWN: Final = Verdict(UNKNOWN_RECIPIENT, UNKNOWN_RULE)
_UNAVAILABLE: Final = Verdict(DIRECTORY_UNAVAILABLE, UNKNOWN_RULE)
_DENIED: Final = Verdict(RELAY_DENIED, RELAY_RULE)
_FORM: Final = Verdict(RELAY_FORM, RELAY_RULE)
ASK: Final = Verdict(DIRECTORY_UNAVAILABLE, CALLOUT_RULE)
"""The next hop has to be asked first; known by identity. Who cannot ask says 451."""
NO_ANSWER: Final = Verdict(DIRECTORY_UNAVAILABLE, CALLOUT_RULE)
"""It was asked and has not said."""
_UNKNOWN_LOGGED: Final = Verdict(None, "accept", shadow=(UNKNOWN,))


class RecipientFacts(NamedTuple):
    """What is known about one RCPT.

    ``verified_by``: "directory", "static", "callout" or "any" for the relay's own domains, "" for every other.
    ``known``: True or False from the snapshot or the next hop, None when there is no usable snapshot or it was not asked.
    ``relay_form``: the local part hides another address (``a%b``, ``a!b``, ``"a@b"``).
    ``trusted``: the client may relay. ``postmaster``: local part of RFC 5321 §4.5.1.
    ``refused``: what the recipient's route says when it is ``error:``.
    ``ruling``: an operator's word about the address or its domain, said by ``ruled_by``.
    ``unknown``: the mode of ``recipients.unknown``. ``instead``: the mailbox its mail goes to, "" for the address itself.
    """

    verified_by: str
    known: bool | None
    relay_form: bool
    trusted: bool
    postmaster: bool
    unknown: Mode
    refused: Verdict | None = None
    ruling: Ruling | None = None
    ruled_by: str = OVERRIDES_RULE
    instead: Mailbox = NULL_SENDER


@dataclass(frozen=True, slots=True)
class Override:
    """One of ``[[directory.overrides]]``. ``until``: seconds since 1970, 0 for ever."""

    ruling: Ruling
    until: int
    comment: str


@dataclass(frozen=True, slots=True)
class DomainRule:
    """What holds for the addresses of one own domain. ``plain``: one look-up of the address says everything."""

    verified_by: Literal["directory", "static", "callout", "any"]
    delimiter: str = ""
    tag: Literal["keep", "remove"] = "keep"
    sensitive: bool = False
    postmaster: Mailbox | None = None
    overrides: Mapping[str, Override] = field(default_factory=dict)
    plain: bool = True

    @classmethod
    def of(cls, domain: Domain, overrides: Mapping[str, Override]) -> DomainRule:
        """From a ``[[domain]]`` and the overrides of one of its names."""
        return cls(
            "any" if domain.recipients == "none" else domain.recipients,
            domain.delimiter,
            domain.tag,
            domain.case == "sensitive",
            Mailbox(domain.postmaster) if domain.postmaster else None,
            overrides,
            domain.recipients not in {"static", "callout"}
            and not (domain.delimiter or domain.case == "sensitive" or domain.postmaster or overrides),
        )


@dataclass(frozen=True, slots=True)
class RecipientRules:
    """The configuration as the decision needs it; ``domains`` maps own domains to what holds for them.

    ``delimiters``: those domains alone whose addresses may carry tags, for senders.
    """

    domains: dict[str, DomainRule]
    unknown: Mode
    delimiters: dict[str, str] = field(default_factory=dict)

    @property
    def simple(self) -> frozenset[str]:
        """Domains of which the snapshot alone decides, in lower case; none while unknown recipients are let pass."""
        if self.unknown is not Mode.ENFORCE:
            return frozenset()
        return frozenset(n for n, rule in self.domains.items() if rule.plain and rule.verified_by == "directory")

    @classmethod
    def of(cls, config: Config) -> RecipientRules:
        """From the whole configuration."""
        overrides: dict[str, dict[str, Override]] = {}
        for entry in config.directory.overrides:
            ruling = parse_ruling(entry.action)
            assert ruling is not None  # the schema takes no other
            said = overrides.setdefault(entry.address.rpartition("@")[2], {})
            said[entry.address] = Override(ruling, end_of(entry.expires), entry.comment)
        return cls(
            {name: DomainRule.of(d, overrides.get(name, {})) for d in config.domain for name in d.names},
            config.recipients.unknown,
            {name: domain.delimiter for domain in config.domain if domain.delimiter for name in domain.names},
        )


class Rule(NamedTuple):
    """One question. ``ask`` gives the verdict that ends the matter, or None: then the next rule is asked.

    ``why`` tells in words what the answer rests on.
    """

    name: str
    ask: Callable[[RecipientFacts], Verdict | None]
    why: Callable[[RecipientFacts], str]


def _form(facts: RecipientFacts) -> Verdict | None:
    return _FORM if facts.relay_form and not facts.trusted else None


def _relay(facts: RecipientFacts) -> Verdict | None:
    return _DENIED if not facts.verified_by and not facts.trusted else None


def _route(facts: RecipientFacts) -> Verdict | None:
    if facts.refused is not None:
        return facts.refused
    return None if facts.verified_by else ACCEPT


def _postmaster(facts: RecipientFacts) -> Verdict | None:
    """RFC 5321 §4.5.1: comes before everything that could refuse it."""
    return _accepted(facts) if facts.postmaster else None


def _ruling(facts: RecipientFacts) -> Verdict | None:
    if facts.ruling is None:
        return None
    kind, text = facts.ruling
    return _accepted(facts) if kind is None else Verdict(kind, facts.ruled_by, text)


def _unknown(facts: RecipientFacts) -> Verdict | None:
    if facts.verified_by == "any" or facts.known or facts.unknown is Mode.OFF:
        return _accepted(facts)
    if facts.known is None:
        return ASK if facts.verified_by == "callout" else _UNAVAILABLE
    return UNKNOWN if facts.unknown is Mode.ENFORCE else _UNKNOWN_LOGGED


def _accepted(facts: RecipientFacts) -> Verdict:
    return Verdict(None, "accept", instead=facts.instead) if facts.instead else ACCEPT


def _why_form(facts: RecipientFacts) -> str:
    if not facts.relay_form:
        return "the address hides no other one"
    return "the address hides another one (%, ! or @)" + (", and the client is trusted" if facts.trusted else "")


def _why_relay(facts: RecipientFacts) -> str:
    if facts.verified_by:
        return "the domain is one of our own"
    return f"the domain is not our own, and the client is {'' if facts.trusted else 'not '}trusted"


def _why_route(facts: RecipientFacts) -> str:
    if facts.refused is not None:
        return "the route of this address says error:"
    return "no route refuses it" + ("" if facts.verified_by else "; addresses of others are not looked up")


def _why_postmaster(facts: RecipientFacts) -> str:
    return "postmaster of an own domain is always taken" if facts.postmaster else "another mailbox"


def _why_ruling(facts: RecipientFacts) -> str:
    return f"{facts.ruled_by} says {action_of(facts.ruling)}" if facts.ruling else "nothing is said of it"


def _why_unknown(facts: RecipientFacts) -> str:
    if facts.verified_by == "any":
        return 'the domain takes every address (recipients = "none" or "any")'
    if facts.unknown is Mode.OFF:
        return "switched off"
    if facts.verified_by == "callout":
        said = {True: "takes the address", False: "does not know the address", None: "has to be asked (callout)"}
        return f"the next hop {said[facts.known]}"
    if facts.known is None:
        return "there is no snapshot that could be asked"
    return f"the snapshot {'knows' if facts.known else 'does not know'} the address"


RULES: Final = (
    Rule(RELAY_RULE, _form, _why_form),
    Rule(RELAY_RULE, _relay, _why_relay),  # no route opens it
    Rule("route", _route, _why_route),
    Rule(POSTMASTER_RULE, _postmaster, _why_postmaster),
    Rule(OVERRIDES_RULE, _ruling, _why_ruling),
    Rule(UNKNOWN_RULE, _unknown, _why_unknown),
)


def decide(facts: RecipientFacts) -> Verdict:
    """The verdict of the first rule that has one. Unknown means 451, never 550, while the snapshot cannot be asked."""
    if not (facts.relay_form or facts.refused or facts.ruling or facts.postmaster or facts.instead):
        # What the rules come to for nearly all mail and nearly all attacks; a test goes through all combinations.
        if facts.known:
            return ACCEPT
        if facts.known is False and facts.unknown is Mode.ENFORCE:
            return UNKNOWN
    for rule in RULES:
        verdict = rule.ask(facts)
        if verdict is not None:
            return verdict
    raise AssertionError("the last rule always decides")


def asked(facts: RecipientFacts) -> Iterator[tuple[Rule, Verdict | None]]:
    """The rules that ``decide`` asks, with their answers; the last one decides."""
    for rule in RULES:
        verdict = rule.ask(facts)
        yield rule, verdict
        if verdict is not None:
            return
