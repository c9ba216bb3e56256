"""Owns: what follows from a refusal by policy: its reply, its log line, what it costs the client (rows F6, O13, S3);
and what follows from header fields that the firewall took out (row F10).

It must not decide anything but what a spent budget means.
"""

from __future__ import annotations

from collections.abc import Sequence

from relay.config.schema import Mode
from relay.inbound.transaction import Transaction
from relay.inbound.wire import Wire
from relay.mail import reply
from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.envelope import QueueId
from relay.mail.reply import Kind
from relay.mail.terms import RecipientTerms
from relay.policy.abuse import RULES, Budget
from relay.policy.particular import SIZE_RULE
from relay.policy.verdict import Verdict


class Refusing(Wire):
    """A connection that can be refused things."""

    helo = ""
    protocol = "SMTP"

    def _reject(self, verdict: Verdict, stage: str, named: Mailbox, sender: Mailbox, recipient: Mailbox | None) -> None:
        """Say, log and count a refusal. The line is made once: a dictionary attack is many of them."""
        assert verdict.kind is not None
        kind = verdict.kind
        listener = self.listener
        if kind is reply.UNKNOWN_RECIPIENT and listener.budgets.unknown_counts and not self.exempt:
            self._unknown()
        if listener.soft_bounce:
            kind = listener.softened(kind)
        line = kind.line(named, verdict.text)
        listener.log.reject(
            self.client, stage, line, kind.reason, verdict.rule, sender, recipient, self.protocol, self.helo
        )
        self.refuse(verdict.kind, kind, f"{line}\r\n".encode())

    def judged(self, transaction: Transaction, mailbox: Mailbox, verdict: Verdict, said: RecipientTerms | None) -> None:
        """Tell the client what became of a recipient."""
        if verdict.shadow:
            self._shadows(verdict, "RCPT", transaction.sender, mailbox)
        if verdict.kind is not None:
            named = transaction.sender if verdict.kind in reply.ABOUT_SENDER else mailbox
            self._reject(verdict, "RCPT", named, transaction.sender, mailbox)
            return
        if said is not None:
            transaction.say_of_next(said)
        transaction.recipients.append(verdict.instead or mailbox)
        self.say(reply.OK_RCPT)

    def _refuse_unknown(self, transaction: Transaction, mailbox: Mailbox, verdict: Verdict) -> None:
        """``_reject`` for the refusal that comes by the thousand."""
        listener, note = self.listener, transaction.note_unknown
        if note is None:
            note = listener.log.refusals(self.client, "RCPT", transaction.sender, self.protocol, self.helo)
            transaction.note_unknown = note
        if note is None or listener.soft_bounce:
            self._reject(verdict, "RCPT", mailbox, transaction.sender, mailbox)
            return
        if listener.budgets.unknown_counts and not self.exempt:
            self._unknown()
        kind = reply.UNKNOWN_RECIPIENT
        line = kind.line(mailbox)
        note(line, mailbox)
        self.refuse(kind, kind, f"{line}\r\n".encode())

    def _refuse_message(self, transaction: Transaction, kind: Kind) -> None:
        """Log and say why a message is not taken, behind its last octet."""
        self.listener.log.reject(
            self.client, "END-OF-MESSAGE", kind.line(), kind.reason, kind.reason, transaction.sender, None,
            self.protocol, self.helo,
        )  # fmt: skip
        self.say(kind)

    def _outgrown(self, transaction: Transaction, octets: int) -> Sequence[int]:
        """Log and count the recipients for whom the message came out too large; their numbers, in mode log none."""
        over = transaction.outgrown(octets)
        enforced = self.listener.rules.particular.size_limit is Mode.ENFORCE
        kind = reply.RECIPIENT_SIZE
        for number in over:
            mailbox = transaction.recipients[number]
            self.listener.log.reject(
                self.client, "END-OF-MESSAGE", kind.line(mailbox), kind.reason, SIZE_RULE, transaction.sender, mailbox,
                self.protocol, self.helo, enforced=enforced,
            )  # fmt: skip
            if not enforced:
                self.listener.metrics.shadow(kind)
        if over and enforced and self.listener.soft_bounce:  # nobody gets a report in such a night
            return range(len(transaction.recipients))
        return over if enforced else ()

    def _unknown(self) -> None:
        """Count an unknown recipient against client and network; tell when that spends a budget."""
        listener = self.listener
        for budget, wait_s in listener.budgets.unknown(self.address, listener.now):
            listener.log.note(
                "warning", "budget_spent", client=self.client, rule=RULES[budget], free_in_s=round(wait_s)
            )  # fmt: skip

    def _blocked(self, sender: Mailbox, recipient: Mailbox) -> bool:
        """Refuse every recipient of a client that asked for too many unknown ones: it must learn no more addresses."""
        listener = self.listener
        budget = None if self.exempt else listener.budgets.blocks(self.address, listener.now)
        if budget is None:
            return False
        self._excused -= 1  # this 4xx spends the error budget: whoever guesses on is to go
        self._reject(Verdict(reply.TOO_MANY_UNKNOWN, RULES[budget]), "RCPT", recipient, sender, recipient)
        return True

    def _held_off(self) -> bool:
        """Refuse MAIL for now: memory is low, or the client sends more often than it may."""
        listener = self.listener
        if listener.memory_low:
            verdict = Verdict(reply.MEMORY_LOW, "limits.memory_octets")
        elif (
            listener.message_rate
            and not self.exempt
            and not listener.budgets.may(Budget.MESSAGES, self.address, listener.now)
        ):
            verdict = Verdict(reply.MESSAGE_RATE, RULES[Budget.MESSAGES])
        else:
            return False
        self._reject(verdict, "MAIL", NULL_SENDER, NULL_SENDER, None)
        return True

    def _shadows(self, verdict: Verdict, stage: str, sender: Mailbox, recipient: Mailbox | None) -> None:
        """Rules in mode = "log": said in the log and counted, not to the client."""
        for shadow in verdict.shadow:
            assert shadow.kind is not None
            named = sender if recipient is None or shadow.kind in reply.ABOUT_SENDER else recipient
            self.listener.log.reject(
                self.client, stage, shadow.kind.line(named, shadow.text), shadow.kind.reason, shadow.rule,
                sender, recipient, self.protocol, self.helo, enforced=False,
            )  # fmt: skip
            self.listener.metrics.shadow(shadow.kind)

    def _goes_out_as(self, transaction: Transaction) -> Mailbox:
        """The sender for the envelope; that it is another one than the client said is in the log."""
        sender = transaction.goes_out_as()
        if sender != transaction.sender:
            self.listener.log.note("info", "sender_rewritten", sender=transaction.sender, goes_out_as=sender)
        return sender

    def _removed(self, queue_id: QueueId, names: tuple[str, ...]) -> None:
        """Log and count what the header firewall took out, or in mode log what it would have."""
        listener = self.listener
        if listener.rules.header.mode is Mode.LOG:
            listener.log.header_warning(queue_id, names, len(names))
            listener.metrics.shadow_headers(len(names))
        else:
            listener.log.header_removed(queue_id, names, len(names))
            listener.metrics.headers_removed(len(names))
