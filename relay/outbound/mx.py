"""Owns: the mail exchangers of a domain as a worker knows them: asked of the DNS, judged by ``policy.exchange``, kept for as
long as the records say. It must not connect anywhere, nor be asked while a client waits: ``known`` only remembers.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from relay.config.schema import Config
from relay.mail.answer import Answer, Stage
from relay.net.dns import ABSENT_MOST_S, TTL_MOST_S, UNKNOWN_S, Resolver
from relay.policy.exchange import Exchanger, Own, exchangers, hosts, is_host, is_inside, is_unusable, literal_address
from relay.policy.lookup import Addresses, Found

KNOWN: Final = 5_000
"""Domains remembered: some megabytes. The least recently used goes first."""

Reach: TypeAlias = Literal["anywhere", "public"]
Exchangers: TypeAlias = tuple[Exchanger, ...] | Answer


def own(config: Config) -> Own:
    """What the configuration says leads back to this relay."""
    found = {config.server.hostname.lower(), "localhost", *(name.lower() for name in config.dns.own_hosts)}
    return Own(frozenset(found), frozenset(found))


def is_ours(address: str) -> bool:
    """Whether an address is this machine's: the kernel then picks it as the source, too. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return bool(probe.getsockname()[0] == address)
    except OSError:  # no way there, so it is not here
        return False


class Exchanges:
    """Domain → mail exchangers."""

    def __init__(self, config: Config, resolver: Resolver, clock: Callable[[], float] = time.monotonic) -> None:
        self._resolver = resolver
        self._clock = clock
        self._known: OrderedDict[tuple[str, Reach], tuple[float, Exchangers]] = OrderedDict()
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a (new) configuration."""
        self._own = own(config)
        self._private = config.dns.private
        self._families: tuple[Literal["A", "AAAA"], ...] = tuple(
            "A" if family == "ipv4" else "AAAA" for family in config.dns.families
        )
        self._known.clear()

    def known(self, domain: str, reach: Reach) -> Exchangers | None:
        """What is remembered of a domain in lower case; None: it has to be asked."""
        found = self._known.get((domain, reach))
        if found is None or found[0] <= self._clock():
            return None
        self._known.move_to_end((domain, reach))
        return found[1]

    async def find(self, domain: str, reach: Reach) -> Exchangers:
        """The hosts for a domain in lower case, best first, or what its recipients get. ``reach`` public: none inside. Never
        raises.
        """
        known = self.known(domain, reach)
        if known is None:
            is_closed = is_inside if reach == "public" and not self._private else is_unusable
            known, ttl = await self._ask(domain, is_closed)
            self._known[domain, reach] = (self._clock() + ttl, known)
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return known

    async def _ask(self, domain: str, is_closed: Callable[[str], bool]) -> tuple[Exchangers, float]:
        if not domain:  # postmaster, where no domain is ours
            return Answer(Stage.ROUTE, 550, "5.1.2", "an address without a domain"), TTL_MOST_S
        address = literal_address(domain)
        if address is not None:
            records = Addresses(Found.RECORDS, (address,))
            # A literal is its own host; what is said of it is what is said of an address.
            one = exchangers(domain, [(0, "literal", [records])], self._own, is_ours, is_closed)
            return (one if isinstance(one, Answer) else (Exchanger(0, address, (address,)),)), ABSENT_MOST_S
        said = await self._resolver.exchangers(domain)
        named = hosts(domain, said, self._own)
        if isinstance(named, Answer):
            return named, said.ttl
        asked = await asyncio.gather(*(self._addresses(host, family) for _, host in named for family in self._families))
        width = len(self._families)
        found = [
            (preference, host, asked[at * width : (at + 1) * width]) for at, (preference, host) in enumerate(named)
        ]
        judged = exchangers(domain, found, self._own, is_ours, is_closed)
        ttl = min([said.ttl or TTL_MOST_S, *(one.ttl for one in asked if one.found is not Found.NODATA)])
        if isinstance(judged, Answer) and judged.code < 500:
            ttl = UNKNOWN_S
        return judged, ttl

    async def _addresses(self, host: str, family: Literal["A", "AAAA"]) -> Addresses:
        if not is_host(host):
            return Addresses(Found.NXDOMAIN, ttl=ABSENT_MOST_S)
        return await self._resolver.addresses(host, family)
