"""Owns: which hosts a domain's mail goes to, from what the DNS said (RFC 5321 §5.1, RFC 7505). Pure.

==============================================  ==============================================================
the DNS                                         then
==============================================  ==============================================================
MX records                                      their hosts by preference, equal ones in any order
no MX record                                    the domain itself (implicit MX)
a single MX to the root (null MX)               556 5.1.10
no such domain                                  550 5.1.2
neither MX nor address                          550 5.1.2
MX records, no host with an address             550 5.4.4
only loopback or otherwise unusable addresses   550 5.4.4
only addresses inside, for strangers' domains   550 5.4.4
this relay among the hosts                      it and all of its or a worse preference are left out
nothing better than this relay                  554 5.4.6
no usable answer                                451 4.4.3
==============================================  ==============================================================
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from relay.mail.address import is_domain
from relay.mail.answer import Answer, Stage
from relay.policy.lookup import Addresses, Found, MailExchangers

HOSTS: Final = 5
"""Hosts of one domain that are looked at, best first: more only take more time to fail."""
PER_FAMILY: Final = 3
"""Addresses of one host and family that are tried."""


@dataclass(frozen=True, slots=True)
class Exchanger:
    """One host, with the addresses to connect to, in order."""

    preference: int
    host: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Own:
    """What leads to this relay itself: names in lower case, and addresses besides those of the machine."""

    names: frozenset[str]
    addresses: frozenset[str]


def literal_address(domain: str) -> str | None:
    """The address of a domain literal, ``[192.0.2.1]`` or ``[IPv6:2001:db8::1]``; None for a name."""
    if not domain.startswith("["):
        return None
    return str(ipaddress.ip_address(domain[1:-1].lower().removeprefix("ipv6:")))


def hosts(domain: str, said: MailExchangers, own: Own) -> tuple[tuple[int, str], ...] | Answer:
    """The hosts to ask the addresses of, best first; or what the recipients get without."""
    if said.found is Found.UNKNOWN:
        return _unknown(f"MX of {domain}", said.why)
    if said.found is Found.NXDOMAIN:
        return Answer(Stage.ROUTE, 550, "5.1.2", f"domain {domain} does not exist")
    records = said.records if said.found is Found.RECORDS else ((0, domain),)
    if all(not host for _, host in records):  # RFC 7505 §3
        return Answer(Stage.ROUTE, 556, "5.1.10", f"domain {domain} does not accept mail (null MX)")
    named = sorted((preference, host) for preference, host in records if host)
    limit = min((preference for preference, host in named if host in own.names), default=None)
    better = [one for one in named if limit is None or one[0] < limit]
    return tuple(better[:HOSTS]) if better else _ourselves(domain)


def exchangers(
    domain: str, found: Sequence[tuple[int, str, Sequence[Addresses]]], own: Own, is_ours: Callable[[str], bool],
    is_closed: Callable[[str], bool],
) -> tuple[Exchanger, ...] | Answer:  # fmt: skip
    """The hosts with their addresses, best first. ``found``: preference, host and what each family's look-up brought, in
    the order of ``hosts``; ``is_ours`` tells addresses of this machine, ``is_closed`` those where mail must not go.
    """
    usable: list[Exchanger] = []
    doubt = ""
    unusable = False
    limit: int | None = None
    for preference, host, families in found:
        addresses = [*chain.from_iterable(family.records[:PER_FAMILY] for family in families)] if is_host(host) else []
        doubt = doubt or next((family.why for family in families if family.found is Found.UNKNOWN), "")
        reachable = [address for address in addresses if not is_closed(address)]
        unusable = unusable or len(reachable) < len(addresses)
        if any(address in own.addresses or is_ours(address) for address in reachable):
            limit = preference if limit is None else min(limit, preference)
        elif reachable:
            usable.append(Exchanger(preference, host, tuple(reachable)))
    better = tuple(one for one in usable if limit is None or one.preference < limit)
    if better:
        return better
    if doubt:
        return _unknown(f"address of {domain}'s mail exchangers", doubt)
    if limit is not None:
        return _ourselves(domain)
    if unusable:
        return Answer(Stage.ROUTE, 550, "5.4.4", f"the mail exchangers of {domain} have no address that can be reached")
    if len(found) == 1 and found[0][1] == domain:
        return Answer(Stage.ROUTE, 550, "5.1.2", f"domain {domain} has neither mail exchanger nor address")
    return Answer(Stage.ROUTE, 550, "5.4.4", f"no mail exchanger of {domain} has an address")


def in_turn(found: Sequence[Exchanger], dice: Sequence[float]) -> list[Exchanger]:
    """The order for one message: equal preferences at random (RFC 5321 §5.1). ``dice``: one number for each."""
    return [one for _, _, one in sorted(zip((e.preference for e in found), dice, found, strict=True), key=_first_two)]


def _first_two(one: tuple[int, float, Exchanger]) -> tuple[int, float]:
    return one[0], one[1]


def is_unusable(text: str) -> bool:
    """True for what no other host on the Internet can have: loopback, unspecified, multicast, link-local."""
    address = ipaddress.ip_address(text)
    inner = getattr(address, "ipv4_mapped", None) or address
    return bool(
        inner.is_loopback or inner.is_unspecified or inner.is_multicast or inner.is_link_local or inner.is_reserved
    )


# RFC 1918, RFC 6598 (carriers' NAT), RFC 4193.
_PRIVATE: Final = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)


def is_inside(text: str) -> bool:
    """The same, and private networks: where a domain that a stranger chose must not lead the relay."""
    address = ipaddress.ip_address(text)
    inner = getattr(address, "ipv4_mapped", None) or address
    return is_unusable(text) or any(inner in network for network in _PRIVATE if network.version == inner.version)


def is_host(name: str) -> bool:
    """No top-level domain is a number: an address written as a name is a common mistake, and nothing to ask for."""
    return is_domain(name) and not name.rpartition(".")[2].isdigit()


def _unknown(what: str, why: str) -> Answer:
    return Answer(Stage.ROUTE, 451, "4.4.3", f"{what} cannot be looked up now: {why}"[:200])


def _ourselves(domain: str) -> Answer:
    return Answer(Stage.ROUTE, 554, "5.4.6", f"mail for {domain} loops back to this relay")
