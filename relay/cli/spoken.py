"""Owns: how times, sizes, counts and strangers' text are shown to an operator. No command's logic."""

from __future__ import annotations

import re
import time
from typing import Final

import typer
from rich.text import Text

_UNITS: Final = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def plain(text: str) -> Text:
    """For a terminal: what a stranger wrote must not steer it, nor be taken for rich's own markup."""
    return Text(harmless(text))


def harmless(text: str) -> str:
    """The same as a string."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def moment(seconds: float) -> str:
    """Wall-clock seconds as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def count(number: int, what: str) -> str:
    """``1 message``, ``2 messages``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def span(seconds: float) -> str:
    """A time in one unit, two of it at least."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def size(octets: int) -> str:
    """Octets in KB or MB."""
    return f"{octets / 2**20:.1f} MB" if octets >= 2**20 else f"{octets / 1024:.1f} KB"


def parse_span(text: str) -> float:
    """``90``, ``30m``, ``2h``, ``1d`` in seconds; raises typer.BadParameter."""
    found = re.fullmatch(r"([0-9]{1,9}) ?(s|m|min|h|d|w)?", text.strip())
    if found is None:
        raise typer.BadParameter(f'"{text}" is no time; write a number and s, m, h, d or w, e.g. 30m or 2d')
    return float(found[1]) * _UNITS[found[2] or "s"]
