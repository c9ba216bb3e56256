"""Owns: the HTTP server and the web member's part in the process tree. GET and HEAD of three paths, nothing else.

What the pages say comes from ``web.collect`` and ``web.health``. Strangers may reach this port by mistake: every
connection has an end, their number a bound, and no answer names a version.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web, web_response
from aiohttp.web_protocol import RequestHandler
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from relay.config.schema import Config
from relay.control import Abort, Child, Commit, Control, Drain, Prepare, Prepared, Ready, Refused, Reopen
from relay.telemetry.logs import LogWriter
from relay.telemetry.maillog import MailLog, adopt
from relay.telemetry.metrics import FLUSH_S, Metrics
from relay.web.collect import Figures, Probe, page
from relay.web.health import reasons

FRESH_S: Final = 1.0
"""Figures are used again for so long: whoever asks more often gets the same answer, and costs nothing."""
TAKE_S: Final = 8.0
"""Longest wait for figures; Prometheus gives up after 10 s, a hanging disk never answers."""
CONNECTION_S: Final = 30.0
"""Life of a connection, whatever it does: enough for the slowest page, an end for one that never asks."""
CONNECTIONS: Final = 64
"""Open connections; a Prometheus pair and a load balancer's checks need a handful."""
STOP_S: Final = 2.0
"""Pages under way when a drain comes may finish for so long."""

# aiohttp names itself and Python's version in every answer, those to malformed requests included.
web_response.SERVER_SOFTWARE = "dmz-relay"  # type: ignore[attr-defined]


class Pages:
    """The three pages. ``config`` and ``log`` may be exchanged at any time."""

    def __init__(self, config: Config, log: MailLog, supervisor: int) -> None:
        self.config = config
        self.log = log
        self._supervisor = supervisor
        self._probe = Probe(supervisor)
        self._taking: asyncio.Task[Figures] | None = None
        self._figures: Figures | None = None
        self._until = 0.0
        self._answers: Final[dict[str, Callable[[], Awaitable[web.Response]]]] = {
            "/metrics": self._metrics,
            "/livez": self._livez,
            "/readyz": self._readyz,
        }

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """One request. Never raises: what goes wrong is in the log, the client hears 500."""
        make = self._answers.get(request.path)
        if make is None:
            response = _text(404, "not found: there are /metrics, /livez and /readyz")
        elif request.method not in ("GET", "HEAD"):
            response = _text(405, "only GET and HEAD")
            response.headers["Allow"] = "GET, HEAD"
        else:
            try:
                response = await make()
            except TimeoutError:
                response = _text(
                    503, f"figures could not be had within {TAKE_S:g} s; is the disk of the spool hanging?"
                )
            except Exception as error:  # noqa: BLE001 - the boundary of a request
                self.log.alarm("web_fault", path=request.path, error=repr(error))
                response = _text(500, "internal error; see the log")
        response.headers["Cache-Control"] = "no-store"
        response.force_close()
        return response

    async def figures(self) -> Figures:
        """At most ``FRESH_S`` old. One thread at most takes them, however many ask. Raises TimeoutError."""
        if self._figures is not None and time.monotonic() < self._until:
            return self._figures
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take())
        return await asyncio.wait_for(asyncio.shield(self._taking), TAKE_S)

    async def _take(self) -> Figures:
        self._figures = await asyncio.to_thread(self._probe.take, self.config)
        self._until = time.monotonic() + FRESH_S
        return self._figures

    async def _metrics(self) -> web.Response:
        body = page(await self.figures())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _livez(self) -> web.Response:
        if os.getppid() != self._supervisor:
            return _text(503, "the supervisor is gone")
        return _text(200, "alive")

    async def _readyz(self) -> web.Response:
        why = reasons(await self.figures(), self.config)
        return web.Response(
            status=503 if why else 200,
            body=json.dumps({"ready": not why, "reasons": why}, indent=1).encode() + b"\n",
            content_type="application/json",
        )


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n")


class _Refused(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


def _expire(handler: RequestHandler) -> None:
    if handler.transport is not None:
        handler.transport.abort()


class Member:
    """The member's part in the tree: log, metrics, control messages, heartbeat by ``Control``."""

    def __init__(self, child: Child, loop: asyncio.AbstractEventLoop) -> None:
        config = child.config
        self._loop = loop
        self._metrics = Metrics(config.server.spool / "metrics", "web")
        self._writer = self._open_log(config)
        self._log = self._adopt_log(config)
        if self._metrics.problem is not None:
            self._log.alarm("metrics_not_shared", error=str(self._metrics.problem))
        self.pages = Pages(config, self._log, os.getppid())
        self.drained: asyncio.Future[None] = loop.create_future()
        self._pending: tuple[Config, LogWriter | None] | None = None
        self._timer = loop.call_soon(self._tick)
        self._control = Control(child.control, loop, config.process.heartbeat_timeout_s)
        self._control.on(Prepare, self._prepare)
        self._control.on(Commit, self._commit)
        self._control.on(Abort, self._abort)
        self._control.on(Reopen, lambda _: self._writer.reopen())
        self._control.on(Drain, self._drain)

    def ready(self) -> None:
        """Tell the supervisor that the pages are served."""
        self._control.send(Ready())

    def close(self) -> None:
        """Write out what waits."""
        self._timer.cancel()
        self._writer.close()
        self._metrics.close()

    def _open_log(self, config: Config) -> LogWriter:
        writer = LogWriter(config.log.file)
        writer.start(self._loop, self._metrics.log_lines_lost)
        return writer

    def _adopt_log(self, config: Config) -> MailLog:
        log = MailLog(self._writer, config.log.format, config.server.hostname)
        adopt(log)
        return log

    def _tick(self) -> None:
        self._metrics.flush()
        self._timer = self._loop.call_later(FLUSH_S, self._tick)

    def _prepare(self, message: Prepare) -> None:
        self._drop_pending()
        writer = None
        if message.config.log.file != self.pages.config.log.file:
            try:
                writer = self._open_log(message.config)
            except OSError as error:
                self._control.send(Refused(f"log.file: cannot write {message.config.log.file}: {error.strerror}"))
                return
        self._pending = message.config, writer
        self._control.send(Prepared())

    def _commit(self, _: Commit) -> None:
        assert self._pending is not None
        config, writer = self._pending
        self._pending = None
        if writer is not None:
            self._writer.close()
            self._writer = writer
        self.pages.log = self._log = self._adopt_log(config)
        self.pages.config = config

    def _abort(self, _: Abort) -> None:
        self._drop_pending()

    def _drop_pending(self) -> None:
        if self._pending is not None and self._pending[1] is not None:
            self._pending[1].close()
        self._pending = None

    def _drain(self, _: Drain) -> None:
        if not self.drained.done():
            self.drained.set_result(None)


async def serve(child: Child) -> int:
    """Serve until drained; returns the exit code. Raises OSError when the log cannot be opened."""
    assert child.web is not None
    loop = asyncio.get_running_loop()
    member = Member(child, loop)
    http = web.Server(member.pages.answer, access_log=None, lingering_time=1.0, max_line_size=2048, max_field_size=4096)

    def connection() -> asyncio.Protocol:
        if len(http.connections) >= CONNECTIONS:
            return _Refused()
        handler = http()
        loop.call_later(CONNECTION_S, _expire, handler)
        return handler

    listening = await loop.create_server(connection, sock=child.web)
    member.ready()
    await member.drained
    listening.close()
    await http.shutdown(STOP_S)
    member.close()
    return 0
