"""Owns: the clients. Each sends one message after the other, and each message until it is told what became of it.

A message without final reply, or put off with 4xx, is sent again with the same id, as any mail server would. Half of
the clients keep their connection, the others open one for each message. It must not know the relay's inside.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from contextlib import suppress
from typing import Final

from soak.ledger import ACKNOWLEDGED, Ledger, Sent, Told, Transmission
from soak.message import Mill
from soak.moments import Moments, Point
from tests.bed.wire import stuffed

MESSAGES_A_CONNECTION: Final = 20
THINK_S: Final = 0.05
"""Mean pause between two messages of one client: with it, some hundred messages a second are sent."""
AGAIN_S: Final = 0.1
"""Mean pause before a message is sent again, or a relay that is down is tried again."""
TRANSMISSIONS_MAX: Final = 500
"""A message that was not taken after so many tries never will be. While a relay is down each client makes some."""

_SIZES: Final = ((1_000, 70), (10_000, 22), (70_000, 4), (200_000, 4))
_QUEUE_ID: Final = re.compile(r" as ([0-9A-F]+)$")


class Gone(Exception):
    """The connection ended, or nothing came in time."""


class _Dialogue:
    """One connection that has said EHLO."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience_s: float) -> None:
        self._reader = reader
        self._writer = writer
        self._patience_s = patience_s
        self.messages = 0

    def send(self, octets: bytes) -> None:
        self._writer.write(octets)

    async def reply(self) -> tuple[int, str]:
        """Code and text of the next reply. Raises Gone."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._writer.drain()
                while True:
                    line = (await self._reader.readuntil(b"\r\n")).decode("ascii").rstrip("\r\n")
                    if line[3:4] != "-":
                        return int(line[:3]), line[4:]
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise Gone(str(error) or type(error).__name__) from None

    def close(self) -> None:
        self._writer.transport.abort()


class Load:
    """So many clients at once. ``stop`` lets each finish its message."""

    def __init__(
        self, address: tuple[str, int], ledger: Ledger, moments: Moments, dice: random.Random, mill: Mill, *, clients: int,
        patience_s: float, name: str,
    ) -> None:  # fmt: skip
        """``patience_s``: how long a client waits for a reply; ``name`` makes the message ids unique."""
        self._address = address
        self._ledger = ledger
        self._moments = moments
        self._dice = dice
        self._patience_s = patience_s
        self._name = name
        self._mill = mill
        self._count = 0
        self._ending = False
        self._tasks = [asyncio.create_task(self._client(keeps=number % 2 == 0)) for number in range(clients)]

    async def stop(self) -> None:
        """No new messages; returns when every message sent has its final reply. Raises what a client failed with."""
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def abandon(self) -> None:
        """End at once: something else has failed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, *, keeps: bool) -> None:
        dialogue: _Dialogue | None = None
        try:
            while not self._ending:
                dialogue = await self._until_told(dialogue)
                if dialogue is not None and (not keeps or dialogue.messages >= MESSAGES_A_CONNECTION):
                    await self._leave(dialogue)
                    dialogue = None
                await asyncio.sleep(self._dice.expovariate(1 / THINK_S))
        finally:
            if dialogue is not None:
                dialogue.close()

    async def _leave(self, dialogue: _Dialogue) -> None:
        if self._dice.random() < 0.5:
            dialogue.send(b"QUIT\r\n")
            with suppress(Gone):
                await dialogue.reply()
        dialogue.close()

    async def _until_told(self, dialogue: _Dialogue | None) -> _Dialogue | None:
        self._count += 1
        message_id = f"{self._name}-{self._count}"
        sent = self._ledger.send(message_id, self._recipients())
        size = self._dice.choices([size for size, _ in _SIZES], [weight for _, weight in _SIZES])[0]
        wire = stuffed(self._mill.make(message_id, _SENDER, round(size * self._dice.uniform(0.7, 1.3)))) + b".\r\n"
        for _ in range(TRANSMISSIONS_MAX):
            if dialogue is None:
                dialogue = await self._connect()
            told = Told.NOT_SENT
            if dialogue is not None:
                told = await self._transmit(dialogue, sent, wire)
                dialogue.messages += 1
            if told in ACKNOWLEDGED or told is Told.REFUSED:
                return dialogue
            if dialogue is not None:
                dialogue.close()
                dialogue = None
            await asyncio.sleep(self._dice.expovariate(1 / AGAIN_S))
        raise AssertionError(
            f"message {message_id} was not taken in {TRANSMISSIONS_MAX} tries: {sent.transmissions[-5:]}"
        )

    def _recipients(self) -> tuple[str, ...]:
        """Mostly one, sometimes several, sometimes on two routes: these are queued even when express is on."""
        throw = self._dice.random()
        users = self._dice.sample(USERS, 4)
        if throw < 0.75:
            return (f"{users[0]}@example.com",)
        if throw < 0.9:
            return tuple(f"{user}@example.com" for user in users[: self._dice.randint(2, 4)])
        return (f"{users[0]}@example.com", f"{users[1]}@example.org", f"{users[2]}@example.org")

    async def _connect(self) -> _Dialogue | None:
        try:
            async with asyncio.timeout(self._patience_s):
                reader, writer = await asyncio.open_connection(*self._address)
        except (OSError, TimeoutError):
            return None
        self._moments.reached(Point.CLIENT_CONNECTS)
        dialogue = _Dialogue(reader, writer, self._patience_s)
        try:
            if (await dialogue.reply())[0] == 220:
                dialogue.send(b"EHLO client.example.net\r\n")
                if (await dialogue.reply())[0] == 250:
                    return dialogue
        except Gone:
            pass
        dialogue.close()
        return None

    async def _transmit(self, dialogue: _Dialogue, sent: Sent, wire: bytes) -> Told:
        envelope = [f"MAIL FROM:<{_SENDER}>\r\n", *(f"RCPT TO:<{one}>\r\n" for one in sent.recipients), "DATA\r\n"]
        dot_sent = False
        code, text = 0, ""
        try:
            if self._dice.random() < 0.5:
                dialogue.send("".join(envelope).encode("ascii"))
                replies = [await dialogue.reply() for _ in envelope]
            else:
                replies = []
                for line in envelope:
                    dialogue.send(line.encode("ascii"))
                    replies.append(await dialogue.reply())
            if [code for code, _ in replies] != [250] * (len(envelope) - 1) + [354]:
                told, text = Told.NOT_SENT, str(replies)
            else:
                dialogue.send(wire)
                dot_sent = True
                self._moments.reached(Point.CLIENT_DOT)
                code, text = await dialogue.reply()
                told = _told(code, text)
        except Gone as gone:
            told, text = Told.NO_REPLY if dot_sent else Told.NOT_SENT, str(gone)
        found = _QUEUE_ID.search(text) if told in ACKNOWLEDGED else None
        queue_id = found[1] if found else ""
        sent.transmissions.append(Transmission(time.time(), told, f"{code} {text}", queue_id))
        if told in ACKNOWLEDGED:
            self._moments.reached(Point.CLIENT_REPLY, queue_id)
        return told


USERS: Final = tuple(f"user{number}" for number in range(20))
_SENDER: Final = "sender@example.net"


def _told(code: int, text: str) -> Told:
    if code == 250:
        return Told.DELIVERED if "delivered as" in text else Told.QUEUED
    return Told.REFUSED if code >= 500 else Told.LATER
