"""Owns: the policy for every delivery result: whose fault an answer is, what follows, and what the client is told.

Pure. The one place that reads a next hop's codes; nobody else may compare them. The table, first row that fits
(docs/architecture.md says what each outcome leads to):

====================================================================  =========
answer                                                                outcome
====================================================================  =========
2xx to the final dot                                                  DELIVERED
code 0 (no reply), 4xx, 421 anywhere, any code out of place           DEFERRED
5xx by a route or the DNS, before any session                         REFUSED
5xx at connect, banner, EHLO, STARTTLS, AUTH                          OUR_FAULT
5xx to MAIL about size, SMTPUTF8, content or the sender               REFUSED
501 with 5.1.x to RCPT: this address, not our grammar                 REFUSED
500-504, 530, 534, 535, 538; 5.7.3, 5.7.54, 5.7.57, 5.7.60            OUR_FAULT
any other 5xx to MAIL                                                 OUR_FAULT
5.5.3, or 552 without a better reason, to RCPT or DATA                DEFERRED
any other 5xx                                                         REFUSED
====================================================================  =========
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final

from relay.mail.answer import Answer, Stage
from relay.mail.reply import Kind, from_next_hop


class Outcome(StrEnum):
    """What one recipient's answer means for the message."""

    DELIVERED = "delivered"
    """The next hop has it."""
    REFUSED = "refused"
    """For good, and about the message or the recipient: passed on to the client, or reported to the sender."""
    DEFERRED = "deferred"
    """For now: stays in the queue."""
    OUR_FAULT = "our_fault"
    """Looks permanent, but the relay or the next hop's connector is to blame: queue, alarm, next hop misconfigured."""


class Fault(StrEnum):
    """Families of our-fault answers: label of the alarm's metric, key of its advice."""

    GREETING = "greeting"
    EHLO = "ehlo"
    TLS = "tls"
    AUTH = "auth"
    ANONYMOUS = "anonymous"
    RECIPIENT_RIGHT = "recipient_right"
    SENDER_RIGHT = "sender_right"
    SUBMIT_RIGHT = "submit_right"
    SYNTAX = "syntax"


# Nothing said before MAIL can be about a message: the session itself was refused.
_SESSION_STAGES: Final = frozenset({Stage.CONNECT, Stage.BANNER, Stage.EHLO, Stage.STARTTLS, Stage.AUTH})
_RECIPIENT_STAGES: Final = frozenset({Stage.RCPT, Stage.DATA})

# RFC 5321 §4.2.2: the command was not understood or not expected. 53x: RFC 4954 §6, RFC 3207 §4.
_SYNTAX_CODES: Final = frozenset({500, 501, 502, 503, 504})
_LOGIN_CODES: Final = frozenset({530, 534, 535, 538})

# What Exchange says when a receive connector lacks a right.
_EXCHANGE_FAULTS: Final = {
    "5.7.3": Fault.AUTH,  # Authentication unsuccessful; Cannot achieve Exchange Server authentication
    "5.7.54": Fault.RECIPIENT_RIGHT,  # Unable to relay recipient in non-accepted domain
    "5.7.57": Fault.ANONYMOUS,  # Client was not authenticated to send anonymous mail during MAIL FROM
    "5.7.60": Fault.SENDER_RIGHT,  # Client does not have permissions to send as this sender
}

