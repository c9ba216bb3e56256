"""Memory while big messages pass: 20 of 25 MB at once; growth of the peak PSS over all processes of a target.

usage: memory.py --target NAME,HOST:PORT,PIDS,SINKPORT ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import benchlib as b

BIG: Final = b.Load(sessions=20, messages=20, octets=25_000_000, keep=False)
SMALL: Final = b.Load(sessions=20, messages=200, octets=1_000, keep=False)


def once(target: b.Target) -> float:
    """MB by which the peak exceeds the memory before. Small mail goes first, so that lazy start-up is not counted."""
    if target.sink is None:
        raise ValueError(f"{target.name} has no sink: nothing tells when its mail has arrived")
    count = target.sink.count()
    b.send(target.host, target.port, SMALL)
    target.sink.wait_for(count + SMALL.messages, 60)
    before = b.pss_bytes(b.tree(target.roots))
    with b.PeakPss(target.roots) as memory:
        b.send(target.host, target.port, BIG)
        target.sink.wait_for(count + SMALL.messages + BIG.messages, 240)
    return (memory.peak - before) / 1e6


def measure(targets: Sequence[b.Target]) -> Iterator[b.Figure]:
    """Growth of memory, once per target: a second round would find the memory of the first."""
    yield b.figure("20 messages of 25 MB at once", "MB more PSS", [{target.name: once(target) for target in targets}])


def main() -> None:
    options = b.command_line(__doc__).parse_args()
    targets = list(b.targets(options.target))
    try:
        for figure in measure(targets):
            print(figure, flush=True)
    finally:
        for target in targets:
            if target.sink:
                target.sink.close()


if __name__ == "__main__":
    main()
