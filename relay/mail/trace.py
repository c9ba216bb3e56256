"""Owns: the trace header the relay puts in front of each message (RFC 5321 §4.4) and the date in it.

Pure, and on the hot path: what does not change within a session is put together once (``origin``), the date once a
second (``date``), so that a message costs one string. A client's words enter only through ``origin``, cleaned there.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Final, NewType

from relay.mail.address import Mailbox, is_address_literal, is_domain
from relay.mail.domain import DOMAIN_OCTETS
from relay.mail.envelope import QueueId

Origin = NewType("Origin", str)
"""``from HELO (name [address])``: the part of Received that says where the message came from, clean."""

HELO_OCTETS: Final = DOMAIN_OCTETS

# Outside these a HELO argument could open a comment, a quoted string or a new line inside the header.
_UNSAFE_IN_LOGIN: Final = re.compile(r"[^A-Za-z0-9._@+-]")
_UNSAFE_IN_HELO: Final = re.compile(r"[^A-Za-z0-9._-]")


def helo_text(helo: str) -> str:
    """The HELO argument as it may stand in a header or log: a domain or literal unchanged, else cleaned with ``?``."""
    if is_domain(helo) or is_address_literal(helo):
        return helo
    return _UNSAFE_IN_HELO.sub("?", helo[:HELO_OCTETS]) or "unknown"


def literal(address: str) -> str:
    """An IP address as address literal (RFC 5321 §4.1.3): ``[192.0.2.1]``, ``[IPv6:2001:db8::1]``."""
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def origin(helo: str, name: str, address: str) -> Origin:
    """Where a session comes from, once per EHLO.

    ``helo``: the client's own words. ``name``: the verified host name of the client, "" when there is none.
    ``address``: its IP address as the socket gives it (an IPv6 scope is dropped).
    """
    known = name if is_domain(name) else "unknown"
    return Origin(f"from {helo_text(helo)} ({known} {literal(address.partition('%')[0])})")


def logged_in_as(origin: Origin, login: str) -> Origin:
    """``origin`` with the account that logged in, as Postfix shows it; for those who want it to be seen."""
    return Origin(f"{origin}\r\n\t(Authenticated sender: {_UNSAFE_IN_LOGIN.sub('?', login[:HELO_OCTETS])})")


def received(
    origin: Origin, hostname: str, protocol: str, queue_id: QueueId, recipient: Mailbox | None, date: str
) -> bytes:
    """The Received header in wire form, final CR LF included.

    ``protocol``: SMTP, ESMTP, ESMTPS, ESMTPA or ESMTPSA (RFC 3848), or with UTF8 (``utf8_protocol``). ``recipient``: the only recipient, None when there
    are several (naming them would tell each about the others: RFC 5321 §7.2). ``date``: from ``date``.
    """
    if recipient is None:
        return f"Received: {origin}\r\n\tby {hostname} with {protocol} id {queue_id};\r\n\t{date}\r\n".encode("ascii")
    return (
        f"Received: {origin}\r\n\tby {hostname} with {protocol} id {queue_id}\r\n\tfor <{recipient}>; {date}\r\n"
    ).encode()


def utf8_protocol(protocol: str) -> str:
    """What ``with`` says of a message that came with SMTPUTF8 (RFC 6531 §4.3): UTF8SMTP, UTF8SMTPS, …"""
    return f"UTF8{protocol.removeprefix('E')}"


def date(now: float, offset: int = 0) -> str:
    """``now`` (seconds since 1970, UTC) as RFC 5322 §3.3 date-time, ``offset`` seconds east of UTC. Cache it per second."""
    zone = timezone(timedelta(seconds=offset)) if offset else UTC
    return format_datetime(datetime.fromtimestamp(int(now), zone))
