"""Owns: who dies, how, and what has to be true before the next one does.

================  =========================================================================================
mode              a moment is
================  =========================================================================================
worker            kill -9 of a worker; the supervisor replaces it
hub               kill -9 of the hub; the supervisor replaces it
supervisor        kill -9 of the supervisor alone; the tree has to die by itself and is started again
tree              kill -9 of every process; the relay is started again on what is left
hung              SIGSTOP of a worker; the supervisor has to kill and replace it
lease             SIGSTOP of a worker past the lease of its messages, the watchdog out of the way; another
                  worker takes them over; then SIGCONT
================  =========================================================================================

It must not know what is sent meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from typing import Any, Final

from soak.moments import Moments
from tests.bed.relay import RelayRunner, children_of, is_alive

PATIENCE_S: Final = 60.0
"""What has not happened after this long never will: a start, a death, a replacement."""
POLL_S: Final = 0.02
HEARTBEAT_S: Final = 1.0
LEASE_S: Final = 5.0
"""The shortest the configuration allows: each stop lasts at least as long."""
AIMED: Final = 0.8
"""Share of strikes at the worker that has the message of the moment in hand; the others hit any worker."""
KILLS_A_SLOT: Final = 3
"""The supervisor makes a slot wait longer after each quick death: 0, 0.5, 1 s; a new tree begins again at 0."""
STOPPED_AT_ONCE: Final = 3
"""Of WORKERS, in mode lease: at least one goes on."""
WORKERS: Final = 4
"""Where workers are struck."""

STANDSTILL_S: Final = 1.0
"""Without a moment for so long, everybody waits for a stopped worker."""

_SLOT_IN_ID: Final = slice(11, 13)
"""Where a queue id names the slot of the worker that took the message, in hexadecimal."""


class Mode(StrEnum):
    """What dies; see the table above."""

    WORKER = "worker"
    HUB = "hub"
    SUPERVISOR = "supervisor"
    TREE = "tree"
    HUNG = "hung"
    LEASE = "lease"

    @property
    def moments_a_round(self) -> int:
        """So many strikes before the queue is drained, the books are balanced and the tree starts anew."""
        return {
            Mode.WORKER: WORKERS * KILLS_A_SLOT,
            Mode.HUB: KILLS_A_SLOT,
            Mode.SUPERVISOR: 10,
            Mode.TREE: 10,
            Mode.HUNG: WORKERS * KILLS_A_SLOT,
            Mode.LEASE: 4 * STOPPED_AT_ONCE,
        }[self]

    @property
    def workers(self) -> int:
        """How many the tree has: some to go on where workers are struck, else the fewest that share a queue."""
        return WORKERS if self in {Mode.WORKER, Mode.HUNG, Mode.LEASE} else 2

    @property
    def settings(self) -> dict[str, Any]:
        """What the relay's configuration needs for it."""
        settings: dict[str, Any] = {"server": {"workers": self.workers}, "process": {"heartbeat_timeout_s": 5.0}}
        if self is Mode.HUNG:
            settings["process"]["heartbeat_timeout_s"] = HEARTBEAT_S
        elif self is Mode.LEASE:
            settings["process"]["heartbeat_timeout_s"] = 300.0
            settings["queue"] = {"lease_s": LEASE_S}
        return settings


