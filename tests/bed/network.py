"""Owns: a network of a test's own: two network namespaces with a cable between them, so that a relay can have neighbours
with addresses of their own and ports below 1024. Nothing of it reaches this machine's network. Needs root and ``ip``.

A namespace belongs to a thread: sockets are made in the one the thread is in, children inherit it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

_CLONE_NEWNET: Final = 0x40000000  # sched.h


class Network:
    """The relay's side and the outside. ``far`` are the outside's addresses, ``near`` the relay's."""

    def __init__(self, near: Sequence[str], far: Sequence[str]) -> None:
        """Addresses with prefix length: 192.0.2.1/24."""
        self._names = tuple(f"dmz-relay-{os.getpid()}-{side}" for side in ("near", "far"))
        for name in self._names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self._names[0], "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", self._names[1])
        for name, device, addresses in zip(self._names, ("near", "far"), (near, far), strict=True):
            for address in addresses:
                nodad = ("nodad",) if ":" in address else ()
                _ip("-n", name, "address", "add", address, "dev", device, *nodad)
            _ip("-n", name, "link", "set", device, "up")

    @contextmanager
    def near(self) -> Iterator[None]:
        """On the relay's side."""
        with _inside(self._names[0]):
            yield

    @contextmanager
    def far(self) -> Iterator[None]:
        """On the outside."""
        with _inside(self._names[1]):
            yield

    def close(self) -> None:
        """Take it down; the processes in it must have ended."""
        for name in self._names:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@contextmanager
def _inside(name: str) -> Iterator[None]:
    with open("/proc/thread-self/ns/net", "rb") as before, open(f"/run/netns/{name}", "rb") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
