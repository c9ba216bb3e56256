"""Owns: what a member counts. The hot path bumps plain integers; ``flush`` (every 250 ms, from the member's loop)
adds them to the value files.

One thread only: the bumps and ``flush`` run on the event loop (in the supervisor: its only thread). Must not name a
metric that is not in ``telemetry.catalogue``, and must not let outside values make label sets without a bound.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar, get_args

from prometheus_client import Counter, Gauge, Histogram

from relay.mail.reply import Kind
from relay.telemetry import catalogue
from relay.telemetry.catalogue import Family
from relay.telemetry.valuefiles import ValueFiles, label_text, observe_in_bulk

FLUSH_S: Final = 0.25
"""How often a member's loop calls ``Metrics.flush``, seconds."""

REPLY_SETS: Final = 256
"""Distinct (code, enhanced, reason): the relay's own are some 120 with their softened forms; the rest is room for
what next hops make up."""
NAME_SETS: Final = 100
"""Listeners, and next hops: a page with more of them helps nobody, and each next hop costs 16 series."""
SMALL_SETS: Final = 64
"""Reasons: names from our own code."""
SUPERVISOR: Final = "supervisor"
"""The member without a loop: it flushes when it has counted something, and does not claim to be alive."""
OTHER: Final = "other"
"""Label of everything beyond a bound."""

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
"""Upper bounds of the latency buckets: express takes milliseconds, a tarpitting next hop minutes."""


Outcome = Literal["delivered", "deferred", "bounced", "our_fault", "discarded"]
"""What became of one recipient at a next hop. Strings, because hashing an enum member takes 0.2 µs."""

NextHopState = Literal["up", "down", "misconfigured"]
"""How a worker sees a next hop."""

Shortage = Literal["places", "memory", "descriptors"]
"""What a worker can be short of."""

_KeyT = TypeVar("_KeyT")
_MetricT = TypeVar("_MetricT", Counter, Gauge, Histogram)
_Known = Mapping[str, Sequence[Mapping[str, str]]]


class _Bounded(Generic[_MetricT]):
    """The label sets of one metric, at most ``limit`` of them and ``other``, over all processes of the slot."""

    __slots__ = ("_children", "_limit", "_metric")

    def __init__(self, metric: _MetricT, family: Family, limit: int, known: _Known) -> None:
        self._metric: _MetricT = metric
        self._limit = limit
        self._children: dict[tuple[str, ...], _MetricT] = {} if family.labels else {(): metric}
        for labels in known.get(family.name, ()):
            if labels.keys() == set(family.labels):
                self.child(tuple(labels[name] for name in family.labels))

    def child(self, labels: tuple[str, ...]) -> _MetricT:
        child = self._children.get(labels)
        if child is None:
            if len(self._children) >= self._limit:
                overflow: _MetricT = self._metric.labels(*[OTHER] * len(labels))
                return overflow
            child = self._metric.labels(*map(label_text, labels))
            self._children[labels] = child
        return child


class _Counted(Generic[_KeyT]):
    """A counter. ``pending`` is what the hot path bumps; it stays the same object for ever."""

    __slots__ = ("_children", "_labels", "pending")

    def __init__(self, family: Family, limit: int, labels: Callable[[_KeyT], tuple[str, ...]], known: _Known) -> None:
        counter = Counter(family.name, family.text, family.labels, registry=None)
        self._children = _Bounded(counter, family, limit, known)
        self._labels = labels
        self.pending: defaultdict[_KeyT, int] = defaultdict(int)

    def flush(self) -> None:
        if self.pending:
            for key, count in self.pending.items():
                self._children.child(self._labels(key)).inc(count)
            self.pending.clear()


def _gauge(family: Family) -> Gauge:
    return Gauge(family.name, family.text, family.labels, registry=None, multiprocess_mode=family.merge)


class _Shown(Generic[_KeyT]):
    """A gauge. ``current`` holds the values; its keys are made of names from the configuration."""

    __slots__ = ("_children", "_labels", "current")

    def __init__(self, family: Family, limit: int, labels: Callable[[_KeyT], tuple[str, ...]]) -> None:
        self._children = _Bounded(_gauge(family), family, limit, {})
        self._labels = labels
        self.current: defaultdict[_KeyT, int] = defaultdict(int)

    def flush(self) -> None:
        sums: defaultdict[Gauge, int] = defaultdict(int)
        for key, value in self.current.items():
            sums[self._children.child(self._labels(key))] += value
        for gauge, value in sums.items():
            gauge.set(value)


