"""Owns: free ports on loopback.

Below the ephemeral range (32768 and up), so that no outgoing connection of another test takes one between its choice
and its use, and in a range of its own per xdist worker, so that two workers never choose the same.
"""

from __future__ import annotations

import os
import random
import socket
from typing import Final

_FIRST: Final = 12_000
_PER_WORKER: Final = 1_000
_WORKERS: Final = 18

_given: set[int] = set()


def free_port() -> int:
    """A port nobody listens on and that this process has not handed out before."""
    name = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    first = _FIRST + int(name.removeprefix("gw") or 0) % _WORKERS * _PER_WORKER
    choices = [port for port in range(first, first + _PER_WORKER) if port not in _given]
    random.SystemRandom().shuffle(choices)
    for port in choices:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise AssertionError(f"no free port between {first} and {first + _PER_WORKER}")
