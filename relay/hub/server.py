"""Owns: the hub process: exact counts of open sessions over all workers, and the limits on them.

One connection per worker. What a worker holds is counted per connection too, so that its death takes its counts along.
It keeps the schedule of
reading directories, too (``directory.schedule``). It must not know SMTP or the queue.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Final, cast

import uvloop

from relay.config.schema import Config, Limits
from relay.control import Abort, Child, Commit, Control, Drain, Prepare, Prepared, Ready, Refused, Reopen, Secrets
from relay.directory.placement import UNLISTED
from relay.directory.schedule import Schedule
from relay.directory.sync import Outcome
from relay.hub.budgets import EXCHANGE_S
from relay.hub.frames import ANSWER, REQUEST, VERSION, Ask, Tell, Verdict
from relay.policy.abuse import Budget
from relay.telemetry.logs import LogWriter
from relay.telemetry.maillog import MailLog, adopt, note

if TYPE_CHECKING:
    from relay.auth.server import Desk
    from relay.auth.stores import Stores

CONNECTIONS_MAX: Final = 256
"""Open connections: 64 workers (the most there can be), their predecessors not yet noticed as dead, and diagnosis."""

ANNOUNCED_MAX_FACTOR: Final = 2
"""A worker may announce this many times ``limits.sessions``: more than it can hold by itself (its local limit is never
above the whole limit, and the limit may have been halved since); beyond that it is out of order and is cut off."""

SETTLE_S: Final = 0.4
"""After a crash the next hub lets workers ask only when all have announced what they hold, or after this long: twice
the workers' reconnect interval. Until then they keep to their local limits, so the sum stays within the limit."""


SPENT_MAX: Final = 16_384
"""What is spent of budgets is repeated for so many keys in 200 ms (some 5 MB for 64 workers); more counts only where it was
spent."""


class Counts:
    """Open sessions, in total and per client key. At most ``limits.sessions`` plus announcements entries."""

    __slots__ = ("clients", "per_client", "sessions", "total")

    def __init__(self, limits: Limits) -> None:
        self.clients: dict[int, int] = {}
        self.total = 0
        self.sessions = limits.sessions
        self.per_client = limits.sessions_per_client

    def limit(self, limits: Limits) -> None:
        """Take new limits; sessions that are open stay open."""
        self.sessions = limits.sessions
        self.per_client = limits.sessions_per_client

    def remove(self, key: int, count: int) -> None:
        """``count`` sessions of a client ended."""
        left = self.clients[key] - count
        if left:
            self.clients[key] = left
        else:
            del self.clients[key]
        self.total -= count


class Hub:
    """The counts, and who may ask when."""

    def __init__(self, limits: Limits, live_workers: int, loop: asyncio.AbstractEventLoop, *, first: bool) -> None:
        """``first``: it starts together with its workers, so nobody can hold a session yet."""
        self.counts = Counts(limits)
        self.workers: set[WorkerLink] = set()
        self.desk: Desk | None = None
        """Where logins are checked; None without stores."""
        self._settled = first
        self._expected = live_workers
        self._spent: list[tuple[WorkerLink, int, int]] = []
        self._load = 0
        self._loop = loop
        loop.call_later(EXCHANGE_S, self._exchange)
        if not self._settled:
            loop.call_later(SETTLE_S, self._settle)

    def spent(self, link: WorkerLink, argument: int, key: int) -> None:
        """A worker's client spent of a budget."""
        if len(self._spent) < SPENT_MAX:
            self._spent.append((link, argument, key))

    def _exchange(self) -> None:
        """Repeat to each worker what the others told, and how many sessions are open when that changed."""
        self._loop.call_later(EXCHANGE_S, self._exchange)
        spent, self._spent = self._spent, []
        load = self.counts.total
        told = b"" if load == self._load else ANSWER.pack(Tell.LOAD, 0, load)
        self._load = load
        pack = ANSWER.pack
        if not spent and not told:
            return
        for worker in self.workers:
            if worker.greeted:
                frames = bytearray(told)
                for link, argument, key in spent:
                    if link is not worker:
                        frames += pack(Tell.KEY_HIGH, 0, key >> 32)
                        frames += pack(Tell.KEY_LOW, 0, key & 0xFFFFFFFF)
                        frames += pack(Tell.SPENT, 0, argument)
                worker.tell(frames)

    def greeted(self, link: WorkerLink) -> None:
        """A worker has announced what it holds."""
        self._load = -1  # it has to be told
        if self._settled:
            link.welcome()
        elif sum(worker.greeted for worker in self.workers) >= self._expected:
            self._settle()

    def _settle(self) -> None:
        if not self._settled:
            self._settled = True
            for worker in self.workers:
                if worker.greeted:
                    worker.welcome()