# MAIL refused because of what this message or its sender is. 5.7.1 is not among them: at MAIL it is how Exchange 2007
# and 2010 say that the connector lacks Accept-Any-Sender or Submit, while Postfix, which uses it for senders too, by
# default says so at RCPT (smtpd_delay_reject). Queued by mistake costs time; passed on by mistake costs the mail.
_ABOUT_SENDER: Final = frozenset(
    {
        "5.1.0",  # Exchange's sender filter: 554 5.1.0 Sender denied
        "5.1.7",  # RFC 3463 §3.2: bad sender's mailbox address syntax
        "5.1.8",  # RFC 3463 §3.2: bad sender's system address
        "5.7.27",  # RFC 7505 §4.2: sender address has null MX
    }
)
_ABOUT_MESSAGE: Final = frozenset(
    {
        "5.2.3",  # RFC 3463 §3.3: length exceeds an administrative limit
        "5.3.4",  # RFC 1870 §6.1: too big for the system
        "5.6.3",  # RFC 6152 §3: 8-bit content, and the next hop takes 7-bit only
        "5.6.7",  # RFC 6531 §3.5: non-ASCII address
        "5.6.9",  # RFC 6531 §3.5: UTF-8 header
    }
)
_TOO_BIG: Final = 552
_BAD_MAILBOX: Final = 553  # RFC 5321 §3.3: reverse-path not acceptable; without an enhanced code it can only be that

_TOO_MANY_RECIPIENTS: Final = "5.5.3"  # RFC 3463 §3.6: split the message, so the rest is due again
_UNSPECIFIC: Final = frozenset({"", "5.0.0", "5.5.0", _TOO_MANY_RECIPIENTS})


def classify(answer: Answer) -> Outcome:
    """The outcome of one recipient's answer, by the table above. Never DELIVERED short of a 2xx to the final dot."""
    code, enhanced, stage = answer.code, answer.enhanced, answer.stage
    if 200 <= code <= 299 and stage is Stage.FINAL:
        return Outcome.DELIVERED
    if not 500 <= code <= 599:
        return Outcome.DEFERRED
    if stage in _SESSION_STAGES:
        return Outcome.OUR_FAULT
    if stage is Stage.ROUTE:
        return Outcome.REFUSED
    if stage is Stage.MAIL and _is_about_mail(code, enhanced):
        return Outcome.REFUSED
    if stage is Stage.RCPT and code == 501 and enhanced.startswith("5.1."):
        # Otherwise one odd recipient would mark the next hop as misconfigured for everyone.
        return Outcome.REFUSED
    if code in _SYNTAX_CODES or code in _LOGIN_CODES or enhanced in _EXCHANGE_FAULTS:
        return Outcome.OUR_FAULT
    if stage is Stage.MAIL:
        return Outcome.OUR_FAULT
    # RFC 5321 §4.5.3.1.10: 552 is what RFC 821 said for too many recipients, to be taken as 452.
    too_many = enhanced == _TOO_MANY_RECIPIENTS or (code == _TOO_BIG and enhanced in _UNSPECIFIC)
    return Outcome.DEFERRED if too_many and stage in _RECIPIENT_STAGES else Outcome.REFUSED


def classify_foreign(answer: Answer) -> Outcome:
    """The same for a host that was found by MX. Nobody here can mend it, so there is no fault of ours to wait for: a 5xx
    about the message, its sender or a recipient is reported at once, one before MAIL is tried again elsewhere or later.
    """
    outcome = classify(answer)
    if outcome is not Outcome.OUR_FAULT:
        return outcome
    return Outcome.DEFERRED if answer.stage in _SESSION_STAGES else Outcome.REFUSED


def _is_about_mail(code: int, enhanced: str) -> bool:
    if enhanced in _ABOUT_SENDER or enhanced in _ABOUT_MESSAGE:
        return True
    return enhanced in _UNSPECIFIC and code in (_TOO_BIG, _BAD_MAILBOX)


def fault(answer: Answer) -> Fault:
    """The family of an answer that ``classify`` called OUR_FAULT; for others a family that means little."""
    match answer.stage:
        case Stage.CONNECT | Stage.BANNER:
            return Fault.GREETING
        case Stage.EHLO:
            return Fault.EHLO
        case Stage.STARTTLS:
            return Fault.TLS
        case Stage.AUTH:
            return Fault.AUTH
        case Stage.ROUTE | Stage.MAIL | Stage.RCPT | Stage.DATA | Stage.FINAL:
            pass
    exchange = _EXCHANGE_FAULTS.get(answer.enhanced)
    if exchange is not None:
        return exchange
    if answer.code in _LOGIN_CODES:
        # 530 5.7.0 is "Must issue a STARTTLS command first" (RFC 3207 §4) as often as "Authentication required".
        return Fault.TLS if "starttls" in answer.text.lower() else Fault.AUTH
    if answer.stage is Stage.MAIL and answer.code not in _SYNTAX_CODES:
        return Fault.SENDER_RIGHT if "send as" in answer.text.lower() else Fault.SUBMIT_RIGHT
    return Fault.SYNTAX


