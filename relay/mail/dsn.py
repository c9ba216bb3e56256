"""Owns: delivery reports (RFC 3464 in RFC 6522's multipart/report; RFC 6533 where UTF-8 is in it) and the question who may
get one.

Pure: time, identifiers and boundary are arguments. Reports are built in wire form (CR LF, dots stuffed), as every
``Content`` is. The original travels inside as the wire octets it has: its lines stay lines of the report, so
stuffing them again, or decoding and encoding them, would only change them. The caller sends with the null sender.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from relay.mail.address import Mailbox
from relay.mail.answer import Answer
from relay.mail.envelope import QueueId
from relay.mail.terms import PLAIN, PLAIN_RECIPIENT, RecipientTerms, Terms, decode_xtext

ORIGINAL_OCTETS: Final = 50 * 1024
"""Originals up to this size are returned whole, of larger ones the header only (RFC 6522 §3): enough to recognise
the message, and a report stays small enough to lie in memory and in the database."""

_LINE: Final = 76  # RFC 5322 §2.1.1 recommends at most 78


class Cause(Enum):
    """What became of a recipient."""

    REFUSED = "refused"
    """The next hop said no for good."""
    EXPIRED = "expired"
    """It stayed undelivered for too long; the answer is the last temporary failure."""
    DELAYED = "delayed"
    """It is not delivered yet, and goes on being tried; the answer is the last temporary failure."""
    RELAYED = "relayed"
    """The next hop has it, and will not report on it (RFC 3461 §5.2.2)."""
    DELIVERED = "delivered"
    """It is where it was to go."""


_ACTIONS: Final = {
    Cause.REFUSED: "failed",
    Cause.EXPIRED: "failed",
    Cause.DELAYED: "delayed",
    Cause.RELAYED: "relayed",
    Cause.DELIVERED: "delivered",
}
_FAILED: Final = frozenset({Cause.REFUSED, Cause.EXPIRED})


@dataclass(frozen=True, slots=True)
class Notice:
    """One recipient of a report. ``host`` is the next hop's name, "" when none was reached. ``terms``: what the sender asked
    for.
    """

    recipient: Mailbox
    cause: Cause
    answer: Answer
    host: str
    terms: RecipientTerms = PLAIN_RECIPIENT

    @property
    def action(self) -> str:
        """The Action of RFC 3464 §2.3.3."""
        return _ACTIONS[self.cause]

    @property
    def is_wanted(self) -> bool:
        """Whether the sender wants to hear this (RFC 3461 §5.2)."""
        if self.cause in _FAILED:
            return self.terms.wants_failure
        return self.terms.wants_delay if self.cause is Cause.DELAYED else self.terms.wants_success


@dataclass(frozen=True, slots=True)
class Report:
    """What is the same for all recipients of one report.

    ``message_id`` without angle brackets; dates as ``trace.date`` gives them; ``boundary`` of RFC 2046 §5.1.1 tokens
    (extended here should the original contain it). ``original`` is ``content.head(ORIGINAL_OCTETS)`` of the message
    returned, ``original_size`` its full size in octets, ``terms`` what its sender said. ``until``: the date up to which
    delayed mail is tried.
    """

    hostname: str
    sender: Mailbox
    queue_id: QueueId
    arrived: str
    date: str
    message_id: str
    boundary: str
    original: bytes
    original_size: int
    terms: Terms = PLAIN
    until: str = ""


def delivery_report(report: Report, notices: Sequence[Notice]) -> bytes:
    """The report on ``notices`` in wire form: failures, or delays, or successes, which are never mixed.

    It is 8-bit exactly when the original or an address is: ``isascii()`` tells. Raises ValueError when there is nobody to
    report on or nobody to report to.
    """
    if not notices or not report.sender:
        raise ValueError("a report needs recipients to report on and a sender to go to")
    kind, original = _original(report, notices)
    letter, status = _letter(report, notices, kind), _status(report, notices)
    # RFC 6533 §4: where addresses are not ASCII, the part for programs has another type.
    status_type = "delivery-status" if "".join(status).isascii() else "global-delivery-status"
    boundary = report.boundary
    while boundary.encode("ascii") in original:
        boundary += "="
    head = [
        f'From: "Mail Delivery System" <MAILER-DAEMON@{report.hostname}>',
        f"To: <{report.sender}>",
        f"Subject: {_SUBJECTS[notices[0].cause]}",
        f"Date: {report.date}",
        f"Message-ID: <{report.message_id}>",
        "Auto-Submitted: auto-replied",  # RFC 3834 §5
        "MIME-Version: 1.0",
        "Content-Type: multipart/report; report-type=delivery-status;",
        f'\tboundary="{boundary}"',
        f"Content-Transfer-Encoding: {_encoding(original.decode('latin-1'), *letter, *status)}",
        "",
        f"--{boundary}",
        f"Content-Type: text/plain; charset={'us-ascii' if ''.join(letter).isascii() else 'utf-8'}",
        f"Content-Transfer-Encoding: {_encoding(*letter)}",
        "",
        *letter,
        "",
        f"--{boundary}",
        f"Content-Type: message/{status_type}",
        f"Content-Transfer-Encoding: {_encoding(*status)}",
        "",
        *status,
        "",
        f"--{boundary}",
        f"Content-Type: {kind}",
        f"Content-Transfer-Encoding: {'7bit' if original.isascii() else '8bit'}",
        "",
    ]
    wire = "".join(f".{line}\r\n" if line.startswith(".") else f"{line}\r\n" for line in head)
    # The CR LF in front of a boundary belongs to it (RFC 2046 §5.1.1), so the original keeps its own last one.
    return b"".join((wire.encode(), original, f"\r\n--{boundary}--\r\n".encode("ascii")))


def _encoding(*texts: str) -> str:
    return "7bit" if all(text.isascii() for text in texts) else "8bit"


def _original(report: Report, notices: Sequence[Notice]) -> tuple[str, bytes]:
    """The third part and its type. Whole only in reports of failure, and not where RET=HDRS was asked (RFC 3461 §6.2)."""
    octets = report.original
    header = header_of(octets)
    utf8 = report.terms.utf8 and not header.isascii()  # RFC 6532 §3.7: such a message is no message/rfc822
    whole = report.original_size <= ORIGINAL_OCTETS and len(octets) == report.original_size
    if whole and report.terms.ret != "HDRS" and any(notice.cause in _FAILED for notice in notices):
        kind = "message/global" if utf8 else "message/rfc822"
        return kind, octets if octets.endswith(b"\r\n") else octets + b"\r\n"
    return "message/global-headers" if utf8 else "text/rfc822-headers", header


def header_of(octets: bytes) -> bytes:
    """The header of a message from its first octets, without the empty line; whole lines only when it was cut."""
    if octets.startswith(b"\r\n"):
        return b""
    end = octets.find(b"\r\n\r\n")
    return octets[: end + 2] if end >= 0 else octets[: octets.rfind(b"\r\n") + 2] if b"\r\n" in octets else b""


# --- the letter ------------------------------------------------------------------------------------------------

_NOT_DELIVERED: Final = "Your message could not be delivered"
_PASSED_ON: Final = "Your message was passed on"
_SUBJECTS: Final = {
    Cause.REFUSED: _NOT_DELIVERED,
    Cause.EXPIRED: _NOT_DELIVERED,
    Cause.DELAYED: "Your message is delayed",
    Cause.RELAYED: _PASSED_ON,
    Cause.DELIVERED: "Your message was delivered",
}
_OPENINGS: Final = {
    "failed": "Your message could not be delivered to the addresses below. Nothing more will be tried.",
    "delayed": (
        "Your message could not be delivered to the addresses below yet. You need not send it again: it goes on being "
        "tried."
    ),
    "relayed": (
        "You asked to hear when your message arrives. It was passed on to a server that does not send such reports, so "
        "this is the last one about the addresses below, unless delivery fails."
    ),
    "delivered": "You asked to hear when your message arrives. It was delivered to the addresses below.",
}


def _letter(report: Report, notices: Sequence[Notice], kind: str) -> list[str]:
    whole = kind in ("message/rfc822", "message/global")
    action = notices[0].action
    opening = _OPENINGS[action]
    if action == "delayed" and report.until:
        opening += f" If that has not succeeded by {report.until}, you get another report."
    lines = [f"This is the mail system at {report.hostname}.", "", *textwrap.wrap(opening, _LINE), ""]
    for notice in notices:
        lines.append(f"<{notice.recipient}>")
        lines += textwrap.wrap(_reason(notice), _LINE, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    attached = "your message" if whole else "the header of your message"
    lines += textwrap.wrap(
        f"A report for mail programs and {attached} are attached. If you ask your postmaster about it, "
        f"name this identifier: {report.queue_id}",
        _LINE,
    )
    return lines


def _reason(notice: Notice) -> str:
    where = f"the server {notice.host}" if notice.host else "the destination"
    said = _said(notice.answer)
    match notice.cause:
        case Cause.REFUSED:
            return f"was refused by {where}: {said}"
        case Cause.EXPIRED if notice.answer.code:
            return f"was tried for too long without success; last, {where} answered: {said}"
        case Cause.EXPIRED:
            return f"was tried for too long without success; last, {where} could not be used: {said}"
        case Cause.DELAYED if notice.answer.code:
            return f"is tried again; last, {where} answered: {said}"
        case Cause.DELAYED:
            return f"is tried again; last, {where} could not be used: {said}"
        case Cause.RELAYED:
            return f"was taken by {where}: {said}"
        case Cause.DELIVERED:
            return f"was delivered by {where}: {said}"


def _said(answer: Answer) -> str:
    return " ".join(part for part in (str(answer.code or ""), answer.enhanced, answer.text) if part)


# --- the part for programs -----------------------------------------------------------------------------------


def _status(report: Report, notices: Sequence[Notice]) -> list[str]:
    lines = [
        f"Reporting-MTA: dns; {report.hostname}",
        f"X-Queue-ID: {report.queue_id}",
        f"Arrival-Date: {report.arrived}",
    ]
    if report.terms.envid:
        lines.insert(0, f"Original-Envelope-Id: {decode_xtext(report.terms.envid)}")
    for notice in notices:
        lines.append("")
        original = notice.terms.original_address
        if original is not None:
            lines.append(f"Original-Recipient: {original[0]}; {original[1]}")
        lines += [
            f"Final-Recipient: {'rfc822' if notice.recipient.isascii() else 'utf-8'}; {notice.recipient}",
            f"Action: {notice.action}",
            f"Status: {_status_code(notice)}",
        ]
        if notice.host:
            lines.append(f"Remote-MTA: dns; {notice.host}")
        if notice.answer.code:
            lines += _folded(f"Diagnostic-Code: smtp; {_said(notice.answer)}")
        else:
            lines += _folded(f"Diagnostic-Code: x-dmz-relay; {notice.answer.text}")
        lines.append(f"Last-Attempt-Date: {report.date}")
        if notice.cause is Cause.DELAYED and report.until:
            lines.append(f"Will-Retry-Until: {report.until}")
    return lines


def _folded(field: str) -> list[str]:
    return textwrap.wrap(field, _LINE, subsequent_indent="\t", break_long_words=False, break_on_hyphens=False)


def _status_code(notice: Notice) -> str:
    enhanced = notice.answer.enhanced
    match notice.cause:
        case Cause.EXPIRED:
            return "4.4.7"  # RFC 3463 §3.5: delivery time expired
        case Cause.DELAYED:
            return enhanced if enhanced.startswith("4.") else "4.0.0"
        case Cause.REFUSED:
            return enhanced if enhanced.startswith("5.") else "5.0.0"
        case Cause.RELAYED | Cause.DELIVERED:
            return enhanced if enhanced.startswith("2.") else "2.0.0"


# --- who may get a report --------------------------------------------------------------------------------------

_UNFOLD: Final = re.compile(rb"\r\n(?=[ \t])")
_FIELD: Final = re.compile(
    rb"^(auto-submitted|precedence|x-auto-response-suppress|content-type|list-[a-z-]+)[ \t]*:[ \t]*([^\r\n]*)",
    re.IGNORECASE | re.MULTILINE,
)


def reportable(sender: str) -> bool:
    """Whether any report may go to this sender: never to the null sender (RFC 5321 §6.1), nor to a mailer daemon."""
    return bool(sender) and sender.rpartition("@")[0].lower() not in ("mailer-daemon", "double-bounce")


def answerable(sender: str, header: bytes) -> bool:
    """Whether a failure of this message may be reported to a sender who did not say whether it wants to hear; the guard
    against loops and backscatter.

    ``header``: the first octets of the message in wire form. No report for list owners, for automatic mail
    (Auto-Submitted: RFC 3834 §2; Precedence; List-*: RFC 2369, RFC 2919), for reports themselves, or where
    X-Auto-Response-Suppress (Exchange) names NDR or All.
    """
    if not reportable(sender) or sender.lower().startswith("owner-"):
        return False
    return not any(
        _is_automatic(name.lower(), value.strip().lower())
        for name, value in _FIELD.findall(_UNFOLD.sub(b"", header_of(header)))
    )


def _is_automatic(name: bytes, value: bytes) -> bool:
    match name:
        case b"auto-submitted":
            return value.partition(b";")[0].partition(b"(")[0].strip() != b"no"
        case b"precedence":
            return value in (b"bulk", b"list", b"junk")
        case b"x-auto-response-suppress":
            return not {word.strip() for word in value.split(b",")}.isdisjoint((b"ndr", b"all"))
        case b"content-type":
            return value.startswith(b"multipart/report")
        case _:
            return True
