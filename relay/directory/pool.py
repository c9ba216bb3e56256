"""Owns: the connections of one store to the servers of its directory: how many, which server, what to do when one fails.

Apart from those that read the whole directory. A server that fails is left alone for a moment that grows, the next one is
asked meanwhile, and while none is left the caller is told so at once: a login never waits for a server known to be dead.
A question may be asked of another server; a password never (``give_password``): each failure counts there. It must not know
accounts, nor keep a password but that of the relay itself.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from relay.config.ldap import LdapProfile, LdapServer
from relay.directory.failure import MENDS_ELSEWHERE, LdapFailure, Reason, decoded
from relay.directory.link import Link, connect
from relay.directory.tls import context

IDLE_S: Final = 60.0
"""An unused connection is closed after this long: firewalls forget theirs after some minutes, without a word."""
AGE_S: Final = 600.0
"""No connection gets older: servers change their certificates and their order."""
PAUSE_S: Final = 0.5
PAUSE_MAX_S: Final = 10.0
"""A server that failed is left alone for between these, twice as long after each failure."""
REFUSED_S: Final = 30.0
"""The same after it refused the relay's own login: each try brings that account nearer to its lock-out."""
WAITING_MAX: Final = 1024
"""Logins that wait for a connection; more are told to come again."""
LEAST_S: Final = 0.1
"""With less time than this no server is asked: it would be blamed for the wait of others."""
CONTEXT_S: Final = 300.0
"""How long what is trusted is remembered: loading the system's authorities takes 20 ms of everybody's time."""

_ResultT = TypeVar("_ResultT")
Told = Callable[[LdapServer, LdapFailure | None], None]
"""Called when a server fails that did not before, and with None when it is back."""


@dataclass(slots=True)
class _Server:
    at: LdapServer
    idle: list[Link] = field(default_factory=list)
    failures: int = 0
    until: float = 0.0
    """Left alone until then."""
    probing: bool = False
    """One login tries it again; the others do not wait for what comes of that."""
    last: LdapFailure | None = None


