"""Owns: what a backlog for a dead next hop costs: start, memory, the delay of mail for others, the operator's commands.

    .venv/bin/python bench/backlog.py [--messages 100000] [--durable] [--parked]

A spool with so many messages for a next hop that refuses connections, all due at the start (--parked: known to wait for that
next hop, as after a restart in the middle of an outage); then the shipped program with one worker a core, and mail for a
next hop that works, one message after the other. Asserts nothing: it prints figures, those without a backlog first.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from relay.config.schema import Queue  # noqa: E402 - the path first
from relay.mail.address import Mailbox  # noqa: E402
from relay.mail.content import Content  # noqa: E402
from relay.mail.envelope import Envelope, QueueId  # noqa: E402
from relay.queue.boot import boot_clock  # noqa: E402
from relay.queue.prepare import prepare  # noqa: E402
from relay.queue.sqlite import SqliteStore  # noqa: E402
from relay.queue.store import NewMessage  # noqa: E402
from tests.bed.next_hop import NextHop  # noqa: E402
from tests.bed.ports import free_port  # noqa: E402
from tests.bed.relay import RelayRunner, children_of  # noqa: E402
from tests.bed.wire import letter  # noqa: E402

PORTION = 500
MAILS = 200


def fill(spool: Path, count: int, waits_for: str) -> float:
    """Put the backlog; seconds it took."""
    body = Content.of(b"Subject: backlog\r\n\r\n" + b"a line of a message that waits\r\n" * 30)

    async def work() -> None:
        store = SqliteStore(spool, "boot:0:1", 0, Queue(), asyncio.get_running_loop())
        envelope = Envelope(
            QueueId(""), Mailbox("s@example.net"), (), body_8bit=False, listener="mx", client="c[192.0.2.1]"
        )
        new = NewMessage(envelope, body, time.time(), 432000.0, boot_clock(), leased=False, waits_for=waits_for)
        for start in range(0, count, PORTION):
            await store.put(
                [
                    replace(
                        new,
                        envelope=replace(
                            envelope,
                            id=QueueId(f"BL{number:08X}"),
                            recipients=(Mailbox(f"u{number}@dead.example.com"),),
                        ),
                    )
                    for number in range(start, min(start + PORTION, count))
                ]
            )
        await store.close()

    prepare(spool)
    begun = time.monotonic()
    asyncio.run(work())
    return time.monotonic() - begun


def memory(pids: list[int]) -> float:
    """Proportional resident memory, MB."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def cpu(pids: list[int]) -> float:
    """CPU seconds so far."""
    return (
        sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) for pid in pids)
        / 100
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """What a backlog was seen to cost."""

    start_s: float
    median_ms: float
    megabytes: float


def say(text: str) -> None:
    """To standard error: standard output is for tables."""
    print(text, file=sys.stderr, flush=True)


def measure(count: int, *, express: bool, parked: bool) -> Seen:
    """Run it once, telling all there is to tell on standard error."""
    with tempfile.TemporaryDirectory(prefix="dmz-relay-backlog-") as name, NextHopOf() as hop:
        dead = f"127.0.0.1:{free_port()}"
        relay = RelayRunner(
            Path(name),
            hop.route,
            config={
                "server": {"workers": 2},
                "domain": [{"names": ["example.com", "dead.example.com"], "recipients": "any"}],
                "route": [
                    {"domains": ["example.com"], "next_hops": [hop.route]},
                    {"domains": ["dead.example.com"], "next_hops": [f"smtp:[127.0.0.1]:{dead.rpartition(':')[2]}"]},
                ],
                "delivery": {"express": express},
                "queue": {"retry_s": [60, 300, 900, 1800, 3600]},
                "log": {"file": str(Path(name) / "relay.log")},
            },
        )
        took = fill(relay.spool, count, dead if parked else "") if count else 0.0
        begun = time.monotonic()
        relay.start(build=False)
        with relay.client() as client:
            client.open()
            start_s = time.monotonic() - begun
            say(f"\n{count} messages waiting, {'express' if express else 'durable'}{', parked' if parked else ''}")
            say(f"  put in                       {took:8.1f} s")
            say(f"  start to first greeting      {start_s:8.2f} s")
            tree = [relay.supervisor, *children_of(relay.supervisor)]
            at, spent = time.monotonic(), cpu(tree)
            delays = []
            for number in range(MAILS):
                before = time.monotonic()
                client.deliver("s@example.net", "user@example.com", letter(f"n{number}"))
                while len(hop.accepted) <= number:
                    time.sleep(0.0005)
                delays.append((time.monotonic() - before) * 1000)
                time.sleep(0.02)
            delays.sort()
            share = (cpu(tree) - spent) / (time.monotonic() - at)
        say(
            f"  mail for others, until there {statistics.median(delays):8.1f} ms median, "
            f"{delays[int(len(delays) * 0.95)]:.1f} ms 95 %, {delays[-1]:.1f} ms longest"
        )
        megabytes = memory(tree)
        say(f"  CPU of the tree meanwhile    {share * 100:8.0f} % of one core")
        say(f"  memory of the tree           {megabytes:8.0f} MB")
        for what in (
            ["queue", "list"],
            ["queue", "summary"],
            ["queue", "list", "--domain", "nobody.example"],
            ["version"],
        ):
            before = time.monotonic()
            relay.command(*what) if what != ["version"] else subprocess.run(
                [sys.executable, "-m", "relay", "version"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
            say(f"  relay {' '.join(what):24.24} {time.monotonic() - before:7.2f} s")
        before = time.monotonic()
        relay.get("/metrics")
        say(f"  GET /metrics                 {(time.monotonic() - before) * 1000:8.1f} ms")
        before = time.monotonic()
        relay.stop()
        say(f"  stop                         {time.monotonic() - before:8.2f} s")
        return Seen(start_s, statistics.median(delays), megabytes)


class NextHopOf:
    """A next hop that ends with the measurement."""

    def __enter__(self) -> NextHop:
        self._hop = NextHop()
        return self._hop

    def __exit__(self, *_: object) -> None:
        self._hop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--parked", action="store_true")
    given = parser.parse_args()
    measure(0, express=not given.durable, parked=False)
    measure(given.messages, express=not given.durable, parked=given.parked)


if __name__ == "__main__":
    main()
