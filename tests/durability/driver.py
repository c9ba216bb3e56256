"""A process that puts, defers and settles messages and says so line by line, to be traced, cut and failed.

usage: driver.py SPOOL COUNT [SLOT [soon]]

With ``soon`` small messages are put as the relay puts those that it delivers at once: by the intake log.

Lines on standard output, each one write(2): ``ACK ID`` after a put returned, ``FAIL ID`` after it raised QueueError,
``GONE ID`` before a settle that finishes the message begins, ``OK ID`` after it. The body of a message follows from
its ID alone (``body_of``), so whoever finds it can tell whether it is whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from pathlib import Path

from relay.config.schema import Queue
from relay.mail.address import Mailbox
from relay.mail.content import MEMORY_OCTETS, Content
from relay.mail.envelope import Envelope, QueueId
from relay.queue.boot import boot_clock, boot_id
from relay.queue.intake import DONE_RESERVE
from relay.queue.layout import Tuning
from relay.queue.sqlite import SqliteStore
from relay.queue.store import Deferral, NewMessage, QueueError, Settlement

TUNING = Tuning(
    wal_octets=256 << 10, checkpoint_octets=96 << 10, intake_octets=DONE_RESERVE + (128 << 10), reserve_octets=0
)
"""A log so short that a few dozen messages go round it several times."""

LARGE_OCTETS = MEMORY_OCTETS + 10_001
IN_FLIGHT = 6


def body_of(name: str) -> bytes:
    """Every sixth message is large."""
    octets = LARGE_OCTETS if int(name[1:]) % 6 == 5 else 700 + int(name[1:]) % 7 * 300
    block = hashlib.sha256(name.encode()).digest()
    return (block * (octets // len(block) + 1))[:octets]


def say(word: str, name: str) -> None:
    os.write(1, f"{word} {name}\n".encode())


async def one(store: SqliteStore, name: str, *, soon: bool) -> None:
    number = int(name[1:])
    body = body_of(name)
    content = Content.of(body)
    if len(body) > MEMORY_OCTETS:
        descriptor = store.open_body()
        for start in range(0, len(body), 16384):
            os.write(descriptor, body[start : start + 16384])
        content = Content(None, descriptor, len(body))
    to = tuple(Mailbox(f"user{each}@example.org") for each in range(1 + number % 2))
    envelope = Envelope(
        QueueId(name), Mailbox("sender@example.com"), to, body_8bit=False, listener="mx", client="client[192.0.2.1]"
    )
    message = NewMessage(envelope, content, time.time(), 1e6, boot_clock(), leased=True)
    try:
        if soon and content.memory is not None:
            lease, committed = store.put_soon(message)
            await committed
        else:
            (lease,) = await store.put([message])
    except QueueError as error:
        sys.stderr.write(f"{name}: {error}\n")
        say("FAIL", name)
        return
    finally:
        content.close()
    say("ACK", name)
    try:
        match number % 4:
            case 0 | 1:
                say("GONE", name)
                await store.settle(Settlement(lease, tuple(range(len(to))), ()))
                say("OK", name)
            case 2:
                later = Deferral(0, 1, boot_clock() + 1000.0, 450, "4.2.0", "later", "hop")
                await store.settle(Settlement(lease, (), (later,)))
            case _:
                pass  # stays leased
    except QueueError as error:
        sys.stderr.write(f"{name}: settle: {error}\n")


async def main(spool: Path, count: int, slot: int, *, soon: bool) -> None:
    owner = f"{boot_id()}:{slot}:1"
    store = SqliteStore(spool, owner, slot, Queue(), asyncio.get_running_loop(), tuning=TUNING)
    await store.take_over_slot()
    names = iter([f"M{number:05}" for number in range(count)])

    async def session() -> None:
        for name in names:
            await one(store, name, soon=soon)

    await asyncio.gather(*(session() for _ in range(IN_FLIGHT)))
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int((*sys.argv, 0)[3]), soon="soon" in sys.argv))
