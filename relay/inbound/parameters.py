"""Owns: the ESMTP parameters of MAIL and RCPT (RFC 5321 §4.1.2, RFC 1870, RFC 6152,
RFC 3461, RFC 6531). Pure.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from relay.mail.address import PLAIN_MAILBOX
from relay.mail.reply import BAD_ARGUMENTS, BAD_PARAMETER, BAD_SIZE, Kind
from relay.mail.terms import (
    PLAIN,
    PLAIN_RECIPIENT,
    RecipientTerms,
    Terms,
    parse_envid,
    parse_notify,
    parse_original,
    parse_ret,
)

# The two commands nearly every client sends; whatever does not match goes through mail.address.parse_path.
PLAIN_MAIL: Final = re.compile(rb"MAIL FROM:<(" + PLAIN_MAILBOX.encode() + rb")?>", re.IGNORECASE).fullmatch
PLAIN_RCPT: Final = re.compile(rb"(" + PLAIN_MAILBOX.encode() + rb")>").fullmatch
"""From behind ``RCPT_VERB``, in whatever case that is: a pattern without regard to case takes twice as long."""
RCPT_VERB: Final = b"RCPT TO:<"
MAIL_PREFIX: Final = re.compile(rb"MAIL FROM: ?(?=\S)", re.IGNORECASE).match
RCPT_PREFIX: Final = re.compile(rb"RCPT TO: ?(?=\S)", re.IGNORECASE).match

# esmtp-value is printable ASCII without "=" (RFC 5321 §4.1.2), and UTF-8 where SMTPUTF8 is on (RFC 6531 §3.3).
_PARAMETER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~\u0080-\U0010ffff]+))?")
_XTEXT: Final = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+")  # RFC 3461 §4
SIZE_DIGITS: Final = 20  # RFC 1870 §4


class MailParameters(NamedTuple):
    """``size`` in octets as declared, 0 when not; ``body_8bit`` for BODY=8BITMIME; ``terms``: DSN and SMTPUTF8;
    ``auth``: there was AUTH= (RFC 4954 §5), whose value nobody here trusts.
    """

    size: int
    body_8bit: bool
    terms: Terms = PLAIN
    auth: bool = False


def _split(text: str) -> dict[str, str | None] | None:
    """Keyword, in capitals, and value of each parameter, None where there is no value; None when the syntax is wrong."""
    found: dict[str, str | None] = {}
    for word in text.split(" "):
        if not word:
            continue
        parameter = _PARAMETER.fullmatch(word)
        if parameter is None or parameter[1].upper() in found:
            return None
        found[parameter[1].upper()] = parameter[2]
    return found


def mail_parameters(text: str) -> MailParameters | Kind:
    """What stands behind the path of MAIL, or the refusal."""
    parameters = _split(text)
    if parameters is None:
        return BAD_ARGUMENTS
    size, body_8bit, auth, utf8, ret, envid = 0, False, False, False, "", ""
    for key, value in parameters.items():
        given = value or ""
        match key:
            case "SIZE":
                if not (given.isascii() and given.isdigit() and len(given) <= SIZE_DIGITS):
                    return BAD_SIZE
                size = int(given)
            case "BODY":
                if given.upper() not in ("7BIT", "8BITMIME"):
                    return BAD_ARGUMENTS
                body_8bit = given.upper() == "8BITMIME"
            case "RET":
                ret = parse_ret(given) or ""
                if not ret:
                    return BAD_ARGUMENTS
            case "ENVID":
                envid = parse_envid(given) or ""
                if not envid:
                    return BAD_ARGUMENTS
            case "AUTH":
                if given != "<>" and _XTEXT.fullmatch(given) is None:
                    return BAD_ARGUMENTS
                auth = True
            case "SMTPUTF8":
                if value is not None:
                    return BAD_ARGUMENTS
                utf8 = True
            case _:
                return BAD_PARAMETER
    return MailParameters(size, body_8bit, Terms(utf8, ret, envid) if utf8 or ret or envid else PLAIN, auth)


def rcpt_parameters(text: str) -> RecipientTerms | Kind:
    """What stands behind the path of RCPT, or the refusal."""
    parameters = _split(text)
    if parameters is None:
        return BAD_ARGUMENTS
    notify, original = "", ""
    for key, value in parameters.items():
        match key:
            case "NOTIFY":
                notify = parse_notify(value or "") or ""
                if not notify:
                    return BAD_ARGUMENTS
            case "ORCPT":
                original = parse_original(value or "") or ""
                if not original:
                    return BAD_ARGUMENTS
            case _:
                return BAD_PARAMETER
    return RecipientTerms(notify, original) if parameters else PLAIN_RECIPIENT
