"""Owns: what ``relay check`` finds out over the network: whether next hops take a connection, whether the DNS answers.

All of it is warnings: a next hop that is down now is no reason not to start, mail for it waits in the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Final

from relay.cli.grade import Finding, Grade
from relay.config.schema import Config
from relay.control import HopSecret
from relay.mail.address import Mailbox, domain_of
from relay.mail.answer import Answer, Stage
from relay.net.dns import Resolver
from relay.outbound.callout import NoAnswer
from relay.outbound.lanes import dns_servers
from relay.outbound.mx import Exchanges
from relay.outbound.peer import settings_of
from relay.outbound.probe import TRY_S, Tried, ask_about, try_all
from relay.policy.lookup import Found
from relay.policy.route import NextHop, RouteTable
from relay.supervisor.keys import read_next_hops

MOST: Final = 100
"""Next hops that are tried; who has more sees what the first ones say."""

_HINTS: Final = {
    Stage.CONNECT: "is it running, and does a firewall let the relay through? Mail for it waits in the queue",
    Stage.BANNER: "it refuses this relay: allow its address there",
    Stage.EHLO: "it refuses this relay: allow its address and name there",
    Stage.AUTH: "correct user and password_file of its [[next_hop]]; relay probe says more",
    Stage.STARTTLS: 'mend its certificate or write delivery.tls = "opportunistic"',
}


def next_hops(config: Config) -> Iterator[Finding]:
    """A finding for each next hop."""
    hops = RouteTable(config).next_hops()
    problems: list[str] = []
    secrets = read_next_hops(config, problems)
    for problem in problems:
        yield Finding(Grade.WARNING, "next hops", problem, "run this as the user that starts the relay")
    # A login without its password would be one more failure in the directory behind the next hop.
    tried_hops = [hop for hop in hops[:MOST] if not _lacks_password(hop, config, secrets)]
    if len(hops) > MOST:
        yield Finding(Grade.OK, "next hops", f"{len(hops)} in all, the first {MOST} are tried")
    for tried in asyncio.run(try_all(tried_hops, config, TRY_S, secrets)):
        yield from _finding(config, tried)
    asked = [name for domain in config.domain if domain.recipients == "callout" for name in domain.names]
    for name in asked[:MOST]:
        yield asyncio.run(_callout(config, name, secrets))


async def _callout(config: Config, domain: str, secrets: Mapping[str, HopSecret]) -> Finding:
    """Whether asking the next hop tells valid recipients from others (row R13)."""
    try:
        next_hop, heard = await ask_about(Mailbox(f"postmaster@{domain}"), config, secrets)
    except NoAnswer as why:
        hint = "recipients get 451 until it answers"
        return Finding(Grade.WARNING, "callout", f"{domain}: {why}", hint)
    if heard.anything:
        text = f"{domain}: {next_hop.name} takes a random address, so that every recipient is taken"
        hint = 'let it refuse unknown recipients at RCPT, or write recipients = "directory"'
        return Finding(Grade.ERROR, "callout", text, hint)
    return Finding(Grade.OK, "callout", f"{domain}: {next_hop.name} refuses a random address")


def _lacks_password(hop: NextHop, config: Config, secrets: Mapping[str, HopSecret]) -> bool:
    entry = settings_of(hop, config)
    return entry is not None and bool(entry.user) and not secrets[entry.own_key].password


def name_service(config: Config) -> Iterator[Finding]:
    """Whether the DNS answers, where a route needs it."""
    exchanges = RouteTable(config).exchanges()
    if exchanges:
        yield from asyncio.run(_asked(config, list(dict.fromkeys(goal.domain for goal in exchanges))[:MOST]))


async def _asked(config: Config, domains: list[str]) -> list[Finding]:
    """``domains``: "" for the recipient's own, of which nobody knows which: then any answer will do."""
    resolver = Resolver(dns_servers(config), config.dns.timeout_s, tell=lambda *_, **__: None)
    exchanges = Exchanges(config, resolver)
    servers = ", ".join(f"{host}:{port}" for host, port in resolver.servers) or "none"
    found: list[Finding] = []
    try:
        for domain in domains:
            if domain:
                said = await exchanges.find(domain, "anywhere")
                if isinstance(said, Answer):
                    hint = "mend the domain's MX, or name its host in brackets"
                    found.append(Finding(Grade.WARNING, "dns", f"no way to {domain}: {said.text}", hint))
                else:
                    hosts = ", ".join(one.host for one in said)
                    found.append(Finding(Grade.OK, "dns", f"{domain} by MX: {hosts}"))
                continue
            answer = await resolver.exchangers(domain_of(f"@{config.server.hostname}"))
            if answer.found is Found.UNKNOWN:
                hint = "name resolvers that answer in dns.servers: mail by MX waits until they do"
                found.append(Finding(Grade.WARNING, "dns", f"no answer from {servers}: {answer.why}", hint))
            else:
                found.append(Finding(Grade.OK, "dns", f"answers: {servers}"))
    finally:
        resolver.close()
    return found


def _finding(config: Config, tried: Tried) -> Iterator[Finding]:
    name = f"next hop {tried.next_hop.name}"
    if tried.answer is not None:
        hint = _HINTS.get(tried.answer.stage, "look at its log")
        yield Finding(Grade.WARNING, name, _said(tried.answer), hint)
        return
    assert tried.offers is not None
    offers = tried.offers
    said = [
        offers.tls or "no TLS",
        f"up to {offers.size:,} octets" if offers.size else "no size limit told",
        *(["PIPELINING"] if offers.pipelining else []),
        *(["8BITMIME"] if offers.eight_bit else []),
    ]
    yield Finding(Grade.OK, name, f"takes a connection: {', '.join(said)}")
    if tried.tls_failed:
        yield Finding(
            Grade.WARNING,
            name,
            "STARTTLS is offered and fails: mail goes on readable",
            "mend its certificate or protocol",
        )
    elif not offers.tls and config.delivery.tls == "opportunistic" and tried.next_hop.protocol == "smtp":
        hint = "give it a certificate, if the way there is not yours alone"
        yield Finding(Grade.WARNING, name, "offers no STARTTLS: mail goes on readable", hint)
    if 0 < offers.size < config.limits.message_octets:
        text = f"takes {offers.size:,} octets, and the relay {config.limits.message_octets:,}: larger mail is returned"
        yield Finding(Grade.WARNING, name, text, f"write limits.message_octets = {offers.size}, or raise its limit")
    if not offers.eight_bit:
        yield Finding(Grade.WARNING, name, "offers no 8BITMIME: 8-bit mail is sent as it is", "update it if you can")


def _said(answer: Answer) -> str:
    code = f"{answer.code} {answer.enhanced} ".replace("  ", " ") if answer.code else ""
    where = {
        Stage.CONNECT: "no connection",
        Stage.BANNER: "refuses the connection",
        Stage.STARTTLS: "STARTTLS fails",
        Stage.AUTH: "refuses the login",
    }
    return f"{where.get(answer.stage, 'refuses EHLO')}: {code}{answer.text}"
