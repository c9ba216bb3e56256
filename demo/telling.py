"""Owns: how the demo looks on the screen. Colour and folded lines are for terminals only."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Final

_WIDEST: Final = 120
"""Columns: longer lines are hard to read even where the terminal has room."""
_TERMINAL: Final = sys.stdout.isatty()
_COLOUR: Final = _TERMINAL and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

BOLD: Final = "1"
DIM: Final = "2"
RED: Final = "31"
GREEN: Final = "32"
CYAN: Final = "36"


def _painted(text: str, colour: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if _COLOUR and colour else text


def _print(text: str, indent: str = "", colour: str = "", hang: str = "") -> None:
    """One paragraph; what follows its first line stands ``hang`` further in. Words are never broken: people copy them."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = [indent + text]
    if _TERMINAL and len(lines[0]) > width:
        lines = textwrap.wrap(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=indent + hang,
            break_long_words=False,
            break_on_hyphens=False,
        )
    for line in lines:
        print(_painted(line.rstrip(), colour), flush=True)


def say(text: str = "") -> None:
    """A sentence to the reader."""
    _print(text)


def headline(number: int, text: str) -> None:
    """The beginning of a step."""
    print(flush=True)
    _print(f"{number}. {text}", colour=BOLD)


def dialogue(lines: Iterable[tuple[str, str]]) -> None:
    """What client and relay said to each other, as (who, line)."""
    for who, line in lines:
        _print(f"{who:6} {line}", "    ", CYAN if who == "relay" else "", " " * 7)


def shown(title: str, lines: Iterable[str]) -> None:
    """Something that stands somewhere, word for word: log lines, headers, the output of a command."""
    _print(f"{title}:", "  ", DIM)
    for line in lines:
        _print(line, "    ", hang="  ")


def good(text: str) -> None:
    """How it ended, as it should."""
    _print(f"=> {text}", "  ", GREEN, "   ")


def bad(text: str) -> None:
    """How it ended, as it should not; further lines of ``text`` stand below the first."""
    first, *rest = text.splitlines()
    _print(f"=> {first}", "  ", RED, "   ")
    for line in rest:
        _print(line, "     ")


def command(text: str, meaning: str) -> None:
    """Something to try: never folded, so that it can be copied."""
    _print(meaning, "  ")
    print("    " + _painted(text, CYAN), flush=True)
