"""Owns: what happens in a child between fork and its role: signals, descriptors, user, ties to the supervisor.

Must not import anything: after the change of user the program's files may be out of reach.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from relay.supervisor.privileges import Identity, become, call_process, die_with

EXIT_CRASHED: Final = 70
"""The role raised an exception (EX_SOFTWARE of sysexits.h)."""

SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})
"""The supervisor's signals, blocked around a fork so that none is taken twice."""


def fork(body: Callable[[], int]) -> int:
    """Run ``body`` in a child, which ends with its result or EXIT_CRASHED; returns the child's pid. Raises OSError."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _run(body)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _run(body: Callable[[], int]) -> NoReturn:
    code = EXIT_CRASHED
    try:
        signal.set_wakeup_fd(-1)
        # A terminal's Ctrl-C and a service manager's SIGTERM reach the whole group: only the supervisor acts on them.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = body()
    except BaseException:  # noqa: BLE001 - nothing of the supervisor's stack may run on in the child
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # Not sys.exit: the supervisor's clean-up (pidfile, sockets) is not the child's.
            os._exit(code)


def settle(identity: Identity | None, parent: int, name: str) -> None:
    """Become ``identity`` for good, and die with ``parent``. Raises OSError."""
    become(identity)
    die_with(parent)
    call_process(name)
