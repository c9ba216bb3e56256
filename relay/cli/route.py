"""Owns: ``relay route``: where mail for an address goes and which entry decides, found by the code that delivers it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from relay.cli.judged import parse, reply_line
from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, CommandFailed, ConfigOption, JsonOption
from relay.cli.placed import Placed
from relay.config.load import Loaded, read
from relay.config.schema import Config
from relay.config.whole import TABLE, KeyPath
from relay.inbound.transaction import Rules
from relay.mail.address import Mailbox, domain_of
from relay.mail.answer import Answer
from relay.mail.reply import BAD_RECIPIENT, Kind
from relay.net.dns import Resolver
from relay.outbound.lanes import dns_servers
from relay.outbound.mx import Exchanges
from relay.policy.exchange import literal_address
from relay.policy.lookup import Found
from relay.policy.route import OWN_HOSTS, Action, Decision, NextHop, refusal
from relay.telemetry import catalogue
from relay.telemetry.valuefiles import merged, readable

ALIVE_S: Final = 5.0
"""A worker that has said nothing for longer is not there."""
NOT_RUNNING: Final = "not known: no relay runs on this spool"

_TLS: Final = {
    "off": "off: never",
    "opportunistic": "opportunistic: where it is offered, with any certificate",
    "verified": "verified: always, with a certificate that this machine trusts for the host's name",
}


@dataclass(frozen=True, slots=True)
class Hop:
    """One next hop. ``why`` says what is behind it: weight, or preference and domain of its MX record."""

    name: str
    host: str
    port: int
    protocol: str
    addresses: tuple[str, ...]
    why: str
    state: str


@dataclass(frozen=True, slots=True)
class Way:
    """The answer. ``directory``: what it says of the recipient's host. ``answer`` is what recipients get when there is no way, or what RCPT says; empty when mail goes."""

    address: str
    action: str
    place: str
    entry: str
    asked: tuple[str, ...]
    next_hops: tuple[Hop, ...]
    tls: str
    dns: tuple[str, ...]
    answer: str
    directory: str = ""


