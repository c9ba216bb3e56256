"""Owns: the syntax of SMTP paths (RFC 5321 §4.1.2, with UTF-8: RFC 6531 §3.3) and what a mailbox is.

Pure. A value of type ``Mailbox`` has been through this module and nothing else makes one, so later code
may put it into a reply, a log line, a header or a command without looking at it again.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable
from enum import Enum
from typing import Final, NewType

from relay.mail.domain import DOMAIN_OCTETS, ascii_domain

Mailbox = NewType("Mailbox", str)
"""``local@domain`` exactly as the client wrote it, printable, at most 320 octets; or ``postmaster`` alone (RFC 5321
§4.5.1). ASCII, unless the client announced UTF-8 (SMTPUTF8). Never the null sender: that is the empty string,
``NULL_SENDER``."""

NULL_SENDER: Final = Mailbox("")

LOCAL_PART_OCTETS: Final = 64  # RFC 5321 §4.5.3.1.1

_ATEXT: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"  # RFC 1035 §2.3.4: 63 octets
DOMAIN_PATTERN: Final = rf"{_LABEL}(?:\.{_LABEL})*"
_PLAIN_ATEXT: Final = r"[A-Za-z0-9#$&'*+/=?^_`{|}~-]"
# The mailbox nearly all mail is for: dot-atom without the relaying characters % and !, plain domain, both of lawful
# length. What it matches, parse_mailbox takes unchanged and is_relay_form denies.
PLAIN_MAILBOX: Final = (
    rf"(?=[^@>]{{1,{LOCAL_PART_OCTETS}}}@[^@>]{{1,{DOMAIN_OCTETS}}}(?![^>]))"
    rf"{_PLAIN_ATEXT}+(?:\.{_PLAIN_ATEXT}+)*@{DOMAIN_PATTERN}"
)

_DOMAIN: Final = re.compile(DOMAIN_PATTERN)
_DOT_ATOM: Final = re.compile(rf"{_ATEXT}+(?:\.{_ATEXT}+)*")
_QUOTED: Final = re.compile(r'"(?:[ !#-\[\]-~]|\\[ -~])*"')
_UTF8_ATEXT: Final = r"[\u0080-\U0010ffff" + _ATEXT[1:]
_UTF8_DOT_ATOM: Final = re.compile(rf"{_UTF8_ATEXT}+(?:\.{_UTF8_ATEXT}+)*")
_UTF8_QUOTED: Final = re.compile(r'"(?:[ !#-\[\]-~\u0080-\U0010ffff]|\\[ -~])*"')
# Grammar allows everything beyond ASCII. What is invisible, a line end to somebody, or turns the direction of writing would
# make a log line or a report say something else than it does. U+200C and U+200D belong to the spelling of some languages.
UNFIT: Final = re.compile(
    r"[\x00-\x1f\x7f-\xa0\u1680\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f\u3000\ud800-\udfff\ufeff\ufff0-\uffff]"
)
_QUOTED_PAIR: Final = re.compile(r"\\(.)")
_LITERAL: Final = re.compile(r"\[(?:(?P<four>[0-9.]{7,15})|IPv6:(?P<six>[0-9A-F:.]{2,45}))\]", re.IGNORECASE)


class AddressFault(Enum):
    """Why a path is not taken; the session maps each to one named reply."""

    SYNTAX = "syntax"
    TOO_LONG = "too long"
    NON_ASCII = "not ASCII"
    SOURCE_ROUTE = "source route"


def is_domain(text: str) -> bool:
    """True for a host or domain name in letters, digits, hyphens (underscore tolerated), ≤ 255 octets."""
    return len(text) <= DOMAIN_OCTETS and _DOMAIN.fullmatch(text) is not None


def is_address_literal(text: str) -> bool:
    """True for ``[192.0.2.1]`` and ``[IPv6:2001:db8::1]`` (RFC 5321 §4.1.3) with an address that exists."""
    found = _LITERAL.fullmatch(text)
    if found is None:
        return False
    try:
        ipaddress.IPv4Address(found["four"]) if found["four"] else ipaddress.IPv6Address(found["six"])
    except ValueError:
        return False
    return True


def domain_of(mailbox: str) -> str:
    """The domain, in ASCII (A-labels) and lower case; empty for the null sender and for ``postmaster`` alone."""
    if "@" not in mailbox:
        return ""
    domain = mailbox.rpartition("@")[2].lower()
    return domain if domain.isascii() else ascii_domain(domain) or domain


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
    if _DOMAIN.fullmatch(domain) is None and not is_address_literal(domain):
        return AddressFault.SYNTAX
    return Mailbox(text)


def parse_utf8_mailbox(text: str) -> Mailbox | AddressFault:
    """The same where UTF-8 may be in it (RFC 6531 §3.3). It is kept as it was written, composed (NFC) or not."""
    if text.isascii():
        return parse_mailbox(text)
    local, at, domain = text.rpartition("@")
    if not at or UNFIT.search(text):
        return AddressFault.SYNTAX
    if len(local.encode()) > LOCAL_PART_OCTETS or len(domain.encode()) > DOMAIN_OCTETS:
        return AddressFault.TOO_LONG
    if _UTF8_QUOTED.fullmatch(local) is None and _UTF8_DOT_ATOM.fullmatch(local) is None:
        return AddressFault.SYNTAX
    plain = domain if domain.isascii() else ascii_domain(domain)
    if plain is None or (_DOMAIN.fullmatch(plain) is None and not is_address_literal(plain)):
        return AddressFault.SYNTAX
    return Mailbox(text)


def unquoted(mailbox: Mailbox) -> Mailbox:
    """The same mailbox without needless quotes: what a look-up has to ask for, lest ``"a"@b`` pass for another than ``a@b``.

    RFC 5321 §4.1.2: quoting that is not needed does not make another mailbox. Nor does another way of writing UTF-8: the
    local part is composed (NFC), the domain in ASCII.
    """
    if mailbox.startswith('"'):
        local, _, domain = mailbox.rpartition("@")
        bare = _QUOTED_PAIR.sub(r"\1", local[1:-1])
        if (_DOT_ATOM if bare.isascii() else _UTF8_DOT_ATOM).fullmatch(bare):
            mailbox = Mailbox(f"{bare}@{domain}")
    if mailbox.isascii():
        return mailbox
    local = mailbox.rpartition("@")[0]
    return Mailbox(f"{unicodedata.normalize('NFC', local)}@{domain_of(mailbox)}")


def ascii_form(mailbox: Mailbox) -> Mailbox | None:
    """The same mailbox in ASCII: possible when UTF-8 is in its domain only (RFC 6531 §3.2); else None."""
    if mailbox.isascii():
        return mailbox
    local = mailbox.rpartition("@")[0]
    return Mailbox(f"{local}@{domain_of(mailbox)}") if local.isascii() else None


def without_tag(mailbox: str, delimiters: str) -> Mailbox:
    """``user@domain`` of ``user+tag@domain``; empty when there is no tag. A quoted local part has none."""
    local, _, domain = mailbox.rpartition("@")
    if not local.startswith('"'):
        for position, character in enumerate(local):
            if position and character in delimiters:
                return Mailbox(f"{local[:position]}@{domain}")
    return NULL_SENDER


def is_relay_form(mailbox: Mailbox) -> bool:
    """True for the forms that relays of old resolved: ``a%b@c``, ``a!b@c``, ``"a@b"@c`` (RFC 5321 App. C, RFC 2505).

    As senders they are ordinary (VERP); whether such a recipient is refused is policy's business.
    """
    local = mailbox.rpartition("@")[0]
    return "%" in local or "!" in local or "@" in local


def parse_path(raw: bytes) -> tuple[Mailbox | AddressFault, str]:
    """``<path>`` and what stands behind it (the ESMTP parameters, without the leading space).

    ``<>`` gives ``NULL_SENDER``. Source routes (``<@a,@b:c@d>``) are named and refused: RFC 5321 §3.6.1
    lets a server decline them. Control characters are a fault wherever they stand, so what is behind the path is
    printable too.
    """
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        return AddressFault.NON_ASCII, ""
    return _parse(text, parse_mailbox) if text.isprintable() else (AddressFault.SYNTAX, "")


def parse_utf8_path(raw: bytes) -> tuple[Mailbox | AddressFault, str]:
    """The same where UTF-8 may be in path and parameters (RFC 6531 §3.3)."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return AddressFault.NON_ASCII, ""
    return (AddressFault.SYNTAX, "") if UNFIT.search(text) else _parse(text, parse_utf8_mailbox)


def _parse(text: str, parse: Callable[[str], Mailbox | AddressFault]) -> tuple[Mailbox | AddressFault, str]:
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
    return parse(path), parameters


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
