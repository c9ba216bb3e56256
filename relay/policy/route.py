"""Owns: WHERE mail goes (row T1, static routes). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from relay.config.schema import Config, split_next_hop


class NextHop(NamedTuple):
    """A host to deliver to."""

    host: str
    port: int

    @property
    def name(self) -> str:
        """``host:port``: the name in logs, metrics and the queue."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Route:
    """Next hops in order of preference; ``name`` is what the configuration calls it."""

    name: str
    next_hops: tuple[NextHop, ...]


class RouteTable:
    """Domain → route; exact match, then the default."""

    __slots__ = ("_default", "_routes")

    def __init__(self, config: Config) -> None:
        self._routes: dict[str, Route] = {}
        for entry in config.route:
            route = Route(entry.domains[0], tuple(NextHop(*split_next_hop(text)) for text in entry.next_hops))
            for domain in entry.domains:
                self._routes[domain] = route
        self._default = self._routes.pop("*", None)

    def find(self, domain: str) -> Route | None:
        """The route for a lower-case domain; None when there is none (mail then waits: 4.4.4)."""
        return self._routes.get(domain, self._default)

    def next_hops(self) -> tuple[NextHop, ...]:
        """Every next hop named anywhere, once each."""
        routes = [*self._routes.values(), *([self._default] if self._default else [])]
        return tuple(dict.fromkeys(hop for route in routes for hop in route.next_hops))
