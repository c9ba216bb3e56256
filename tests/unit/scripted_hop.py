"""Owns: a next hop in the test's own loop that says what a script tells it, octet by octet, and the lane before it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from relay.config.schema import Config
from relay.mail.address import Mailbox
from relay.mail.answer import Answer, Stage
from relay.mail.content import Content
from relay.mail.terms import PLAIN
from relay.outbound.lane import Lane
from relay.policy.route import NextHop
from relay.telemetry.maillog import MailLog

ALL = ("PIPELINING", "8BITMIME", "SIZE 1000000")


class Ended(Exception):
    """The relay closed the connection."""


class Talk:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.heard: list[str] = []

    async def say(self, octets: str | bytes) -> None:
        self.writer.write(octets.encode() + b"\r\n" if isinstance(octets, str) else octets)
        await self.writer.drain()

    async def hear(self, start: str = "") -> str:
        octets = await self.reader.readline()
        if not octets:
            raise Ended
        line = octets.decode().rstrip("\r\n")
        self.heard.append(line)
        assert line.startswith(start), f"{line} where {start} was to come"
        return line

    async def hello(self, *extensions: str) -> None:
        await self.say("220 hop")
        await self.hear("EHLO mx.example.com")
        await self.say("".join(f"250-{word}\r\n" for word in ("hop", *extensions)).encode() + b"250 HELP\r\n")

    async def hear_message(self) -> bytes:
        octets = b""
        while not octets.endswith(b"\r\n.\r\n") and octets != b".\r\n":
            line = await self.reader.readline()
            if not line:
                raise Ended
            octets += line
        return octets

    async def envelope(self, *replies: str) -> None:
        """Hear MAIL, RCPT… and DATA, one for each reply."""
        for reply in replies:
            await self.hear()
            await self.say(reply)

    async def until_closed(self) -> bytes:
        return await self.reader.read()


Script = Callable[[Talk], Awaitable[None]]


async def good(talk: Talk) -> None:
    """What a next hop should do, for as long as it is talked to."""
    await talk.hello(*ALL)
    await serve(talk)


async def serve(talk: Talk) -> None:
    while True:
        match (await talk.hear()).split()[0]:
            case "DATA":
                await talk.say("354 go")
                await talk.hear_message()
                await talk.say("250 2.0.0 taken")
            case "QUIT":
                await talk.say("221 bye")
                return
            case _:
                await talk.say("250 ok")


class Hop:
    """The server: connection after connection follows the next script, the last one for ever."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.talks: list[Talk] = []
        self.problems: list[BaseException] = []
        self.lines: list[str] = []
        self.clock = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, **settings: Any) -> None:
        config, log = configuration(**settings), MailLog(self, "postfix", "mx")
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=2**20)
        port = self.server.sockets[0].getsockname()[1]
        self.lane = Lane(NextHop("127.0.0.1", port), config, 1, log)

    def write(self, line: str) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        pass

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self.scripts[min(len(self.talks), len(self.scripts) - 1)]
        self.talks.append(Talk(reader, writer))
        self._tasks.add(asyncio.get_running_loop().create_task(self._talk(self.talks[-1], script)))

    async def _talk(self, talk: Talk, script: Script) -> None:
        try:
            await script(talk)
        except (Ended, ConnectionError, asyncio.CancelledError):
            pass
        except BaseException as problem:
            self.problems.append(problem)
            raise
        finally:
            talk.writer.close()

    def stop_the_clock(self) -> None:
        """From now on time passes only by ``clock``; the lane is swept by the test."""
        self.clock = self.lane.now()
        self.lane.now = lambda: self.clock

    async def end(self) -> None:
        self.lane.close()
        self.server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in (
            *(talk.writer.transport for talk in self.talks),
            *(connection.transport for connection in self.lane._connections.copy()),
        ):
            transport.abort()
        await asyncio.sleep(0.01)  # transports close in the next turns of the loop, and nothing tells when they have
        assert self.problems == []


def configuration(*, next_hop: Sequence[Mapping[str, Any]] = (), **delivery: Any) -> Config:
    return Config.model_validate(
        {
            "next_hop": list(next_hop),
            "server": {"hostname": "mx.example.com"},
            "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
            "delivery": {"tls": "off", **delivery},
            "queue": {"retry_s": [5.0]},
        }
    )


class Message:
    """An attempt that remembers its answers."""

    def __init__(
        self, *recipients: str, content: Content | None = None, body_8bit: bool = False, finish: bool = True
    ) -> None:
        self.sender = Mailbox("a@example.net")
        self.recipients = [Mailbox(f"{name}@example.com") for name in recipients or ("u",)]
        self.content = content or Content.of(b"Subject: x\r\n\r\n..dot\r\n")
        self.body_8bit = body_8bit
        self.terms = PLAIN
        self.told = False
        self.finish = finish
        self.asked = 0
        self.started = 0.0
        self.result: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()

    def may_finish(self) -> bool:
        self.asked += 1
        return self.finish

    def done(self, answers: list[Answer], next_hop: str) -> None:
        self.result.set_result(answers)


async def deliver(hop: Hop, message: Message | None = None) -> list[Answer]:
    message = message or Message()
    hop.lane.submit(message, express=True)
    async with asyncio.timeout(20):
        return await message.result


def brief(answers: Sequence[Answer]) -> list[tuple[Stage, int, str]]:
    return [(answer.stage, answer.code, answer.enhanced) for answer in answers]


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)
