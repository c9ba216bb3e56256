"""Owns: the worker's end of the questions about logins, and what holds while there is no hub: 454.

Connected all the time, because the hub says here what may be offered. Must not know SMTP, nor keep a password.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

from relay.auth.question import (
    REPLY,
    FrameError,
    Question,
    Reply,
    Result,
    Step,
    Unpacker,
    question_out,
    reply_in,
    unpacked,
)
from relay.config.auth import Mechanism
from relay.hub.frames import REQUEST, VERSION, Ask
from relay.hub.reach import Reach

ANSWER_TIMEOUT_S: Final = 60.0
"""Above the hub's own bounds; a hub that hangs is killed after ``process.heartbeat_timeout_s`` and found out by that."""
SWEEP_S: Final = 5.0

_Answer: TypeAlias = Callable[[Reply], None]
Offers: TypeAlias = dict[str, list[Mechanism]]

_GONE: Final = Reply(Result.UNAVAILABLE, why="the hub is gone")


class AuthClient:
    """Questions go to the hub, answers come by callback, exactly one each."""

    def __init__(self, address: str, offered: Callable[[Offers], None]) -> None:
        """``offered`` is called with what each listener may offer, at once and whenever it changes."""
        self._reach = Reach(address, lambda: _Link(self))
        self._offered = offered
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: _Link | None = None
        self._fresh: _Link | None = None
        self._ready = asyncio.Event()
        self._waiting: dict[int, tuple[_Answer, float]] = {}
        """By tag: who waits, and until when. A look every ``SWEEP_S`` instead of a timer for each."""
        self._sweep: asyncio.TimerHandle | None = None
        self._tag = 0

    async def start(self) -> None:
        """Connect and wait a moment for the offers; afterwards reconnect by itself until ``stop``."""
        self._loop = self._reach.begin()
        await self._reach.first_word(self._ready)

    def go_on(self) -> None:
        """There are stores now: connect, unless that was done before."""
        if self._loop is None:
            self._loop = self._reach.begin()

    def stop(self) -> None:
        """Disconnect for good."""
        self._reach.stop()
        if self._sweep is not None:
            self._sweep.cancel()
        if self._fresh is not None:
            self._fresh.abort()

    def tag(self) -> int:
        """A number for one dialogue: SCRAM asks twice under it."""
        self._tag = self._tag + 1 & 0xFFFFFFFF
        return self._tag

    def ask(self, tag: int, question: Question, client: str, listener: str, answer: _Answer) -> None:
        """Ask the hub. ``answer`` may be called before this returns, when there is no hub."""
        if self._link is None:
            answer(_GONE)
            return
        assert self._loop is not None
        self._waiting[tag] = (answer, self._loop.time() + ANSWER_TIMEOUT_S)
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_S, self._look)
        self._link.write(question_out(tag, client, listener, question))

    def forget(self, tag: int, mechanism: Mechanism, listener: str) -> None:
        """The client of a dialogue is gone or has cancelled: nothing is waited for."""
        self._waiting.pop(tag, None)
        if self._link is not None:
            self._link.write(question_out(tag, "", listener, Question(Step.FORGET, mechanism, "", b"")))

    def _look(self) -> None:
        assert self._loop is not None
        now = self._loop.time()
        for tag in [tag for tag, (_, until) in self._waiting.items() if until <= now]:
            self._waiting.pop(tag)[0](Reply(Result.UNAVAILABLE, why="the hub does not answer"))
        self._sweep = self._loop.call_later(SWEEP_S, self._look) if self._waiting else None

    def linked(self, link: _Link) -> None:
        """Connected: say what this connection is for. Nothing is asked before the hub has taken that in."""
        self._fresh = link
        link.write(REQUEST.pack(Ask.LOGINS, VERSION, 0))

    def lost(self) -> None:
        """The hub is gone: whoever waits is told 454."""
        self._link = self._fresh = None
        waiting, self._waiting = self._waiting, {}
        for answer, _ in waiting.values():
            answer(_GONE)
        self._reach.again()

    def answered(self, frame: bytes) -> None:
        """An answer of the hub."""
        tag, reply = reply_in(frame)
        waiting = self._waiting.pop(tag, None)
        if waiting is not None:
            waiting[0](reply)

    def told(self, body: dict[str, Any]) -> None:
        """What else the hub says."""
        if body["tell"] == "offers":
            self._link = self._fresh
            self._offered({name: [Mechanism(one) for one in mechanisms] for name, mechanisms in body["offers"].items()})
            self._ready.set()


class _Link(asyncio.Protocol):
    """One connection to the hub."""

    def __init__(self, client: AuthClient) -> None:
        self._client = client
        self._unpacker = Unpacker()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._client.linked(self)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._unpacker.feed(data):
                if frame[0] == REPLY:
                    self._client.answered(frame)
                else:
                    self._client.told(unpacked(frame))
        except (FrameError, KeyError, ValueError, TypeError):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost()

    def write(self, frame: bytes) -> None:
        """Send."""
        if self._transport is not None:
            self._transport.write(frame)

    def abort(self) -> None:
        """Break it off."""
        if self._transport is not None:
            self._transport.abort()