class _Timing:
    """Durations between two flushes, by bucket."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


class _Timed(Generic[_KeyT]):
    """A histogram; ``pending`` as in ``_Counted``."""

    __slots__ = ("_children", "_labels", "pending")

    def __init__(self, family: Family, limit: int, labels: Callable[[_KeyT], tuple[str, ...]], known: _Known) -> None:
        histogram = Histogram(family.name, family.text, family.labels, registry=None, buckets=SECONDS)
        self._children = _Bounded(histogram, family, limit, known)
        self._labels = labels
        self.pending: defaultdict[_KeyT, _Timing] = defaultdict(_Timing)

    def flush(self) -> None:
        if self.pending:
            for key, timing in self.pending.items():
                observe_in_bulk(self._children.child(self._labels(key)), timing.counts, timing.total)
            self.pending.clear()


def _reply(kind: Kind) -> tuple[str, ...]:
    return (str(kind.code), kind.enhanced, kind.reason)


def _name(name: str) -> tuple[str, ...]:
    return (name,)


def _same(labels: tuple[str, ...]) -> tuple[str, ...]:
    return labels


class Metrics:
    """The counters of one member. ``identifier`` names its slot: ``worker-0``, ``hub``, ``web``, or ``SUPERVISOR``.

    Make it after the fork, one per process. ``problem`` is the OSError that keeps the values from the metrics page
    (disk full, wrong owner), else None: the relay works without.

    ``replies`` may be bumped directly where a call is too much: ``metrics.replies[kind] += 1`` (40 ns; a method 80).
    """

    def __init__(self, folder: Path, identifier: str, clock: Callable[[], float] = time.time) -> None:
        self._files = ValueFiles(folder, identifier)
        self._files.select()
        self.problem: OSError | None = self._files.problem
        known = self._files.known
        replies = _Counted(catalogue.REPLIES, REPLY_SETS, _reply, known)
        sessions = _Counted(catalogue.SESSIONS, NAME_SETS, _name, known)
        received = _Counted(catalogue.RECEIVED_MESSAGES, NAME_SETS, _name, known)
        received_octets = _Counted(catalogue.RECEIVED_BYTES, NAME_SETS, _name, known)
        accepted = _Counted(catalogue.ACCEPTED, SMALL_SETS, _same, known)
        logins = _Counted(catalogue.LOGINS, SMALL_SETS, _same, known)
        shadow = _Counted(catalogue.SHADOW, SMALL_SETS, _name, known)
        sent = _Counted(catalogue.SENT_MESSAGES, NAME_SETS, _name, known)
        sent_octets = _Counted(catalogue.SENT_BYTES, NAME_SETS, _name, known)
        deliveries = _Counted(catalogue.DELIVERIES, NAME_SETS * len(get_args(Outcome)), _same, known)
        restarts = _Counted(catalogue.RESTARTS, SMALL_SETS, _same, known)
        self._headers_removed = _Counted(catalogue.HEADERS_REMOVED, 1, _same, known)
        self._late = _Counted(catalogue.LATE, 1, _same, known)
        self._duplicates = _Counted(catalogue.POSSIBLE_DUPLICATES, 1, _same, known)
        self._refusals = _Counted(catalogue.SNAPSHOT_REFUSALS, 1, _same, known)
        self._callouts = _Counted(catalogue.CALLOUTS, SMALL_SETS, _name, known)
        self._lines_lost = _Counted(catalogue.LOG_LINES_LOST, 1, _same, known)
        open_sessions = _Shown(catalogue.OPEN_SESSIONS, NAME_SETS, _name)
        short_of = _Shown(catalogue.SHORT_OF, SMALL_SETS, _name)
        states = _Shown(catalogue.NEXT_HOP_STATE, NAME_SETS * len(get_args(NextHopState)), _same)
        connections = _Shown(catalogue.NEXT_HOP_CONNECTIONS, NAME_SETS, _name)
        accept = _Timed(catalogue.ACCEPT_SECONDS, 1, _same, known)
        delivery = _Timed(catalogue.DELIVERY_SECONDS, NAME_SETS, _name, known)

        self.replies: Final = replies.pending
        self._sessions: Final = sessions.pending
        self._received: Final = received.pending
        self._received_octets: Final = received_octets.pending
        self._ways: Final = accepted.pending
        self._logins: Final = logins.pending
        self._shadow: Final = shadow.pending
        self._sent: Final = sent.pending
        self._sent_octets: Final = sent_octets.pending
        self._deliveries: Final = deliveries.pending
        self._restarts: Final = restarts.pending
        self._open: Final = open_sessions.current
        self._short_of: Final = short_of.current
        for what in get_args(Shortage):
            self._short_of[what] = 0
        self._states: Final = states.current
        self._connections: Final = connections.current
        self._accept_times: Final = accept.pending
        self._delivery_times: Final = delivery.pending
        self._snapshot: Gauge | None = None
        self._callout_off: Gauge | None = None
        self._clock = clock
        self._closed = False
        self._alive = None if identifier == SUPERVISOR else _gauge(catalogue.ALIVE).labels(label_text(identifier))
        self._flushes: Final = tuple(
            family.flush
            for family in (
                replies,
                sessions,
                received,
                received_octets,
                accepted,
                logins,
                shadow,
                sent,
                sent_octets,
                deliveries,
                restarts,
                self._headers_removed,
                self._late,
                self._duplicates,
                self._refusals,
                self._lines_lost,
                self._callouts,
                open_sessions,
                short_of,
                states,
                connections,
                accept,
                delivery,
            )
        )

    def flush(self) -> None:
        """Bring the value files up to date: some 10 µs when little happened."""
        self._files.select()
        if self._alive is not None:
            self._alive.set(self._clock())
        for flush in self._flushes:
            flush()

    def close(self) -> None:
        """Flush and let go of the files; the values stay readable."""
        if not self._closed:
            self.flush()
            self._closed = True
            self._files.close()

    # --- inbound ---
    def replied(self, kind: Kind, count: int = 1) -> None:
        """``count`` replies of one kind went to a client."""
        self.replies[kind] += count

    def session_opened(self, listener: str) -> None:
        """A client was let in."""
        self._sessions[listener] += 1
        self._open[listener] += 1

    def session_closed(self, listener: str) -> None:
        """Counterpart of ``session_opened``."""
        self._open[listener] -= 1

    def short_of(self, what: Shortage, short: int) -> None:
        """1: this worker has too little of it from now on; 0: enough."""
        self._short_of[what] = short

    def received(self, listener: str, octets: int) -> None:
        """A message came in and was acknowledged."""
        self._received[listener] += 1
        self._received_octets[listener] += octets

    def accepted(self, seconds: float) -> None:
        """Dispatch answered, so long after the final dot."""
        self._accept_times[()].add(seconds)

    def login(self, mechanism: str, result: str) -> None:
        """An AUTH dialogue came to its end; both are names from our code."""
        self._logins[mechanism, result] += 1

    def shadow(self, kind: Kind) -> None:
        """A rule in ``mode = "log"`` would have given this reply."""
        self._shadow[kind.reason] += 1

    def shadow_headers(self, count: int) -> None:
        """Header fields the firewall met in ``mode = "log"``."""
        self._shadow["header_firewall"] += count

    def headers_removed(self, count: int) -> None:
        """Header lines the firewall took out of one message."""
        self._headers_removed.pending[()] += count

    # --- dispatch and outbound; ``next_hop`` is the name a route gives it ---
    def express(self) -> None:
        """A message was acknowledged after the next hop's own 250."""
        self._ways["express", "express"] += 1

    def queued(self, reason: str) -> None:
        """A message was acknowledged from the queue, because of ``reason`` (a name from our code, not text)."""
        self._ways["queue", reason] += 1

    def late(self) -> None:
        """An express attempt outlasted its deadline: the message was queued and acknowledged meanwhile."""
        self._late.pending[()] += 1

    def possible_duplicate(self, count: int = 1) -> None:
        """Recipients tried again although an earlier final dot may have been taken (RFC 1047)."""
        self._duplicates.pending[()] += count

    def sent(self, next_hop: str, octets: int) -> None:
        """A next hop took a message."""
        self._sent[next_hop] += 1
        self._sent_octets[next_hop] += octets

    def delivery(self, next_hop: str, outcome: Outcome) -> None:
        """The result of one attempt for one recipient."""
        self._deliveries[next_hop, outcome] += 1

    def delivery_seconds(self, next_hop: str, seconds: float) -> None:
        """Time from MAIL to the reply to the final dot."""
        self._delivery_times[next_hop].add(seconds)

    def next_hop_state(self, next_hop: str, state: NextHopState) -> None:
        """How this worker sees a next hop from now on."""
        for each in get_args(NextHopState):
            self._states[next_hop, each] = int(each == state)

    def next_hop_connections(self, next_hop: str, count: int) -> None:
        """Connections this worker has open to a next hop."""
        self._connections[next_hop] = count

    # --- members ---
    def snapshot_in_use(self, generation: int) -> None:
        """This worker decides by that generation. Written at once; made here, for a member without one says nothing."""
        if self._snapshot is None:
            self._files.select()
            self._snapshot = _gauge(catalogue.SNAPSHOT_IN_USE)
        self._snapshot.set(generation)

    def callout(self, result: str) -> None:
        """A next hop was asked about a recipient, or would have been: valid, unknown, no_answer, budget."""
        self._callouts.pending[result] += 1

    def callouts_off(self, count: int) -> None:
        """So many domains have a next hop that takes anything."""
        if self._callout_off is None:
            self._callout_off = _gauge(catalogue.CALLOUT_OFF)
        self._callout_off.set(count)

    def snapshot_refused(self) -> None:
        """A new snapshot could not be taken; the previous one serves on."""
        self._refusals.pending[()] += 1

    def log_lines_lost(self, count: int) -> None:
        """Lines the log writer had to drop."""
        self._lines_lost.pending[()] += count

    def restarted(self, role: str, cause: str) -> None:
        """The supervisor replaces a process of ``role`` (``cause``: exit, signal, heartbeat)."""
        self._restarts[role, cause] += 1
