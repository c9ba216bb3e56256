"""Owns: AS WHOM may a login send (row A11), and who may use our own domains without one (row S5). Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from relay.config.schema import Config, Mode
from relay.mail.address import Mailbox, unquoted
from relay.mail.reply import NOT_OWNER, NULL_NOT_ALLOWED, OWN_DOMAIN_SPOOFED, Kind
from relay.policy.verdict import ACCEPT, Verdict

OWNER_RULE: Final = "submission.sender"
NULL_RULE: Final = "submission.null_sender"
SPOOF_RULE: Final = "senders.own_domains"


class Grant(StrEnum):
    """How far beyond its own addresses an account may go."""

    OWN = "own"
    DOMAINS = "own-domains"
    """Any sender of the relay's own domains."""
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Account:
    """Who logged in. ``addresses`` in lower case; ``@example.com`` stands for every address of that domain."""

    name: str
    addresses: frozenset[Mailbox]
    grant: Grant = Grant.OWN

    def owns(self, mailbox: Mailbox) -> bool:
        """Whether an address is this account's. The local part's case counts for nobody's login."""
        plain = Mailbox(unquoted(mailbox).lower())
        return plain in self.addresses or Mailbox("@" + plain.rpartition("@")[2]) in self.addresses


@dataclass(frozen=True, slots=True)
class OwnershipRules:
    """The tables ``[submission]`` and ``[senders]`` as the decisions need them."""

    domains: frozenset[str]
    sender: Mode
    null_sender: bool
    any_sender: frozenset[str]
    own_domains: frozenset[str]
    spoofing: Mode

    @classmethod
    def of(cls, config: Config) -> OwnershipRules:
        """From the whole configuration."""
        submission = config.submission
        return cls(
            frozenset(name for domain in config.domain for name in domain.names),
            submission.sender,
            submission.null_sender,
            frozenset(name.lower() for name in submission.any_sender),
            frozenset(name.lower() for name in submission.own_domains),
            config.senders.own_domains,
        )

    def grant(self, account: Account) -> Grant:
        """The wider of what its store and the configuration grant."""
        name = account.name.lower()
        if account.grant is Grant.ANY or name in self.any_sender:
            return Grant.ANY
        if account.grant is Grant.DOMAINS or name in self.own_domains:
            return Grant.DOMAINS
        return Grant.OWN


def decide(sender: Mailbox, account: Account, rules: OwnershipRules) -> Verdict:
    """May this login send as ``sender``? Denied unless owned or granted."""
    if not sender:
        return ACCEPT if rules.null_sender else _ruled(NULL_NOT_ALLOWED, NULL_RULE, rules.sender)
    if rules.sender is Mode.OFF or account.owns(sender):
        return ACCEPT
    match rules.grant(account):
        case Grant.ANY:
            return ACCEPT
        case Grant.DOMAINS if _domain(sender) in rules.domains:
            return ACCEPT
        case _:
            return _ruled(NOT_OWNER, OWNER_RULE, rules.sender)


def spoofed(sender: Mailbox, rules: OwnershipRules) -> Verdict:
    """A stranger (neither trusted nor logged in) names one of our own domains as its sender."""
    if not sender or rules.spoofing is Mode.OFF or not is_own(sender, rules.domains):
        return ACCEPT
    return _ruled(OWN_DOMAIN_SPOOFED, SPOOF_RULE, rules.spoofing)


def is_own(sender: Mailbox, domains: Container[str]) -> bool:
    """Whether the domain is one of ours."""
    return _domain(sender) in domains


def _domain(mailbox: Mailbox) -> str:
    return mailbox.rpartition("@")[2].lower()


def _ruled(kind: Kind, rule: str, mode: Mode) -> Verdict:
    match mode:
        case Mode.ENFORCE:
            return Verdict(kind, rule)
        case Mode.LOG:
            return Verdict(None, "accept", shadow=(Verdict(kind, rule),))
        case Mode.OFF:
            return ACCEPT
