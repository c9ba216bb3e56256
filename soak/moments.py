"""Owns: when to strike. A moment is the k-th event of a kind from now, plus a fraction of a millisecond.

Events are counted, not seconds: so each point on the way of a message is hit as often as any other, however fast or
slow the machine is. The strike runs inside the event, before the harness does anything else. It must not know whom it
hits.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

EVENTS_MAX: Final = 120
"""A moment is at most so many events away: a fraction of a second under load."""
DELAY_MAX_S: Final = 0.001
"""Longest wait after the event: about what a message spends between any two events."""
OVERDUE_S: Final = 60.0
"""With no moment in this time nothing moves any more: the relay hangs."""


class Point(StrEnum):
    """What is counted: steps on the way of a message, as its two ends see them."""

    CLIENT_CONNECTS = "client connects"
    CLIENT_DOT = "client has sent its final dot"
    CLIENT_REPLY = "client has its final reply"
    HOP_MAIL = "next hop reads MAIL"
    HOP_DOT = "next hop has the final dot and has not answered"
    HOP_REPLY = "next hop has answered the final dot"


Strike = Callable[[str], None]
"""Called with the queue id of the message at hand, empty when it is not known yet."""


class Moments:
    """Counts events; one moment may be armed at a time."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._point: Point | None = None
        self._left = 0
        self._delay_s = 0.0
        self._strike: Strike | None = None
        self._over: asyncio.Future[None] | None = None

    async def next(self, strike: Strike, patience_s: float = OVERDUE_S) -> Point:
        """Strike at a random moment; returns its point, once it is over.

        Raises TimeoutError when none comes, and whatever ``strike`` raised.
        """
        point = self._dice.choice(list(Point))
        self._left = self._dice.randint(1, EVENTS_MAX)
        self._delay_s = self._dice.uniform(0.0, DELAY_MAX_S)
        self._strike = strike
        over = self._over = asyncio.get_running_loop().create_future()
        self._point = point
        try:
            async with asyncio.timeout(patience_s):
                await over
        finally:
            self._point = None
        return point

    def reached(self, point: Point, queue_id: str = "") -> None:
        """An event. The hot path: a comparison."""
        if point is not self._point:
            return
        self._left -= 1
        if self._left > 0:
            return
        strike, over = self._strike, self._over
        assert strike is not None
        assert over is not None
        self._point = None
        # Asleep, not awaiting: clients and next hop do nothing meanwhile, only the relay goes on.
        time.sleep(self._delay_s)
        try:
            strike(queue_id)
        except Exception as error:  # noqa: BLE001 - whoever asked for the moment hears of it, not the client at hand
            over.set_exception(error)
        else:
            over.set_result(None)
