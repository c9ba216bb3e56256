"""Owns: WHO a client is: trusted to relay or not. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ClientRules:
    """A list of networks, such as ``trusted.networks``. IPv4-mapped IPv6 addresses count as the IPv4 address they carry."""

    __slots__ = ("_networks",)

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(text) for text in networks)

    def trusted(self, address: str) -> bool:
        """True when the address lies in a trusted network; ValueError for what is no IP address."""
        if not self._networks:
            return False
        ip = ipaddress.ip_address(address)
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in self._networks if network.version == ip.version)
