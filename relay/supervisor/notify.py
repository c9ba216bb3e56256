"""Owns: what the service manager is told (sd_notify(3)); nothing when there is none."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def take_address() -> str:
    """NOTIFY_SOCKET, removed from the environment so that no child speaks for the supervisor; "" when unset."""
    return os.environ.pop("NOTIFY_SOCKET", "")


def notify(address: str, state: str) -> None:
    """Send ``state`` ("READY=1"); a service manager that does not listen is its own problem."""
    if not address:
        return
    target = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0)
        sock.sendto(state.encode(), target)


def reloading() -> str:
    """The state for the begin of a reload; READY=1 ends it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
