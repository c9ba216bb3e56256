"""Owns: the short-lived process that reads directories: its birth, its words, its end at the deadline.

It is forked, says how far it is and how it went as lines of JSON, and can be killed at any moment: a directory that hangs,
trickles or floods costs nothing but this process. Must not decide when to read.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from relay.config.schema import Config
from relay.directory.failure import Reason
from relay.directory.sync import Extent, Outcome, Purpose, failed, synchronise

WORDS_OCTETS: Final = 1 << 22
"""Most that a child says: an outcome names up to 2,000 addresses."""
_READ_OCTETS: Final = 1 << 16
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

Body = Callable[[Callable[[str, int], None]], Outcome]


@dataclass(slots=True)
class Reader:
    """A running child: what it said so far, and where it says more. ``words`` is a descriptor that does not block."""

    pid: int
    words: int
    said: bytearray
    progress: tuple[str, int] = ("", 0)
    outcome: Outcome | None = None

    def hear(self) -> bool:
        """Take what it said; False when it has ended. Never blocks."""
        while True:
            try:
                octets = os.read(self.words, _READ_OCTETS)
            except BlockingIOError:
                return True
            if not octets:
                return False
            self.said += octets
            if len(self.said) > WORDS_OCTETS:
                return False
            *lines, rest = bytes(self.said).split(b"\n")
            self.said[:] = rest
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            if "outcome" in found:
                body = found["outcome"]
                body["examples"] = tuple(body["examples"])
                body["readings"] = tuple(body["readings"])
                body["twice_names"] = tuple(body["twice_names"])
                self.outcome = Outcome(**body)
            else:
                self.progress = (str(found["profile"]), int(found["entries"]))
        except (ValueError, KeyError, TypeError):
            return

    def kill(self) -> None:
        """End it at once; what it had not put in place is nothing."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def reap(self) -> int:
        """Wait for its end, which is near; its status."""
        os.close(self.words)
        return os.waitpid(self.pid, 0)[1]


def start(
    config: Config,
    passwords: Mapping[str, str],
    purpose: Purpose,
    key: bytes = b"",
    extent: Extent = Extent.CHANGES,
) -> Reader:
    """Begin a reading in a process of its own. Raises OSError."""
    return start_body(lambda progress: synchronise(config, passwords, purpose, time.time(), progress, key, extent))


def start_body(body: Body) -> Reader:
    """Run ``body`` in a child. Raises OSError."""
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _live(body, theirs, parent)
    os.close(theirs)
    os.set_blocking(ours, False)
    return Reader(pid, ours, bytearray())


def _live(body: Body, words: int, parent: int) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _LIBC.prctl(_PR_SET_NAME, b"relay-sync", 0, 0, 0)
        if os.getppid() != parent:
            os._exit(code)
        # Control sockets and listeners of the parent are none of its business, nor may they outlive it here.
        words = os.dup2(words, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") > 0 else 65536)
        gc.disable()  # addresses by the hundred thousand and no cycles: collecting costs a tenth and finds nothing
        with open(words, "w", encoding="ascii") as said:

            def progress(profile: str, entries: int) -> None:
                print(json.dumps({"profile": profile, "entries": entries}), file=said, flush=True)

            outcome = body(progress)
            print(json.dumps({"outcome": outcome.plain()}), file=said, flush=True)
        code = 0
    except BaseException:  # noqa: BLE001 - the boundary of the process: nothing of the parent's stack may run on here
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def ended(reader: Reader, config: Config, now: float) -> Outcome:
    """Its outcome, once it has ended; one that ended without is a fault that is remembered."""
    status = reader.reap()
    if reader.outcome is not None:
        return reader.outcome
    why = f"the process that reads ended with status {os.waitstatus_to_exitcode(status)}; its last words are in the log"
    return failed(config, now, Reason.CRASHED, why)


def overdue(reader: Reader, config: Config, now: float) -> Outcome:
    """Kill it and say so."""
    reader.kill()
    reader.reap()
    profile, entries = reader.progress
    after = f" after {entries} entries of {profile}" if entries else ""
    seconds = config.directory.sync_timeout_s
    why = f"the reading was broken off{after}: it took longer than directory.sync_timeout_s, {seconds:g} s"
    return failed(config, now, Reason.SLOW, why)


def run(reader: Reader, config: Config, show: Callable[[str, int], None]) -> Outcome:
    """Wait for it in the foreground, telling ``show`` of each step; kill it at the deadline or when interrupted."""
    until = time.monotonic() + config.directory.sync_timeout_s
    try:
        while True:
            left = until - time.monotonic()
            if left <= 0:
                return overdue(reader, config, time.time())
            select.select([reader.words], [], [], min(left, 1.0))
            alive = reader.hear()
            show(*reader.progress)
            if not alive:
                return ended(reader, config, time.time())
    except KeyboardInterrupt:
        reader.kill()
        reader.reap()
        raise
