"""Owns: asking the DNS, for the whole process: one resolver, its cache and its bounds. A stub: it asks the configured
resolvers and follows what they answer.

It must not judge answers: it returns ``policy.lookup`` values. Nothing of a question stays behind but the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, cast

import dns.asyncbackend
import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.CNAME
import dns.rdtypes.ANY.MX
import dns.rdtypes.ANY.NS
import dns.rdtypes.ANY.OPT
import dns.rdtypes.ANY.SOA
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA
import dns.resolver

from relay.policy.lookup import CHAIN, Addresses, Found, Lookup, MailExchangers
from relay.telemetry.maillog import note

CACHED: Final = 10_000
"""Answers kept: some megabytes. The least recently used goes first."""
QUESTIONS: Final = 100
"""Questions under way at once; the rest waits its turn."""
TTL_LEAST_S: Final = 5.0
"""A TTL of 0 would ask anew for each of a thousand messages to one domain."""
TTL_MOST_S: Final = 86_400.0
"""RFC 2181 §8 allows 68 years."""
ABSENT_MOST_S: Final = 300.0
"""For "no such name": mail is refused by it, so whoever mends a domain should not wait long (RFC 2308 §5 allows hours)."""
UNKNOWN_S: Final = 2.0
"""How long a failure stands for an answer, so that a backlog for one domain asks once."""
LIFETIME_S: Final = 15.0
"""One question over all servers and tries."""
ROUNDS: Final = 2
SILENT: Final = 5
"""So many questions in a row without any answer from any server, and it is found out whether one is there at all."""
SILENT_S: Final = 5.0
"""When none is, no more is asked for this long."""
PAYLOAD: Final = 1232  # DNS flag day 2020: what passes everywhere unfragmented
RECORDS: Final = 200
"""Records taken from one answer."""

Server = tuple[str, int]

dns.asyncbackend.get_backend("asyncio")  # imported now: no process imports after it has dropped its rights


class _Failed(Exception):
    """No usable answer; the text says what came instead."""


def system_servers(path: Path = Path("/etc/resolv.conf")) -> tuple[Server, ...]:
    """The resolvers of this machine."""
    try:
        found = dns.resolver.Resolver(str(path), configure=True)
    except (dns.exception.DNSException, OSError):
        return (("127.0.0.1", 53),)  # resolv.conf(5): without the file, the name server on this machine
    return tuple((str(server), found.port) for server in found.nameservers)


class Resolver:
    """Asks A, AAAA and MX. Made after the fork, used from one event loop."""

    def __init__(
        self,
        servers: Sequence[Server],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[..., None] = note,
    ) -> None:
        """``tell`` gets level, event and fields of what an operator may want to know."""
        self._note = tell
        self._clock = clock
        self._cache: OrderedDict[tuple[str, str], tuple[float, Lookup]] = OrderedDict()
        self._asking: dict[tuple[str, str], asyncio.Task[Lookup]] = {}
        self._places = asyncio.Semaphore(QUESTIONS)
        self._silent = 0
        self._silent_until = 0.0
        self._down = False
        self._probe: asyncio.Task[bool] | None = None
        self.configure(servers, timeout_s)

    def configure(self, servers: Sequence[Server], timeout_s: float) -> None:
        """Take over a (new) configuration; other servers may know other answers."""
        self.servers = tuple(servers)
        self._timeout_s = timeout_s
        self._cache.clear()
        self._silent_until = 0.0

    async def addresses(self, name: str, family: Literal["A", "AAAA"]) -> Addresses:
        """The addresses of a host. Never raises."""
        return cast("Addresses", await self._lookup(name, family))

    async def exchangers(self, domain: str) -> MailExchangers:
        """The MX records of a domain. Never raises."""
        return cast("MailExchangers", await self._lookup(domain, "MX"))

    def close(self) -> None:
        """Give up what is being asked."""
        for task in [*self._asking.values(), *([self._probe] if self._probe is not None else [])]:
            task.cancel()

    async def _lookup(self, name: str, kind: str) -> Lookup:
        key = (name.lower().rstrip("."), kind)
        cached = self._cache.get(key)
        if cached is not None:
            if cached[0] > self._clock():
                self._cache.move_to_end(key)
                return cached[1]
            del self._cache[key]
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.get_running_loop().create_task(self._resolve(*key))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(task)  # whoever gives up leaves the answer to the others

    async def _resolve(self, name: str, kind: str) -> Lookup:
        make = MailExchangers if kind == "MX" else Addresses
        try:
            async with self._places:
                found = await self._chase(name, kind)
        except _Failed as failure:
            found = make(Found.UNKNOWN, ttl=UNKNOWN_S, why=str(failure))
        except Exception as error:  # noqa: BLE001 - the boundary of this task: many wait for its answer
            self._note("error", "dns_fault", name=name, type=kind, cause=repr(error))
            found = make(Found.UNKNOWN, ttl=UNKNOWN_S, why="local error")
        self._cache[name, kind] = (self._clock() + found.ttl, found)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return found

    # --- one question ---------------------------------------------------------------------------------------------------

    async def _chase(self, name: str, kind: str) -> Lookup:
        """From a name over its CNAMEs to records, or to the answer that there are none."""
        make = MailExchangers if kind == "MX" else Addresses
        try:
            current = dns.name.from_text(name + ".")
        except (dns.exception.DNSException, UnicodeError):  # no such name can exist: RFC 1035 §2.3.4
            return make(Found.NXDOMAIN, ttl=ABSENT_MOST_S)
        wanted = dns.rdatatype.from_text(kind)
        aliases: list[str] = []
        ttl = TTL_MOST_S
        seen = {current}
        until = self._clock() + LIFETIME_S
        while True:
            response = await self._ask(current, wanted, until)
            asked = current
            while (rrset := response.get_rrset(response.answer, current, dns.rdataclass.IN, wanted)) is None:
                alias = response.get_rrset(response.answer, current, dns.rdataclass.IN, dns.rdatatype.CNAME)
                if alias is None:
                    break
                ttl = min(ttl, alias.ttl)
                current = alias[0].target
                aliases.append(_text(current))
                if current in seen:
                    raise _Failed(f"CNAME loop at {_text(current)}")
                if len(aliases) > CHAIN:
                    raise _Failed(f"more than {CHAIN} CNAMEs")
                seen.add(current)
            if rrset is not None:
                ttl = max(TTL_LEAST_S, min(ttl, rrset.ttl))
                if aliases:
                    self._note("info", "dns_alias", name=name, type=kind, aliases=" ".join(aliases))
                return _records(rrset, kind, ttl, tuple(aliases))
            if response.rcode() == dns.rcode.NXDOMAIN:
                return make(Found.NXDOMAIN, ttl=_absent_ttl(response, ttl), aliases=tuple(aliases))
            if current == asked or _authority(response, current):
                return make(Found.NODATA, ttl=_absent_ttl(response, ttl), aliases=tuple(aliases))
            # An alias whose target the server did not look up.

    async def _ask(self, name: dns.name.Name, kind: dns.rdatatype.RdataType, until: float) -> dns.message.Message:
        """A usable answer of the first server that has one. Raises _Failed."""
        if self._silent >= SILENT and not await self._anybody():
            raise _Failed("no DNS server answers")
        said: dict[Server, str] = {}
        silent = set(self.servers)
        for _ in range(ROUNDS):
            for server in [one for one in self.servers if one in silent]:
                left = min(self._timeout_s, until - self._clock())
                if left <= 0:
                    break
                try:
                    response = await self._exchange(server, name, kind, left)
                except (dns.exception.Timeout, TimeoutError):
                    said[server] = "did not answer in time"
                    continue
                except (OSError, EOFError) as error:
                    said[server] = getattr(error, "strerror", None) or str(error) or "connection lost"
                    continue
                except dns.exception.DNSException as error:
                    said[server] = f"broken answer ({type(error).__name__})"
                    continue
                silent.discard(server)
                self._heard()
                trouble = _trouble(response)
                if not trouble:
                    return response
                said[server] = trouble
        why = ", ".join(f"{server[0]}: {what}" for server, what in said.items()) or "no DNS server was asked"
        if silent == set(self.servers):
            self._silent += 1
        raise _Failed(why)

    async def _anybody(self) -> bool:
        """Whether any server is there: asked once for all who want to know, and not again for a while when none is."""
        if self._clock() < self._silent_until:
            return False
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_task(self._look_for_servers())
        return await asyncio.shield(self._probe)

    async def _look_for_servers(self) -> bool:
        """The root is what every resolver knows by heart; any answer will do. One slow domain is no proof of anything."""
        try:
            for server in self.servers:
                with contextlib.suppress(dns.exception.DNSException, OSError, EOFError):
                    await self._exchange(server, dns.name.root, dns.rdatatype.NS, self._timeout_s)
                    self._heard()
                    return True
            self._silent_until = self._clock() + SILENT_S
            if not self._down:
                self._down = True
                self._note("error", "dns_down", servers=_names(self.servers))
            return False
        finally:
            self._probe = None

    async def _exchange(
        self, server: Server, name: dns.name.Name, kind: dns.rdatatype.RdataType, timeout_s: float
    ) -> dns.message.Message:
        """One question to one server; over TCP when the answer did not fit; without EDNS where it is not understood."""
        host, port = server
        query = dns.message.make_query(name, kind, use_edns=0, payload=PAYLOAD)
        try:
            # What comes from elsewhere, or is no answer to this question, is passed over: it may be forged.
            response = await dns.asyncquery.udp(
                query, host, timeout_s, port, ignore_unexpected=True, raise_on_truncation=True, ignore_errors=True
            )
        except dns.message.Truncated:
            return await dns.asyncquery.tcp(query, host, timeout_s, port)
        if response.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP):  # RFC 6891 §6.2.2
            query = dns.message.make_query(name, kind)
            response = await dns.asyncquery.udp(
                query, host, timeout_s, port, ignore_unexpected=True, ignore_errors=True
            )  # fmt: skip
            if response.flags & dns.flags.TC:
                return await dns.asyncquery.tcp(query, host, timeout_s, port)
        return response

    def _heard(self) -> None:
        self._silent = 0
        if self._down:
            self._down = False
            self._silent_until = 0.0
            self._note("info", "dns_up", servers=_names(self.servers))


def _names(servers: Sequence[Server]) -> str:
    return ",".join(f"{host}:{port}" for host, port in servers)


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower()


def _trouble(response: dns.message.Message) -> str:
    """Why an answer says nothing about the name; "" when it does."""
    rcode = response.rcode()
    if rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return dns.rcode.to_text(rcode)
    types = {rrset.rdtype for rrset in response.authority}
    lame = (
        not response.answer
        and rcode == dns.rcode.NOERROR
        and not response.flags & dns.flags.AA
        and dns.rdatatype.NS in types
        and dns.rdatatype.SOA not in types
    )
    return "a referral to other servers" if lame else ""


def _authority(response: dns.message.Message, name: dns.name.Name) -> bool:
    """Whether the answer says itself that there is nothing more at ``name`` (RFC 2308 §2.2)."""
    return any(
        rrset.rdtype == dns.rdatatype.SOA and name.is_subdomain(rrset.name) for rrset in response.authority
    )  # fmt: skip


def _absent_ttl(response: dns.message.Message, ttl: float) -> float:
    """How long "there is none" holds: RFC 2308 §5."""
    for rrset in response.authority:
        if rrset.rdtype == dns.rdatatype.SOA:
            ttl = min(ttl, rrset.ttl, rrset[0].minimum)
    return max(TTL_LEAST_S, min(ttl, ABSENT_MOST_S))


def _records(rrset: dns.rrset.RRset, kind: str, ttl: float, aliases: tuple[str, ...]) -> Lookup:
    if kind == "MX":
        exchangers = sorted(
            (int(one.preference), "" if one.exchange == dns.name.root else _text(one.exchange)) for one in rrset
        )
        return MailExchangers(Found.RECORDS, tuple(exchangers[:RECORDS]), ttl, aliases)
    return Addresses(Found.RECORDS, tuple(str(one.address) for one in list(rrset)[:RECORDS]), ttl, aliases)
