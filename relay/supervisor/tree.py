"""Owns: the life of the process tree: start, watch, replace, reload, drain, end.

Synchronous: one selector over a wake-up socket for signals and the control sockets, ``fork``, ``waitpid``. Must not
run an event loop, a thread or a database, and never waits for a single child.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import sys
import time
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import Final, assert_never

from relay import app
from relay.config.schema import Config
from relay.control import Beat, ControlError, Drain, Failed, Prepared, Ready, Refused, Start, ToChild, Workers
from relay.supervisor import spool
from relay.supervisor.birth import Circumstances, Role, Roles, birth
from relay.supervisor.child import SIGNALS
from relay.supervisor.errors import EXIT_FAILED, EXIT_REFUSED, Refusal
from relay.supervisor.ground import Ground, lay, leave
from relay.supervisor.keys import read_secrets
from relay.supervisor.log import SupervisorLog
from relay.supervisor.members import Part, Process, Slot, places, secrets_for
from relay.supervisor.notify import notify, take_address
from relay.supervisor.privileges import call_process
from relay.supervisor.reload import Means, Reload
from relay.telemetry.maillog import note
from relay.telemetry.metrics import Metrics

LAST_S: Final = 4.0
"""Hub and web have this long to end once the last worker has gone; web finishes pages for up to 2 s."""

TURN_S: Final = 1.0
"""Longest sleep of the main loop."""

BUSY_TURN_S: Final = 0.05
"""Longest sleep while a child has not read everything it was sent."""

LATE_S: Final = 1.0
"""A main loop that sleeps longer than it wanted by this much was stopped, and probably everything else with it."""


class Phase(Enum):
    """What the tree as a whole does."""

    STARTING = auto()
    RUNNING = auto()
    DRAINING = auto()
    """Workers finish what they have."""
    CLOSING = auto()
    """Hub and web end."""


def run(config_path: Path, config: Config, pidfile: Path | None, roles: Roles | None = None) -> int:
    """Run a tree until it is stopped; returns the exit code: 0 stopped, 1 a process could not start, 2 refused.

    ``roles`` are the functions of ``relay.app`` unless a test brings its own.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # nothing is running yet: a signal simply ends the start
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    call_process("relay")
    roles = roles or {
        Part.WORKER: Role(app.worker),
        Part.HUB: Role(app.hub, app.load_hub),
        Part.WEB: Role(app.web, app.load_web),
    }
    try:
        app.preload()
        ground = lay(config)
        if pidfile is not None:
            spool.remove_pidfile(pidfile, stale=True)
        log = SupervisorLog(config, ground.identities.worker)
    except Refusal as refusal:
        for problem in refusal.problems:
            print(f"relay: {problem}", file=sys.stderr)  # noqa: T201 - the start's own terminal, before there is a log
        return EXIT_REFUSED
    found = ground.queue
    note(
        "info", "queue_opened", messages=found.messages, migrated_from=found.migrated_from, voided=found.voided,
        restarted=found.restarted, possible_duplicates=found.marked, orphans=found.orphans,
    )  # fmt: skip
    for queue_id in found.duplicates:
        log.mail.possible_duplicate(queue_id)
    tree = Tree(config_path, config, pidfile, ground, log, roles)
    try:
        return tree.live()
    finally:
        if pidfile is not None:
            spool.remove_pidfile(pidfile)
        leave(ground)