class Pool:
    """Connections that are logged in as the relay (``service``), or as nobody in particular."""

    def __init__(self, profile: LdapProfile, password: str, most: int, told: Told, *, service: bool) -> None:
        """At most ``most`` connections. ``password`` is the relay's own."""
        self._profile = profile
        self._password = password.encode()
        self._service = service and bool(profile.bind)
        self._most = most
        self._told = told
        self._servers = [_Server(server) for server in profile.targets()]
        self._open = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._context: tuple[float, ssl.SSLContext] | None = None
        self._closed = False

    def close(self) -> None:
        """Hang up; questions under way are answered still."""
        self._closed = True
        for server in self._servers:
            while server.idle:
                self._leave(server.idle.pop())

    async def ask(self, question: Callable[[Link, float], Awaitable[_ResultT]], until: float) -> _ResultT:
        """The answer of the first server that gives one before ``until`` (time of the loop). Raises LdapFailure.

        ``question`` gets a connection and the time it has there. It may be asked several times.
        """
        while True:
            server, link = await self._acquire(until)
            used = link.asked
            try:
                answer = await question(link, self._share(until))
            except LdapFailure as failure:
                self._leave(link)
                if failure.reason not in MENDS_ELSEWHERE:
                    raise
                if not (used and failure.reason is Reason.LOST):  # one that was idle may have ended long ago
                    self._failed(server, failure)
                continue
            except BaseException:
                self._leave(link)
                raise
            self._answered(server, link)
            return answer

    async def give_password(self, question: Callable[[Link, float], Awaitable[_ResultT]], until: float) -> _ResultT:
        """The answer of one server, whatever comes of it. Raises LdapFailure: then nobody knows what the server noted."""
        server, link = await self._acquire(until)
        used = link.asked
        try:
            answer = await question(link, until)
        except LdapFailure as failure:
            self._leave(link)
            if not (used and failure.reason is Reason.LOST):
                self._failed(server, failure)
            raise
        except BaseException:
            self._leave(link)
            raise
        self._answered(server, link)
        return answer

    # --- connections ---------------------------------------------------------------------------------------------------
    async def _acquire(self, until: float) -> tuple[_Server, Link]:
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() > until - LEAST_S:
                raise LdapFailure(Reason.SLOW, "the directory took all the time that a login has")
            server = self._best(loop.time())
            while server.idle:
                link = server.idle.pop()
                if self._fit(link, loop.time()):
                    return server, link
                self._leave(link)
            if self._open >= self._most:
                spare = next((one for one in reversed(self._servers) if one.idle), None)
                if spare is not None:  # a connection to a server that is not the best any more
                    self._leave(spare.idle.pop())
            if self._open < self._most:
                fresh = await self._connect(server, until)
                if fresh is not None:
                    return server, fresh
                continue
            await self._wait(until)

    def _best(self, now: float) -> _Server:
        for server in self._servers:
            if server.until <= now:
                if server.failures:
                    server.probing = True
                    server.until = now + self._pause(server)
                return server
        soonest = min(self._servers, key=lambda server: server.until)
        assert soonest.last is not None
        raise soonest.last

    @staticmethod
    def _fit(link: Link, now: float) -> bool:
        return not link.lost and now - link.used < IDLE_S and now - link.opened < AGE_S

    async def _wait(self, until: float) -> None:
        if len(self._waiting) >= WAITING_MAX:
            raise LdapFailure(Reason.BUSY, "too many logins wait for this directory")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout_at(until):
                await place
        except TimeoutError:
            if place.done() and not place.cancelled():
                self._wake()  # its turn came too late: let the next one have it
            raise LdapFailure(Reason.SLOW, "all connections to the directory are busy") from None
        finally:
            if place in self._waiting:
                self._waiting.remove(place)

    def _share(self, until: float) -> float:
        """A server's part of the time that is left: the others need some, too."""
        now = asyncio.get_running_loop().time()
        usable = sum(server.until <= now for server in self._servers)
        return min(now + (until - now) / max(1, usable), now + self._profile.answer_timeout_s)

    async def _connect(self, server: _Server, until: float) -> Link | None:
        """A new connection; None when the server failed, which is noted. Raises LdapFailure where no other will do better."""
        self._open += 1
        loop = asyncio.get_running_loop()
        try:
            limit = min(self._share(until), loop.time() + self._profile.connect_timeout_s)
            link = await connect(server.at, self._profile, self._trust(loop.time()), limit)
            try:
                if self._service:
                    result = await link.bind(self._profile.bind, self._password, limit)
                    if result.code:
                        raise decoded(result.code, result.diagnostic, server.at.url)
            except BaseException:
                link.abort()
                raise
        except LdapFailure as failure:
            self._freed()
            self._failed(server, failure)
            if failure.reason not in MENDS_ELSEWHERE or loop.time() >= until:
                raise
            return None
        except BaseException:
            self._freed()
            raise
        link.asked = False
        return link

    def _trust(self, now: float) -> ssl.SSLContext | None:
        if self._profile.insecure and not any(server.at.ldaps for server in self._servers):
            return None
        if self._context is None or now - self._context[0] > CONTEXT_S:
            self._context = (now, context(self._profile))
        return self._context[1]

    def _failed(self, server: _Server, failure: LdapFailure) -> None:
        now = asyncio.get_running_loop().time()
        first = not server.failures
        if server.probing or now >= server.until:  # what was under way when it failed adds nothing
            server.failures += 1
            pause = REFUSED_S if failure.reason is Reason.CREDENTIALS else self._pause(server)
            server.until = now + pause
        server.probing = False
        server.last = failure
        while server.idle:
            self._leave(server.idle.pop())
        for place in self._waiting:  # they need not wait for what will not come
            if not place.done():
                place.set_result(None)
        self._waiting.clear()
        if first:
            self._told(server.at, failure)

    @staticmethod
    def _pause(server: _Server) -> float:
        return min(PAUSE_MAX_S, PAUSE_S * 2.0 ** min(max(0, server.failures - 1), 10)) * random.uniform(0.8, 1.2)

    def _answered(self, server: _Server, link: Link) -> None:
        if server.failures:
            server.failures, server.until, server.probing, server.last = 0, 0.0, False, None
            self._told(server.at, None)
        if self._closed or link.lost:
            self._leave(link)
            return
        server.idle.append(link)
        self._wake()

    def _leave(self, link: Link) -> None:
        link.close()
        self._freed()

    def _freed(self) -> None:
        self._open -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
