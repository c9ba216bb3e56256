"""Owns: waiting for something to become true, with a deadline and a message that says what did not happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

PATIENCE_S: Final = 20.0
"""How long a test waits for what should take milliseconds: a busy machine must not fail it."""
_POLL_S: Final = 0.01


def wait_for(look: Callable[[], T], what: str | Callable[[], str], patience_s: float = PATIENCE_S) -> T:
    """The first truthy value of ``look``; AssertionError naming ``what`` when there was none in time."""
    deadline = time.monotonic() + patience_s
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"within {patience_s} s: no {what if isinstance(what, str) else what()}")
        time.sleep(_POLL_S)
    return seen
