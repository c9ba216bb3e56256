"""Owns: a worker's connection to the hub, and what holds while there is none.

Hot: ``open`` and ``close`` run once per SMTP connection, so answers come by callback, without task or future, and all
frames of one loop iteration leave in one write. Must not know SMTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeAlias, cast

from relay.hub.budgets import Budgets
from relay.hub.frames import ANSWER, COUNT_MAX, REQUEST, VERSION, Ask, Tell, Verdict, client_key
from relay.hub.reach import Reach

ANSWER_TIMEOUT_S: Final = 1.0
"""A hub that leaves a question open for longer is treated as gone: clients wait for their greeting meanwhile."""

CLOSE_DELAY_S: Final = 0.003
"""A session's end waits this long for another one's beginning to go along with; until then it counts as open. Where
sessions are short that halves what the hub is asked (35 µs of each connection)."""

PENDING_MAX: Final = 8192
"""Questions under way; more are decided locally. A hub answers within a millisecond, so this is never seen."""

_Answer: TypeAlias = Callable[[Verdict], None]


class HubClient:
    """Exact session limits over all workers while the hub is there, this worker's share of them while it is not."""

    __slots__ = (
        "_batch",
        "_closing",
        "_flushing",
        "_guard",
        "_key",
        "_link",
        "_load",
        "_loop",
        "_open",
        "_pending",
        "_per_client",
        "_reach",
        "_sessions",
        "_tag",
        "_total",
        "_welcome",
        "budgets",
        "live_workers",
    )

    def __init__(self, address: str, sessions: int, per_client: int, live_workers: int) -> None:
        """``address``: path of the hub's socket. ``live_workers`` may be set at any time."""
        self._reach = Reach(address, lambda: _Link(self))
        self._sessions = sessions
        self._per_client = per_client
        self.live_workers = live_workers
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: _Link | None = None
        self._welcome: asyncio.Event = asyncio.Event()
        self._guard: asyncio.TimerHandle | None = None
        self._batch = bytearray()
        self._flushing = False
        self._closing: asyncio.TimerHandle | None = None
        self._pending: dict[int, tuple[int, _Answer]] = {}  # in order of asking; at most PENDING_MAX
        self._tag = 0
        self._open: dict[int, int] = {}  # sessions per client key; at most `sessions`
        self._total = 0
        self._load = 0
        self._key = 0
        self.budgets = Budgets()

    @property
    def load(self) -> int:
        """Sessions open over all workers, as of 200 ms ago; without a hub, what they are if all hold as many as this one."""
        return self._load if self._welcome.is_set() else self._total * self.live_workers

    @property
    def connected(self) -> bool:
        """Whether the hub decides; otherwise local limits do."""
        return self._welcome.is_set()

    async def start(self) -> None:
        """Connect, and wait a moment for the hub; afterwards reconnect by itself until ``stop``."""
        self._loop = self._reach.begin()
        await self._reach.first_word(self._welcome)

    def stop(self) -> None:
        """Disconnect for good; questions under way are answered by local limits."""
        self._reach.stop()
        for handle in (self._guard, self._closing):
            if handle is not None:
                handle.cancel()
        if self._link is not None:
            self._link.abort()

    def limit(self, sessions: int, per_client: int) -> None:
        """Take new limits for the time without a hub; the hub has its own from the configuration."""
        self._sessions = sessions
        self._per_client = per_client

    def open(self, client: str, answer: _Answer) -> None:
        """Ask whether a session of ``client`` (an IP address) may open.

        ``answer`` is called exactly once, possibly before this returns. After ``Verdict.OK`` the caller owes one
        ``close``, also when its client has gone meanwhile. Raises ValueError when ``client`` is not an address.
        """
        key = client_key(client)
        if not self._welcome.is_set() or len(self._pending) >= PENDING_MAX:
            answer(self._decide(key))
            return
        self._tag = tag = (self._tag + 1) & 0xFFFFFFFF
        self._pending[tag] = (key, answer)
        self._write(Ask.OPEN, tag, key)
        if self._guard is None:
            assert self._loop is not None
            self._guard = self._loop.call_later(ANSWER_TIMEOUT_S, self._check, tag)

    def close(self, client: str) -> None:
        """A session that was allowed to open ended."""
        key = client_key(client)
        left = self._open[key] - 1
        if left:
            self._open[key] = left
        else:
            del self._open[key]
        self._total -= 1
        if self._link is not None:
            self._write(Ask.CLOSE, 0, key)

    def exchange(self) -> None:
        """Tell the hub what clients spent since the last call; the worker calls this every ``budgets.EXCHANGE_S``."""
        assert self._loop is not None
        for budget, key, count in self.budgets.changes(self._loop.time()):
            if self._link is not None:
                self._write(Ask.SPENT, budget << 24 | min(count, COUNT_MAX), key)

    def _decide(self, key: int) -> Verdict:
        """By this worker's share of the limits, at least 1."""
        known = self._open.get(key, 0)
        if self._total >= max(1, self._sessions // self.live_workers):
            return Verdict.BUSY
        if known >= max(1, self._per_client // self.live_workers):
            return Verdict.CLIENT_BUSY
        self._open[key] = known + 1
        self._total += 1
        if self._link is not None:
            self._write(Ask.ANNOUNCE, 1, key)
        return Verdict.OK

    def _write(self, ask: Ask, argument: int, key: int) -> None:
        assert self._loop is not None
        if ask is Ask.CLOSE:
            if self._closing is None:
                self._closing = self._loop.call_later(CLOSE_DELAY_S, self._flush)
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        self._batch += REQUEST.pack(ask, argument, key)

    def _flush(self) -> None:
        self._flushing = False
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if self._link is not None and self._batch:
            self._link.write(self._batch)
        self._batch = bytearray()

    def _check(self, tag: int) -> None:
        """``tag`` was asked ``ANSWER_TIMEOUT_S`` ago."""
        self._guard = None
        if tag in self._pending and self._link is not None:
            self._link.abort()
        elif self._pending:
            assert self._loop is not None
            self._guard = self._loop.call_later(ANSWER_TIMEOUT_S, self._check, self._tag)

    def linked(self, link: _Link) -> None:
        """Connected: say what is open. From now on every change is told; OPEN has to wait for the welcome."""
        self._link = link
        self._batch = bytearray()
        for key, count in self._open.items():
            self._batch += REQUEST.pack(Ask.ANNOUNCE, count, key)
        self._batch += REQUEST.pack(Ask.HELLO, VERSION, 0)
        self._flush()

    def lost(self) -> None:
        """The hub is gone: local limits decide, questions under way included."""
        self._link = None
        self._welcome.clear()
        self._batch = bytearray()
        pending, self._pending = self._pending, {}
        for key, answer in pending.values():
            answer(self._decide(key))
        self._reach.again()

    def told(self, frames: bytes) -> None:
        """What the hub says, whole frames."""
        for tell, verdict, argument in ANSWER.iter_unpack(frames):
            if tell == Tell.VERDICT:
                asked = self._pending.pop(argument, None)
                if asked is None:
                    continue
                key, answer = asked
                if verdict == Verdict.OK:
                    self._open[key] = self._open.get(key, 0) + 1
                    self._total += 1
                answer(_VERDICTS[verdict])
            elif tell == Tell.WELCOME and argument == VERSION:
                self._welcome.set()
            else:
                self._hear(tell, argument)

    def _hear(self, tell: int, argument: int) -> None:
        """What the other workers' clients do."""
        if tell == Tell.LOAD:
            self._load = argument
        elif tell == Tell.KEY_HIGH:
            self._key = argument << 32
        elif tell == Tell.KEY_LOW:
            self._key |= argument
        elif tell == Tell.SPENT:
            assert self._loop is not None
            self.budgets.hear(argument >> 24, self._key, argument & COUNT_MAX, self._loop.time())


_VERDICTS: Final = tuple(Verdict)


class _Link(asyncio.Protocol):
    """One connection to the hub."""

    __slots__ = ("_client", "_rest", "_transport")

    def __init__(self, client: HubClient) -> None:
        self._client = client
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class is no subclass of it
        self._client.linked(self)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        cut = len(data) - len(data) % ANSWER.size
        self._rest = data[cut:]
        self._client.told(data[:cut] if self._rest else data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost()

    def write(self, frames: bytearray) -> None:
        """Hand frames to the transport."""
        if self._transport is not None:
            self._transport.write(frames)

    def abort(self) -> None:
        """Break the connection off."""
        if self._transport is not None:
            self._transport.abort()
