"""Owns: how the right side of a route is written, in ``[[route]]`` and in a transport table alike: ``transport:nexthop``
as in transport(5). Pure: names are checked by their letters, nothing is looked up.

==========================  ==========================================================================
written                     meaning
==========================  ==========================================================================
``smtp:[host]:port``        this host; a name is looked up as this machine does, no mail exchangers
``smtp:domain:port``        the mail exchangers of the domain
``smtp:``                   the mail exchangers of the recipient's domain
``lmtp:[host]:port``        this host by LMTP (RFC 2033); ``lmtp:host`` means the same
``error:5.1.2 text``        refused for good
``retry:4.4.1 text``        kept in the queue
``discard:text``            taken and thrown away
``:nexthop``                ``smtp:nexthop``
``:``                       as if the line were not there
==========================  ==========================================================================
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from relay.config.invalid import Invalid
from relay.mail.address import is_domain

TEXT_OCTETS: Final = 200  # of a refusal's text: the whole reply line has 512 (RFC 5321 §4.5.3.1.5)
HOSTS: Final = 16
"""Next hops of one route: more are a slip, and each may cost a connect time-out before the next is tried."""
SMTP_PORT: Final = 25
LMTP_PORT: Final = 24

_SERVICES: Final = {"smtp": 25, "lmtp": 24, "submission": 587}
_SMTP: Final = frozenset({"", "smtp", "relay"})  # relay: a second SMTP client of Postfix's master.cf
_MAILBOXES: Final = frozenset({"local", "virtual", "maildrop", "dovecot", "cyrus"})
_HINT: Final = "write smtp:[exchange.example.com]:25"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]*")
_BRACKETS: Final = re.compile(r"\[(?P<host>[^\[\]]*)\](?::(?P<port>[^:]*))?")
_BARE: Final = re.compile(r"(?P<host>[^:\[\]]+)(?::(?P<port>[^:]*))?")
_STATUS: Final = re.compile(r"(?P<status>\d\.\d{1,3}\.\d{1,3})(?:\s+|$)")
_LITERAL: Final = re.compile(r"ipv6:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Host:
    """One host. ``protocol`` is smtp or lmtp."""

    protocol: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Exchangers:
    """The mail exchangers of ``domain``; "" means the recipient's."""

    domain: str
    port: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Refused for good: ``error:``."""

    status: str
    text: str


@dataclass(frozen=True, slots=True)
class Delay:
    """Kept in the queue: ``retry:``."""

    status: str
    text: str


@dataclass(frozen=True, slots=True)
class Loss:
    """Taken and thrown away: ``discard:``."""

    text: str


Destination: TypeAlias = Host | Exchangers
Target: TypeAlias = tuple[Destination, ...] | Refusal | Delay | Loss


def parse_target(text: str) -> Target | None:
    """What ``transport:nexthop`` means; None for ``:``. Raises Invalid."""
    text = text.strip()
    transport, colon, nexthop = text.partition(":")
    nexthop = nexthop.strip()
    if not colon or _NAME.fullmatch(transport) is None or _is_address(text) or _is_address(transport):
        raise _no_transport(text)
    transport = transport.lower()
    match transport:
        case "" if not nexthop:
            return None
        case "error":
            return Refusal(*_reason(nexthop, "5", "mail to this address is not accepted"))
        case "retry":
            return Delay(*_reason(nexthop, "4", "mail to this address waits"))
        case "discard":
            return Loss(_text(nexthop) or "discarded")
        case "lmtp":
            return _list(nexthop, _lmtp) if nexthop else _lmtp("")
        case _ if transport in _SMTP:
            return _list(nexthop, _smtp) if nexthop else (Exchangers("", SMTP_PORT),)
        case _ if transport in _MAILBOXES:
            raise Invalid(f'"{transport}" delivers into mailboxes, the relay has none', _HINT)
        case _:
            raise _no_transport(text)


def parse_next_hop(text: str) -> Target:
    """One entry of ``route.next_hops``: as above, but ``:`` means nothing there. Raises Invalid."""
    target = parse_target(text)
    if target is None:
        raise Invalid('":" leaves a route as it is, and there is none', _HINT)
    return target


def _no_transport(text: str) -> Invalid:
    """Not ``transport:nexthop``; most often the transport was forgotten."""
    if _is_address(text):
        return Invalid(f'"{text}" is a bare IP address', f"write smtp:[{text}]")
    host, _, port = text.partition(":")
    if _is_address(host) and (not port or port.isdigit()):
        return Invalid(f'"{text}" is a bare IP address', f"write smtp:[{host}]{':' + port if port else ''}")
    if "." in host and is_domain(host):
        behind = f":{port}" if port else ""
        return Invalid(
            f'"{text}" names no transport', f"write smtp:[{host}]{behind} for this host, smtp:{host}{behind} for its MX"
        )
    if text.startswith("["):
        return Invalid(f'"{text}" names no transport', f"write smtp:{text}")
    if ":" in text and _NAME.fullmatch(host):
        what = f'there is no transport "{host}"'
        return Invalid(what, "write smtp:, lmtp:, error:, discard: or retry:, e.g. smtp:[exchange.example.com]:25")
    return Invalid(f'"{text}" is not a next hop', _HINT)


def _list(nexthop: str, parse: Callable[[str], tuple[Destination, ...]]) -> tuple[Destination, ...]:
    found = tuple(destination for one in re.split(r"[\s,]+", nexthop) if one for destination in parse(one))
    if not found:
        raise Invalid(f'"{nexthop}" names no host', _HINT)
    if len(found) > HOSTS:
        raise Invalid(f"these are {len(found)} next hops", f"leave at most {HOSTS}")
    return found


def _smtp(text: str) -> tuple[Destination, ...]:
    if text.lower().startswith("smtp:"):
        raise Invalid(f'"{text}" names the transport again', f"write it once, then the hosts: smtp:[first], {text[5:]}")
    found = _BRACKETS.fullmatch(text)
    if found is not None:
        return (Host("smtp", _host(found["host"]), _port(found["port"], SMTP_PORT)),)
    if _is_address(text):
        raise Invalid(f'"{text}" is a bare IP address', f"write smtp:[{text}]")
    found = _BARE.fullmatch(text)
    if found is None:
        raise Invalid(f'"{text}" is not a next hop', _HINT)
    host, port = found["host"], found["port"]
    if _is_address(host):
        raise Invalid(f'"{text}" is a bare IP address', f"write smtp:[{host}]{':' + port if port else ''}")
    return (Exchangers(_name(host).lower(), _port(port, SMTP_PORT)),)


def _lmtp(text: str) -> tuple[Destination, ...]:
    hint = "write lmtp:[dovecot.example.com]:24"
    if text.startswith("unix:"):
        raise Invalid("LMTP over a socket file is not there", f"let the server listen on a port and {hint}")
    inner = text.removeprefix("inet:")
    found = _BRACKETS.fullmatch(inner) or _BARE.fullmatch(inner)
    if found is None:
        if _is_address(inner):
            raise Invalid(f'"{inner}" is a bare IP address', f"write lmtp:[{inner}]")
        raise Invalid("lmtp: needs a host" if not inner else f'"{inner}" is not a next hop', hint)
    return (Host("lmtp", _host(found["host"]), _port(found["port"], LMTP_PORT)),)


def _host(host: str) -> str:
    """A host in brackets: a name, or an address as Postfix writes it, ``ipv6:`` in front or not."""
    literal = _LITERAL.match(host)
    address = host[literal.end() :] if literal else host
    if _is_address(address):
        return str(ipaddress.ip_address(address))
    return _name(host)


def _name(host: str) -> str:
    # Digits and dots alone are a mistyped address; as a name it would be asked of the DNS for ever.
    if not is_domain(host) or not re.search(r"[A-Za-z]", host):
        raise Invalid(f'"{host}" is neither a host name nor an IP address', _HINT)
    return host


def _port(text: str | None, usual: int) -> int:
    if text is None:
        return usual
    port = _SERVICES.get(text.lower())
    if port is None:
        if not (text.isascii() and text.isdigit() and len(text) <= 5):
            raise Invalid(f'"{text}" is not a port', "write its number, e.g. :25")
        port = int(text)
    if not 1 <= port <= 65535:
        raise Invalid(f"there is no port {port}", "write a port from 1 to 65535")
    return port


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _reason(nexthop: str, status_class: str, usual: str) -> tuple[str, str]:
    """Enhanced code and text of ``error:`` and ``retry:``."""
    found = _STATUS.match(nexthop)
    text = _text(nexthop[found.end() :] if found else nexthop) or usual
    if found is None:
        return f"{status_class}.0.0", text
    if found["status"][0] != status_class:
        other = "retry:" if status_class == "5" else "error:"
        raise Invalid(
            f'"{found["status"]}" does not fit', f"write {status_class}{found['status'][1:]}, or {other} instead"
        )
    return found["status"], text


def _text(text: str) -> str:
    text = " ".join(text.split())
    if not (text.isascii() and text.isprintable()) or len(text) > TEXT_OCTETS:
        raise Invalid("this text cannot stand in an SMTP reply", f"write at most {TEXT_OCTETS} plain ASCII characters")
    return text


def show(destination: Destination) -> str:
    """As one would write it."""
    match destination:
        case Host(protocol, host, port):
            usual = LMTP_PORT if protocol == "lmtp" else SMTP_PORT
            return f"{protocol}:[{host}]{'' if port == usual else f':{port}'}"
        case Exchangers(domain, port):
            return f"smtp:{domain}{'' if port == SMTP_PORT else f':{port}'}"
