"""Owns: the lanes of one worker: one for each next hop of the configuration, and one for each mail exchanger in use, which
come and go; and the choice among a route's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from relay.config.addresses import split_dns_server
from relay.config.schema import Config
from relay.control import HopSecret
from relay.mail.address import Mailbox, domain_of
from relay.mail.answer import Answer, Stage
from relay.net.dns import Resolver, system_servers
from relay.outbound.lane import MX_LABEL, Lane
from relay.outbound.mx import Exchanges
from relay.outbound.peer import NO_SECRETS
from relay.policy.exchange import Exchanger, in_turn
from relay.policy.route import Action, Goal, NextHop, Route, RouteTable, shared_out
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics, NextHopState

SESSION_STAGES: Final = frozenset({Stage.CONNECT, Stage.BANNER, Stage.EHLO, Stage.STARTTLS, Stage.AUTH})
"""What fails here has nothing to do with the message."""
SWEEP_S: Final = 0.2
"""How often connections are looked at for deadlines: a next-hop time-out is at most this much late."""
MX_LANES: Final = 1_000
"""Mail exchangers one worker deals with at once. More than the messages it works on (queue.active), fewer than descriptors."""
MX_LANE_S: Final = 300.0
"""A mail exchanger without mail is forgotten after this long, and with it that it was down."""

_FULL: Final = Answer(Stage.ROUTE, 451, "4.4.5", "too many mail exchangers are in use")


def dns_servers(config: Config) -> tuple[tuple[str, int], ...]:
    """The resolvers to ask."""
    return tuple(map(split_dns_server, config.dns.servers)) or system_servers()


class Lanes:
    """Made at start; a reload adds lanes and lets those no longer named run dry."""

    def __init__(
        self,
        config: Config,
        live_workers: int,
        log: MailLog,
        metrics: Metrics,
        secrets: Mapping[str, HopSecret] = NO_SECRETS,
    ) -> None:
        self._secrets = secrets
        self._log = log
        self._metrics = metrics
        self._lanes: dict[NextHop, Lane] = {}
        self._found: dict[NextHop, Lane] = {}
        self._leaving: set[Lane] = set()
        self._states: dict[Lane, NextHopState] = {}
        self._draining = False
        self._mx_shown = False
        self._ready: dict[str, Lane | None] = {}
        self.hop_of: Callable[[Mailbox], str] | None = None
        """What a directory says of a recipient's host; None where none may say anything."""
        self.on_ready: Callable[[], None] = _nobody
        self.live_workers = live_workers
        self._config = config
        self._resolver = Resolver(dns_servers(config), config.dns.timeout_s)
        self._exchanges = Exchanges(config, self._resolver)
        self.configure(config, live_workers)

    def configure(self, config: Config, live_workers: int, secrets: Mapping[str, HopSecret] | None = None) -> None:
        """Take over a (new) configuration with its secrets, or another number of workers."""
        if secrets is not None:
            self._secrets = secrets
        if config is not self._config:
            self._resolver.configure(dns_servers(config), config.dns.timeout_s)
            self._exchanges.configure(config)
        self._config = config
        self.live_workers = live_workers
        self.routes = RouteTable(config)
        named = self.routes.next_hops()
        for hop in named:
            lane = self._lanes.get(hop)
            if lane is None:
                lane = self._lanes[hop] = Lane(hop, config, live_workers, self._log, secrets=self._secrets)
                lane.back = self._back
            else:
                lane.configure(config, live_workers, self._secrets)
        for lane in [*self._found.values(), *self._leaving]:
            lane.configure(config, live_workers)
        for hop in [h for h in self._lanes if h not in named]:
            lane = self._lanes.pop(hop)
            self._leaving.add(lane)  # swept until it is empty

        own = self.routes.of_domains(name for domain in config.domain for name in domain.names)
        delivered = [route for route in own if route.action is Action.DELIVER]
        # Where mail exchangers are among them, nobody knows what the next one takes.
        hops = [hop for route in delivered for hop in route.next_hops] if all(r.static for r in delivered) else []
        self._own_hops = tuple(dict.fromkeys(hops))

    def of(self, mailbox: Mailbox) -> Route | None:
        """The route of a recipient."""
        hop_of = self.hop_of
        return self.routes.find(mailbox) if hop_of is None else self.routes.of(mailbox, hop_of(mailbox))

    # --- the lanes of a route ------------------------------------------------------------------------------------------

    def candidates(self, route: Route) -> list[Lane]:
        """The lanes of a route of hosts: first those that are up, then those to be probed; each group in order of
        preference.
        """
        lanes = [self._lanes[hop] for hop in route.next_hops]
        if len(lanes) == 1:
            return lanes
        if route.weights:
            lanes = [lanes[number] for number in shared_out(route.weights, [random.random() for _ in lanes])]
            lanes.sort(key=lambda lane: not lane.has_room())  # a busy one's share goes to the others, not to the disk
        return _healthy_first(lanes)

    def known(self, route: Route, mailbox: Mailbox) -> list[Lane]:
        """The same for any route, where nothing has to be asked and the first choice has a lane; else none."""
        lanes: list[Lane] = []
        for goal in self._in_order(route):
            if isinstance(goal, NextHop):
                lanes.append(self._lanes[goal])
                continue
            found = self._exchanges.known(goal.domain or domain_of(mailbox), goal.reach)
            if found is None:
                return []
            for one in self._turns(found):
                lane = self._found.get(NextHop(one.host, goal.port))
                if lane is not None:
                    lane.used = time.monotonic()
                    lanes.append(lane)
                elif not lanes:
                    return []
        return _healthy_first(lanes)

    async def find(self, route: Route, mailbox: Mailbox) -> list[Lane] | Answer:
        """The same, whatever it takes; or what the recipients get when the DNS knows no way."""
        lanes: list[Lane] = []
        refused: Answer | None = None
        for goal in self._in_order(route):
            if isinstance(goal, NextHop):
                lanes.append(self._lanes[goal])
                continue
            found = await self._exchanges.find(goal.domain or domain_of(mailbox), goal.reach)
            if isinstance(found, Answer):
                refused = found if refused is None or found.code < refused.code else refused
                continue
            hosts = [lane for one in self._turns(found) if (lane := self._lane_for(one, goal.port)) is not None]
            lanes += hosts
            if not hosts:
                refused = _FULL
        return _healthy_first(lanes) if lanes else refused or _FULL

    @staticmethod
    def _in_order(route: Route) -> list[Goal]:
        if not route.weights:
            return list(route.goals)
        return [route.goals[number] for number in shared_out(route.weights, [random.random() for _ in route.goals])]

    @staticmethod
    def _turns(found: tuple[Exchanger, ...] | Answer) -> list[Exchanger]:
        return [] if isinstance(found, Answer) else in_turn(found, [random.random() for _ in found])

    def _lane_for(self, one: Exchanger, port: int) -> Lane | None:
        hop = NextHop(one.host, port)
        lane = self._found.get(hop)
        if lane is None:
            if len(self._found) >= MX_LANES and not self._make_room():
                return None
            lane = self._found[hop] = Lane(hop, self._config, self.live_workers, self._log, "mx")
            lane.back = self._back
            lane.draining = self._draining
        lane.addresses = one.addresses
        lane.used = time.monotonic()
        return lane

    def _make_room(self) -> bool:
        empty = min((lane for lane in self._found.values() if lane.empty), key=lambda lane: lane.used, default=None)
        if empty is None:
            return False
        self._retire(empty)
        return True

    def _retire(self, lane: Lane) -> None:
        """Forget a mail exchanger. An attempt that had it as its second choice may still come: then it is back."""
        del self._found[lane.next_hop]
        lane.retired = self._revive

    def _revive(self, lane: Lane) -> None:
        lane.retired = None
        self._leaving.add(lane)

    @property
    def largest(self) -> int | None:
        """The largest message that some next hop of the own domains takes, by what each said last; None where there is no
        limit or one of them is not known.
        """
        sizes = [self._lanes[hop].largest for hop in self._own_hops]
        return max((size for size in sizes if size), default=None) if all(sizes) else None

    def _all(self) -> Iterator[Lane]:
        yield from self._lanes.values()
        yield from self._found.values()
        yield from self._leaving

    # --- mail that waits for a next hop --------------------------------------------------------------------------------

    @staticmethod
    def waits_for(route: Route, lane: Lane) -> str:
        """What mail of this route waits for when no connection comes about, ``lane`` being the last one tried: the hosts of
        the route, or one mail exchanger.
        """
        return " ".join(hop.name for hop in route.next_hops) if route.static else f"mx:{lane.name}"

    def waited_for(self, route: Route, lane: Lane, answers: Sequence[Answer]) -> str:
        """The same after an attempt, empty when it failed for another reason, or when a connection has come about since."""
        if lane.proven or not all(answer.stage in SESSION_STAGES for answer in answers):
            return ""
        return self.waits_for(route, lane)

    def _back(self, lane: Lane) -> None:
        """Mail that waits for this next hop may go."""
        if lane.origin != "route":
            self._ready[f"mx:{lane.name}"] = lane
        for route in self.routes.all():
            if route.static and lane.next_hop in route.next_hops:
                self._ready[self.waits_for(route, lane)] = lane
        self.on_ready()

    def awaited(self, waiting: Sequence[str]) -> None:
        """Mail waits for these: find out whether they are there. What no route leads to any more is not waited for."""
        for hops in waiting:
            if hops.startswith("mx:"):
                continue  # strangers are not probed; their mail has dates of its own
            names = set(hops.split())
            lanes = [lane for lane in self._lanes.values() if lane.name in names]
            back = next((lane for lane in lanes if lane.proven), None)
            if back is not None or not lanes:
                self._ready[hops] = back
                self.on_ready()
            for lane in lanes:
                lane.probe()

    def ready(self) -> list[str]:
        """What mail may no longer wait for (``waits_for``): next hops that are back, and have not gone again."""
        if self._ready:
            self._ready = {hops: lane for hops, lane in self._ready.items() if lane is None or lane.proven}
        return list(self._ready)

    def served(self, hops: Sequence[str]) -> None:
        """Nobody waits for these any more."""
        for each in hops:
            self._ready.pop(each, None)

    # --- upkeep --------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Deadlines and figures; called every SWEEP_S."""
        for lane in self._lanes.values():
            lane.sweep()
            self._metrics.next_hop_connections(lane.name, lane.connections)
            state: NextHopState = "misconfigured" if lane.misconfigured else "up" if lane.up else "down"
            if self._states.get(lane) != state:
                self._states[lane] = state
                self._metrics.next_hop_state(lane.name, state)
        if self._found or self._leaving or self._mx_shown:
            self._sweep_found()

    def _sweep_found(self) -> None:
        self._mx_shown = True
        before = time.monotonic() - MX_LANE_S
        for lane in list(self._found.values()):
            lane.sweep()
            if lane.used < before and lane.empty:
                self._retire(lane)
        for lane in list(self._leaving):
            lane.sweep()
            if lane.empty:
                self._leaving.discard(lane)
                self._states.pop(lane, None)
                lane.retired = self._revive
                if lane.origin == "route" and lane.next_hop not in self._lanes:
                    self._metrics.next_hop_connections(lane.name, 0)
        self._metrics.next_hop_connections(MX_LABEL, sum(lane.connections for lane in self._found.values()))

    def turn_away(self) -> None:
        """Make room for mail to other next hops where one hangs."""
        for lane in list(self._all()):
            lane.turn_away()

    @property
    def busy(self) -> bool:
        """True while any lane has work."""
        return any(lane.busy for lane in self._all())

    def drain(self) -> None:
        """Take no express mail any more."""
        self._draining = True
        for lane in self._all():
            lane.draining = True

    def close(self) -> None:
        """QUIT to all that is idle."""
        self._resolver.close()
        for lane in list(self._all()):
            lane.close()


def _healthy_first(lanes: list[Lane]) -> list[Lane]:
    return sorted(lanes, key=lambda lane: 0 if lane.up and not lane.hesitates else 1 if lane.worth_trying else 2)


def _nobody() -> None:
    """Where nobody waits."""
