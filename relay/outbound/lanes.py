"""Owns: the lanes of one worker, one for each next hop of the configuration, and the choice among a route's."""

from __future__ import annotations

import random

from relay.config.schema import Config
from relay.mail.address import Mailbox
from relay.outbound.lane import Lane
from relay.policy.route import NextHop, Route, RouteTable, shared_out
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics, NextHopState

SWEEP_S = 0.2
"""How often connections are looked at for deadlines: a next-hop time-out is at most this much late."""


class Lanes:
    """Made at start; a reload adds lanes and lets those no longer named run dry."""

    def __init__(self, config: Config, live_workers: int, log: MailLog, metrics: Metrics) -> None:
        self._log = log
        self._metrics = metrics
        self._lanes: dict[NextHop, Lane] = {}
        self._states: dict[Lane, NextHopState] = {}
        self.live_workers = live_workers
        self.configure(config, live_workers)

    def configure(self, config: Config, live_workers: int) -> None:
        """Take over a (new) configuration, or another number of workers."""
        self._config = config
        self.live_workers = live_workers
        self.routes = RouteTable(config)
        named = self.routes.next_hops()
        for hop in named:
            lane = self._lanes.get(hop)
            if lane is None:
                self._lanes[hop] = Lane(hop, config, live_workers, self._log)
            else:
                lane.configure(config, live_workers)
        for hop in [h for h, lane in self._lanes.items() if h not in named and not lane.busy]:
            self._lanes.pop(hop).close()

    def of(self, mailbox: Mailbox) -> Route | None:
        """The route of a recipient."""
        return self.routes.find(mailbox)

    def candidates(self, route: Route) -> list[Lane]:
        """The route's lanes: first those that are up, then those to be probed; each group in order of preference."""
        lanes = [self._lanes[hop] for hop in route.next_hops]
        if len(lanes) == 1:
            return lanes
        if route.weights:
            lanes = [lanes[number] for number in shared_out(route.weights, [random.random() for _ in lanes])]
            lanes.sort(key=lambda lane: not lane.has_room())  # a busy one's share goes to the others, not to the disk
        return sorted(lanes, key=lambda lane: 0 if lane.up else 1 if lane.worth_trying else 2)

    def sweep(self) -> None:
        """Deadlines and figures; called every SWEEP_S."""
        for lane in self._lanes.values():
            lane.sweep()
            self._metrics.next_hop_connections(lane.name, lane.connections)
            state: NextHopState = "misconfigured" if lane.misconfigured else "up" if lane.up else "down"
            if self._states.get(lane) != state:
                self._states[lane] = state
                self._metrics.next_hop_state(lane.name, state)

    def turn_away(self) -> None:
        """Make room for mail to other next hops where one hangs."""
        for lane in list(self._lanes.values()):
            lane.turn_away()

    @property
    def busy(self) -> bool:
        """True while any lane has work."""
        return any(lane.busy for lane in self._lanes.values())

    def drain(self) -> None:
        """Take no express mail any more."""
        for lane in self._lanes.values():
            lane.draining = True

    def close(self) -> None:
        """QUIT to all that is idle."""
        for lane in self._lanes.values():
            lane.close()
