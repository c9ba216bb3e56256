"""Owns: WHERE mail goes (row T1): which entry of the routes decides for an address, and what it says. Pure.

The entries of ``[[route]]`` and those of the transport table are one table; the most specific pattern decides, in the
order of transport(5). A route never allows anything: whether mail is taken at all is ``policy.recipient``'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Final, Literal, NamedTuple, TypeAlias

from relay.config.destination import (
    SMTP_PORT,
    Delay,
    Destination,
    Exchangers,
    Host,
    Loss,
    Refusal,
    Target,
    parse_next_hop,
)
from relay.config.schema import Config
from relay.config.transport import DEFAULT, parse_table, search_order
from relay.config.whole import TABLE, KeyPath
from relay.mail.address import Mailbox, domain_of, unquoted, without_tag
from relay.mail.answer import Answer, Stage
from relay.mail.reply import Kind, OperatorText, route_refused
from relay.policy.verdict import Verdict

OWN_HOSTS: Final[KeyPath] = ("directory", "next_hops")


class NextHop(NamedTuple):
    """A host to deliver to."""

    host: str
    port: int
    protocol: str = "smtp"

    @property
    def name(self) -> str:
        """``host:port``: the name in logs, metrics and the queue."""
        name = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return name if self.protocol == "smtp" else f"{self.protocol}:{name}"


class Exchange(NamedTuple):
    """The mail exchangers of a domain; "" means the recipient's own. ``reach`` public: strangers choose the domain (``*``),
    so that its hosts must not be inside (``dns.private``).
    """

    domain: str
    port: int
    reach: Literal["anywhere", "public"] = "anywhere"

    @property
    def name(self) -> str:
        """In words."""
        port = "" if self.port == SMTP_PORT else f", port {self.port}"
        return f"MX of {self.domain or 'the recipient domain'}{port}"


Goal: TypeAlias = NextHop | Exchange


class Action(Enum):
    """What a route does with mail."""

    DELIVER = "deliver"
    REFUSE = "error"
    RETRY = "retry"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: recipients of one route travel together
class Route:
    """What an entry says. ``name`` is its first pattern, ``at`` where it stands in the configuration.

    ``goals`` are in order of preference, or, with ``weights``, shared out by them. ``status`` and ``text`` belong to the
    actions without goals. ``static``: all goals are hosts, so ``next_hops`` says everything. ``by_domain``: the
    recipients' domains are asked for their exchangers, so only those of one domain travel together.
    """

    name: str
    at: KeyPath
    action: Action
    goals: tuple[Goal, ...] = ()
    weights: tuple[int, ...] = ()
    status: str = ""
    text: str = ""
    next_hops: tuple[NextHop, ...] = ()
    static: bool = False
    by_domain: bool = False

    @property
    def described(self) -> str:
        """Where it leads, in one line."""
        if self.action is not Action.DELIVER:
            return f"{self.action.value}: {self.status} {self.text}".replace("  ", " ")
        shares = [f" (weight {weight})" for weight in self.weights] or [""] * len(self.goals)
        return ", ".join(f"{goal.name}{share}" for goal, share in zip(self.goals, shares, strict=True))

    @property
    def answer(self) -> Answer:
        """What a recipient of a route without goals gets."""
        return Answer(Stage.ROUTE, 550 if self.action is Action.REFUSE else 451, self.status, self.text)


@dataclass(frozen=True, slots=True)
class Decision:
    """Which entry decides for an address. ``asked``: the patterns in the order of the search, the last one fits."""

    pattern: str
    route: Route
    asked: tuple[str, ...]


class RouteTable:
    """Address → route."""

    __slots__ = ("_addresses", "_default", "_delimiters", "_domains", "_entries", "_parents", "own", "refuses")

    def __init__(self, config: Config) -> None:
        written = dict(_routes(config))
        found = dict(written)
        for line in parse_table(config.routing.table)[0]:
            at = (*TABLE, line.number)
            if line.target is not None:
                found[line.pattern] = _route([line.pattern], at, line.target, ())
                continue
            for pattern in search_order(line.pattern):  # as if the table were not there
                if pattern in written:
                    found[line.pattern] = replace(written[pattern], at=at)
                    break
        self._entries = dict(found)
        self._delimiters = {
            name: domain.delimiter for domain in config.domain if domain.delimiter for name in domain.names
        }
        self._default = found.pop(DEFAULT, None)
        self._addresses = {pattern: route for pattern, route in found.items() if "@" in pattern}
        self._parents = {pattern: route for pattern, route in found.items() if pattern.startswith(".")}
        self._domains = {pattern: route for pattern, route in found.items() if "@" not in pattern and pattern[0] != "."}
        self.own: Final = _own_hosts(config)
        """By every spelling: the hosts that a directory may name for single recipients."""
        self.refuses: Final = any(route.action is Action.REFUSE for route in self.all())
        """Whether any entry refuses mail: else nobody need ask at RCPT."""

    def find(self, mailbox: Mailbox) -> Route | None:
        """The route of an address; None when there is none (mail then waits: 4.4.4)."""
        if self._addresses:
            route = self._of_address(unquoted(mailbox).lower())
            if route is not None:
                return route
        domain = domain_of(mailbox)
        route = self._domains.get(domain)
        if route is not None:
            return route
        return self._above(domain) if self._parents else self._default

    def of(self, mailbox: Mailbox, hop: str) -> Route | None:
        """The same where a directory names the host of the recipient's mail; "" when it does not. What is not in
        ``directory.next_hops`` says nothing, and nothing stands over an entry of that very address, ``error:`` and its kin.
        """
        found = self.find(mailbox)
        own = self.own.get(hop)
        if own is None or (found is not None and found.action is not Action.DELIVER):
            return found
        if self._addresses and self._of_address(unquoted(mailbox).lower()) is not None:
            return found
        return own

    def _of_address(self, address: str) -> Route | None:
        route = self._addresses.get(address)
        if route is None and self._delimiters:
            route = self._addresses.get(self._untagged(address))
        return route

    def _untagged(self, address: str) -> str:
        return without_tag(address, self._delimiters.get(domain_of(address), ""))

    def decide(self, mailbox: Mailbox, hop: str = "") -> Decision | None:
        """The same as ``of``, with the pattern that decided and those that were asked before: for people."""
        own = self.own.get(hop)
        if own is not None and self.of(mailbox, hop) is own:
            return Decision(hop, own, (unquoted(mailbox).lower(),))
        asked: list[str] = []
        address = unquoted(mailbox).lower()
        first, *others = search_order(address)
        untagged = self._untagged(address)
        for pattern in (first, untagged, *others) if untagged else (first, *others):
            asked.append(pattern)
            route = self._entries.get(pattern)
            if route is not None:
                return Decision(pattern, route, tuple(asked))
        return None

    def _above(self, domain: str) -> Route | None:
        for pattern in search_order(domain):
            route = self._parents.get(pattern)
            if route is not None:
                return route
        return self._default

    def all(self) -> Iterator[Route]:
        """Every entry's route; one that several patterns lead to comes several times."""
        yield from self._addresses.values()
        yield from self._domains.values()
        yield from self._parents.values()
        if self._default is not None:
            yield self._default
        yield from self.own.values()

    def of_domains(self, domains: Iterable[str]) -> set[Route]:
        """Every route that an address of these domains can have."""
        names = set(domains)
        found = {self.find(Mailbox(f"{DEFAULT}@{name}")) for name in names}
        found |= {route for address, route in self._addresses.items() if domain_of(address) in names}
        found |= set(self.own.values())
        return {route for route in found if route is not None}

    def next_hops(self) -> tuple[NextHop, ...]:
        """Every host named anywhere, once each."""
        return tuple(dict.fromkeys(goal for route in self.all() for goal in route.goals if isinstance(goal, NextHop)))

    def exchanges(self) -> tuple[Exchange, ...]:
        """Whatever is found by MX, once each."""
        return tuple(dict.fromkeys(goal for route in self.all() for goal in route.goals if isinstance(goal, Exchange)))


