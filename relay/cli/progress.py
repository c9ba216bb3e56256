"""Owns: showing how far a reading of directories is (row R20): a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_S: Final = 10.0


class ReadingProgress:
    """``known``: how many entries each directory had the last time, so that the bar has an end."""

    def __init__(self, known: Mapping[str, int]) -> None:
        self._known = known
        self._due = time.monotonic() + LINE_S
        self._tasks: dict[str, TaskID] = {}
        self._last = ("", -1)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("reading {task.description}"),
                BarColumn(),
                TextColumn("{task.fields[said]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def told(self, profile: str, entries: int) -> None:
        """So many entries of this directory have come."""
        if (profile, entries) == self._last or not profile:
            return
        self._last = (profile, entries)
        if self._bar is None:
            if time.monotonic() >= self._due:
                self._due = time.monotonic() + LINE_S
                sys.stderr.write(f"reading {profile}: {self._said(profile, entries)}\n")
            return
        self._bar.start()
        if profile not in self._tasks:
            total = self._known.get(profile)
            self._tasks[profile] = self._bar.add_task(profile, total=total, said="")
        self._bar.update(self._tasks[profile], completed=entries, said=self._said(profile, entries))

    def _said(self, profile: str, entries: int) -> str:
        total = self._known.get(profile)
        return f"{entries} entries" if total is None else f"{entries} of about {total} entries"

    def end(self) -> None:
        """Take it off the screen."""
        if self._bar is not None:
            self._bar.stop()
