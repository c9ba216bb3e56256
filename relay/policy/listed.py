"""Owns: which senders an operator has listed, and what follows (row S4): deny-list, allow-list, reason and end. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from relay.config.schema import Config
from relay.mail.address import Mailbox, domain_of, without_tag
from relay.mail.reply import OperatorText, operator_text
from relay.mail.ruling import end_of


@dataclass(frozen=True, slots=True)
class ListedSender:
    """One of ``[[senders.rules]]``. ``until``: seconds since 1970, 0 for ever."""

    allowed: bool
    text: OperatorText
    until: int
    comment: str


@dataclass(frozen=True, slots=True)
class SenderList:
    """All of them, by address and ``@domain`` in lower case. ``own``: domains of which only listed senders may send."""

    entries: Mapping[str, ListedSender]
    own: frozenset[str]
    delimiters: Mapping[str, str]

    @classmethod
    def of(cls, config: Config) -> SenderList | None:
        """From the whole configuration; None where nothing is listed, so that nobody need ask."""
        senders = config.senders
        if not senders.rules and not senders.only_listed:
            return None
        entries: dict[str, ListedSender] = {}
        for rule in senders.rules:
            listed = ListedSender(
                rule.action == "allow", operator_text(rule.text), end_of(rule.expires), operator_text(rule.comment)
            )
            entries.setdefault(rule.sender, listed)
        own = frozenset(name for domain in config.domain for name in domain.names) if senders.only_listed else ()
        tags = {name: domain.delimiter for domain in config.domain if domain.delimiter for name in domain.names}
        return cls(entries, frozenset(own), tags)

    def find(self, sender: Mailbox, now: float) -> tuple[str, ListedSender] | None:
        """What is said of a sender, without needless quotes, and under which name; a tag is no way round. ``now``: seconds
        since 1970.
        """
        domain = domain_of(sender)
        for name in (sender, without_tag(sender, self.delimiters.get(domain, "")), f"@{domain}"):
            listed = self.entries.get(name.lower())
            if listed is not None and (not listed.until or now < listed.until):
                return name, listed
        return None

    def restriction(self, sender: Mailbox, known: OperatorText | None, now: float) -> OperatorText | None:
        """The restriction of a sender, "" for the configured text, None for none. ``known``: what the directory says."""
        found = self.find(sender, now)
        if found is not None:
            return None if found[1].allowed else found[1].text
        if known is None and domain_of(sender) in self.own:
            return OperatorText("")
        return known

    def why(self, sender: Mailbox, now: float) -> str:
        """In words, "" where the list says nothing."""
        found = self.find(sender, now)
        if found is not None:
            name, listed = found
            remark = f" ({listed.comment})" if listed.comment else ""
            return f"senders.rules {'allows' if listed.allowed else 'restricts'} {name}{remark}"
        return "senders.only_listed: nothing allows it" if domain_of(sender) in self.own else ""
