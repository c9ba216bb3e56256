"""Dictionary attack: refused unknown recipients a second, interleaved between targets.

usage: attack.py --target NAME,HOST:PORT,PIDS ... [--reps N]

serial: one RCPT, wait for the reply, the next. pipelined: 50 RCPTs in one write. churn: a new connection for every 20.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

import benchlib as b
import uvloop

SESSIONS: Final = 20
FIRST: Final = 2000
"""Recipients of the warm-up, which tells how many a run needs."""


@dataclass(frozen=True, slots=True)
class Mode:
    """``batch`` RCPTs in one write; a connection ends after ``per_connection`` of them (0: with the run)."""

    name: str
    batch: int
    per_connection: int


MODES: Final = (Mode("serial", 1, 0), Mode("pipelined", 50, 0), Mode("churn", 20, 20))


class Attacker(asyncio.Protocol):
    """One connection: banner, EHLO, MAIL, then RCPTs until the quota is used up."""

    def __init__(self, run: Run, quota: int) -> None:
        self._run, self._quota = run, quota
        self._replies_before_rcpt = 3
        self._waiting = 0
        self._partial = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        if self._replies_before_rcpt:
            self._greet(data)
            return
        self._run.soft += data.count(b"\n4") + data.startswith(b"4")
        self._run.replies += (lines := data.count(b"\n"))
        self._waiting -= lines
        if self._waiting > 0:
            return
        if self._quota > 0:
            self._ask()
        else:
            self._transport.write(b"QUIT\r\n")
            self._transport.close()

    def _greet(self, data: bytes) -> None:
        self._partial += data
        if not self._partial.endswith(b"\n") or self._partial.splitlines()[-1][3:4] == b"-":
            return
        self._partial = b""
        self._replies_before_rcpt -= 1
        match self._replies_before_rcpt:
            case 2:
                self._transport.write(b"EHLO attacker.test\r\n")
            case 1:
                self._transport.write(b"MAIL FROM:<spam@attacker.test>\r\n")
            case _:
                self._ask()

    def _ask(self) -> None:
        count = min(self._run.mode.batch, self._quota)
        self._quota -= count
        self._waiting = count
        first = self._run.asked
        self._run.asked += count
        self._transport.write(b"".join(b"RCPT TO:<x%d.nobody@example.com>\r\n" % (first + i) for i in range(count)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.lost(broken=self._waiting > 0 or self._quota > 0)


class Run:
    """One run of one mode against one target."""

    MAX_BROKEN: Final = 50

    def __init__(self, target: b.Target, mode: Mode, total: int) -> None:
        self._target, self.mode = target, mode
        self._quota = mode.per_connection or total // SESSIONS
        self._left = max(SESSIONS, total // self._quota)
        self._live = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.asked = self.replies = self.broken = self.soft = 0

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: Attacker(self, self._quota), self._target.host, self._target.port)

    def _next(self) -> None:
        self._left -= 1
        self._live += 1
        task = asyncio.get_running_loop().create_task(self._open())
        self._tasks.add(task)
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.exception() is not None:
            self.lost(broken=True)

    def lost(self, *, broken: bool) -> None:
        self._live -= 1
        self.broken += broken
        if self._left > 0 and self.broken < self.MAX_BROKEN:
            self._next()
        elif self._live == 0:
            self._end.set()

    async def attack(self) -> None:
        self._end = asyncio.Event()
        for _ in range(min(SESSIONS, self._left)):
            self._next()
        async with asyncio.timeout(120):
            await self._end.wait()


def once(target: b.Target, mode: Mode, total: int) -> float:
    """Refusals a second."""
    run, start = Run(target, mode, total), time.monotonic()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run.attack())
    if run.broken or run.soft:
        b.say(f"  {mode.name} {target.name}: {run.broken} broken connections, {run.soft} replies 4xx")
    return run.replies / (time.monotonic() - start)


def measure(targets: Sequence[b.Target], reps: int, seconds: float) -> Iterator[b.Figure]:
    """Refusals a second in each mode; ``seconds`` is the wanted length of a run."""
    for mode in MODES:
        totals = {}
        for target in targets:
            rate = once(target, mode, FIRST)
            totals[target.name] = int(max(FIRST, min(200 * FIRST, rate * seconds)))
        rounds = []
        for _ in range(reps):
            row = {}
            for target in targets:
                time.sleep(0.2)
                row[target.name] = once(target, mode, totals[target.name])
            rounds.append(row)
        yield b.figure(f"unknown recipients, {mode.name}", "refusals/s", rounds)


def main() -> None:
    parser = b.command_line(__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="wanted length of one run")
    options = parser.parse_args()
    for figure in measure(list(b.targets(options.target)), options.reps, options.seconds):
        print(figure, flush=True)


if __name__ == "__main__":
    main()
