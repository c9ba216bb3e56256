"""Owns: free ports on loopback.

Below the ephemeral range (32768 and up), so that no outgoing connection of another test takes one between its choice
and its use. A process takes ports by blocks, and a block belongs to it until it ends: the claim is an abstract Unix
socket, which the kernel gives to one process of a network namespace and takes back when that dies. So neither two
workers nor two runs on one machine choose the same port.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Final

_FIRST: Final = 12_000
_BLOCK: Final = 100
_BLOCKS: Final = 200  # up to port 31,999

_claims: list[socket.socket] = []


def _ports() -> Iterator[int]:
    blocks = list(range(_BLOCKS))
    random.SystemRandom().shuffle(blocks)
    for block in blocks:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0dmz-relay-test-ports-{block}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        yield from range(_FIRST + block * _BLOCK, _FIRST + (block + 1) * _BLOCK)


_unused: Final = _ports()


def free_port() -> int:
    """A port nobody listens on and that no test process has been handed before it."""
    for port in _unused:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError(f"no block of ports is left between {_FIRST} and {_FIRST + _BLOCKS * _BLOCK - 1}")
