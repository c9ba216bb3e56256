"""Owns: the syntax of SMTP paths (RFC 5321 §4.1.2) and what a mailbox is.

Pure. A value of type ``Mailbox`` has been through this module and nothing else makes one, so later code
may put it into a reply, a log line, a header or a command without looking at it again.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, NewType

Mailbox = NewType("Mailbox", str)
"""``local@domain`` exactly as the client wrote it, printable ASCII, at most 320 octets; or ``postmaster``
alone (RFC 5321 §4.5.1). Never the null sender: that is the empty string, ``NULL_SENDER``."""

NULL_SENDER: Final = Mailbox("")

LOCAL_PART_OCTETS: Final = 64  # RFC 5321 §4.5.3.1.1
DOMAIN_OCTETS: Final = 255  # RFC 5321 §4.5.3.1.2

_ATEXT: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
DOMAIN_PATTERN: Final = rf"{_LABEL}(?:\.{_LABEL})*"
# The mailbox nearly all mail is for: dot-atom without the relaying characters % and !, plain domain.
PLAIN_MAILBOX: Final = (
    r"[A-Za-z0-9#$&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9#$&'*+/=?^_`{|}~-]+)*@" + DOMAIN_PATTERN
)

_DOMAIN: Final = re.compile(DOMAIN_PATTERN)
_DOT_ATOM: Final = re.compile(rf"{_ATEXT}+(?:\.{_ATEXT}+)*")
_QUOTED: Final = re.compile(r'"(?:[ !#-\[\]-~]|\\[ -~])*"')
_LITERAL: Final = re.compile(r"\[(?:[0-9.]{7,15}|IPv6:[0-9A-Fa-f:.]{2,45})\]")


class AddressFault(Enum):
    """Why a path is not taken; the session maps each to one named reply."""

    SYNTAX = "syntax"
    TOO_LONG = "too long"
    NON_ASCII = "not ASCII"
    SOURCE_ROUTE = "source route"


def is_domain(text: str) -> bool:
    """True for a host or domain name in letters, digits, hyphens (underscore tolerated), ≤ 255 octets."""
    return len(text) <= DOMAIN_OCTETS and _DOMAIN.fullmatch(text) is not None


def domain_of(mailbox: str) -> str:
    """The domain, lower case; empty for the null sender and for ``postmaster`` alone."""
    return mailbox.rpartition("@")[2].lower() if "@" in mailbox else ""


def parse_mailbox(text: str) -> Mailbox | AddressFault:
    """A mailbox without angle brackets; every form RFC 5321 §4.1.2 allows, faults named."""
    if not text.isascii() or not text.isprintable():
        return AddressFault.NON_ASCII if not text.isascii() else AddressFault.SYNTAX
    local, at, domain = text.rpartition("@")
    if not at:
        return Mailbox(text) if text.lower() == "postmaster" else AddressFault.SYNTAX
    if len(local) > LOCAL_PART_OCTETS or len(domain) > DOMAIN_OCTETS:
        return AddressFault.TOO_LONG
    quoted = _QUOTED.fullmatch(local) is not None
    if not quoted and _DOT_ATOM.fullmatch(local) is None:
        return AddressFault.SYNTAX
    if _LITERAL.fullmatch(domain) is None and _DOMAIN.fullmatch(domain) is None:
        return AddressFault.SYNTAX
    return Mailbox(text)


def is_relay_form(mailbox: Mailbox) -> bool:
    """True for the forms that relays of old resolved: ``a%b@c``, ``a!b@c``, ``"a@b"@c`` (RFC 5321 App. C, RFC 2505).

    As senders they are ordinary (VERP); whether such a recipient is refused is policy's business.
    """
    local = mailbox.rpartition("@")[0]
    return "%" in local or "!" in local or "@" in local


def parse_path(raw: bytes) -> tuple[Mailbox | AddressFault, str]:
    """``<path>`` and what stands behind it (the ESMTP parameters, without the leading space).

    ``<>`` gives ``NULL_SENDER``. Source routes (``<@a,@b:c@d>``) are named and refused: RFC 5321 §4.1.1.3
    lets a server decline them.
    """
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        return AddressFault.NON_ASCII, ""
    if not text.startswith("<"):
        return AddressFault.SYNTAX, ""
    end = _closing_bracket(text)
    if end < 0:
        return AddressFault.SYNTAX, ""
    path, rest = text[1:end], text[end + 1 :]
    if rest and not rest.startswith(" "):
        return AddressFault.SYNTAX, ""
    parameters = rest.strip(" ")
    if not path:
        return NULL_SENDER, parameters
    if path.startswith("@"):
        return AddressFault.SOURCE_ROUTE, parameters
    return parse_mailbox(path), parameters


def _closing_bracket(text: str) -> int:
    """Index of the ``>`` that ends the path: the first one outside a quoted string; -1 when there is none."""
    quoted = False
    position = 1
    while position < len(text):
        character = text[position]
        if quoted and character == "\\":
            position += 1
        elif character == '"':
            quoted = not quoted
        elif character == ">" and not quoted:
            return position
        position += 1
    return -1
