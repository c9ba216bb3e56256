"""Owns: asking the DNS which hosts offer a service (SRV, RFC 2782), blocking: for processes without an event loop.

One question, nothing kept. Must not judge what comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import dns.exception
import dns.rdtypes.IN.SRV  # now: no process imports after it has dropped its rights
import dns.resolver

RECORDS: Final = 200
"""Records taken from one answer."""


class Service(NamedTuple):
    """One record; ``host`` in lower case, without the final dot."""

    priority: int
    weight: int
    host: str
    port: int


class NoServices(Exception):
    """There is no usable answer; the text says why."""


def services(name: str, servers: Sequence[tuple[str, int]], timeout_s: float) -> list[Service]:
    """The records of ``name``, as they come. ``timeout_s`` for all servers and tries together. Raises NoServices."""
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = [host for host, _ in servers]
    resolver.nameserver_ports = dict(servers)
    try:
        answer = resolver.resolve(name, "SRV", search=False, lifetime=timeout_s)
    except dns.resolver.NXDOMAIN:
        raise NoServices("there is no such name") from None
    except dns.resolver.NoAnswer:
        raise NoServices("it has no SRV records") from None
    except (dns.exception.DNSException, OSError, ValueError) as error:
        raise NoServices(f"no usable answer: {error}") from None
    found = [
        Service(record.priority, record.weight, record.target.to_text(omit_final_dot=True).lower(), record.port)
        for record in list(answer)[:RECORDS]
    ]
    if not any(one.host not in {"", "."} for one in found):  # RFC 2782: the service is decidedly not there
        raise NoServices("it says that the service is not there")
    return [one for one in found if one.host not in {"", "."}]
