"""Owns: how many messages a next hop gets in a minute from one worker, as a bucket that fills with time.

It must not read a clock: the lane's time, in seconds, is an argument.
"""

from __future__ import annotations

from typing import Final

from relay.config.schema import Config
from relay.mail.answer import Answer, Stage
from relay.outbound.peer import settings_of
from relay.policy.route import NextHop

BURST_S: Final = 1.0
"""What was not used for so long may go at once; less than the lane's sweep comes round to would lose some of the rate."""
AHEAD_S: Final = 2.0
"""Queued mail waits in memory when its turn comes within this time; other mail has the place otherwise."""
HELD_BACK: Final = Answer(Stage.CONNECT, 0, "", "held back: the next hop gets no more messages a minute")
"""Not an attempt: the next hop was not asked, nor is it away."""


class Pace:
    """One worker's share of a next hop's rate."""

    __slots__ = ("_at", "_booked", "_burst", "_tokens", "per_s")

    def __init__(self, per_s: float, now: float) -> None:
        self.per_s = per_s
        self._burst = max(1.0, per_s * BURST_S)
        self._tokens = 1.0
        self._at = now
        self._booked = 0.0

    def free(self, now: float) -> bool:
        """Whether a message may go."""
        if now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self.per_s)
            self._at = now
        return self._tokens >= 1.0

    def take(self, now: float) -> bool:
        """The same, and the message goes."""
        free = self.free(now)
        if free:
            self._tokens -= 1.0
        return free

    def holds(self, waiting: int) -> bool:
        """Whether that many who wait are enough: the next one's turn is too far away to wait for it in memory."""
        return waiting >= max(1.0, self.per_s * AHEAD_S)

    def book(self, now: float, waiting: int) -> float:
        """The time of a turn behind those who wait and those who booked, so that they come back one after another."""
        self._booked = max(self._booked, now + waiting / self.per_s) + 1.0 / self.per_s
        return self._booked


def pace_of(hop: NextHop, config: Config, live_workers: int, now: float, before: Pace | None) -> Pace | None:
    """This worker's pace for ``hop``, None without a limit. One that stays the same goes on where it was."""
    entry = settings_of(hop, config)
    if entry is None or not entry.messages_per_minute:
        return None
    per_s = entry.messages_per_minute / 60.0 / max(1, live_workers)
    return before if before is not None and before.per_s == per_s else Pace(per_s, now)
