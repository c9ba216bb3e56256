"""Owns: ``relay firewall``: the connections that the configuration asks a firewall to let through. It must not open any."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Final, Literal

import typer

from relay.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption
from relay.config.addresses import split_address
from relay.config.load import load
from relay.config.schema import Config, Listener, Role
from relay.net.dns import system_servers
from relay.outbound.lanes import dns_servers
from relay.policy.route import RouteTable

ANYWHERE: Final = "anywhere"
RELAY: Final = "relay"

_BOTH: Final[tuple[Literal["udp", "tcp"], ...]] = ("udp", "tcp")
_CLIENTS: Final = {
    Role.MX: "mail servers",
    Role.SUBMISSION: "mail programs, STARTTLS",
    Role.SUBMISSIONS: "mail programs, TLS",
}


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of connection; ``source`` opens it. ``relay`` stands for every address of this machine. ``key`` is where the
    configuration asks for it.
    """

    direction: Literal["in", "out"]
    source: str
    destination: str
    port: int
    protocol: Literal["tcp", "udp"]
    why: str
    key: str


def firewall(
    as_json: JsonOption = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what stays on this machine (loopback).")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """List the connections that a firewall has to let through: to the listeners, to next hops, directories and the DNS.

    Nothing is tried; relay check does that. Whatever is not listed may be closed.
    """
    found = [flow for flow in flows(load(config, os.environ)) if everything or not _stays_here(flow)]
    if as_json:
        typer.echo(json.dumps([asdict(flow) for flow in found], indent=2))
        return
    rows = [("", "from", "to", "port", "why", "asked for by")]
    rows += [(f.direction, f.source, f.destination, f"{f.port}/{f.protocol}", f.why, f.key) for f in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def flows(config: Config) -> tuple[Flow, ...]:
    """All of them in the order of the configuration; one asked for by several keys comes once."""
    found: dict[tuple[object, ...], Flow] = {}
    for flow in (*_incoming(config), *_outgoing(config)):
        way = (flow.direction, flow.source, flow.destination, flow.port, flow.protocol)
        known = found.setdefault(way, flow)
        found[way] = replace(known, why=_joined(known.why, flow.why), key=_joined(known.key, flow.key))
    return tuple(found.values())


def _joined(known: str, more: str) -> str:
    return known if more in known.split("; ") else f"{known}; {more}"


def _incoming(config: Config) -> Iterator[Flow]:
    for index, listener in enumerate(config.listener):
        address, port = split_address(listener.address)
        for source in listener.proxy_protocol or [ANYWHERE]:
            yield Flow("in", source, _here(address), port, "tcp", _clients(listener), f"listener[{index}].address")
    if config.web.listen is not None:
        address, port = split_address(config.web.listen)
        yield Flow("in", "monitoring", _here(address), port, "tcp", "metrics and health", "web.listen")


def _clients(listener: Listener) -> str:
    return "balancer, PROXY protocol" if listener.proxy_protocol else _CLIENTS[listener.role]


def _outgoing(config: Config) -> Iterator[Flow]:
    table = RouteTable(config)
    hops, exchanges = table.next_hops(), table.exchanges()
    profiles = config.directory.ldap
    asked_for = "dns.servers" if config.dns.servers else "resolv.conf"
    named = [hop.host for hop in hops] + [server.host for profile in profiles for server in profile.targets()]
    services = [server for profile in profiles for server in profile.targets() if server.is_service]
    if exchanges or services:
        what = " and ".join(filter(None, ("mail exchangers" * bool(exchanges), "directory servers" * bool(services))))
        for address, port in dns_servers(config):
            for protocol in _BOTH:
                yield Flow("out", RELAY, address, port, protocol, what, asked_for)
    # Names of hosts are looked up as the machine looks up all of its names, whatever dns.servers says.
    if not all(map(_is_address, named)):
        for address, port in system_servers():
            for protocol in _BOTH:
                yield Flow("out", RELAY, address, port, protocol, "names of hosts", "resolv.conf")
    for hop in hops:
        yield Flow("out", RELAY, hop.host, hop.port, "tcp", f"mail, {hop.protocol.upper()}", "route")
    for goal in exchanges:
        yield Flow("out", RELAY, ANYWHERE, goal.port, "tcp", goal.name, "route")
    for profile in profiles:
        for server in profile.targets():
            why = "recipients and logins" if profile.recipients else "logins"
            host = f"hosts of {server.host}" if server.is_service else server.host
            yield Flow("out", RELAY, host, server.port, "tcp", why, f"directory.ldap {profile.name}")


def _here(address: str) -> str:
    return RELAY if ipaddress.ip_address(address).is_unspecified else address


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _stays_here(flow: Flow) -> bool:
    host = flow.destination
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
