"""Owns: a worker's way to the hub's socket: connect, connect again after a loss, leave for good.

What is said on a connection is its protocol's. Must not know who asks what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

RECONNECT_S: Final = 0.2
"""Pause between attempts to reach the hub: a replaced hub is found well within the second it takes at most."""
START_WAIT_S: Final = 1.0
"""A start waits this long for the hub's first word; then it goes on without."""


class Reach:
    """One connection at a time, made by ``protocol``. Whoever owns the protocol tells of its end with ``again``."""

    __slots__ = ("_address", "_connecting", "_loop", "_protocol", "_retry", "_stopped")

    def __init__(self, address: str, protocol: Callable[[], asyncio.Protocol]) -> None:
        """``address``: path of the hub's socket."""
        self._address = address
        self._protocol = protocol
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._stopped = False

    def begin(self) -> asyncio.AbstractEventLoop:
        """Connect on the running loop, which is returned; from now on until ``stop``."""
        self._loop = asyncio.get_running_loop()
        self._connect()
        return self._loop

    @staticmethod
    async def first_word(heard: asyncio.Event) -> None:
        """Wait a moment for it."""
        try:
            async with asyncio.timeout(START_WAIT_S):
                await heard.wait()
        except TimeoutError:
            pass

    def again(self) -> None:
        """The connection is gone: another one in a moment, unless this was ``stop``."""
        if not self._stopped:
            assert self._loop is not None
            self._retry = self._loop.call_later(RECONNECT_S, self._connect)

    def stop(self) -> None:
        """No connection any more; one that is there is its owner's to end."""
        self._stopped = True
        for handle in (self._retry, self._connecting):
            if handle is not None:
                handle.cancel()

    def _connect(self) -> None:
        self._retry = None
        if not self._stopped:
            assert self._loop is not None
            self._connecting = self._loop.create_task(self._try())

    async def _try(self) -> None:
        assert self._loop is not None
        try:
            await self._loop.create_unix_connection(self._protocol, self._address)
        except OSError:
            self.again()
