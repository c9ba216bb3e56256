"""Memory of idle connections: opens many, says EHLO and MAIL on each, holds them, reads the memory.

usage: idle.py --target NAME,HOST:PORT,PIDS ... [--connections 1000]

Postfix needs a process for each: start it with PF_PROCS=1100.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence

import benchlib as b


def _reply(connection: socket.socket) -> None:
    got = b""
    while not got.endswith(b"\n") or got.splitlines()[-1][3:4] == b"-":
        if not (piece := connection.recv(4096)):
            raise OSError(f"closed after {got!r}")
        got += piece


def once(target: b.Target, connections: int) -> float:
    """Growth of PSS per connection, KB, over the target's whole process trees."""
    before = b.pss_bytes(b.tree(target.roots))
    with contextlib.ExitStack() as held:
        for _ in range(connections):
            connection = held.enter_context(socket.create_connection((target.host, target.port), 20))
            _reply(connection)
            for command in (b"EHLO idle.test\r\n", b"MAIL FROM:<idle@idle.test>\r\n"):
                connection.sendall(command)
                _reply(connection)
        time.sleep(0.5)  # the figure is about connections at rest
        after = b.pss_bytes(b.tree(target.roots))
    return (after - before) / connections / 1024


def measure(targets: Sequence[b.Target], connections: int) -> Iterator[b.Figure]:
    """PSS per idle connection, taken once: memory that a first round left behind would flatter a second."""
    b.raise_open_files()
    yield b.figure(
        f"idle connection ({connections})", "KB PSS", [{target.name: once(target, connections) for target in targets}]
    )


def main() -> None:
    parser = b.command_line(__doc__)
    parser.add_argument("--connections", type=int, default=1000)
    options = parser.parse_args()
    for figure in measure(list(b.targets(options.target)), options.connections):
        print(figure, flush=True)


if __name__ == "__main__":
    main()
