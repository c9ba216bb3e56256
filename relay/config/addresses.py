"""Owns: how addresses are written in the configuration. Pure: nothing is looked up."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from relay.config.invalid import Invalid
from relay.mail.address import is_domain

_ADDRESS: Final = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\]|(?P<four>[0-9.]+)):(?P<port>[0-9]{1,5})")
_ADDRESS_HINT: Final = "write ADDRESS:PORT with numbers, e.g. 0.0.0.0:25 or [::]:25"


def split_address(text: str) -> tuple[str, int]:
    """``192.0.2.1:25`` or ``[2001:db8::1]:25`` as (address, port); raises Invalid."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise Invalid(f'"{text}" is not an address with a port', _ADDRESS_HINT)
    address = found["six"] or found["four"]
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise Invalid(f'"{address}" is not an IP address', _ADDRESS_HINT) from None
    return address, _port(found["port"])


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise Invalid(f"there is no port {port}", "write a port from 1 to 65535")
    return port


def split_dns_server(text: str) -> tuple[str, int]:
    """``192.0.2.53``, ``192.0.2.53:5353``, ``2001:db8::53`` or ``[2001:db8::53]:53`` as (address, port); raises Invalid."""
    try:
        return str(ipaddress.ip_address(text)), 53
    except ValueError:
        pass
    try:
        return split_address(text)
    except Invalid:
        raise Invalid(f'"{text}" is not the address of a DNS server', "write 192.0.2.53 or 192.0.2.53:53") from None


def own_host(value: str) -> str:
    """A host name or address that leads to this relay, as it is compared; raises Invalid."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        if not is_domain(value):
            raise Invalid(
                f'"{value}" is neither a host name nor an IP address', "write mx.example.com or 192.0.2.1"
            ) from None
    return value.lower()
