"""Owns: rounds of load and death, and the table of what came of them.

usage: python -m soak [--moments N] [--mode MODE]... [--clients N] [--seed N] [--keep FOLDER]

A round: a tree is started on the state of the round before, clients send, moments strike. Then the clients finish, the
next hop is good, the queue runs empty, the books are balanced, the tree is drained. Rounds alternate between express
on and off. Exit code 1 when anything was lost or cannot be explained.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from soak.ledger import Account, Failure, Ledger
from soak.load import USERS, Load
from soak.message import Mill
from soak.moments import Moments
from soak.next_hop import SLOW_S, NextHop
from soak.victims import Executioner, Mode
from tests.bed.relay import RelayRunner

MOMENTS: Final = 200
CLIENTS: Final = 24
"""Sessions at once; with their pauses they send some hundred messages a second."""
EXPRESS_DEADLINE_S: Final = 0.15
FINAL_REPLY_S: Final = 2.0
CLIENT_PATIENCE_S: Final = 20.0
LEASE_PATIENCE_S: Final = 2.5
"""In mode lease clients give up on a stopped worker and send again, while it still has their message."""
SETTLED_S: Final = 1.5
"""Longer than a worker takes to start."""
DRAIN_S: Final = 90.0
"""A queue that is not empty after this long keeps a message nobody delivers."""
SHOWN: Final = 5
"""Failures shown with their history."""
HISTORY_LINES: Final = 60

_FOLLOWED: Final = ("possible_duplicate", "lease_lost", "leases_voided", "process_died", "queue_entry_set_aside")

assert EXPRESS_DEADLINE_S < SLOW_S[0] < SLOW_S[1] < FINAL_REPLY_S


@dataclass(slots=True)
class Outcome:
    """What one mode came to."""

    mode: Mode
    seed: int
    moments: int = 0
    rounds: int = 0
    seconds: float = 0.0
    points: Counter[str] = field(default_factory=Counter)
    account: Account = field(default_factory=Account)
    events: Counter[str] = field(default_factory=Counter)
    """How often the relay logged what shows that the hard paths were taken."""

    @property
    def failures(self) -> list[Failure]:
        """Lost and unexplained."""
        return [*self.account.lost, *self.account.unexplained]


class MailLogReader:
    """The relay's log, read on from round to round."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self.named: set[str] = set()
        self.events: Counter[str] = Counter()

    def read_on(self) -> None:
        """Take up what was written since the last time."""
        with self._path.open("rb") as log:
            log.seek(self._position)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                event = _event(line)
                if event.get("event") in _FOLLOWED:
                    self.events[event["event"]] += 1
                    if event["event"] == "possible_duplicate":
                        self.named.add(event["id"])
                elif event.get("event") == "queued":
                    self.events[f"queued: {event['reason']}"] += 1
                elif event.get("event") == "result" and event["text"].startswith("broken off: the lease"):
                    self.events["broken off before the final dot"] += 1

    def history(self, queue_ids: frozenset[str]) -> list[str]:
        """Every line that speaks of one of these."""
        with self._path.open(encoding="utf-8", errors="replace") as log:
            found = [line.rstrip() for line in log if any(queue_id in line for queue_id in queue_ids)]
        return found[:HISTORY_LINES]


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}  # a line cut off by a death
    return event if isinstance(event, dict) else {}


