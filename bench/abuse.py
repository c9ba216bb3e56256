"""Owns: what clients that stand in the way, and next hops that fail, cost everybody else. `make bench-abuse` runs it.

usage: abuse.py [--part held|broken|outage|backlog ...] [--state FOLDER] [--port N] > FILE

held     ordinary mail from 127.0.0.2 while 127.0.0.66 holds 300 idle sessions, then 40 that drip an octet at a time
broken   400 sessions that break off in every way there is: descriptors and memory before and after
outage   a next hop is away, mail waits; from the moment it is back until the waiting mail, and new mail, is there
backlog  100,000 messages wait for a dead next hop (bench/backlog.py): start, mail for others, memory

Figures only; what is wanted stands beside each. Budgets of clients are off, so that it is the harder case: all sessions
are let in and may stay. The next hop is an smtp-sink.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import socket
import ssl
import statistics
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import backlog
import benchlib as b
import run

PARTS: Final = ("held", "broken", "outage", "backlog")
ABUSER, CLIENT = "127.0.0.66", "127.0.0.2"
IDLE, DRIPPING, BROKEN = 300, 40, 400
MAILS: Final = 40
WAITING: Final = 20
EVERY_S: Final = 0.05
DRIP_S: Final = 0.2
MESSAGE: Final = b"From: <a@sender.test>\r\nTo: <1user@example.com>\r\nSubject: ordinary\r\n\r\nA line.\r\n"
SEED: Final = 20261127


@dataclass(frozen=True, slots=True)
class Result:
    """One figure and its bound."""

    measure: str
    value: float
    unit: str
    most: float

    def row(self) -> str:
        """A line of the table."""
        word = "met" if self.value <= self.most else "**missed**"
        return f"| {self.measure} | {self.value:.3g} {self.unit} | ≤ {self.most:g} {self.unit} {word} |"


class Session:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, target: b.Target, source: str) -> Session:
        """Connect and hear the greeting."""
        session = cls(*await asyncio.open_connection(target.host, target.port, local_addr=(source, 0)))
        await session.reply("220")
        return session

    async def reply(self, code: str) -> None:
        """Read one reply, which must be this one."""
        while True:
            line = (await asyncio.wait_for(self.reader.readline(), 30)).decode()
            if not line.startswith(code):
                raise RuntimeError(f"{line!r} instead of {code}")
            if line[3:4] != "-":
                return

    async def say(self, line: bytes, code: str) -> None:
        """One command and its reply."""
        self.writer.write(line + b"\r\n")
        await self.reply(code)

    async def mail(self, number: int = 0) -> None:
        """One message, from EHLO to the reply to the final dot."""
        await self.say(b"EHLO client.sender.test", "250")
        await self.say(b"MAIL FROM:<bench%d@sender.test>" % number, "250")
        await self.say(b"RCPT TO:<1user@example.com>", "250")
        await self.say(b"DATA", "354")
        await self.say(MESSAGE + b".", "250")

    def close(self) -> None:
        """Without QUIT."""
        self.writer.close()

    def reset(self) -> None:
        """By RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def ordinary(target: b.Target) -> list[float]:
    """Seconds that each of some messages takes, on a connection of its own, until it is acknowledged."""
    took = []
    for number in range(MAILS):
        begun = time.monotonic()
        session = await Session.open(target, CLIENT)
        await session.mail(number)
        took.append(time.monotonic() - begun)
        session.close()
        await asyncio.sleep(EVERY_S)
    return took


# --------------------------------------------------------------------------------------------------------------- held
@contextlib.asynccontextmanager
async def idle(target: b.Target) -> AsyncIterator[None]:
    """Sessions that say EHLO and nothing more."""
    held = []
    for _ in range(IDLE):
        session = await Session.open(target, ABUSER)
        await session.say(b"EHLO abuser.test", "250")
        held.append(session)
    yield
    for session in held:
        session.close()


@contextlib.asynccontextmanager
async def dripping(target: b.Target) -> AsyncIterator[None]:
    """Sessions that send an octet now and then: half of them a command, half of them a message."""

    async def drip(session: Session) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                session.writer.write(b"x")
                await session.writer.drain()
                await asyncio.sleep(DRIP_S)

    held = []
    for number in range(DRIPPING):
        session = await Session.open(target, ABUSER)
        await session.say(b"EHLO abuser.test", "250")
        if number % 2:
            await session.say(b"MAIL FROM:<spam@abuser.test>", "250")
            await session.say(b"RCPT TO:<1user@example.com>", "250")
            await session.say(b"DATA", "354")
        held.append(session)
    tasks = [asyncio.create_task(drip(session)) for session in held]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for session in held:
        session.close()


def held(state: Path, port: int) -> Iterator[Result]:
    """Longest time that an ordinary message takes."""

    async def while_held(target: b.Target) -> list[tuple[str, list[float]]]:
        found = [("nobody is in the way", await ordinary(target))]
        async with idle(target):
            found.append((f"{IDLE} idle sessions", await ordinary(target)))
        async with dripping(target):
            found.append((f"{DRIPPING} dripping sessions", await ordinary(target)))
        return found

    with run.relay(state, run.EXPRESS, port) as target:
        for what, took in asyncio.run(while_held(target)):
            b.say(f"{what}: median {statistics.median(took) * 1000:.1f} ms")
            yield Result(f"ordinary mail, {what}, longest of {MAILS}", max(took), "s", 1)