class Executioner:
    """Strikes at one relay, in one mode."""

    def __init__(self, relay: RelayRunner, moments: Moments, dice: random.Random, mode: Mode) -> None:
        self._relay = relay
        self._moments = moments
        self._dice = dice
        self._mode = mode
        self._struck: Counter[int] = Counter()  # by slot, since the tree began

    async def round(self, count: int) -> list[str]:
        """So many moments; the points they came at."""
        self._struck.clear()
        points: list[str] = []
        while len(points) < count:
            # On a busy machine the watchdog may have been there first: such a moment does not count.
            with suppress(ProcessLookupError):
                points += await self._strike(count - len(points))
        return points

    async def _strike(self, count: int) -> list[str]:
        """One moment, or up to ``count``. Raises ProcessLookupError when whoever was to be struck is gone."""
        match self._mode:
            case Mode.WORKER:
                return [await self._strike_worker(signal.SIGKILL)]
            case Mode.HUNG:
                return [await self._strike_worker(signal.SIGSTOP)]
            case Mode.LEASE:
                return await self._stop_past_lease(min(STOPPED_AT_ONCE, count))
            case Mode.HUB:
                return [await self._strike_hub()]
            case Mode.SUPERVISOR | Mode.TREE:
                return [await self._strike_tree()]

    async def complete(self) -> None:
        """Wait until every place of the tree is filled with a process that runs."""
        await until(
            lambda: len(self._workers()) == self._mode.workers and self._other("hub") and self._other("web"),
            "whole tree",
        )
        await until(lambda: not any(map(_is_stopped, self._workers().values())), "end of the stopped workers")

    # --- who there is ------------------------------------------------------------------------------------------------
    def _workers(self) -> dict[int, int]:
        """Slot → pid."""
        members = children_of(self._relay.supervisor)
        return {int(name.rpartition("-")[2]): pid for pid, name in members.items() if name.startswith("relay-worker-")}

    def _other(self, role: str) -> int:
        """Pid of hub or web, 0 when there is none."""
        members = children_of(self._relay.supervisor)
        return next((pid for pid, name in members.items() if name == f"relay-{role}"), 0)

    @contextmanager
    def _held(self, pids: Iterable[int]) -> Iterator[Callable[[int, signal.Signals], None]]:
        """A way to signal these members and nobody else: a number may be another process's by then.

        Raises ProcessLookupError, as does the way itself, when one is gone.
        """
        with ExitStack() as opened:
            held: dict[int, int] = {}
            for pid in pids:
                held[pid] = os.pidfd_open(pid)
                opened.callback(os.close, held[pid])
            if not held.keys() <= children_of(self._relay.supervisor).keys():
                raise ProcessLookupError
            yield lambda pid, number: signal.pidfd_send_signal(held[pid], number)

    def _choose(self, workers: dict[int, int], queue_id: str) -> int:
        """The slot to strike: mostly the one that has the message in hand."""
        fewest = min(self._struck[slot] for slot in workers)
        if queue_id and self._dice.random() < AIMED:
            slot = int(queue_id[_SLOT_IN_ID], 16)
            if slot in workers and self._struck[slot] < KILLS_A_SLOT:
                return slot
        return self._dice.choice([slot for slot in workers if self._struck[slot] == fewest])

    # --- strikes -----------------------------------------------------------------------------------------------------
    async def _strike_worker(self, number: signal.Signals) -> str:
        """The next may come while the replacement is still starting."""
        await until(lambda: len(self._running()) > 1, "second worker")
        known = self._running()

        def strike(queue_id: str) -> None:
            workers = _left_of(known)
            slot = self._choose(workers, queue_id)
            send(workers[slot], number)
            self._struck[slot] += 1

        with self._held(known.values()) as send:
            return await self._moments.next(strike)

    def _running(self) -> dict[int, int]:
        return {slot: pid for slot, pid in self._workers().items() if not _is_stopped(pid)}

    async def _strike_hub(self) -> str:
        await until(lambda: self._other("hub"), "hub")
        hub = self._other("hub")
        with self._held([hub]) as send:
            point = await self._moments.next(lambda _: send(hub, signal.SIGKILL))
        await until(lambda: self._other("hub") not in {0, hub}, "new hub")
        return point

    async def _strike_tree(self) -> str:
        relay = self._relay
        await self.complete()
        supervisor, children = relay.supervisor, list(children_of(relay.supervisor))

        def strike(_: str) -> None:
            os.kill(supervisor, signal.SIGKILL)  # our own child, not waited for yet: nobody else can have its pid
            if self._mode is Mode.TREE:
                for pid in children:
                    with suppress(ProcessLookupError):  # nobody outlives the supervisor
                        send(pid, signal.SIGKILL)

        with self._held(children) as send:
            point = await self._moments.next(strike)
        await asyncio.to_thread(relay.wait_for_exit)
        await until(lambda: not any(map(is_alive, children)), "end of the children without their supervisor")
        await asyncio.to_thread(relay.start, build=False)
        return point

    async def _stop_past_lease(self, count: int) -> list[str]:
        """Up to ``count`` at once, each at a moment of its own: a stop takes longer than all the rest.

        A worker that stops with the queue's write lock in hand stops all that would queue; then no more moments come.
        """
        await self.complete()
        known = self._running()
        stopped: list[int] = []

        def strike(queue_id: str) -> None:
            workers = _left_of(known)
            slot = self._choose(workers, queue_id)
            send(workers[slot], signal.SIGSTOP)
            self._struck[slot] += 1
            stopped.append(slot)

        with self._held(known.values()) as send:
            try:
                points: list[str] = [await self._moments.next(strike)]
                with suppress(TimeoutError):
                    while len(points) < count:
                        points.append(await self._moments.next(strike, STANDSTILL_S))
                await asyncio.sleep(LEASE_S)  # not for luck: before this no lease can be over
                await self._taken_over(set(stopped))
            finally:
                for slot in stopped:
                    send(known[slot], signal.SIGCONT)
        return points

    async def _taken_over(self, slots: set[int]) -> None:
        """Until none of the stopped holds a message, unless one of them stopped with the queue's write lock in hand."""
        deadline = time.monotonic() + LEASE_S
        while time.monotonic() < deadline:
            listed = await asyncio.to_thread(self._relay.command, "queue", "list", "--json", "--limit", "0")
            owners = {json.loads(line)["owner"] for line in listed.stdout.splitlines()} - {""}
            if not any(int(owner.split(":")[1]) in slots for owner in owners):
                return


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for it. Raises AssertionError when it does not happen."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"within {PATIENCE_S:g} s: no {what}")
        await asyncio.sleep(POLL_S)


def _left_of(workers: dict[int, int]) -> dict[int, int]:
    """Those that still run, by four small reads: a look at all processes would take longer than any moment lasts.

    Raises ProcessLookupError when none does.
    """
    left = {slot: pid for slot, pid in workers.items() if is_alive(pid) and not _is_stopped(pid)}
    if not left:
        raise ProcessLookupError
    return left


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(") ")[2][0] == "T"
    except OSError:
        return False