class WorkerLink(asyncio.Protocol):
    """One worker's connection. Frames of one read are answered by one write."""

    __slots__ = ("_counts", "_hub", "_rest", "_transport", "greeted", "held", "holds")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._counts = hub.counts
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self.greeted = False
        self.held: dict[int, int] = {}
        self.holds = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class is no subclass of it
        if len(self._hub.workers) >= CONNECTIONS_MAX:
            self._break("there are too many connections")
            return
        self._hub.workers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._hub.workers.discard(self)
        for key, count in self.held.items():
            self._counts.remove(key, count)
        self.held.clear()

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        cut = len(data) - len(data) % REQUEST.size
        self._rest = data[cut:]
        answers = self._answer(data[:cut] if self._rest else data)
        if answers and self._transport is not None:
            self._transport.write(answers)

    def _answer(self, frames: bytes) -> bytearray:
        """All of one read in one loop, without a call per frame: this runs twice for every connection of the relay."""
        counts, clients, held = self._counts, self._counts.clients, self.held
        answers = bytearray()
        pack = ANSWER.pack
        for ask, argument, key in REQUEST.iter_unpack(frames):
            if ask == Ask.OPEN:
                known = clients.get(key, 0)
                if counts.total >= counts.sessions:
                    verdict = Verdict.BUSY
                elif known >= counts.per_client:
                    verdict = Verdict.CLIENT_BUSY
                else:
                    verdict = Verdict.OK
                    clients[key] = known + 1
                    counts.total += 1
                    held[key] = held.get(key, 0) + 1
                    self.holds += 1
                answers += pack(Tell.VERDICT, verdict, argument)
            elif ask == Ask.CLOSE:
                if not self._close(key):
                    self._break("it closed a session that it did not hold")
                    break
            elif not self._rare(ask, argument, key):
                break
        return answers

    def _close(self, key: int) -> bool:
        mine = self.held.get(key, 0)
        if not mine:
            return False
        if mine == 1:
            del self.held[key]
        else:
            self.held[key] = mine - 1
        self.holds -= 1
        self._counts.remove(key, 1)
        return True

    def _rare(self, ask: int, argument: int, key: int) -> bool:
        """Frames of a new connection; False when it was ended."""
        if ask == Ask.LOGINS and argument == VERSION and not self.greeted and not self.holds:
            self._hand_over()
            return False
        if ask == Ask.HELLO and argument == VERSION:
            self.greeted = True
            self._hub.greeted(self)
            return True
        if ask == Ask.SPENT and argument >> 24 < len(Budget):
            self._hub.spent(self, argument, key)
            return True
        if ask == Ask.ANNOUNCE and self.holds + argument <= ANNOUNCED_MAX_FACTOR * self._counts.sessions:
            if argument:
                self.held[key] = self.held.get(key, 0) + argument
                self.holds += argument
                self._counts.clients[key] = self._counts.clients.get(key, 0) + argument
                self._counts.total += argument
            return True
        self._break(f"it sent a frame that makes no sense (type {ask}, argument {argument})")
        return False

    def _hand_over(self) -> None:
        """The connection is about logins: let the desk have it. Nothing else is sent before the desk has spoken."""
        desk, transport = self._hub.desk, self._transport
        if desk is None or transport is None:
            self._break("it asks about logins, and there is no store")
            return
        self._transport = None
        self._hub.workers.discard(self)
        transport.set_protocol(desk.link(transport))

    def welcome(self) -> None:
        """The worker may ask from now on."""
        if self._transport is not None:
            self._transport.write(ANSWER.pack(Tell.WELCOME, 0, VERSION))

    def tell(self, frames: bytearray) -> None:
        """News from the other workers."""
        if frames and self._transport is not None:
            self._transport.write(frames)

    def close(self) -> None:
        """End the connection; the worker turns to its local limits."""
        if self._transport is not None:
            self._transport.close()

    def _break(self, why: str) -> None:
        note("warning", "hub_link_closed", why=why)
        if self._transport is not None:
            self._transport.abort()


