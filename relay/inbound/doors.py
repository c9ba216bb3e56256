"""Owns: the listening sockets of one worker, and leaving the next client to another worker that has fewer sessions.

All workers wait on the same sockets, and the kernel wakes them in the same order each time: of twenty clients that come
together the first one takes all, and keeps them for as long as they stay. So each worker writes how many sessions it has
into memory that all see, and whoever has more than ``AHEAD`` more than another looks away for ``AWAY_S``.

Must not refuse anybody, nor let a client wait for a worker that does not come: who looked away in vain takes the client.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Final

AHEAD: Final = 2
"""So many sessions more than another worker has are no reason to look away: short sessions come and go."""
AWAY_S: Final = 0.002
"""Some wake-ups of another worker; no client notices it."""
VAIN: Final = 10
"""So often in a row is looked away although nothing moves elsewhere; then the other workers are stuck, and this one takes
whoever comes until one of them moves.
"""
BACKLOG: Final = 1024

Door = tuple[Callable[[], asyncio.BaseProtocol], socket.socket]
"""What to make of a connection, and where it comes in."""


class Doors:
    """The doors of the worker in ``slot`` of ``counts``: sessions of each worker, 64 bits each, shared by all."""

    def __init__(self, doors: Sequence[Door], counts: memoryview, slot: int) -> None:
        self._doors = doors
        self._counts = counts
        self._slot = slot
        self._others: Final = tuple(other for other in range(len(counts)) if other != slot)
        self._servers: list[asyncio.Server] = []
        self._seen: list[int] = []
        self._vain = 0
        self._back: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closed = False
        counts[slot] = 0

    async def open(self) -> None:
        """Take clients from now on."""
        loop = asyncio.get_running_loop()
        for factory, sock in () if self._closed else self._doors:
            # A server closes what it is given, and that is to be opened again.
            self._servers.append(await loop.create_server(factory, sock=sock.dup(), backlog=BACKLOG))
        if self._closed:
            self._shut()

    def close(self) -> None:
        """Take nobody any more."""
        self._closed = True
        if self._back is not None:
            self._back.cancel()
        self._shut()
        for _, sock in self._doors:
            sock.close()

    def entered(self) -> None:
        """A client came in."""
        counts = self._counts
        mine = counts[self._slot] = counts[self._slot] + 1
        if mine > AHEAD and self._servers and not self._closed:
            for other in self._others:
                if mine > counts[other] + AHEAD:
                    self._look_away()
                    return

    def left(self) -> None:
        """A client that came in is gone."""
        self._counts[self._slot] -= 1

    def _look_away(self) -> None:
        seen = [self._counts[other] for other in self._others]
        if seen != self._seen:
            self._seen, self._vain = seen, 0
        elif self._vain < VAIN:
            self._vain += 1
        else:
            return
        self._shut()
        self._back = asyncio.get_running_loop().call_later(AWAY_S, self._come_back)

    def _come_back(self) -> None:
        self._opening = asyncio.get_running_loop().create_task(self.open())

    def _shut(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