def route(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The recipient, e.g. user@example.com.")],
    as_json: JsonOption = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say where mail for ADDRESS goes: the entry that decides, the next hops, TLS, what the DNS says of mail exchangers.

    Whether it is taken at all says relay recipient. The exit code is 1 when there is no way.
    """
    way = find(read(config, os.environ), address)
    if as_json:
        typer.echo(json.dumps(asdict(way), indent=2))
    else:
        _show(way)
    if way.answer:
        raise typer.Exit(EXIT_FAILED)


def find(loaded: Loaded, address: str) -> Way:
    """Where mail for an address goes. Raises CommandFailed for what is no address."""
    config = loaded.config
    mailbox = parse(address, BAD_RECIPIENT)
    if isinstance(mailbox, Kind) or not mailbox:
        raise CommandFailed(f"{address}: not an address; write for example user@example.com")
    if "@" not in mailbox:  # RFC 5321 §4.5.1
        mailbox = Rules.of(config).postmaster or mailbox
    placed = Placed(config)
    decision, remark = placed.decide(mailbox), placed.remark(mailbox)
    if decision is None:
        answer = f"451 4.4.4 no route for {domain_of(mailbox)}: add a [[route]] for it or for *"
        return Way(mailbox, "none", "", "", (), (), "", (), answer, remark)
    place, entry = _written(loaded, decision)
    known = decision.route
    tls = _TLS[config.delivery.tls] if known.action is Action.DELIVER else ""
    hops, said, answer = asyncio.run(_hops(config, decision, mailbox))
    return Way(mailbox, known.action.value, place, entry, decision.asked, hops, tls, said, answer, remark)


def _written(loaded: Loaded, decision: Decision) -> tuple[str, str]:
    """Place and text of the entry."""
    at: KeyPath = decision.route.at
    pattern = decision.pattern
    if at[:2] == OWN_HOSTS:
        pattern = "the directory's host for it"
    elif at[:2] != TABLE:
        domains = loaded.config.route[int(at[1])].domains
        at = (*at, "domains", domains.index(pattern)) if pattern in domains else at
    problem = loaded.origin.problem(at, "", "")
    place = f"{problem.file}:{problem.line}" if problem.line else problem.file
    return place, f"{pattern}  {decision.route.described}"


async def _hops(config: Config, decision: Decision, mailbox: Mailbox) -> tuple[tuple[Hop, ...], tuple[str, ...], str]:
    """The next hops in order, what the DNS said, and the answer where there is no way."""
    way = decision.route
    if way.action is Action.REFUSE:
        verdict = refusal(way)
        assert verdict is not None
        assert verdict.kind is not None
        return (), (), reply_line(config, verdict.kind, mailbox, verdict.text)
    if way.action is not Action.DELIVER:
        return (), (), _line(way.answer) if way.action is Action.RETRY else ""
    states = _states(config.server.spool)
    resolver = Resolver(dns_servers(config), config.dns.timeout_s, tell=lambda *_, **__: None)
    exchanges = Exchanges(config, resolver)
    hops: list[Hop] = []
    said: list[str] = []
    answers: list[Answer] = []
    for number, goal in enumerate(way.goals):
        weight = f"weight {way.weights[number]}" if way.weights else ""
        if isinstance(goal, NextHop):
            addresses = await _system_addresses(goal.host)
            state = states.get(goal.name, "not known: no mail yet") if states is not None else NOT_RUNNING
            hops.append(Hop(goal.name, goal.host, goal.port, goal.protocol, addresses, weight, state))
            continue
        domain = goal.domain or domain_of(mailbox)
        found = await exchanges.find(domain, goal.reach)
        said += await _what_dns_said(resolver, domain)
        if isinstance(found, Answer):
            answers.append(found)
            continue
        for one in found:
            name = NextHop(one.host, goal.port).name
            why = ", ".join(filter(None, (weight, f"preference {one.preference} of {domain}")))
            hops.append(Hop(name, one.host, goal.port, "smtp", one.addresses, why, "not shown for hosts found by MX"))
    resolver.close()
    return tuple(hops), tuple(said), "" if hops else _line(min(answers, key=lambda answer: answer.code))


async def _what_dns_said(resolver: Resolver, domain: str) -> list[str]:
    """The MX answer, remembered by the resolver, in words."""
    if literal_address(domain) is not None:
        return [f"{domain} is an address, nothing is asked"]
    said = await resolver.exchangers(domain)
    servers = ", ".join(f"{host}:{port}" for host, port in resolver.servers)
    via = f" (alias of {', '.join(said.aliases)})" if said.aliases else ""
    match said.found:
        case Found.RECORDS:
            records = ", ".join(f"{preference} {host or '.'}" for preference, host in said.records)
            return [f"MX of {domain}{via}: {records}; for {said.ttl:.0f} s, asked of {servers}"]
        case Found.NODATA:
            return [f"MX of {domain}{via}: none, so the domain itself; asked of {servers}"]
        case Found.NXDOMAIN:
            return [f"MX of {domain}{via}: there is no such name; asked of {servers}"]
        case Found.UNKNOWN:
            return [f"MX of {domain}{via}: no usable answer: {said.why}"]


async def _system_addresses(host: str) -> tuple[str, ...]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return (f"not found: {error.strerror or error}",)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def _states(spool: Path) -> dict[str, str] | None:
    """How the workers of the running relay see each configured next hop; None when there is no relay."""
    page = merged(readable(spool / "metrics")[0])
    samples = [sample for metric in page for sample in metric.samples]
    before = time.time() - ALIVE_S
    if not any(sample.name == catalogue.ALIVE.name and sample.value > before for sample in samples):
        return None
    seen: dict[str, dict[str, float]] = {}
    for sample in samples:
        if sample.name == catalogue.NEXT_HOP_STATE.name and sample.value:
            seen.setdefault(sample.labels["next_hop"], {})[sample.labels["state"]] = sample.value
    open_now = {s.labels["next_hop"]: s.value for s in samples if s.name == catalogue.NEXT_HOP_CONNECTIONS.name}
    return {hop: f"{_of_workers(states)}; connections open: {open_now.get(hop, 0):.0f}" for hop, states in seen.items()}


def _of_workers(states: dict[str, float]) -> str:
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{state} for {count:.0f} workers" for state, count in states.items())


def _line(answer: Answer) -> str:
    return f"{answer.code} {answer.enhanced} {answer.text}"


def _show(way: Way) -> None:
    def line(name: str, text: Any) -> None:
        typer.echo(f"{name:12}{text}")

    typer.echo(f"{way.address}: {_words(way)}")
    if way.place:
        line("entry", f"{way.place}: {way.entry}")
        line("asked", ", ".join(way.asked))
    if way.directory:
        line("directory", way.directory)
    for said in way.dns:
        line("dns", said)
    for hop in way.next_hops:
        protocol = "" if hop.protocol == "smtp" else f", {hop.protocol.upper()}"
        why = f", {hop.why}" if hop.why else ""
        line("next hop", f"{hop.name}{protocol}{why}")
        line("", ", ".join(hop.addresses))
        line("", hop.state)
    if way.tls:
        line("tls", way.tls)
    if way.answer:
        line("answer", way.answer)


def _words(way: Way) -> str:
    match way.action:
        case "error":
            return "refused by its route"
        case "retry":
            return "kept in the queue by its route"
        case "discard":
            return "taken and thrown away by its route"
        case "none":
            return "no route"
        case _:
            return "no way there" if way.answer else f"goes to {', '.join(hop.name for hop in way.next_hops)}"
