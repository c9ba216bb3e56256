"""The queue alone: put (1 KB, one recipient, leased) and settle, from several processes at once, by number in flight.

usage: store.py [--processes 2] [--inflight 20] [--seconds 3] [--octets 1024] [--busy 0] [FOLDER]

``--busy`` burns that many microseconds of the event loop for each message, as SMTP would.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import uvloop

from relay.config.schema import Queue
from relay.mail.address import Mailbox
from relay.mail.content import MEMORY_OCTETS, Content
from relay.mail.envelope import Envelope, QueueId
from relay.queue.boot import boot_clock, boot_id
from relay.queue.prepare import prepare
from relay.queue.sqlite import SqliteStore
from relay.queue.store import NewMessage, Settlement


def new_message(name: str, content: Content) -> NewMessage:
    envelope = Envelope(
        QueueId(name),
        Mailbox("sender@example.com"),
        (Mailbox("user@example.org"),),
        body_8bit=False,
        listener="mx",
        client="client[192.0.2.1]",
    )
    return NewMessage(envelope, content, time.time(), 432000.0, boot_clock(), leased=True)


def burn(microseconds: float) -> None:
    until = time.perf_counter() + microseconds / 1e6
    while time.perf_counter() < until:
        pass


async def one_process(spool: Path, slot: int, barrier: Barrier, options: argparse.Namespace) -> tuple[int, float]:
    loop = asyncio.get_running_loop()
    store = SqliteStore(spool, f"{boot_id()}:{slot}:1", slot, Queue(), loop)
    await store.take_over_slot()
    octets = os.urandom(options.octets)
    done = 0
    worst = 0.0
    barrier.wait()
    end = time.monotonic() + options.seconds

    async def session(number: int) -> None:
        nonlocal done, worst
        count = 0
        while (begin := time.monotonic()) < end:
            count += 1
            if options.octets > MEMORY_OCTETS:
                descriptor = store.open_body()
                os.write(descriptor, octets)
                content = Content(None, descriptor, len(octets))
            else:
                content = Content.of(octets)
            (lease,) = await store.put([new_message(f"{slot}-{number}-{count}", content)])
            content.close()
            worst = max(worst, time.monotonic() - begin)
            if options.busy:
                burn(options.busy)
            assert await store.settle(Settlement(lease, (0,), ()))
            done += 1

    await asyncio.gather(*(session(number) for number in range(options.inflight)))
    await store.close()
    return done, worst


def process(spool: Path, slot: int, barrier: Barrier, options: argparse.Namespace, results: object) -> None:
    begin = time.process_time()
    if options.switch:
        sys.setswitchinterval(options.switch / 1e6)
    done, worst = uvloop.run(one_process(spool, slot, barrier, options))
    results.put((done, worst, time.process_time() - begin))  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--inflight", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--octets", type=int, default=1024)
    parser.add_argument("--busy", type=float, default=0.0)
    parser.add_argument("--switch", type=float, default=0.0, help="interpreter's switch interval, microseconds")
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=options.folder) as spool:
        prepare(Path(spool))
        barrier = context.Barrier(options.processes)
        results = context.Queue()
        children = [
            context.Process(target=process, args=(Path(spool), slot, barrier, options, results))
            for slot in range(options.processes)
        ]
        for child in children:
            child.start()
        figures = [results.get() for _ in children]
        for child in children:
            child.join()
        total = sum(done for done, _, _ in figures)
        cpu = sum(used for _, _, used in figures)
        print(
            f"{total / options.seconds:,.0f} messages/s ({', '.join(f'{done / options.seconds:,.0f}' for done, _, _ in figures)}), "
            f"slowest put {max(worst for _, worst, _ in figures) * 1e3:.0f} ms, "
            f"CPU {cpu / max(total, 1) * 1e6:.0f} us a message"
        )


if __name__ == "__main__":
    main()
