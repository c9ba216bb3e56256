"""Owns: a RCPT that waits for the word of a next hop (row R13). Other sessions go on meanwhile; this one's client waits.

Must not judge: policy does, when the answer is there. No answer is 451.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from relay.mail.address import Mailbox, unquoted
from relay.mail.terms import RecipientTerms
from relay.policy.recipient import NO_ANSWER

if TYPE_CHECKING:
    from relay.inbound.session import Session
    from relay.inbound.transaction import Transaction


def ask(
    session: Session,
    transaction: Transaction,
    mailbox: Mailbox,
    relay_form: bool,  # noqa: FBT001 - a fact
    said: RecipientTerms | None,
) -> None:
    """Let the session wait until the next hop has spoken; then judge again."""
    session.wait()
    session.listener.dispatch.call_out(
        unquoted(mailbox), partial(_told, session, transaction, mailbox, relay_form, said)
    )


def _told(
    session: Session,
    transaction: Transaction,
    mailbox: Mailbox,
    relay_form: bool,  # noqa: FBT001
    said: RecipientTerms | None,
    valid: bool | None,  # noqa: FBT001
) -> None:
    if session.closed:
        return
    session.busy = False
    if valid is None:
        session.judged(transaction, mailbox, NO_ANSWER, said)
    else:
        session.judged(transaction, mailbox, transaction.judge_recipient(mailbox, relay_form), said)
    session.answered()
