"""Owns: the messages of the soak: made so that whoever finds one can tell which it is and whether it is whole.

``X-Soak-Sum`` is the checksum of all that follows it, ``X-Soak-Id`` among it. The relay's trace header stands in front.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import Final, NamedTuple

_LINE: Final = 78  # with CR LF
_BLOCK_LINES: Final = 4_000

_SUM: Final = b"X-Soak-Sum: "
_TRACE_ID: Final = re.compile(rb"\A(?:Return-Path:[^\r]*\r\n)?Received: [^;]*?\bid ([0-9A-F]+)")
_MESSAGE_ID: Final = re.compile(rb"^X-Soak-Id: (\S+)\r$", re.MULTILINE)
_REPORT_ID: Final = re.compile(rb"^Message-ID: <([0-9A-F]+)@", re.MULTILINE | re.IGNORECASE)
_REPORT_FOR: Final = re.compile(rb"^X-Queue-ID: ([0-9A-F]+)\r$", re.MULTILINE)
_REPORT_RECIPIENT: Final = re.compile(rb"^Final-Recipient: rfc822; (\S+)\r$", re.MULTILINE)


class Read(NamedTuple):
    """A message as the next hop got it."""

    message_id: str
    queue_id: str
    whole: bool


class ReadReport(NamedTuple):
    """A report as the sender got it: its own queue id, that of the message it is about, the recipients."""

    queue_id: str
    for_id: str
    recipients: tuple[str, ...]


class Mill:
    """Makes messages of any size from one block of lines; some begin with a dot."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:"
        lines = []
        for number in range(_BLOCK_LINES):
            line = "".join(dice.choices(letters, k=_LINE - 2))
            lines.append(f".{line[1:]}\r\n" if number % 10 == 0 else f"{line}\r\n")
        self._block = "".join(lines).encode("ascii")

    def make(self, message_id: str, sender: str, octets: int) -> bytes:
        """A message of about ``octets``, not dot-stuffed."""
        count = max(1, octets // _LINE)
        start = self._dice.randrange(_BLOCK_LINES - count) * _LINE
        rest = (
            f"X-Soak-Id: {message_id}\r\nFrom: Soak <{sender}>\r\nTo: Somebody <somebody@example.com>\r\n"
            f"Subject: soak {message_id}\r\nMessage-ID: <{message_id}@soak.example.net>\r\n"
            "Date: Tue, 14 Nov 2023 22:13:20 +0000\r\n\r\n"
        ).encode("ascii") + self._block[start : start + count * _LINE]
        return _SUM + hashlib.sha256(rest).hexdigest().encode("ascii") + b"\r\n" + rest


def read(message: bytes) -> Read:
    """Take a message apart; what is not there is empty."""
    trace = _TRACE_ID.match(message)
    given = message.find(_SUM)
    named = _MESSAGE_ID.search(message, given) if given >= 0 else None
    if trace is None or named is None:
        return Read(named[1].decode() if named else "", trace[1].decode() if trace else "", whole=False)
    end = message.index(b"\r\n", given)
    whole = hashlib.sha256(message[end + 2 :]).hexdigest().encode("ascii") == message[given + len(_SUM) : end]
    return Read(named[1].decode(), trace[1].decode(), whole)


def read_report(message: bytes) -> ReadReport | None:
    """A report of the relay; None when it is none."""
    own, about = _REPORT_ID.search(message), _REPORT_FOR.search(message)
    if own is None or about is None:
        return None
    return ReadReport(
        own[1].decode(), about[1].decode(), tuple(found.decode() for found in _REPORT_RECIPIENT.findall(message))
    )
