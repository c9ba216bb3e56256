"""Owns: what a postmaster is sent: letters about what went wrong, and mail that could not even be returned.

Pure: time, identifiers and boundary are arguments. In wire form, as every ``Content`` is; the caller sends with the null sender.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from email.header import Header
from typing import Final

from relay.mail.address import Mailbox
from relay.mail.dsn import header_of

LINE: Final = 900
"""A line of a letter is cut there: RFC 5321 section 4.5.3.1.6 allows 1000 octets."""


@dataclass(frozen=True, slots=True)
class Letter:
    """``message_id`` without angle brackets; ``date`` as ``trace.date`` gives it; ``lines`` are printable ASCII."""

    hostname: str
    to: Mailbox
    subject: str
    date: str
    message_id: str
    lines: Sequence[str]

    def wire(self) -> bytes:
        """The letter alone."""
        return _stuffed([*self._head("text/plain; charset=us-ascii"), "", *self.lines])

    def around(self, original: bytes, boundary: str, *, whole: bool) -> bytes:
        """The letter with a message, or as much of its header as is in ``original``: its octets as they are on the wire."""
        kind = "message/rfc822" if whole else "text/rfc822-headers"
        inside = original if whole else header_of(original)
        if not inside.endswith(b"\r\n"):
            inside += b"\r\n"
        while boundary.encode("ascii") in inside:
            boundary += "="
        encoding = "7bit" if inside.isascii() else "8bit"
        head = [
            *self._head(f'multipart/mixed; boundary="{boundary}"', encoding),
            "",
            f"--{boundary}",
            "Content-Type: text/plain; charset=us-ascii",
            "",
            *self.lines,
            "",
            f"--{boundary}",
            f"Content-Type: {kind}",
            f"Content-Transfer-Encoding: {encoding}",
            "",
        ]
        return b"".join((_stuffed(head), inside, f"\r\n--{boundary}--\r\n".encode("ascii")))

    def _head(self, kind: str, encoding: str = "7bit") -> list[str]:
        return [
            f'From: "Mail Delivery System" <MAILER-DAEMON@{self.hostname}>',
            f"To: <{self.to}>",
            *f"Subject: {Header(self.subject, 'us-ascii').encode(linesep=chr(10))}".split("\n"),
            f"Date: {self.date}",
            f"Message-ID: <{self.message_id}>",
            "Auto-Submitted: auto-generated",  # RFC 3834 §5: not in answer to a message
            "MIME-Version: 1.0",
            f"Content-Type: {kind}",
            f"Content-Transfer-Encoding: {encoding}",
        ]


def _stuffed(lines: Sequence[str]) -> bytes:
    return "".join(f".{line[:LINE]}\r\n" if line.startswith(".") else f"{line[:LINE]}\r\n" for line in lines).encode(
        "ascii"
    )
