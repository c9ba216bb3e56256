"""Owns: connections that come through a balancer: the PROXY header, version 1 or 2, that names the real client.

Stands in front of the session until the header is read; then the session begins as if the client itself had connected, be it
in the clear or by TLS. Only balancers of ``listener.proxy_protocol`` are believed, and they must say who the client is: a
connection without a header, with a malformed one, or from elsewhere is closed without a word (a word would be answered to the
wrong one, and who guesses the address of a client could relay in its name).

The format: haproxy.org/download/2.9/doc/proxy-protocol.txt, §2.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, cast

if TYPE_CHECKING:
    from relay.inbound.listener import Listener
    from relay.inbound.wire import Wire

HEADER_S: Final = 10.0
"""Wait for the header, seconds: a balancer sends it with its first packet."""
V1_OCTETS: Final = 107
"""Longest header of version 1, CR LF included (§2.1)."""
V2_OCTETS: Final = 4096
"""Longest header of version 2 that is read: addresses and what a balancer may add about TLS."""

_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V1: Final = re.compile(
    rb"PROXY (?:UNKNOWN(?: [ -~]*)?|TCP([46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (\d{1,5}) (\d{1,5}))\r\n"
)
_ADDRESSES: Final = {1: 4, 2: 16}  # octets of an address of AF_INET and AF_INET6


class Malformed(Exception):
    """No header that could be believed; the text says why."""


class Header(NamedTuple):
    """``client``: who connected to the balancer, "" when it speaks for itself (health checks). ``size``: octets read."""

    client: str
    size: int


def parse(octets: bytes) -> Header | None:
    """The header at the beginning, or None when more is needed. Raises Malformed."""
    if octets[:12] == _V2[: len(octets)]:
        return _version_2(octets)
    end = octets.find(b"\r\n", 0, V1_OCTETS)
    if end < 0:
        if b"PROXY "[: len(octets)] == octets[:6] and len(octets) < V1_OCTETS:
            return None
        raise Malformed("no PROXY header")
    found = _V1.fullmatch(octets, 0, end + 2)
    if found is None:
        raise Malformed("malformed PROXY header")
    if found[1] is None:
        return Header("", end + 2)
    try:
        client = ipaddress.ip_address(found[2].decode("ascii"))
        balancer = ipaddress.ip_address(found[3].decode("ascii"))
    except ValueError:
        raise Malformed("PROXY header with what is no address") from None
    if {client.version, balancer.version} != {int(found[1])} or max(int(found[4]), int(found[5])) > 65535:
        raise Malformed("PROXY header that contradicts itself")
    return Header(str(client), end + 2)


def _version_2(octets: bytes) -> Header | None:
    if len(octets) < 16:
        return None
    command, family = octets[12], octets[13] >> 4
    size = 16 + int.from_bytes(octets[14:16], "big")
    if command not in (0x20, 0x21) or size > V2_OCTETS:
        raise Malformed("PROXY header of an unknown kind")
    if len(octets) < size:
        return None
    if command == 0x20 or octets[13] == 0:  # LOCAL, or a client of no known kind (§2.2)
        return Header("", size)
    width = _ADDRESSES.get(family)
    if width is None or octets[13] & 0x0F != 1:  # 1: a stream
        raise Malformed("PROXY header of a client that does not come by TCP")
    if size < 16 + 2 * width + 4:
        raise Malformed("PROXY header without its addresses")
    return Header(str(ipaddress.ip_address(octets[16 : 16 + width])), size)


class Proxied(asyncio.Protocol):
    """One connection until its header is read."""

    def __init__(self, listener: Listener, session: Callable[[], Wire]) -> None:
        self._listener = listener
        self._session = session
        self._octets = b""
        self._peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if peer else ""
        self._timer = asyncio.get_running_loop().call_later(HEADER_S, self._refuse, "no PROXY header in time")
        balancers = self._listener.balancers
        if balancers is None or not self._peer or not balancers.trusted(self._peer):
            self._refuse("not one of listener.proxy_protocol")

    def data_received(self, data: bytes) -> None:
        """Some of the header, or all of it and the client's first words."""
        if self._transport.is_closing():
            return
        self._octets += data
        try:
            header = parse(self._octets)
        except Malformed as fault:
            self._refuse(str(fault))
            return
        if header is None:
            return
        self._timer.cancel()
        session = self._session()
        session.came_from = header.client
        self._transport.set_protocol(session)
        session.connection_made(self._transport)
        if len(self._octets) > header.size:
            session.data_received(self._octets[header.size :])

    def connection_lost(self, error: Exception | None) -> None:
        """It went before it said who it is."""
        self._timer.cancel()

    def _refuse(self, why: str) -> None:
        self._timer.cancel()
        if not self._transport.is_closing():
            self._listener.log.note(
                "warning", "proxy_refused", listener=self._listener.name, peer=self._peer, cause=why
            )
        self._transport.abort()