class Soak:
    """One mode against one relay in a folder of its own."""

    def __init__(self, folder: Path, mode: Mode, seed: int, clients: int, tell: Callable[[str], None]) -> None:
        """``tell`` gets a line for each round."""
        self._folder = folder
        self._clients = clients
        self._tell = tell
        self._outcome = Outcome(mode, seed)
        self._mode = mode
        self._dice = random.Random(seed)
        self._ledger = Ledger()
        self._moments = Moments(self._dice)
        self._mill = Mill(self._dice)
        self._hop = NextHop(self._ledger, self._moments, self._dice)

    async def run(self, moments: int) -> Outcome:
        """So many moments. Raises AssertionError when something does not happen that has to."""
        began = time.monotonic()
        outcome = self._outcome
        hops = [await self._hop.listen() for _ in range(2)]
        relay = RelayRunner(self._folder, hops[0], recipients=_recipients(), config=_settings(hops))
        relay.configure(self._mode.settings)
        log = MailLogReader(relay.log_file)
        rounds = max(2, -(-moments // self._mode.moments_a_round))
        try:
            for number in range(rounds):
                share = moments * (number + 1) // rounds - moments * number // rounds
                relay.configure({"delivery": {"express": number % 2 == 0}})
                outcome.points.update(await self._round(relay, number, share))
                outcome.moments += share
                outcome.rounds += 1
                outcome.seconds = time.monotonic() - began
                log.read_on()
                outcome.account, outcome.events = self._ledger.balance(log.named), log.events
                self._tell(f"{self._mode}: {line_of(outcome)}")
                if not outcome.account.balanced:
                    self._show(log)
                    break
        finally:
            await self._hop.close()
            await asyncio.to_thread(relay.close)
        return outcome

    async def _round(self, relay: RelayRunner, number: int, count: int) -> list[str]:
        self._hop.healthy = False
        await asyncio.to_thread(relay.start, build=number == 0)
        executioner = Executioner(relay, self._moments, self._dice, self._mode)
        await executioner.complete()
        patience_s = LEASE_PATIENCE_S if self._mode is Mode.LEASE else CLIENT_PATIENCE_S
        load = Load(
            relay.address(), self._ledger, self._moments, self._dice, self._mill, clients=self._clients,
            patience_s=patience_s, name=f"{self._mode}-{number}",
        )  # fmt: skip
        try:
            points = await executioner.round(count)
            await load.stop()
        except BaseException:
            await load.abandon()
            raise
        self._hop.healthy = True
        await executioner.complete()
        await self._drained(relay)
        code = await asyncio.to_thread(relay.stop)
        assert code == 0, f"the relay ended with {code}: {relay.complaints()}"
        return points

    async def _drained(self, relay: RelayRunner) -> None:
        """Wait until nothing waits. A worker that was just replaced takes its predecessor's log in before it is ready, so
        the queue has to be empty twice, with the same workers.
        """
        deadline = time.monotonic() + DRAIN_S
        seen: tuple[int, ...] = ()
        while True:
            workers = await asyncio.to_thread(self._at_rest, relay)
            if workers and workers == seen:
                return
            seen = workers
            if time.monotonic() > deadline:
                raise AssertionError(f"the queue does not run empty: {relay.command('queue', 'list').stdout}")
            await asyncio.sleep(SETTLED_S if seen else 0.1)

    @staticmethod
    def _at_rest(relay: RelayRunner) -> tuple[int, ...]:
        """The workers, when they are ready and the queue is empty; else none."""
        if relay.metric("relay_queue_messages") or relay.get("/readyz")[0] != 200:
            return ()
        listed = relay.command("queue", "list", "--json")
        assert listed.returncode == 0, listed.stderr
        return () if listed.stdout else tuple(relay.workers())

    def _show(self, log: MailLogReader) -> None:
        for failure in self._outcome.failures[:SHOWN]:
            self._tell(failure.what)
            for line in (*failure.history, *log.history(failure.queue_ids)):
                self._tell(f"    {line}")


def _recipients() -> list[str]:
    return [f"{user}@{domain}" for user in USERS for domain in ("example.com", "example.org")]


def _settings(hops: Sequence[str]) -> dict[str, Any]:
    return {
        "domain": [{"names": ["example.com", "example.org"]}],
        # Reports to the sender take the default route.
        "route": [
            {"domains": ["example.com"], "next_hops": [hops[0]]},
            {"domains": ["example.org"], "next_hops": [hops[1]]},
            {"domains": ["*"], "next_hops": [hops[1]]},
        ],
        "delivery": {
            "express_deadline_s": EXPRESS_DEADLINE_S,
            "final_reply_timeout_s": FINAL_REPLY_S,
            "concurrency": 32,
        },
        "queue": {"retry_s": [0.2, 0.3, 0.5], "retry_jitter": 0.2},
        "limits": {"sessions_per_client": 500},  # clients whose sessions died with a worker come back at once
        "log": {"format": "json"},
    }


_COLUMNS: Final[dict[str, Callable[[Outcome], object]]] = {
    "mode": lambda o: o.mode,
    "moments": lambda o: o.moments,
    "messages": lambda o: o.account.sent,
    "250 delivered": lambda o: o.account.delivered,
    "250 queued": lambda o: o.account.queued,
    "refused": lambda o: o.account.refused,
    "no final reply": lambda o: o.account.no_reply,
    "reports": lambda o: o.account.reports,
    "named by the journal": lambda o: o.account.named,
    "duplicates: journal": lambda o: o.account.by_journal,
    "duplicates: no reply": lambda o: o.account.by_missing_reply,
    "lost": lambda o: len(o.account.lost),
    "unexplained": lambda o: len(o.account.unexplained),
}


def line_of(outcome: Outcome) -> str:
    """The figures in one line."""
    return ", ".join(f"{name} {value(outcome)}" for name, value in _COLUMNS.items() if name != "mode")


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown, one row a mode."""
    rows = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    rows += [[str(value(outcome)) for value in _COLUMNS.values()] for outcome in outcomes]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "| mode | seed | rounds | seconds | what the relay logged |", "|---|---|---|---|---|"]
    for one in outcomes:
        events = ", ".join(f"{name} {count}" for name, count in sorted(one.events.items()))
        lines.append(f"| {one.mode} | {one.seed} | {one.rounds} | {one.seconds:.0f} | {events} |")
    return "\n".join(lines) + "\n"


def soak(folder: Path, mode: Mode, moments: int, seed: int, clients: int, tell: Callable[[str], None]) -> Outcome:
    """One mode, from start to end; ``folder`` is empty and the relay's own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Soak(folder, mode, seed, clients, tell).run(moments))


def main() -> int:
    """Every mode asked for; the table on standard output, what happens meanwhile on standard error."""
    parser = argparse.ArgumentParser(prog="soak", description="Kill parts of the relay under load; count what is lost.")
    parser.add_argument("--moments", type=int, default=MOMENTS, help=f"strikes per mode ({MOMENTS})")
    parser.add_argument("--mode", type=Mode, action="append", choices=list(Mode), help="one or several; default: all")
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"SMTP sessions at once ({CLIENTS})")
    parser.add_argument("--seed", type=int, help="of a run before: the same dice, not the same timing")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave spool and log here")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(1 << 32)
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="dmz-relay-soak-"))
    outcomes: list[Outcome] = []
    try:
        for mode in asked.mode or list(Mode):
            (folder / mode).mkdir(parents=True)
            outcomes.append(soak(folder / mode, mode, asked.moments, seed, asked.clients, _to_stderr))
    finally:
        sys.stdout.write(table(outcomes))
        if asked.keep is None:
            shutil.rmtree(folder)
    return 0 if all(outcome.account.balanced for outcome in outcomes) else 1


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
