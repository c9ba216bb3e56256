"""Look-ups in a snapshot: building, opening, hits, misses, memory.

usage: bench/snapshot.py [ADDRESSES]    (default 500000; needs no server and no root)
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from relay.directory.encode import encode
from relay.directory.key import KEY_OCTETS
from relay.directory.snapshot import ACCEPT, RESTRICTED, Entry, Snapshot
from relay.mail.reply import operator_text

LOOKUPS = 20_000
ROUNDS = 9


def _ns_each(lookup: Callable[[str], int], addresses: list[str]) -> str:
    """Nanoseconds a look-up, best and median of the rounds, the loop around it included."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        for address in addresses:
            lookup(address)
        rounds.append((time.perf_counter_ns() - start) / len(addresses))
    return f"{min(rounds):.0f} ns (median {statistics.median(rounds):.0f})"


def _private_mb() -> float:
    """Memory that belongs to this process alone, MB."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
    records = [Entry(ACCEPT), Entry(ACCEPT | RESTRICTED, operator_text("Ask the help desk"))]
    addresses = {f"first.last{number}@example.com": number % 50 == 0 for number in range(count)}
    key = os.urandom(KEY_OCTETS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "snapshot")
        start = time.perf_counter()
        path.write_bytes(b"".join(encode(addresses, records, key, 1, 0.0, {})))
        print(f"{count} addresses encoded in {time.perf_counter() - start:.2f} s, {path.stat().st_size / 1e6:.2f} MB")
        opening = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            snapshot = Snapshot.open(path, key)
            opening.append((time.perf_counter() - start) * 1000)
            del snapshot
        before = _private_mb()
        snapshot = Snapshot.open(path, key)
        print(f"opened in {statistics.median(opening):.1f} ms, takes {_private_mb() - before:.1f} MB of private memory")
    hits = random.sample(list(addresses), min(LOOKUPS, count))
    misses = [f"x{address}" for address in hits]
    assert all(map(snapshot.lookup, hits))
    assert not any(map(snapshot.lookup, misses))
    print(f"hit {_ns_each(snapshot.lookup, hits)}, miss {_ns_each(snapshot.lookup, misses)}")


if __name__ == "__main__":
    main()
