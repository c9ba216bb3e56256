"""Owns: delivery reports (RFC 3464 in RFC 6522's multipart/report) and the question who may get one.

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

ORIGINAL_OCTETS: Final = 50 * 1024
"""Originals up to this size are returned whole, of larger ones the header only (RFC 6522 §3): enough to recognise
the message, and a report stays small enough to lie in memory and in the database."""

_LINE: Final = 76  # RFC 5322 §2.1.1 recommends at most 78


class Cause(Enum):
    """Why the relay gave a recipient up."""

    REFUSED = "refused"
    """The next hop said no for good."""
    EXPIRED = "expired"
    """It stayed undelivered for too long; the answer is the last temporary failure."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One recipient that gets nothing any more. ``host`` is the next hop's name, "" when none was reached."""

    recipient: Mailbox
    cause: Cause
    answer: Answer
    host: str


@dataclass(frozen=True, slots=True)
class Report:
    """What is the same for all recipients of one report.

    ``message_id`` without angle brackets; dates as ``trace.date`` gives them; ``boundary`` of RFC 2046 §5.1.1 tokens
    (extended here should the original contain it). ``original`` is ``content.head(ORIGINAL_OCTETS)`` of the message
    returned, ``original_size`` its full size in octets.
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


def failure_report(report: Report, failures: Sequence[Failure]) -> bytes:
    """The failure report on ``failures`` in wire form. It is 8-bit exactly when the original is: ``isascii()`` tells.

    Raises ValueError when there is nobody to report on or nobody to report to.
    """
    if not failures or not report.sender:
        raise ValueError("a failure report needs failures and a sender to go to")
    kind, original = _original(report)
    encoding = "7bit" if original.isascii() else "8bit"
    boundary = report.boundary
    while boundary.encode("ascii") in original:
        boundary += "="
    head = [
        f'From: "Mail Delivery System" <MAILER-DAEMON@{report.hostname}>',
        f"To: <{report.sender}>",
        "Subject: Your message could not be delivered",
        f"Date: {report.date}",
        f"Message-ID: <{report.message_id}>",
        "Auto-Submitted: auto-replied",  # RFC 3834 §5
        "MIME-Version: 1.0",
        "Content-Type: multipart/report; report-type=delivery-status;",
        f'\tboundary="{boundary}"',
        f"Content-Transfer-Encoding: {encoding}",
        "",
        f"--{boundary}",
        "Content-Type: text/plain; charset=us-ascii",
        "Content-Transfer-Encoding: 7bit",
        "",
        *_letter(report, failures, kind),
        "",
        f"--{boundary}",
        "Content-Type: message/delivery-status",
        "Content-Transfer-Encoding: 7bit",
        "",
        *_status(report, failures),
        "",
        f"--{boundary}",
        f"Content-Type: {kind}",
        f"Content-Transfer-Encoding: {encoding}",
        "",
    ]
    wire = "".join(f".{line}\r\n" if line.startswith(".") else f"{line}\r\n" for line in head)
    # The CR LF in front of a boundary belongs to it (RFC 2046 §5.1.1), so the original keeps its own last one.
    return b"".join((wire.encode("ascii"), original, f"\r\n--{boundary}--\r\n".encode("ascii")))


def _original(report: Report) -> tuple[str, bytes]:
    octets = report.original
    if report.original_size <= ORIGINAL_OCTETS and len(octets) == report.original_size:
        return "message/rfc822", octets if octets.endswith(b"\r\n") else octets + b"\r\n"
    return "text/rfc822-headers", header_of(octets)


def header_of(octets: bytes) -> bytes:
    """The header of a message from its first octets, without the empty line; whole lines only when it was cut."""
    if octets.startswith(b"\r\n"):
        return b""
    end = octets.find(b"\r\n\r\n")
    return octets[: end + 2] if end >= 0 else octets[: octets.rfind(b"\r\n") + 2] if b"\r\n" in octets else b""


def _letter(report: Report, failures: Sequence[Failure], kind: str) -> list[str]:
    whole = kind == "message/rfc822"
    lines = [
        f"This is the mail system at {report.hostname}.",
        "",
        *textwrap.wrap(
            "Your message could not be delivered to the addresses below. Nothing more will be tried.", _LINE
        ),
        "",
    ]
    for failure in failures:
        lines.append(f"<{failure.recipient}>")
        lines += textwrap.wrap(_reason(failure), _LINE, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    attached = "your message" if whole else "the header of your message"
    lines += textwrap.wrap(
        f"A report for mail programs and {attached} are attached. If you ask your postmaster about it, "
        f"name this identifier: {report.queue_id}",
        _LINE,
    )
    return lines


def _reason(failure: Failure) -> str:
    answer = failure.answer
    where = f"the server {failure.host}" if failure.host else "the destination"
    said = " ".join(part for part in (str(answer.code or ""), answer.enhanced, answer.text) if part)
    match failure.cause:
        case Cause.REFUSED:
            return f"was refused by {where}: {said}"
        case Cause.EXPIRED if answer.code:
            return f"was tried for too long without success; last, {where} answered: {said}"
        case Cause.EXPIRED:
            return f"was tried for too long without success; last, {where} could not be used: {said}"


def _status(report: Report, failures: Sequence[Failure]) -> list[str]:
    lines = [
        f"Reporting-MTA: dns; {report.hostname}",
        f"X-Queue-ID: {report.queue_id}",
        f"Arrival-Date: {report.arrived}",
    ]
    for failure in failures:
        lines += [
            "",
            f"Final-Recipient: rfc822; {failure.recipient}",
            "Action: failed",
            f"Status: {_status_code(failure)}",
        ]
        if failure.host:
            lines.append(f"Remote-MTA: dns; {failure.host}")
        answer = failure.answer
        if answer.code:
            said = " ".join(part for part in (str(answer.code), answer.enhanced, answer.text) if part)
            lines += _folded(f"Diagnostic-Code: smtp; {said}")
        else:
            lines += _folded(f"Diagnostic-Code: x-dmz-relay; {answer.text}")
        lines.append(f"Last-Attempt-Date: {report.date}")
    return lines


def _folded(field: str) -> list[str]:
    return textwrap.wrap(field, _LINE, subsequent_indent="\t", break_long_words=False, break_on_hyphens=False)


def _status_code(failure: Failure) -> str:
    match failure.cause:
        case Cause.EXPIRED:
            return "4.4.7"  # RFC 3463 §3.5: delivery time expired
        case Cause.REFUSED:
            return failure.answer.enhanced if failure.answer.enhanced.startswith("5.") else "5.0.0"


# --- who may get a report --------------------------------------------------------------------------------------

_UNFOLD: Final = re.compile(rb"\r\n(?=[ \t])")
_FIELD: Final = re.compile(
    rb"^(auto-submitted|precedence|x-auto-response-suppress|content-type|list-[a-z-]+)[ \t]*:[ \t]*([^\r\n]*)",
    re.IGNORECASE | re.MULTILINE,
)


def answerable(sender: str, header: bytes) -> bool:
    """Whether a failure of this message may be reported to its sender; the guard against loops and backscatter.

    ``header``: the first octets of the message in wire form. No report for the null sender (RFC 5321 §6.1), for
    mailer daemons and list owners, for automatic mail (Auto-Submitted: RFC 3834 §2; Precedence; List-*: RFC 2369,
    RFC 2919), for reports themselves, or where X-Auto-Response-Suppress (Exchange) names NDR or All.
    """
    local = sender.rpartition("@")[0].lower()
    if not sender or local in ("mailer-daemon", "double-bounce") or local.startswith("owner-"):
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
