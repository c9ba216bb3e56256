"""Owns: the facts of one mail transaction, and asking policy about them.

It must not speak to the client: it returns verdicts, the session renders them.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.config.schema import Config
from relay.directory.snapshot import ACCEPT as KNOWN
from relay.directory.snapshot import RESTRICTED, Directory
from relay.mail.address import Mailbox, unquoted
from relay.mail.reply import TOO_MANY_RECIPIENTS, OperatorText
from relay.policy import recipient, sender
from relay.policy.client import ClientRules
from relay.policy.content import HeaderRules
from relay.policy.recipient import RecipientFacts, RecipientRules
from relay.policy.route import RouteTable, refusal
from relay.policy.sender import SenderRules
from relay.policy.verdict import Verdict

_FULL = Verdict(TOO_MANY_RECIPIENTS, "limits.recipients")


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything policy needs of one configuration; replaced as a whole by a reload."""

    client: ClientRules
    sender: SenderRules
    recipient: RecipientRules
    header: HeaderRules
    recipients: int
    postmaster: Mailbox | None
    """Where mail to ``postmaster`` without a domain goes: postmaster at the first own domain."""
    routes: RouteTable | None
    """Asked only when some route refuses mail."""

    @classmethod
    def of(cls, config: Config) -> Rules:
        """Compile the configuration."""
        domains = RecipientRules.of(config)
        first = next(iter(domains.domains), None)
        routes = RouteTable(config)
        return cls(
            ClientRules(config.trusted),
            SenderRules.of(config.senders),
            domains,
            HeaderRules(config),
            config.limits.recipients,
            Mailbox(f"postmaster@{first}") if first else None,
            routes if routes.refuses else None,
        )


class Transaction:
    """From MAIL to the final dot. ``restriction`` is None for an unrestricted sender; ``asked``: there was a RCPT."""

    __slots__ = (
        "_directory", "_restricted", "_rules", "asked", "body_8bit", "recipients", "restriction", "sender", "trusted",
    )  # fmt: skip

    def __init__(self, mailbox: Mailbox, body_8bit: bool, trusted: bool, rules: Rules, directory: Directory) -> None:  # noqa: FBT001
        self.sender = mailbox
        self.body_8bit = body_8bit
        self.trusted = trusted
        self.recipients: list[Mailbox] = []
        self.asked = False
        self._rules = rules
        self._directory = directory
        self.restriction: OperatorText | None = None
        snapshot = directory.snapshot
        if mailbox and snapshot is not None and snapshot.lookup(plain := unquoted(mailbox)) & RESTRICTED:
            entry = snapshot.entry(plain)
            self.restriction = OperatorText(entry.text) if entry is not None else OperatorText("")
        self._restricted = None if self.restriction is None else sender.decide(self.restriction, rules.sender)

    def judge_sender(self) -> Verdict | None:
        """What policy says of the sender at MAIL, when that is the configured stage; then RCPT does not say it again."""
        if self._rules.sender.stage != "mail":
            return None
        verdict, self._restricted = self._restricted, None
        return verdict

    def judge_recipient(self, mailbox: Mailbox, relay_form: bool) -> Verdict:  # noqa: FBT001 - a fact
        """What policy says of one more recipient; restricted senders are told here by default (row S2)."""
        restricted = self._restricted
        if restricted is not None and restricted.kind is not None:
            return restricted
        if len(self.recipients) >= self._rules.recipients:
            return _FULL
        rules = self._rules.recipient
        mailbox = unquoted(mailbox)
        local, _, domain = mailbox.rpartition("@")
        verified_by = rules.domains.get(domain) or rules.domains.get(domain.lower(), "")
        known: bool | None = None
        if verified_by == "directory":
            snapshot = self._directory.snapshot
            known = None if snapshot is None else bool(snapshot.lookup(mailbox) & KNOWN)
        routes = self._rules.routes
        facts = RecipientFacts(
            verified_by, known, relay_form, self.trusted, not known and local.lower() == "postmaster",
            None if routes is None else refusal(routes.find(mailbox)),
        )  # fmt: skip
        verdict = recipient.decide(facts, rules)
        if restricted is not None and restricted.shadow and verdict.kind is None:
            return Verdict(None, verdict.rule, shadow=(*restricted.shadow, *verdict.shadow))
        return verdict
