"""Owns: the hub's end of the questions about logins: one connection for each worker, apart from that of the counts.

It begins where ``hub.server`` hands a connection over. Answers leave when they are due, in any order.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import time
from collections.abc import Mapping
from typing import Any, Final, cast

from relay.auth.question import (
    QUESTION,
    FrameError,
    Question,
    Reply,
    Result,
    Step,
    Unpacker,
    pack,
    question_in,
    reply_out,
    unpacked,
)
from relay.auth.stores import Change, Stores
from relay.auth.verifier import Exchange, Verifier
from relay.config.schema import Config
from relay.directory import connection
from relay.telemetry.maillog import note

LOOK_S: Final = 1.0
"""How often the stores' files are looked at."""
QUESTIONS_MAX: Final = 2048
"""Questions of one worker under way, among them those whose refusal waits for its time."""
EXCHANGES_MAX: Final = 4096
"""SCRAM exchanges of one worker between their two questions."""


class Desk:
    """What all connections share: the verifier, and who is to be told of new offers."""

    def __init__(self, config: Config, passwords: Mapping[str, str], loop: asyncio.AbstractEventLoop) -> None:
        """``passwords``: the relay's own for directories, by profile."""
        self.loop = loop
        self.links: set[AuthLink] = set()
        stores = Stores(config, passwords)
        _tell(stores.load())
        self.verifier = Verifier(config, stores)
        self._timer = loop.call_later(LOOK_S, self._look)
        self._looking: asyncio.Task[None] | None = None

    def link(self, transport: asyncio.Transport) -> AuthLink:
        """A connection that was handed over."""
        return AuthLink(self, transport)

    def commit(self, config: Config, stores: Stores | None) -> None:
        """Switch to what was prepared."""
        self.verifier.configure(config, stores or Stores(config, {}))
        self._announce()

    def close(self) -> None:
        """Stop looking and answering."""
        self._timer.cancel()
        for link in tuple(self.links):
            link.close()
        self.verifier.close()

    def _look(self) -> None:
        self._timer = self.loop.call_later(LOOK_S, self._look)
        if self._looking is None or self._looking.done():
            self._looking = self.loop.create_task(self._look_at_files())

    async def _look_at_files(self) -> None:
        stores = self.verifier.stores
        changes = await asyncio.to_thread(stores.look)
        if changes:
            _tell(changes)
            self.verifier.throttle.forget_failed_passwords()
            self._announce()

    def _announce(self) -> None:
        for link in tuple(self.links):
            link.offer(self.verifier.stores.offers())


def _tell(changes: list[Change]) -> None:
    for change in changes:
        if change.problem:
            note("error", "auth_store_refused", store=change.store, cause=change.problem)
        else:
            accounts = {} if change.accounts is None else {"accounts": change.accounts}
            note("info", "auth_store_taken", store=change.store, **accounts)


def preload(config: Config) -> None:
    """Import what a check would import; before the hub becomes another user."""
    importlib.import_module("argon2.low_level")
    if any(store.type == "ldap" for store in config.auth.stores):
        connection.preload()


class AuthLink(asyncio.Protocol):
    """One worker's connection, or a command's."""

    def __init__(self, desk: Desk, transport: asyncio.Transport) -> None:
        self._desk = desk
        self._transport: asyncio.Transport | None = transport
        self._unpacker = Unpacker()
        self._exchanges: dict[int, list[Exchange]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._delayed = 0
        """Refusals that wait for their time."""
        desk.links.add(self)
        self.offer(desk.verifier.stores.offers())

    def offer(self, offers: dict[str, Any]) -> None:
        """Say what listeners may offer."""
        self._write(pack({"tell": "offers", "offers": offers}))

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._desk.links.discard(self)
        self._exchanges.clear()
        for task in tuple(self._tasks):
            task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._unpacker.feed(data):
                if frame[0] == QUESTION:
                    self._login(*question_in(frame))
                else:
                    self._take(unpacked(frame))
        except (FrameError, KeyError, TypeError, ValueError) as error:
            note("warning", "hub_link_closed", why=f"about logins: {type(error).__name__}: {error}")
            if self._transport is not None:
                self._transport.abort()

    def _take(self, body: dict[str, Any]) -> None:
        match body["ask"]:
            case "blocks":
                blocks = self._desk.verifier.throttle.blocks(time.monotonic())
                self._write(pack({"tell": "blocks", "blocks": [dataclasses.asdict(block) for block in blocks]}))
            case "release":
                name = str(body["name"])
                released = self._desk.verifier.throttle.release(name)
                if released:
                    note("info", "auth_released", name=name)
                self._write(pack({"tell": "released", "released": released}))
            case _:
                raise FrameError("an unknown question")

    def _login(self, tag: int, client: str, listener: str, question: Question) -> None:
        if question.step is Step.FORGET:
            self._exchanges.pop(tag, None)
            return
        if len(self._tasks) >= QUESTIONS_MAX or len(self._exchanges) >= EXCHANGES_MAX or self._delayed >= QUESTIONS_MAX:
            self._write(reply_out(tag, Reply(Result.UNAVAILABLE, user=question.user, why="too many logins at once")))
            return
        verifier = self._desk.verifier
        reply = verifier.answer_now(question, client, listener)
        if reply is not None:
            if reply.result is Result.OK or not (delay := verifier.delay):
                self._write(reply_out(tag, reply))
            else:
                self._delayed += 1
                self._desk.loop.call_later(delay, self._write_late, reply_out(tag, reply))
            return
        exchange = self._exchanges.setdefault(tag, []) if question.step not in {Step.PLAIN, Step.CRAM} else []

        async def answer() -> None:
            reply = await verifier.answer(question, client, listener, exchange)
            if not exchange:
                self._exchanges.pop(tag, None)
            self._write(reply_out(tag, reply))

        task = self._desk.loop.create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _write_late(self, frame: bytes) -> None:
        self._delayed -= 1
        self._write(frame)

    def _done(self, task: asyncio.Task[None]) -> None:
        """The boundary of a question: a fault of ours leaves the client to the worker's time-out, the log has it."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            note("error", "auth_fault", error=type(error).__name__)
            self.close()

    def _write(self, frame: bytes) -> None:
        if self._transport is not None:
            self._transport.write(frame)
