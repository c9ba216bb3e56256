"""A next hop that gets no more messages in a minute than it is said to bear, over all workers and both ways."""

from __future__ import annotations

import time

from tests.bed.waiting import wait_for
from tests.delivery.conftest import Bed, MakeBed, Spot

PER_MINUTE = 240
SLOW = 2
"""One in 30 s: no test machine takes so long for the few messages here."""
WORKERS = 2
MESSAGES = 12
AT_ONCE = 2 * WORKERS
"""Each worker's first, and what its share of a second lets through at once."""


def limit(bed: Bed, spots: dict[Spot, int]) -> None:
    tables = [{"host": s.hop.host, "port": s.hop.port, "messages_per_minute": rate} for s, rate in spots.items()]
    bed.relay.configure({"next_hop": tables})
    before = len(bed.relay.grep("reloaded"))
    assert bed.relay.command("reload").returncode == 0
    wait_for(
        lambda: len(bed.relay.grep("reloaded")) >= before + WORKERS, lambda: "all workers to take the new configuration"
    )


def test_two_workers_keep_to_the_rate_and_all_mail_arrives_while_others_are_not_held_back(make_bed: MakeBed) -> None:
    bed = make_bed(3, server={"workers": WORKERS})
    spot, slow, other = bed.spot(), bed.spot(), bed.spot()
    limit(bed, {spot: PER_MINUTE, slow: SLOW})

    began = time.monotonic()
    for _ in range(MESSAGES):
        spot.send()
    spot.taken(MESSAGES)
    # No sooner than the rate allows: a slow machine is never too early.
    assert time.monotonic() - began >= (MESSAGES - AT_ONCE) / (PER_MINUTE / 60)

    for _ in range(MESSAGES):
        slow.send()
    [line, *_] = bed.relay.wait_for_log(rf"relay={slow.name}, .*held back: the next hop gets no more messages a minute")
    assert "status=deferred" in line
    assert other.send().delivered
    waiting = bed.queue()
    assert len(waiting) >= MESSAGES - 2 * AT_ONCE
    assert all(recipient["attempts"] == 0 for message in waiting.values() for recipient in message["recipients"])

    limit(bed, {spot: 0, slow: 0})
    bed.relay.command("queue", "retry", "--all")
    slow.taken(MESSAGES)
    wait_for(lambda: not bed.queue(), lambda: f"an empty queue; {bed.queue()}")
    assert bed.relay.grep("next_hop_down") == []
