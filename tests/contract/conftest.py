"""Owns: a spool of either kind whose clock the test moves, and the messages the contract is tried with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from relay.config.schema import Queue
from relay.mail.address import Mailbox
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.mail.terms import PLAIN, Terms
from relay.queue.layout import Tuning
from relay.queue.memory import MemorySpool, MemoryStore
from relay.queue.prepare import PrepareReport, prepare
from relay.queue.sqlite import SqliteStore
from relay.queue.store import Deferral, NewMessage, SetAside, Store

CONFIG = Queue(lease_s=60.0, write_timeout_s=20.0)
SMALL = Tuning(wal_octets=256 * 1024, checkpoint_octets=128 * 1024, reserve_octets=0)


class Bench:
    """A spool, its boot clock (``now``), and the stores opened on it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self.now = 1000.0
        self.boot = "boot-a"
        self.asides: list[SetAside] = []
        self._memory = MemorySpool()
        self._stores: list[Store] = []

    def clock(self) -> float:
        return self.now

    def prepare(self, **given) -> PrepareReport:
        return prepare(self.folder, clock=self.clock, boot=self.boot, tuning=given.pop("tuning", SMALL), **given)

    async def store(self, slot: int = 0, incarnation: int = 1, tuning: Tuning = SMALL, config: Queue = CONFIG) -> Store:
        owner = f"{self.boot}:{slot}:{incarnation}"
        if self.kind == "memory":
            made: Store = MemoryStore(self._memory, owner, slot, config, clock=self.clock)
        else:
            made = SqliteStore(
                self.folder,
                owner,
                slot,
                config,
                asyncio.get_running_loop(),
                on_aside=self.asides.append,
                clock=self.clock,
                boot=self.boot,
                tuning=tuning,
            )
        self._stores.append(made)
        return made

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        self._stores.clear()

    def message(
        self,
        name: str = "M1",
        to: Sequence[str] = ("user@example.org",),
        content: Content | None = None,
        *,
        leased: bool = True,
        due: float | None = None,
        expires_in: float = 1000.0,
        deferrals: tuple[Deferral, ...] = (),
        terms: Terms = PLAIN,
    ) -> NewMessage:
        return NewMessage(
            envelope=Envelope(
                id=QueueId(name),
                sender=Mailbox("sender@example.com"),
                recipients=tuple(Mailbox(each) for each in to),
                body_8bit=True,
                listener="mx",
                client="client.example.com[192.0.2.1]",
                terms=terms,
            ),
            content=content or Content.of(b"Subject: " + name.encode() + b"\r\n\r\nhello\r\n"),
            created=time.time(),
            expires_in=expires_in,
            due=self.now if due is None else due,
            leased=leased,
            deferrals=deferrals,
        )

    def deferral(self, number: int, wait: float, attempts: int = 1) -> Deferral:
        return Deferral(number, attempts, self.now + wait, 450, "4.2.0", "later, please", "hop.example.net")


@pytest.fixture(params=["memory", "sqlite"])
async def bench(request, tmp_path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, request.param)
    if made.kind == "sqlite":
        made.prepare()
    yield made
    await made.close()


@pytest.fixture
async def fresh(tmp_path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, "sqlite")
    yield made
    await made.close()


@pytest.fixture
async def disk(fresh) -> Bench:
    fresh.prepare()
    return fresh