@cache
def _refused(status: str) -> Kind:
    """One Kind for each status: they are the metrics' keys."""
    return route_refused(status)


def refusal(route: Route | None) -> Verdict | None:
    """What RCPT is answered when the route says ``error:``."""
    if route is None or route.action is not Action.REFUSE:
        return None
    return Verdict(_refused(route.status), f"route {route.name}", OperatorText(route.text))


def shared_out(weights: Sequence[int], dice: Sequence[float]) -> list[int]:
    """The indexes of the next hops in the order of one message: each comes first as often as its weight says; those of
    weight 0 come last, in their own order. ``dice``: one number from 0 up to 1 for each.
    """
    # The least of exponential variables is the one of rate w with probability w / sum.
    return sorted(
        range(len(weights)), key=lambda at: -math.log(1.0 - dice[at]) / weights[at] if weights[at] else math.inf
    )


def _own_hosts(config: Config) -> dict[str, Route]:
    """One route for each of ``directory.next_hops``, by its name, its host alone, and as it is written there."""
    found: dict[str, Route] = {}
    for index, text in enumerate(config.directory.next_hops):
        route = _route([text], (*OWN_HOSTS, index), parse_next_hop(text), ())
        hop = route.next_hops[0]
        for spelling in (hop.name, text, hop.host, f"[{hop.host}]", f"[{hop.host}]:{hop.port}"):
            found.setdefault(spelling.lower(), route)
    return found


def _routes(config: Config) -> Iterator[tuple[str, Route]]:
    for index, entry in enumerate(config.route):
        targets = [parse_next_hop(text) for text in entry.next_hops]
        target = targets[0]
        if isinstance(target, tuple):
            target = tuple(goal for one in targets if isinstance(one, tuple) for goal in one)
        route = _route(entry.domains, ("route", index), target, tuple(entry.weights))
        for pattern in entry.domains:
            yield pattern, route


def _route(patterns: Sequence[str], at: KeyPath, target: Target, weights: tuple[int, ...]) -> Route:
    name = patterns[0]
    match target:
        case Refusal(status, text):
            return Route(name, at, Action.REFUSE, status=status, text=text)
        case Delay(status, text):
            return Route(name, at, Action.RETRY, status=status, text=text)
        case Loss(text):
            return Route(name, at, Action.DISCARD, text=text)
        case destinations:
            anybody = DEFAULT in patterns
            goals = tuple(_goal(destination, "public" if anybody else "anywhere") for destination in destinations)
            hosts = tuple(goal for goal in goals if isinstance(goal, NextHop))
            return Route(
                name, at, Action.DELIVER, goals, weights, next_hops=hosts, static=len(hosts) == len(goals),
                by_domain=any(isinstance(goal, Exchange) and not goal.domain for goal in goals),
            )  # fmt: skip


def _goal(destination: Destination, reach: Literal["anywhere", "public"]) -> Goal:
    match destination:
        case Host(protocol, host, port):
            return NextHop(host, port, protocol)
        case Exchangers(domain, port):
            return Exchange(domain, port, "anywhere" if domain else reach)
