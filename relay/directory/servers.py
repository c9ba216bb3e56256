"""Owns: which servers of a profile are asked, in which order: SRV records looked up, those that failed lately last (row D3).

Whoever failed is asked after the others until its rest is over, which doubles with each failure and varies, so that relays do
not come back in step. A server that is resting is still asked when no other one answers. Must not open a connection.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from relay.config.addresses import split_dns_server
from relay.config.ldap import LdapProfile, LdapServer
from relay.config.schema import Config
from relay.directory.failure import LdapFailure, Reason
from relay.net.dns import system_servers
from relay.net.services import NoServices, Service, services

REST_S: Final = 60.0
"""After a first failure."""
REST_MOST_S: Final = 3600.0
VARIES: Final = 0.2
REMEMBERED: Final = 200
"""Servers that failed, at most: SRV records may name others each time."""

_DOMAIN: Final = re.compile(r"(?:.*\._msdcs|.*?\._tcp(?:\..*\._sites)?)\.(?P<domain>.+)", re.IGNORECASE)


class Memory:
    """How servers did. ``failed``: by URL, how often in a row, and until when it rests, seconds since 1970."""

    def __init__(
        self, failed: Mapping[str, Sequence[float]], now: float, dice: Callable[[], float] = random.random
    ) -> None:
        self.failed = {url: (int(said[0]), float(said[1])) for url, said in failed.items() if len(said) == 2}
        self._now = now
        self._dice = dice

    def in_turn(self, servers: Sequence[LdapServer]) -> list[LdapServer]:
        """Those that rest last, otherwise in their own order."""
        return sorted(servers, key=lambda server: self.failed.get(server.url, (0, 0.0))[1] > self._now)

    def note(self, server: LdapServer, failure: LdapFailure | None) -> None:
        """It answered (None), or did not."""
        if failure is None:
            self.failed.pop(server.url, None)
            return
        times = self.failed.pop(server.url, (0, 0.0))[0] + 1
        rest = min(REST_S * 2 ** min(times - 1, 20), REST_MOST_S) * (1 + VARIES * (2 * self._dice() - 1))
        self.failed[server.url] = (times, self._now + rest)
        while len(self.failed) > REMEMBERED:
            del self.failed[next(iter(self.failed))]

    def plain(self) -> dict[str, list[float]]:
        """For JSON."""
        return {url: [float(times), until] for url, (times, until) in self.failed.items()}


def servers_of(config: Config, profile: LdapProfile, last: str = "") -> list[LdapServer]:
    """All servers, SRV records in their place; ``last``: the URL read last, which comes first among these, because what changed
    can only be told by the same one. Raises LdapFailure where the DNS names none.
    """
    found: list[LdapServer] = []
    for server in profile.targets():
        if not server.is_service:
            found.append(server)
            continue
        named = _looked_up(config, profile, server)
        found += sorted(named, key=lambda one: one.url != last)
    return list({server.url: server for server in found}.values())


def _looked_up(config: Config, profile: LdapProfile, server: LdapServer) -> list[LdapServer]:
    resolvers = tuple(map(split_dns_server, config.dns.servers)) or system_servers()
    try:
        records = services(server.host, resolvers, profile.connect_timeout_s)
    except NoServices as fault:
        raise LdapFailure(Reason.DNS, f"{server.host}: {fault}", server.url) from None
    named = _DOMAIN.fullmatch(server.host)
    domain = named["domain"].lower() if named else ""
    ours = [one for one in records if one.host == domain or one.host.endswith(f".{domain}")]
    if not ours:  # the DNS is not authenticated: it may not send the password to any host with a good certificate
        hosts = ", ".join(sorted({one.host for one in records})[:5])
        raise LdapFailure(Reason.DNS, f"{server.host} names {hosts}, none of them in {domain}", server.url)
    return [_server(server, one) for one in shuffled(ours)]


def shuffled(records: Sequence[Service], dice: Callable[[], float] = random.random) -> list[Service]:
    """By priority, and among equals by weight (RFC 2782)."""
    left = sorted(records, key=lambda one: (one.priority, one.weight, one.host))
    turn: list[Service] = []
    while left:
        equals = [one for one in left if one.priority == left[0].priority]
        point = dice() * sum(one.weight for one in equals)
        for chosen in equals:
            point -= chosen.weight
            if point < 0 or chosen is equals[-1]:
                break
        turn.append(chosen)
        left.remove(chosen)
    return turn


def _server(asked: LdapServer, one: Service) -> LdapServer:
    """Active Directory registers its ports in clear alone: with ldaps:// the ones beside them are meant."""
    port = one.port
    if asked.ldaps:
        port = {389: asked.port, 3268: 3269}.get(port, port)
    scheme = "ldaps" if asked.ldaps else "ldap"
    return LdapServer(f"{scheme}://{one.host}:{port}", one.host, port, asked.ldaps)
