"""Owns: a moment of quiet for the writer thread: the event loop stands still while a group of statements is executed.

Each SQLite statement gives the interpreter lock up and takes it again; while the event loop runs, every one of these is
a fight for the lock, with the kernel as referee (70 futex calls a group of 5 messages, a third of the CPU of durable mail).
Standing still costs the loop nothing: it could not have run meanwhile either. Both sides wait for a bounded time only, so
neither can hold up the other when the disk or the loop is stuck. Must not know what is executed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

ARRIVE_S: Final = 0.002
"""How long the thread waits for the loop to stand still; a loop that is busy for longer is fought with instead."""

STAND_S: Final = 0.005
"""How long the loop stands still at most: statements that take longer wait for the disk, not for the lock."""


@contextmanager
def quiet(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """In another thread than the loop's: run the body while the loop stands still."""
    arrived, leave = threading.Lock(), threading.Lock()
    arrived.acquire()
    leave.acquire()

    def stand_still() -> None:
        arrived.release()
        leave.acquire(timeout=STAND_S)

    try:
        loop.call_soon_threadsafe(stand_still)
    except RuntimeError:  # the loop is closed: nobody to fight with
        yield
        return
    arrived.acquire(timeout=ARRIVE_S)
    try:
        yield
    finally:
        leave.release()