class Tree:
    """The running tree."""

    def __init__(
        self, config_path: Path, config: Config, pidfile: Path | None, ground: Ground, log: SupervisorLog, roles: Roles
    ) -> None:
        self._pidfile = pidfile
        self._ground = ground
        self._log = log
        self._metrics = Metrics(config.server.spool / "metrics", "supervisor")
        self._slots = places(ground.workers, web=config.web.listen is not None)
        self._workers = tuple(slot for slot in self._slots if slot.part is Part.WORKER)
        self._around = Circumstances(ground, roles, self._close_own)
        self._selector = selectors.DefaultSelector()
        self._notify = take_address()
        self._phase = Phase.STARTING
        self._exit_code = 0
        self._until: float | None = None
        """End of the phase: whoever still lives then is killed."""
        self._live_told = len(self._workers)
        self._reload = Reload(config_path, config, self._slots, log, self._notify, Means(self._send, self._kill))
        self._bell, bell = socket.socketpair()
        self._bell_end = bell
        for end in (self._bell, bell):
            end.settimeout(0)

    # --- the loop ---
    def live(self) -> int:
        """Start, run, and end the tree; returns the exit code."""
        self._listen_to_signals()
        try:
            self._start()
            while self._phase is not Phase.CLOSING or any(slot.process for slot in self._slots):
                self._turn()
        finally:
            self._kill_all()
        note("info" if self._exit_code == 0 else "error", "supervisor_stopped", code=self._exit_code)
        return self._exit_code

    def _turn(self) -> None:
        before = time.monotonic()
        patience = self._patience(before)
        events = self._selector.select(patience)
        now = time.monotonic()
        if now - before > patience + LATE_S:
            self._forgive(now - before - patience)
        for key, _ in events:
            if key.data is None:
                self._take_signals(now)
            else:
                self._read(key.data, now)
        self._reap(now)
        self._watch(now)
        if self._phase is Phase.RUNNING:
            self._reload.pursue(now)
        if self._phase in (Phase.STARTING, Phase.RUNNING):
            self._replace(now)
            self._tell_workers()
        self._next_phase(now)

    def _patience(self, now: float) -> float:
        """How long nothing can be due."""
        if any(slot.process and slot.process.link.waiting for slot in self._slots):
            return BUSY_TURN_S
        due = [now + TURN_S]
        if self._phase is Phase.RUNNING and self._reload.until is None:
            due += [slot.due for slot in self._slots if slot.process is None]
        due += [at for slot in self._slots if (at := slot.deadline(self._heartbeat_s)) is not None]
        due += [at for at in (self._until, self._reload.until) if at is not None]
        return max(0.0, min(due) - now)

    @property
    def _heartbeat_s(self) -> float:
        return self._config.process.heartbeat_timeout_s

    @property
    def _config(self) -> Config:
        return self._reload.config

    def _forgive(self, late: float) -> None:
        """The whole machine slept: nobody could beat. Everyone gets that time again."""
        note("warning", "supervisor_slept", seconds=round(late, 1))
        for slot in self._slots:
            if slot.process is not None:
                slot.process.heard += late
                slot.process.started += late
        self._reload.forgive(late)

    # --- signals ---
    def _listen_to_signals(self) -> None:
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        signal.set_wakeup_fd(self._bell_end.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _ring)

    def _take_signals(self, now: float) -> None:
        for number in self._bell.recv(256):
            match number:
                case signal.SIGTERM | signal.SIGINT:
                    self._stop(now)
                case signal.SIGHUP:
                    self._reload.asked = True
                case _:  # SIGCHLD: every turn looks for the dead
                    pass

    # --- births and deaths ---
    def _start(self) -> None:
        gc.collect()
        gc.freeze()  # or the first collection in each child would copy every page that the children share
        now = time.monotonic()
        try:
            for slot in self._slots:
                slot.process = self._bear(slot, now)
            secrets = read_secrets(self._config)
        except Refusal as refusal:
            self._fail(EXIT_REFUSED, *refusal.problems)
            return
        except OSError as error:
            self._fail(EXIT_FAILED, f"no process could be started: {error.strerror}")
            return
        for slot in self._slots:
            self._send(slot, Start(secrets_for(slot.part, secrets)))

    def _bear(self, slot: Slot, now: float) -> Process:
        others = [other.process.link for other in self._slots if other.process is not None]
        process = birth(self._around, slot, self._config, self._live(slot), others, now)
        self._selector.register(process.link.sock, selectors.EVENT_READ, slot)
        return process

    def _close_own(self) -> None:
        """In a child: drop what only the supervisor uses."""
        self._selector.close()
        self._bell.close()
        self._bell_end.close()
        self._log.leave(self._config)
        self._metrics.close()

    def _replace(self, now: float) -> None:
        if self._reload.until is not None:
            return  # it would start with a configuration that may be the old one in a moment
        for slot in self._slots:
            if slot.process is None and slot.due <= now:
                try:
                    slot.process = self._bear(slot, now)
                    self._send(slot, Start(secrets_for(slot.part, read_secrets(self._config))))
                except Refusal as refusal:
                    self._kill(slot, "; ".join(refusal.problems))
                except OSError as error:
                    note("error", "process_not_started", process=slot.name, why=error.strerror)
                    slot.due = now + TURN_S

    def _reap(self, now: float) -> None:
        for slot in self._slots:
            process = slot.process
            if process is None:
                continue
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                self._read(slot, now)  # its last words
                self._bury(slot, process, os.waitstatus_to_exitcode(status), now)

    def _bury(self, slot: Slot, process: Process, code: int, now: float) -> None:
        if not process.lost:
            self._selector.unregister(process.link.sock)
        process.link.close()
        pause = slot.died(now)
        why = process.killed_because or process.why or _ending(code)
        self._reload.died(slot, process.pid, why)
        if self._phase is Phase.STARTING and not process.ready and self._exit_code == 0:
            self._fail(EXIT_FAILED, f"{slot.name} did not start: {why}")
        elif self._phase in (Phase.STARTING, Phase.RUNNING):
            note("warning", "process_died", process=slot.name, pid=process.pid, why=why, pause_s=pause)
            cause = "heartbeat" if process.killed_because else "exit" if code >= 0 else "signal"
            self._metrics.restarted(str(slot.part), cause)
            self._metrics.flush()
        elif code != 0:
            note("warning", "process_died", process=slot.name, pid=process.pid, why=why)

    def _kill(self, slot: Slot, why: str) -> None:
        process = slot.process
        assert process is not None
        if not process.killed_because:
            process.killed_because = why
            note("error", "process_killed", process=slot.name, pid=process.pid, why=why)
        os.kill(process.pid, signal.SIGKILL)  # not reaped yet, so the pid is still this process's

    def _kill_all(self) -> None:
        """No survivors, reaped: for the ways out that leave no time."""
        for slot in self._slots:
            if slot.process is not None:
                os.kill(slot.process.pid, signal.SIGKILL)
                os.waitpid(slot.process.pid, 0)
                slot.process = None

    def _fail(self, code: int, *problems: str) -> None:
        """The start has failed: say why, also where the operator looks, and end everything."""
        self._exit_code = code
        for problem in problems:
            note("error", "start_failed", why=problem)
            if self._config.log.file is not None:
                print(f"relay: {problem}", file=sys.stderr)  # noqa: T201 - nobody reads a log of what did not start
        self._phase = Phase.CLOSING
        self._kill_all()

    # --- talk ---
    def _send(self, slot: Slot, message: ToChild) -> None:
        if slot.process is not None:
            try:
                slot.process.link.send(message)
            except ControlError as error:
                self._kill(slot, str(error))

    def _read(self, slot: Slot, now: float) -> None:
        process = slot.process
        if process is None or process.lost:
            return
        try:
            messages, closed = process.link.receive()
        except ControlError as error:
            self._kill(slot, str(error))
            return
        for message in messages:
            process.heard = now
            match message:
                case Ready():
                    process.ready = True
                case Failed(why):
                    process.why = why
                case Prepared() | Refused():
                    self._reload.answered(slot, process.pid, message)
                case Beat():
                    pass
                case never:
                    assert_never(never)
        if closed:
            process.lost = True
            process.heard = now
            self._selector.unregister(process.link.sock)

    def _live(self, born: Slot | None = None) -> int:
        """Workers that share the limits: all but those that are down; at least 1."""
        up = (slot for slot in self._workers if slot.process is not None or slot.incarnation == 0 or slot is born)
        return max(1, sum(1 for _ in up))

    def _tell_workers(self) -> None:
        live = self._live()
        if live != self._live_told:
            self._live_told = live
            for slot in self._workers:
                self._send(slot, Workers(live))

    # --- watch ---
    def _watch(self, now: float) -> None:
        for slot in self._slots:
            process = slot.process
            if process is None:
                continue
            process.link.flush()
            deadline = slot.deadline(self._heartbeat_s)
            if deadline is not None and deadline <= now:
                if process.lost:
                    self._kill(slot, "it closed its control socket")
                elif process.ready:
                    self._kill(slot, f"no heartbeat for {self._heartbeat_s:g} s")
                else:
                    self._kill(slot, f"it was not ready after {now - process.started:.0f} s")

    def _next_phase(self, now: float) -> None:
        match self._phase:
            case Phase.STARTING if all(slot.ready for slot in self._slots):
                self._started()
            case Phase.DRAINING:
                if self._until is not None and self._until <= now:
                    for slot in self._workers:
                        if slot.process is not None:
                            self._kill(slot, "it did not finish in process.drain_timeout_s")
                    self._until = None
                if not any(slot.process for slot in self._workers):
                    self._phase = Phase.CLOSING
                    self._until = now + LAST_S
                    for slot in self._slots:
                        self._send(slot, Drain())
            case Phase.CLOSING if self._until is not None and self._until <= now:
                for slot in self._slots:
                    if slot.process is not None:
                        self._kill(slot, "it did not end")
                self._until = None
            case _:
                pass

    def _started(self) -> None:
        self._phase = Phase.RUNNING
        if self._pidfile is not None:
            try:
                spool.write_pidfile(self._pidfile)
            except OSError as error:
                self._fail(EXIT_REFUSED, f"cannot write the pidfile {self._pidfile}: {error.strerror}")
                return
        notify(self._notify, "READY=1")
        note("info", "supervisor_ready", workers=len(self._workers), listeners=len(self._config.listener))

    def _stop(self, now: float) -> None:
        """SIGTERM. The first drains, the second ends at once."""
        if self._phase in (Phase.DRAINING, Phase.CLOSING):
            note("warning", "supervisor_stops_at_once")
            self._kill_all()
            self._phase = Phase.CLOSING
            return
        note("info", "supervisor_drains", timeout_s=self._config.process.drain_timeout_s)
        notify(self._notify, "STOPPING=1")
        self._phase = Phase.DRAINING
        self._until = now + self._config.process.drain_timeout_s
        self._reload.give_up()
        # Workers close their copies: when the last has, the kernel refuses new clients instead of letting them wait.
        self._ground.listening.close_public()
        for slot in self._workers:
            self._send(slot, Drain())


def _ring(_number: int, _frame: FrameType | None) -> None:
    """The byte in the wake-up socket says everything."""


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by signal {-code} ({signal.strsignal(-code)})"