class Member:
    """The hub as a member of the process tree: log, configuration, drain."""

    def __init__(self, child: Child, loop: asyncio.AbstractEventLoop) -> None:
        self._hub = Hub(child.config.limits, child.live_workers, loop, first=child.incarnation == 1)
        self._listening = child.hub
        self._loop = loop
        self._prepared: tuple[Config, Secrets, Stores | None] | None = None
        self._config = child.config
        self._secrets = child.secrets
        self._schedule = Schedule(loop, _told, _heard)
        self._writer = LogWriter(child.config.log.file)
        self._adopt_log()
        if child.config.auth.stores:
            self._hub.desk = _desk(child.config, child.secrets, loop)
        self._drained = asyncio.Event()
        self._control = Control(child.control, loop, child.config.process.heartbeat_timeout_s)
        self._control.on(Prepare, self._prepare)
        self._control.on(Commit, self._commit)
        self._control.on(Abort, self._abort)
        self._control.on(Reopen, lambda _: self._writer.reopen())
        self._control.on(Drain, lambda _: self._drained.set())

    async def serve(self) -> int:
        """Count until drained; the exit code."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: WorkerLink(self._hub), sock=self._listening)
        self._control.send(Ready())
        self._read_directories()
        await self._drained.wait()
        self._schedule.stop()
        server.close()
        if self._hub.desk is not None:
            self._hub.desk.close()
        for worker in tuple(self._hub.workers):
            worker.close()
        self._control.close()
        self._writer.close()
        return 0

    def _prepare(self, message: Prepare) -> None:
        stores: Stores | None = None
        if message.config.auth.stores:
            try:
                load(message.config)
                stores, problems = importlib.import_module("relay.auth.stores").prepare(
                    message.config, message.secrets.directory_passwords
                )
            except ImportError as error:
                self._control.send(Refused(f"the first auth.stores need a restart: {error}"))
                return
            if problems:
                self._control.send(Refused("; ".join(problems)))
                return
        self._prepared = (message.config, message.secrets, stores)
        self._control.send(Prepared())

    def _commit(self, _: Commit) -> None:
        if self._prepared is not None:
            (self._config, self._secrets, stores), self._prepared = self._prepared, None
            self._hub.counts.limit(self._config.limits)
            if self._hub.desk is not None:
                self._hub.desk.commit(self._config, stores)
            elif stores is not None:
                self._hub.desk = _desk(self._config, self._secrets, self._loop)
            self._adopt_log()
            self._read_directories()

    def _read_directories(self) -> None:
        self._schedule.configure(self._config, self._secrets.directory_passwords, self._secrets.snapshot_key)

    def _abort(self, _: Abort) -> None:
        self._prepared = None

    def _adopt_log(self) -> None:
        """Its few lines are written at once, without a thread."""
        adopt(MailLog(self._writer, self._config.log.format, self._config.server.hostname))


def _heard(directory: str, entries: int) -> None:
    """The log's line about a reading that takes long."""
    if directory:
        note("info", "directory_reading", directory=directory, entries=entries)


def _told(outcome: Outcome) -> None:
    """The log's line about a reading of directories."""
    if outcome.reason:
        note("error", "directory_not_read", reason=outcome.reason, why=outcome.why, cure=outcome.cure)
    elif outcome.held:
        note("warning", "directory_held", why=outcome.held)
    else:
        note(
            "info",
            "directory_read",
            generation=outcome.generation,
            kind=outcome.kind,
            seconds=round(outcome.seconds, 3),
            added=outcome.difference["added"],
            removed=outcome.difference["removed"],
            changed=outcome.difference["changed"],
            **({"twice": outcome.twice} if outcome.twice else {}),
            servers=" ".join(reading["server"] for reading in outcome.readings),
        )
        for reason, count in outcome.skipped.items():
            if reason.startswith(UNLISTED):
                note("warning", "directory_next_hop_unlisted", why=reason, addresses=count)
        for reading in outcome.readings:
            for failed in reading["failed"]:
                note("warning", "directory_server_failed", directory=reading["profile"], why=failed)


def load(config: Config) -> None:
    """Import what checks logins, while that is still possible: some libraries, which no other process needs."""
    if config.auth.stores:
        importlib.import_module("relay.auth.server").preload(config)


def _desk(config: Config, secrets: Secrets, loop: asyncio.AbstractEventLoop) -> Desk:
    made: Desk = importlib.import_module("relay.auth.server").Desk(config, secrets.directory_passwords, loop)
    return made


def run(child: Child) -> int:
    """Serve until drained; returns the exit code. The listening socket is the supervisor's and outlives this hub."""

    async def serve() -> int:
        return await Member(child, asyncio.get_running_loop()).serve()

    return uvloop.run(serve())
