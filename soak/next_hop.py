"""Owns: the next hop of the soak. It outlives the relay, keeps what it gets, and now and then is no good.

What it does to a transaction is drawn at MAIL, see ``_WEIGHTS``. ``keeps`` says whether the mailboxes have the message
afterwards: it is decided by the next hop, not by what the relay heard of it. It must not know which process it talks to.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from enum import StrEnum
from typing import Final

from soak.ledger import Ledger
from soak.message import read, read_report
from soak.moments import Moments, Point
from tests.bed.wire import unstuffed

MESSAGE_MAX: Final = 4 * 1024 * 1024
SLOW_S: Final = (0.25, 0.6)
"""Answers beyond the relay's express deadline and within its wait for the final reply (``soak.run`` sets both)."""
_END: Final = b"\r\n.\r\n"


class Manner(StrEnum):
    """How a transaction goes."""

    GOOD = "good"
    SLOW = "answers late"
    KEEPS_AND_DROPS = "keeps the message, drops before the answer"
    DROPS = "drops after the final dot, keeps nothing"
    SILENT = "keeps the message, never answers"
    LATER = "451 after the final dot"
    REFUSES = "554 after the final dot"
    ONE_LATER = "450 to the last recipient"
    ONE_REFUSED = "550 to the last recipient"
    BUSY = "421 to MAIL"
    CUTS = "drops within the body"


_WEIGHTS: Final = {
    Manner.GOOD: 850,
    Manner.SLOW: 45,
    Manner.KEEPS_AND_DROPS: 20,
    Manner.DROPS: 10,
    Manner.SILENT: 3,
    Manner.LATER: 20,
    Manner.REFUSES: 7,
    Manner.ONE_LATER: 20,
    Manner.ONE_REFUSED: 10,
    Manner.BUSY: 5,
    Manner.CUTS: 10,
}
_FOR_REPORTS: Final = {k: v for k, v in _WEIGHTS.items() if k not in {Manner.REFUSES, Manner.ONE_REFUSED}}
"""A refused report is gone for good (RFC 5321 §6.1), and with it what it would have proved."""


class NextHop:
    """An SMTP server on loopback, on one port or several."""

    def __init__(self, ledger: Ledger, moments: Moments, dice: random.Random) -> None:
        self.healthy = False
        """True: every transaction is GOOD."""
        self._ledger = ledger
        self._moments = moments
        self._dice = dice
        self._servers: list[asyncio.Server] = []
        self._sessions: set[asyncio.Task[None]] = set()

    async def listen(self) -> str:
        """Open one more port; the route to it."""
        server = await asyncio.start_server(self._session, "127.0.0.1", 0, limit=MESSAGE_MAX)
        self._servers.append(server)
        return f"smtp:[127.0.0.1]:{server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """End."""
        for server in self._servers:
            server.close()
        for session in list(self._sessions):
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._sessions.add(task)
        try:
            # Cancelled: the end of the soak, and of this task all the same.
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await _Session(self, reader, writer).run()
        finally:
            self._sessions.discard(task)
            writer.close()

    def manner(self, sender: str) -> Manner:
        """How the next transaction goes."""
        if self.healthy:
            return Manner.GOOD
        weights = _WEIGHTS if sender else _FOR_REPORTS
        return self._dice.choices(list(weights), list(weights.values()))[0]

    def delay_s(self) -> float:
        """How long a slow answer takes."""
        return self._dice.uniform(*SLOW_S)

    def reached(self, point: Point, queue_id: str = "") -> None:
        """Count an event."""
        self._moments.reached(point, queue_id)

    def keep(self, message: bytes, recipients: tuple[str, ...], *, kept: bool, answer: str) -> str:
        """Enter a transaction in the books; the queue id of the message."""
        report = read_report(message)
        if report is not None:
            if kept:
                self._ledger.reported(*report)
            return report.queue_id
        message_id, queue_id, whole = read(message)
        self._ledger.arrived(message_id, queue_id, recipients, kept=kept, answer=answer, whole=whole)
        return queue_id


class _Session:
    """One connection."""

    def __init__(self, hop: NextHop, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._hop = hop
        self._reader = reader
        self._writer = writer
        self._manner = Manner.GOOD
        self._asked = 0
        self._recipients: list[str] = []

    def _say(self, text: str) -> None:
        self._writer.write(f"{text}\r\n".encode("ascii"))

    async def run(self) -> None:
        """Talk until one of both has enough."""
        self._say("220 hop.example.com ESMTP")
        while True:
            line = (await self._reader.readuntil(b"\r\n")).decode("latin-1").rstrip("\r\n")
            verb = line.split(":", 1)[0].split(" ", 1)[0].upper()
            match verb:
                case "EHLO" | "HELO":
                    self._say("250-hop.example.com\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 52428800")
                case "MAIL":
                    self._recipients = []
                    self._asked = 0
                    self._manner = self._hop.manner(_path(line))
                    self._hop.reached(Point.HOP_MAIL)
                    if self._manner is Manner.BUSY:
                        self._say("421 4.3.2 too busy")
                        return
                    self._say("250 2.1.0 ok")
                case "RCPT":
                    self._recipient(_path(line))
                case "DATA" if not self._recipients:
                    self._say("554 5.5.1 no valid recipients")
                case "DATA":
                    self._say("354 go on")
                    if not await self._data():
                        return
                case "RSET" | "NOOP":
                    self._say("250 2.0.0 ok")
                case "QUIT":
                    self._say("221 2.0.0 bye")
                    return
                case _:
                    self._say("500 5.5.2 what?")

    def _recipient(self, mailbox: str) -> None:
        # The relay sends its recipients in order; the second of several stands for "one of them".
        self._asked += 1
        if self._asked == 2 and self._manner is Manner.ONE_LATER:
            self._say("450 4.2.1 not now")
        elif self._asked == 2 and self._manner is Manner.ONE_REFUSED:
            self._say("550 5.1.1 nobody here")
        else:
            self._recipients.append(mailbox)
            self._say("250 2.1.5 ok")

    async def _data(self) -> bool:
        """The body and its answer; False: the connection ends."""
        if self._manner is Manner.CUTS:
            await self._reader.read(1024)
            return False
        wire = (await self._reader.readuntil(_END))[:-3]
        manner = self._manner
        if manner is Manner.SLOW:
            # Kept only at the end: what a next hop does between the two nobody can know.
            queue_id = read(wire).queue_id
            self._hop.reached(Point.HOP_DOT, queue_id)
            await asyncio.sleep(self._hop.delay_s())
        kept = manner not in {Manner.DROPS, Manner.LATER, Manner.REFUSES}
        queue_id = self._hop.keep(unstuffed(wire), tuple(self._recipients), kept=kept, answer=manner)
        if manner is not Manner.SLOW:
            self._hop.reached(Point.HOP_DOT, queue_id)
        match manner:
            case Manner.KEEPS_AND_DROPS | Manner.DROPS:
                return False
            case Manner.SILENT:
                await self._reader.read(1)  # until the relay has enough
                return False
            case Manner.LATER:
                self._say("451 4.3.0 not now")
            case Manner.REFUSES:
                self._say("554 5.6.0 not such a thing")
            case _:
                self._say("250 2.0.0 kept")
        self._hop.reached(Point.HOP_REPLY, queue_id)
        return True


def _path(line: str) -> str:
    return line[line.index("<") + 1 : line.index(">")]