# ------------------------------------------------------------------------------------------------------------- broken
async def break_one(target: b.Target, dice: random.Random) -> None:
    """One session that ends where it should not."""
    session = await Session.open(target, ABUSER)
    way = dice.randrange(8)
    if way:
        await session.say(b"EHLO abuser.test", "250")
    match way:
        case 1:  # in the middle of a command
            session.writer.write(b"MAIL FROM:<sp")
        case 2:  # in the middle of a message that waits in a file
            await session.say(b"MAIL FROM:<spam@abuser.test>", "250")
            await session.say(b"RCPT TO:<1user@example.com>", "250")
            await session.say(b"DATA", "354")
            session.writer.write(b"half a message\r\n" * 10_000)
        case 3:  # in the middle of a chunk
            await session.say(b"MAIL FROM:<spam@abuser.test>", "250")
            await session.say(b"RCPT TO:<1user@example.com>", "250")
            session.writer.write(b"BDAT 100000 LAST\r\nhalf a chunk")
        case 4:  # a TLS handshake that is none
            await session.say(b"STARTTLS", "220")
            session.writer.write(b"\x16\x03\x01\x02\x00nothing of the kind")
        case 5:  # a TLS handshake that goes no further than its first message
            await session.say(b"STARTTLS", "220")
            outgoing = ssl.MemoryBIO()
            context = ssl.create_default_context()
            with contextlib.suppress(ssl.SSLWantReadError):
                context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
            session.writer.write(outgoing.read())
        case 6:  # garbage
            session.writer.write(dice.randbytes(5000))
        case 7:  # behind the final dot, before its reply is read
            await session.say(b"MAIL FROM:<spam@abuser.test>", "250")
            await session.say(b"RCPT TO:<1user@example.com>", "250")
            await session.say(b"DATA", "354")
            session.writer.write(MESSAGE + b".\r\n")
    with contextlib.suppress(ConnectionError):
        await session.writer.drain()
    if dice.randrange(2):
        session.reset()
    else:
        session.close()


def descriptors(target: b.Target, pids: Sequence[int]) -> int:
    """Open files of the relay, those of connections to the next hop not counted: they are kept for the next message."""
    assert target.sink is not None
    peer = f":{target.sink.port:04X} 01"  # remote port, established
    kept = sum(peer in line for line in Path("/proc/net/tcp").read_text().splitlines())
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids) - kept


def broken(state: Path, port: int) -> Iterator[Result]:
    """What broken sessions leave behind. As many come before them, three times: the heap has its size by then."""
    dice = random.Random(SEED)

    async def break_all(target: b.Target) -> None:
        for _ in range(BROKEN // 20):
            await asyncio.gather(*(break_one(target, dice) for _ in range(20)))

    def settled(target: b.Target, pids: Sequence[int]) -> int:
        """Descriptors once they fall no more."""
        least, since = descriptors(target, pids), time.monotonic()
        while time.monotonic() < since + 4:
            time.sleep(0.2)
            now = descriptors(target, pids)
            if now < least:
                least, since = now, time.monotonic()
        return least

    with run.relay(state, run.EXPRESS, port) as target:
        pids = b.tree(target.roots)
        for _ in range(3):
            asyncio.run(break_all(target))
            files, memory = settled(target, pids), b.pss_bytes(pids)
        asyncio.run(break_all(target))
        yield Result(f"{BROKEN} broken sessions, descriptors more", settled(target, pids) - files, "", 0)
        yield Result(f"{BROKEN} broken sessions, memory more", (b.pss_bytes(pids) - memory) / 1e6, "MB", 1)


# ------------------------------------------------------------------------------------------------------------- outage
def outage(state: Path, port: int) -> Iterator[Result]:
    """From the next hop's return to the mail."""
    folder = state / "outage"
    pidfile = state / "outage.pid"
    options = run.relay_options(state, "outage", port, run.RECIPIENTS)
    run.recipients(state, run.RECIPIENTS)

    async def send(target: b.Target, count: int) -> None:
        for number in range(count):
            session = await Session.open(target, CLIENT)
            await session.mail(number)
            session.close()

    with contextlib.suppress(FileNotFoundError):
        run.shutil.rmtree(folder)
    with run.running([run.HERE / "serve", *options, "--retry-s", "1"], pidfile) as pid:
        target = b.Target("outage", "127.0.0.1", port, [pid])
        asyncio.run(send(target, WAITING))
        time.sleep(5)  # long enough for the breaker to open, and for some tries in vain
        sink = b.Sink(port + 1)
        back = time.monotonic()
        try:
            waiting = sink.wait_for(WAITING, 60) - back
            asyncio.run(send(target, 1))
            new = sink.wait_for(WAITING + 1, 60) - back
        finally:
            sink.close()
        yield Result(f"after an outage, {WAITING} waiting messages are there", waiting, "s", 2)
        yield Result("after an outage, a new message is there", new, "s", 2)


# ------------------------------------------------------------------------------------------------------------ backlog
def standing(state: Path, port: int) -> Iterator[Result]:
    """100,000 messages for a dead next hop."""
    del state, port
    before = backlog.measure(0, express=True, parked=False)
    seen = backlog.measure(100_000, express=True, parked=False)
    yield Result("backlog of 100,000, start to first greeting", seen.start_s, "s", 2)
    yield Result("backlog of 100,000, mail for others later by (median)", seen.median_ms - before.median_ms, "ms", 100)
    yield Result("backlog of 100,000, memory of the tree", seen.megabytes, "MB", 150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "relay-bench", metavar="FOLDER")
    parser.add_argument("--port", type=int, default=2650, help="the first of some 10 ports")
    options = parser.parse_args()
    options.state.mkdir(parents=True, exist_ok=True)
    b.raise_open_files()
    parts = {"held": held, "broken": broken, "outage": outage, "backlog": standing}
    print(f"{run.conditions(options.state)}.\n\n| measure | figure | wanted |\n|---|--:|---|", flush=True)
    for name in options.part or PARTS:
        for result in parts[name](options.state, options.port):
            print(result.row(), flush=True)


if __name__ == "__main__":
    main()