_ADVICE: Final = {
    Fault.GREETING: (
        "The next hop refuses connections from this relay. Exchange: add the relay's address to RemoteIPRanges of the "
        "receive connector meant for it, and to the IP allow list; check that host and port of the route are an SMTP "
        "server."
    ),
    Fault.EHLO: (
        "The next hop does not like EHLO or the name in it. Set server.hostname to a full name that resolves to this "
        "relay's address."
    ),
    Fault.TLS: (
        "The next hop refuses or demands STARTTLS. Check delivery.tls of the relay against the connector's "
        "AuthMechanism (Tls), RequireTLS and certificate."
    ),
    Fault.AUTH: (
        "The next hop wants a login that this relay does not have or that is wrong. Exchange: let the connector accept "
        "the relay by address (PermissionGroups AnonymousUsers, and not ExchangeServer authentication for this "
        "address range), or correct the relay's user name and password for this next hop."
    ),
    Fault.ANONYMOUS: (
        "Exchange does not take mail from clients without login on this connector. Add AnonymousUsers to its "
        "PermissionGroups (this grants ms-Exch-SMTP-Submit), or use a connector of its own for the relay whose "
        "RemoteIPRanges holds only the relay's address."
    ),
    Fault.RECIPIENT_RIGHT: (
        "Exchange takes this recipient's domain for a foreign one. Make it an accepted domain, or correct the route; "
        "only if the relay shall send to the outside through Exchange, grant ms-Exch-SMTP-Accept-Any-Recipient on the "
        "relay's connector."
    ),
    Fault.SENDER_RIGHT: (
        "The relay may not send as this sender. Grant ms-Exch-SMTP-Accept-Any-Sender, and for senders of Exchange's own "
        "domains ms-Exch-SMTP-Accept-Authoritative-Domain-Sender, to the relay on its receive connector."
    ),
    Fault.SUBMIT_RIGHT: (
        "The next hop takes no mail from this relay. Exchange: grant ms-Exch-SMTP-Submit and "
        "ms-Exch-SMTP-Accept-Any-Sender on the relay's receive connector (PermissionGroups AnonymousUsers grants both). "
        "Others: list the relay among the trusted networks."
    ),
    Fault.SYNTAX: (
        "The next hop did not understand a command. Look for a firewall that rewrites SMTP (Cisco fixup or inspect "
        "esmtp, banner of asterisks) between relay and next hop, and check that the route's port is an SMTP server."
    ),
}


def advice(answer: Answer) -> str:
    """Cause and cure of an OUR_FAULT answer, for the alarm and for ``relay queue show``: one line of ASCII."""
    return _ADVICE[fault(answer)]


# Later stages judged more: a refusal of the content holds for all recipients, one of a recipient for one.
_TELLING: Final = {Stage.ROUTE: 0, Stage.RCPT: 0, Stage.MAIL: 1, Stage.DATA: 2, Stage.FINAL: 3}


def client_reply(answers: Sequence[Answer], judge: Callable[[Answer], Outcome] = classify) -> Kind:
    """What an express client is told when *all* recipients were refused for good: the most telling of the answers.

    That is the one of the latest stage, there one with a specific enhanced code, there the first. Raises ValueError
    when an answer is no refusal: such a message belongs to the queue, and a 5xx would lose it for that recipient.
    """
    if not answers or any(judge(answer) is not Outcome.REFUSED for answer in answers):
        raise ValueError("a refusal is passed on only when every recipient was refused for good")
    best = max(answers, key=lambda answer: (_TELLING[answer.stage], answer.enhanced not in _UNSPECIFIC))
    return from_next_hop(best.code, best.enhanced)
