"""Owns: the threads that slow password hashes run in: few, and who is known goes first.

A guess at a slow hash takes a core for a tenth of a second; two hundred at once must not make the logins of others wait
behind them. It must not know what it runs.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Final, TypeVar

THREADS: Final = 2
"""Hashes computed at once; libcrypt and Argon2 let other threads run meanwhile."""
WAITING_MAX: Final = 512
"""Checks that wait; more are told to come again."""

_ResultT = TypeVar("_ResultT")


class Turn(IntEnum):
    """Who goes first."""

    KNOWN = 0
    STRANGER = 1


class SlotsFull(Exception):
    """Too many wait already."""


class Slots:
    """At most ``THREADS`` at once, in order of ``Turn``, then of arrival."""

    def __init__(self) -> None:
        self._free = THREADS
        self._waiting: list[tuple[Turn, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="hash")

    async def run(self, turn: Turn, work: Callable[[], _ResultT]) -> _ResultT:
        """``work()`` in a thread. Raises SlotsFull."""
        loop = asyncio.get_running_loop()
        if self._free:
            self._free -= 1
        else:
            if len(self._waiting) >= WAITING_MAX:
                raise SlotsFull
            place: asyncio.Future[None] = loop.create_future()
            heapq.heappush(self._waiting, (turn, next(self._numbers), place))
            await place
        try:
            return await loop.run_in_executor(self._pool, work)
        finally:
            self._leave()

    def _leave(self) -> None:
        while self._waiting:
            place = heapq.heappop(self._waiting)[2]
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
