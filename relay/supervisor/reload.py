"""Owns: changes of configuration, certificate and keys in a running tree.

All or nothing: every process prepares, then all switch; one refusal, death or silence, and all keep the old one.
Must not fork or wait: ``Tree`` calls it each turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from relay.config.files import check_files
from relay.config.load import read
from relay.config.origin import ConfigErrors
from relay.config.schema import Config
from relay.control import Abort, Commit, ControlError, Prepare, Prepared, Refused, Reopen, ToChild
from relay.supervisor.errors import Refusal
from relay.supervisor.keys import fingerprint, read_secrets
from relay.supervisor.log import SupervisorLog
from relay.supervisor.members import Slot, secrets_for
from relay.supervisor.notify import notify, reloading
from relay.telemetry.maillog import note

PREPARE_TIMEOUT_S: Final = 10.0
"""A process that has not answered ``prepare`` by then is taken to refuse it."""

KEYS_POLL_S: Final = 1.0
"""How often certificate and keys are looked at; a change counts when it has been the same for two looks."""


@dataclass(slots=True)
class Change:
    """What is being prepared. ``waiting`` and ``prepared`` hold pids."""

    config: Config
    until: float
    waiting: set[int] = field(default_factory=set)
    prepared: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Means:
    """What ``Tree`` lends: sending to a slot, and killing its process for a reason."""

    send: Callable[[Slot, ToChild], None]
    kill: Callable[[Slot, str], None]


class Reload:
    """The configuration in force, and at most one change of it under way."""

    def __init__(
        self,
        path: Path,
        config: Config,
        slots: Sequence[Slot],
        log: SupervisorLog,
        notify_address: str,
        means: Means,
    ) -> None:
        self.config = config
        self.asked = False
        """A reload was asked for and has not begun."""
        self._path = path
        self._slots = slots
        self._log = log
        self._notify = notify_address
        self._means = means
        self._change: Change | None = None
        self._keys_known = self._keys_seen = fingerprint(config)
        self._keys_due = 0.0

    @property
    def until(self) -> float | None:
        """When the change under way is given up; None when there is none."""
        return None if self._change is None else self._change.until

    def pursue(self, now: float) -> None:
        """Begin what is to begin, end what can end."""
        if self._change is not None:
            self._decide(self._change, now)
        elif self.asked:
            self.asked = False
            self._reload(now)
        elif now >= self._keys_due:
            self._keys_due = now + KEYS_POLL_S
            seen = fingerprint(self.config)
            if seen != self._keys_known and seen == self._keys_seen:
                note("info", "keys_changed")
                self._begin(self.config, now)
            self._keys_seen = seen

    def forgive(self, late: float) -> None:
        """Nobody could answer for ``late`` seconds."""
        if self._change is not None:
            self._change.until += late

    def answered(self, slot: Slot, pid: int, message: Prepared | Refused) -> None:
        """A process answered; too late when the change was given up meanwhile."""
        change = self._change
        if change is not None and pid in change.waiting:
            change.waiting.remove(pid)
            if isinstance(message, Refused):
                change.problems.append(f"{slot.name}: {message.why}")
            else:
                change.prepared.add(pid)

    def died(self, slot: Slot, pid: int, why: str) -> None:
        """A process ended; the change cannot work when it had not answered."""
        if self._change is not None and pid in self._change.waiting:
            self._change.problems.append(f"{slot.name} died while it prepared: {why}")

    def give_up(self) -> None:
        """Have everyone forget the change under way, if any."""
        change, self._change = self._change, None
        if change is not None:
            for slot in self._slots:
                if slot.process is not None and slot.process.pid in change.waiting | change.prepared:
                    self._means.send(slot, Abort())

    def _reload(self, now: float) -> None:
        """SIGHUP: logs are opened again in any case, the configuration is taken when everyone can."""
        notify(self._notify, reloading())
        self._log.reopen(self.config)
        for slot in self._slots:
            if slot.ready:
                self._means.send(slot, Reopen())
        try:
            loaded = read(self._path, os.environ)
        except ConfigErrors as errors:
            self._refuse(map(str, errors.problems))
            return
        problems = [*map(str, check_files(loaded.config, loaded.origin)), *needs_restart(self.config, loaded.config)]
        if problems:
            self._refuse(problems)
        else:
            self._begin(loaded.config, now)

    def _begin(self, config: Config, now: float) -> None:
        self._keys_known = fingerprint(config)
        try:
            secrets = read_secrets(config)
        except Refusal as refusal:
            self._refuse(refusal.problems)
            return
        self._change = change = Change(config, now + PREPARE_TIMEOUT_S)
        for slot in self._slots:
            process = slot.process
            if process is not None and process.ready and not process.killed_because:
                try:
                    process.link.send(Prepare(config, secrets_for(slot.part, secrets)))
                    change.waiting.add(process.pid)
                except ControlError as error:
                    change.problems.append(f"{slot.name}: {error}")

    def _decide(self, change: Change, now: float) -> None:
        if now >= change.until:
            late = [slot.name for slot in self._slots if slot.process and slot.process.pid in change.waiting]
            change.problems += [f"{name} did not answer in {PREPARE_TIMEOUT_S:g} s" for name in late]
        if change.problems:
            self._refuse(change.problems)
            self.give_up()
        elif not change.waiting:
            self._commit(change, now)

    def _commit(self, change: Change, now: float) -> None:
        self._change = None
        self.config = change.config
        for slot in self._slots:
            process = slot.process
            if process is None:
                continue
            if process.pid in change.prepared:
                self._means.send(slot, Commit())
                process.heard = now  # the heartbeat time-out may have become shorter
            else:
                process.blameless = True
                self._means.kill(slot, "it was starting with the configuration that has just been replaced")
        notify(self._notify, "READY=1")
        note("info", "configuration_taken")

    def _refuse(self, problems: Iterable[str]) -> None:
        for problem in problems:
            note("error", "configuration_refused", why=problem)
        notify(self._notify, "READY=1")


def needs_restart(old: Config, new: Config) -> list[str]:
    """Keys that differ and are fixed for the life of a tree, one line each."""
    fixed = {
        "server.spool": (old.server.spool, new.server.spool),
        "server.workers": (old.server.workers, new.server.workers),
        "process.user": (old.process.user, new.process.user),
        "process.hub_user": (old.process.hub_user, new.process.hub_user),
        "listener": (_listeners(old), _listeners(new)),
        "web.listen": (old.web.listen, new.web.listen),
        "log.file": (old.log.file, new.log.file),
        "log.format": (old.log.format, new.log.format),
    }
    return [
        f"{key}: {_text(before)} cannot become {_text(after)} while the relay runs; restart needed"
        for key, (before, after) in fixed.items()
        if before != after
    ]


def _listeners(config: Config) -> tuple[str, ...]:
    return tuple(sorted(f"{listener.name} on {listener.address}" for listener in config.listener))


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "nothing" if value in {None, ""} else str(value)
