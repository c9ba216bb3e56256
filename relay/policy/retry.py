"""Owns: when the next attempt is due. Pure: the clock and the dice are arguments.

The waits are those of ``queue.retry_s``; RFC 5321 §4.5.4.1 wants at least 30 minutes between later attempts and 4 to 5
days before giving up, which the defaults keep after the first, quicker ones.
"""

from __future__ import annotations

from collections.abc import Sequence


def next_attempt(attempts: int, now: float, waits: Sequence[float], jitter: float, random: float) -> float:
    """When to try again, on the clock ``now`` was read from.

    ``attempts`` counts those made, the failed one included (1 at the first failure); ``waits`` are seconds, the last one
    repeats; ``jitter`` is the share by which a wait varies to both sides, ``random`` is in [0, 1). Raises ValueError
    when there are no waits or attempts: a due date made of nothing would be a busy loop.
    """
    if attempts < 1 or not waits:
        raise ValueError("a retry follows at least one attempt and needs at least one wait")
    wait = waits[min(attempts, len(waits)) - 1]
    return now + wait * (1.0 + jitter * (2.0 * random - 1.0))
