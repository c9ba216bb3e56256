"""Owns: the ESMTP parameters of MAIL and RCPT (RFC 5321 §4.1.2, RFC 1870, RFC 6152). Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from relay.mail.address import PLAIN_MAILBOX
from relay.mail.reply import BAD_ARGUMENTS, BAD_PARAMETER, BAD_SIZE, Kind

# The two commands nearly every client sends; whatever does not match goes through mail.address.parse_path.
PLAIN_MAIL: Final = re.compile(rb"MAIL FROM:<(" + PLAIN_MAILBOX.encode() + rb")?>", re.IGNORECASE).fullmatch
PLAIN_RCPT: Final = re.compile(rb"RCPT TO:<(" + PLAIN_MAILBOX.encode() + rb")>", re.IGNORECASE).fullmatch
MAIL_PREFIX: Final = re.compile(rb"MAIL FROM: ?(?=\S)", re.IGNORECASE).match
RCPT_PREFIX: Final = re.compile(rb"RCPT TO: ?(?=\S)", re.IGNORECASE).match

_PARAMETER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~]+))?")
SIZE_DIGITS: Final = 20  # RFC 1870 §4


class MailParameters(NamedTuple):
    """``size`` in octets as declared, 0 when not; ``body_8bit`` for BODY=8BITMIME."""

    size: int
    body_8bit: bool


def mail_parameters(text: str) -> MailParameters | Kind:
    """What stands behind the path of MAIL, or the refusal."""
    size, body_8bit, seen = 0, False, set[str]()
    for word in text.split():
        found = _PARAMETER.fullmatch(word)
        if found is None:
            return BAD_ARGUMENTS
        key, value = found[1].upper(), found[2] or ""
        if key in seen:
            return BAD_ARGUMENTS
        seen.add(key)
        match key:
            case "SIZE":
                if not (value.isascii() and value.isdigit() and len(value) <= SIZE_DIGITS):
                    return BAD_SIZE
                size = int(value)
            case "BODY":
                if value.upper() not in ("7BIT", "8BITMIME"):
                    return BAD_ARGUMENTS
                body_8bit = value.upper() == "8BITMIME"
            case _:
                return BAD_PARAMETER
    return MailParameters(size, body_8bit)
