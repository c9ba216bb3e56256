"""Owns: the facts of one mail transaction, and asking policy about them.

It must not speak to the client: it returns verdicts, the session renders them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NamedTuple

from relay.config.schema import Config, Mode
from relay.directory.lookup import look_up
from relay.directory.snapshot import ACCEPT as KNOWN
from relay.directory.snapshot import NEEDS_AUTH, PARTICULAR, RESTRICTED, Directory, Entry
from relay.mail.address import NULL_SENDER, Mailbox, domain_of, unquoted, without_tag
from relay.mail.reply import TOO_MANY_RECIPIENTS, OperatorText
from relay.mail.terms import PLAIN, PLAIN_RECIPIENT, RecipientTerms, Terms
from relay.policy import ownership, particular, recipient, sender
from relay.policy.client import ClientRules
from relay.policy.content import HeaderRules
from relay.policy.listed import SenderList
from relay.policy.ownership import Account, OwnershipRules
from relay.policy.particular import ParticularRules
from relay.policy.recipient import RecipientFacts, RecipientRules
from relay.policy.route import RouteTable, refusal
from relay.policy.sender import SenderRules
from relay.policy.verdict import ACCEPT, Verdict

RECIPIENTS_RULE: Final = "limits.recipients"

NO_DOMAINS: Final[frozenset[str]] = frozenset()
NO_LIMITS: Final[Mapping[int, int]] = MappingProxyType({})
_PLAINLY: Final = KNOWN | PARTICULAR

_FULL: Final = Verdict(TOO_MANY_RECIPIENTS, RECIPIENTS_RULE)


def _with_shadow(verdict: Verdict, first: Verdict | None) -> Verdict:
    """``verdict``, and before it what a rule in mode log would have said."""
    if first is None or not first.shadow:
        return verdict
    return replace(verdict, shadow=(*first.shadow, *verdict.shadow))


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything policy needs of one configuration; replaced as a whole by a reload."""

    client: ClientRules
    sender: SenderRules
    ownership: OwnershipRules
    may_name_ours: ClientRules
    """Clients outside that may use our own domains as sender."""
    recipient: RecipientRules
    particular: ParticularRules
    header: HeaderRules
    recipients: int
    postmaster: Mailbox | None
    """Where mail to ``postmaster`` without a domain goes: postmaster at the first own domain."""
    hostname: str
    """Mail to postmaster at the relay's own name goes the same way (RFC 5321 §4.5.1)."""
    listed: SenderList | None
    """What is said of single senders; None where nothing is."""
    routes: RouteTable | None
    """Asked only when some route refuses mail."""
    simple: frozenset[str] = NO_DOMAINS
    """Domains of which the snapshot alone can decide: no route refuses mail, and unknown recipients are refused."""

    @classmethod
    def of(cls, config: Config) -> Rules:
        """Compile the configuration."""
        domains = RecipientRules.of(config)
        first = next(iter(domains.domains), None)
        routes = RouteTable(config)
        return cls(
            ClientRules(config.trusted.networks),
            SenderRules.of(config.senders),
            OwnershipRules.of(config),
            ClientRules(config.senders.own_domains_from),
            domains,
            ParticularRules.of(config.recipients),
            HeaderRules(config),
            config.limits.recipients,
            Mailbox(f"postmaster@{first}") if first else None,
            config.server.hostname.lower(),
            SenderList.of(config),
            routes if routes.refuses else None,
            domains.simple if not routes.refuses else NO_DOMAINS,
        )


class Asked(NamedTuple):
    """A rule that was asked, what its answer rests on, and the answer; None: no objection, the next one is asked."""

    rule: str
    why: str
    verdict: Verdict | None


