"""Owns: when directories are read: every ``directory.sync_s`` with jitter, sooner after a failure, one reading at a time.

Lives in the hub's event loop, which must not wait: the reading is a child (``directory.child``), heard through a pipe and
killed at its deadline. Holds the directories' passwords; workers never see them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from typing import Final

from relay.config.schema import Config
from relay.directory.build import created_of
from relay.directory.child import Reader, ended, overdue, start
from relay.directory.failure import Reason
from relay.directory.push import Identity, waiting
from relay.directory.state import read_state, state_path
from relay.directory.sync import Outcome, Purpose, failed

JITTER: Final = 0.1
FIRST_S: Final = 0.2
"""Before the first reading of a relay without a snapshot: its processes start meanwhile."""
RETRY_S: Final = 30.0
"""After a first failure; doubles up to ``sync_s``. A directory that restarts is back by then, one that is down is not asked
more often for it."""

WATCH_S: Final = 1.0
"""How often the folders of pushed files are looked at: one listing of a folder that is nearly always empty."""

LAST_WORDS_S: Final = 0.5
"""A reading that has closed its pipe without an outcome ends by itself within this, or is killed."""

Told = Callable[[Outcome], None]
Heard = Callable[[str, int], None]
"""A directory's name, and how many of its entries have come."""
PROGRESS_S: Final = 10.0
"""How often a reading that takes long is heard of."""


class Schedule:
    """Readings on their schedule. ``told`` hears how each one went, ``heard`` now and then how far one is."""

    def __init__(self, loop: asyncio.AbstractEventLoop, told: Told, heard: Heard) -> None:
        self._loop = loop
        self._told = told
        self._heard = heard
        self._due = 0.0
        self._config: Config | None = None
        self._passwords: Mapping[str, str] = {}
        self._key = b""
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._reader: Reader | None = None
        self._failures = 0
        self._watch: asyncio.TimerHandle | None = None
        self._waiting: tuple[Identity, ...] = ()

    def configure(self, config: Config, passwords: Mapping[str, str], key: bytes) -> None:
        """Take a configuration. A reading under way goes on with the one it began with."""
        changed = self._config is None or self._config.directory != config.directory or self._passwords != passwords
        self._config, self._passwords, self._key = config, passwords, key
        if changed:
            self._failures = 0
            self._plan(self._first())
        if self._watch is None and config.directory.push:
            self._look_around()

    def _look_around(self) -> None:
        """A pushed file that was not there before is read at once."""
        self._watch = None
        config = self._config
        if config is None or not config.directory.push:
            return
        self._watch = self._loop.call_later(WATCH_S, self._look_around)
        if self._reader is None:
            found = waiting(config)
            if found and found != self._waiting:
                self._plan(0.0)
            self._waiting = found

    def stop(self) -> None:
        """End it all."""
        self._config = None
        self._plan(None)
        if self._watch is not None:
            self._watch.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._reader is not None:
            self._loop.remove_reader(self._reader.words)
            self._reader.kill()
            self._reader.reap()
            self._reader = None

    def _plan(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None and self._config is not None and self._config.directory.scheduled:
            self._timer = self._loop.call_later(seconds, self._begin)

    def _first(self) -> float:
        """After a restart the snapshot's age counts: restarts in a row do not read in a row."""
        assert self._config is not None
        created = created_of(self._config.snapshot_path)
        directory = self._config.directory
        last = read_state(state_path(self._config.snapshot_path))
        known = set(last.profiles) == set(directory.scheduled_names)
        if created is None or not known:
            return FIRST_S
        return max(FIRST_S, created + self._varied(directory.sync_s) - time.time())

    def _varied(self, seconds: float) -> float:
        return seconds * random.uniform(1 - JITTER, 1 + JITTER)

    def _begin(self) -> None:
        config = self._config
        self._timer = None
        if config is None or self._reader is not None:
            return
        try:
            self._reader = reader = start(config, self._passwords, Purpose.SCHEDULED, self._key)
        except OSError as error:
            self._finish(config, failed(config, time.time(), Reason.OTHER, f"no process to read in: {error.strerror}"))
            return
        self._due = self._loop.time() + PROGRESS_S
        self._deadline = self._loop.call_later(config.directory.sync_timeout_s, self._overdue, config)
        self._loop.add_reader(reader.words, self._hear, config)

    def _hear(self, config: Config) -> None:
        reader = self._reader
        if reader is None:
            return
        if reader.hear():
            if self._loop.time() >= self._due:
                self._due = self._loop.time() + PROGRESS_S
                self._heard(*reader.progress)
        else:
            self._loop.remove_reader(reader.words)
            if reader.outcome is not None:
                self._reap(config)
            else:  # it is about to end, and its last words are on their way to the log
                self._loop.call_later(LAST_WORDS_S, self._reap, config)

    def _reap(self, config: Config) -> None:
        reader = self._reader
        if reader is not None:
            if reader.outcome is None:
                reader.kill()  # had it only closed its words, reaping would wait
            self._finish(config, ended(reader, config, time.time()))

    def _overdue(self, config: Config) -> None:
        reader = self._reader
        if reader is not None:
            self._loop.remove_reader(reader.words)
            self._finish(config, overdue(reader, config, time.time()))

    def _finish(self, config: Config, outcome: Outcome) -> None:
        self._reader = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._failures = self._failures + 1 if outcome.reason else 0
        self._told(outcome)
        most = config.directory.sync_s
        seconds = min(most, RETRY_S * 2 ** min(self._failures - 1, 20)) if self._failures else most
        self._plan(self._varied(seconds))
