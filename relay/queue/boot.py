"""Owns: the boot clock and the name of this boot. Must not know what they are used for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

Clock = Callable[[], float]
"""Seconds that never go back while the machine is up, suspended or not."""


def boot_clock() -> float:
    """CLOCK_BOOTTIME, seconds: the same in all processes, untouched by clock changes (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The kernel's name of this boot (random(4)); another one means the power was gone or the machine restarted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