class Transaction:
    """From MAIL to the final dot. ``restriction`` is None for an unrestricted sender; ``asked``: there was a RCPT.

    ``size``: as declared at MAIL, 0 when not. ``limits``: recipients, by their number, that take so many octets at most.
    """

    __slots__ = (
        "_directory", "_restricted", "_rules", "_said", "_simple", "_spoofed", "asked", "body_8bit", "limits",
        "note_unknown", "recipients", "restriction", "sender", "size", "terms", "trusted",
    )  # fmt: skip

    def __init__(
        self,
        mailbox: Mailbox,
        body_8bit: bool,  # noqa: FBT001 - facts
        trusted: bool,  # noqa: FBT001
        rules: Rules,
        directory: Directory,
        address: str = "",
        account: Account | None = None,
    ) -> None:
        self.sender = mailbox
        self.body_8bit = body_8bit
        self.trusted = trusted
        self.recipients: list[Mailbox] = []
        self.asked = False
        self.size = 0
        self.limits = NO_LIMITS
        self.terms = PLAIN
        self._said: dict[int, RecipientTerms] = {}
        self._rules = rules
        self._directory = directory
        snapshot = directory.snapshot
        self.restriction: OperatorText | None = None
        if mailbox and snapshot is not None and snapshot.restricted:
            plain = unquoted(mailbox)
            if snapshot.lookup(plain) & RESTRICTED:
                self.restriction = self._text(plain)
            elif rules.recipient.delimiters:
                # user+tag is user: else a tag would be the way round a restriction.
                bare = without_tag(plain, rules.recipient.delimiters.get(domain_of(plain), ""))
                if bare and snapshot.lookup(bare) & RESTRICTED:
                    self.restriction = self._text(bare)
            if account is not None and self.restriction is None:
                self.restriction = self._restriction_of(account)
        if rules.listed is not None and mailbox:
            self.restriction = rules.listed.restriction(unquoted(mailbox), self.restriction, time.time())
        self._restricted = None if self.restriction is None else sender.decide(self.restriction, rules.sender)
        self._spoofed: Verdict | None = None
        if account is None and not trusted and mailbox.rpartition("@")[2].lower() in rules.ownership.domains:
            self._spoofed = self._stranger_of_ours(address)
        self._simple = rules.simple if self._restricted is None and self._spoofed is None else NO_DOMAINS
        self.note_unknown: Callable[[str, str], None] | None = None
        """How the log takes refusals of unknown recipients; the session's."""

    def _restriction_of(self, account: Account) -> OperatorText | None:
        """A login is as restricted as any of its addresses (row S2), whichever of them it writes."""
        snapshot = self._directory.snapshot
        if snapshot is None:
            return None
        names = {*account.addresses, Mailbox(account.name)} if "@" in account.name else account.addresses
        return next((self._text(name) for name in names if snapshot.lookup(name) & RESTRICTED), None)

    def _stranger_of_ours(self, address: str) -> Verdict:
        """A stranger names one of our domains as its sender (row S5)."""
        if address and self._rules.may_name_ours.trusted(address):
            return ACCEPT
        return ownership.spoofed(self.sender, self._rules.ownership)

    def judge_owner(self, account: Account) -> Verdict:
        """What policy says of the sender of somebody who logged in (row A11); told at MAIL."""
        return ownership.decide(self.sender, account, self._rules.ownership)

    def say_of_next(self, terms: RecipientTerms) -> None:
        """Note the parameters of the RCPT whose recipient is taken next."""
        if terms is not PLAIN_RECIPIENT:
            self._said[len(self.recipients)] = terms
            if self.terms is PLAIN:
                self.terms = Terms()

    def all_terms(self) -> Terms:
        """What was said with MAIL and with every RCPT."""
        if not self._said:
            return self.terms
        said = [self._said.get(number, PLAIN_RECIPIENT) for number in range(len(self.recipients))]
        return replace(self.terms, recipients=tuple(said))

    def _text(self, address: Mailbox) -> OperatorText:
        """The wording of a restriction."""
        snapshot = self._directory.snapshot
        entry = None if snapshot is None else snapshot.entry(address)
        return OperatorText("") if entry is None else entry.text

    def judge_sender(self) -> Verdict | None:
        """What policy says of the sender at MAIL, when that is the configured stage; then RCPT does not say it again."""
        if self._rules.sender.stage != "mail":
            return None
        verdict = self.of_sender()
        self._restricted = self._spoofed = None
        return verdict

    def of_sender(self) -> Verdict | None:
        """What policy says of the sender alone, whenever it is told; None when no rule concerns it."""
        restricted, spoofed = self._restricted, self._spoofed
        if spoofed is None or (restricted is not None and restricted.kind is not None):
            return restricted
        return _with_shadow(spoofed, restricted)

    def judge_recipient(self, mailbox: Mailbox, relay_form: bool) -> Verdict:  # noqa: FBT001 - a fact
        """What policy says of one more recipient; restricted senders are told here by default (row S2)."""
        restricted = self._restricted
        if restricted is not None and restricted.kind is not None:
            return restricted
        if len(self.recipients) >= self._rules.recipients:
            return _FULL
        facts = self.facts(mailbox, relay_form)
        verdict = recipient.decide(facts)
        if verdict.kind is None and (entry := self._particulars(mailbox, facts)) is not None:
            verdict = particular.decide(verdict, self._wishes(entry))
            self._limit(entry.size_limit if verdict.kind is None else 0)
        if verdict.kind is not None or (restricted is None and self._spoofed is None):
            return verdict
        if self._spoofed is not None:  # last: whoever may not relay or invents recipients is told that
            verdict = self._spoofed if self._spoofed.kind is not None else _with_shadow(verdict, self._spoofed)
        return _with_shadow(verdict, restricted)

    def _particulars(self, mailbox: Mailbox, facts: RecipientFacts) -> Entry | None:
        """What the directory says of this recipient alone; None for nearly all. Nothing refuses postmaster."""
        snapshot = self._directory.snapshot
        if not facts.known or snapshot is None or not snapshot.particular:
            return None
        plain = unquoted(mailbox)
        if facts.ruling is not None or plain[:11].lower() == "postmaster@":
            return None
        entry = snapshot.entry(plain)
        if entry is None or not entry.flags & KNOWN:
            bare = without_tag(plain, self._rules.recipient.delimiters.get(domain_of(plain), ""))
            entry = snapshot.entry(bare) if bare else None
        return entry if entry is not None and (entry.flags & NEEDS_AUTH or entry.size_limit) else None

    def _wishes(self, entry: Entry) -> tuple[particular.Question, ...]:
        internal = bool(entry.flags & NEEDS_AUTH)
        return particular.questions(internal, entry.size_limit, self.trusted, self.size, self._rules.particular)

    def _limit(self, octets: int) -> None:
        """Note how much the next recipient takes."""
        if self.limits is not NO_LIMITS or (octets and self._rules.particular.size_limit is not Mode.OFF):
            self.limits = {**self.limits, len(self.recipients): octets}

    def outgrown(self, octets: int) -> list[int]:
        """The numbers of the recipients for whom a message of so many octets is too large."""
        return [number for number, most in self.limits.items() if 0 < most < octets and number < len(self.recipients)]

    def quick(self, mailbox: Mailbox) -> Verdict | None:
        """What ``judge_recipient`` would say of a mailbox in plain form, when that is "accept" or "unknown" by the snapshot
        alone; None: ask it. A test goes through all combinations of facts.
        """
        snapshot = self._directory.snapshot
        if (
            mailbox[mailbox.index("@") + 1 :] not in self._simple
            or snapshot is None
            or snapshot.ruled
            or len(self.recipients) >= self._rules.recipients
        ):
            return None
        found = snapshot.lookup(mailbox) & _PLAINLY
        if found == KNOWN:
            return ACCEPT
        return None if found or self._directory.stale or mailbox[:10].lower() == "postmaster" else recipient.UNKNOWN

    def goes_out_as(self) -> Mailbox:
        """The sender under which it goes on: the primary address when it is somebody's of ours who writes to others (row R15)."""
        primaries = self._directory.primaries
        if primaries is None or not (self.trusted and self.sender and self.leaves):
            return self.sender
        return primaries.get(unquoted(self.sender)) or self.sender

    @property
    def leaves(self) -> bool:
        """Whether all of it goes to domains that are not our own."""
        domains = self._rules.recipient.domains
        return not any(domain_of(mailbox) in domains for mailbox in self.recipients)

    def questions(
        self,
        mailbox: Mailbox,
        relay_form: bool,  # noqa: FBT001 - a fact
        note: Callable[[str], object] = len,
    ) -> Iterator[Asked]:
        """The rules that ``judge_recipient`` would ask now, in their order; the last one decides. For explanations."""
        restricted = self._restricted
        refused = None if restricted is None or restricted.kind is None else restricted
        yield self.question_of_sender()
        if refused is not None:
            return
        taken, most = len(self.recipients), self._rules.recipients
        yield Asked(RECIPIENTS_RULE, f"{taken} of at most {most} recipients so far", _FULL if taken >= most else None)
        if taken < most:
            facts = self.facts(mailbox, relay_form, note)
            for rule, verdict in recipient.asked(facts):
                name = rule.name if verdict is None or verdict.kind is None else verdict.rule
                yield Asked(name, rule.why(facts), verdict)
                if verdict is not None and verdict.kind is not None:
                    return
            entry = self._particulars(mailbox, facts)
            for one in self._wishes(entry) if entry is not None else ():
                yield Asked(*one)
                if one.verdict is not None and one.verdict.kind is not None:
                    return
            if self._spoofed is not None:
                yield Asked(ownership.SPOOF_RULE, "a stranger names one of our own domains as sender", self._spoofed)

    def question_of_sender(self) -> Asked:
        """What was asked about the sender; after MAIL has judged it there is nothing more to say."""
        listed = self._rules.listed
        said = "" if listed is None or not self.sender else listed.why(unquoted(self.sender), time.time())
        if said:
            why = f'{said}; senders.restricted = "{self._rules.sender.mode}"'
        elif self.restriction is None:
            why = "the sender carries no restriction"
        elif self._restricted is None:
            why = "the sender was judged at MAIL"
        else:
            why = f'the sender is restricted; senders.restricted = "{self._rules.sender.mode}"'
        return Asked(sender.RULE, why, self._restricted)

    def facts(
        self,
        mailbox: Mailbox,
        relay_form: bool,  # noqa: FBT001 - a fact
        note: Callable[[str], object] = len,
    ) -> RecipientFacts:
        """What is known of a recipient. ``note`` takes the steps of a look-up that needs several; by default nobody listens."""
        mailbox = unquoted(mailbox)
        local, _, domain = mailbox.rpartition("@")
        domains = self._rules.recipient.domains
        rule = domains.get(domain) or domains.get(domain.lower())
        unknown = self._rules.recipient.unknown
        routes = self._rules.routes
        refused = None if routes is None else refusal(routes.find(mailbox))
        if rule is None:
            ours = self._rules.postmaster
            if ours and local.lower() == "postmaster" and domain.lower() == self._rules.hostname:
                note(f"postmaster of this host is {ours}")
                facts = self.facts(ours, relay_form, note)
                return facts._replace(instead=facts.instead or ours)
            return RecipientFacts("", None, relay_form, self.trusted, False, unknown, refused)  # noqa: FBT003
        snapshot = self._directory.snapshot
        if rule.plain and (snapshot is None or not snapshot.ruled):
            known: bool | None = None
            if rule.verified_by == "directory" and snapshot is not None:
                # Row R7: a stale snapshot never says that somebody is unknown.
                known = bool(snapshot.lookup(mailbox) & KNOWN) or (None if self._directory.stale else False)
            return RecipientFacts(
                rule.verified_by, known, relay_form, self.trusted,
                not known and local.lower() == "postmaster", unknown, refused,
            )  # fmt: skip
        if local.lower() == "postmaster":
            if rule.postmaster is not None:
                note(f"postmaster of {domain} is {rule.postmaster}")
            instead = rule.postmaster or NULL_SENDER
            return RecipientFacts(
                rule.verified_by, None, relay_form, self.trusted, True, unknown, refused, instead=instead,  # noqa: FBT003
            )  # fmt: skip
        found = look_up(mailbox, rule, snapshot, time.time(), note)
        if rule.verified_by == "callout" and found.ruling is None:
            found = found._replace(known=self._directory.answers.get(mailbox, time.monotonic()))
        elif found.known is False and self._directory.stale and rule.verified_by != "static":
            note("the snapshot is stale: it is not asked who is unknown")
            found = found._replace(known=None)
        return RecipientFacts(
            rule.verified_by, found.known, relay_form, self.trusted, False, unknown, refused,  # noqa: FBT003
            found.ruling, found.ruled_by, found.instead,
        )  # fmt: skip
