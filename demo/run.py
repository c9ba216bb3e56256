"""Owns: `make demo`: set the stage, walk the tour, say what to try next, keep running until Ctrl-C.

usage: demo/run.py        DEMO_EXIT=1 ends it after the tour; DEMO_PORT_SHIFT=N moves all ports up by N

Exit code 0 only if every step went as told, 1 if not, 130 when stopped during the tour. Whatever happens, every process
that was started is ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import NoReturn

import stage
import telling
import tour


def main() -> int:
    """Run the demo; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT unless told otherwise
        signal.signal(number, _interrupt)
    evidence = ""
    try:
        plan = stage.plan()
        stage.ports_free(plan)
        stage.furnish(plan)
        evidence = "\nMore stands in demo/state: relay.log, relay.stderr, maildir."
        with ExitStack() as ends:
            return _play(plan, ends)
    except (stage.Trouble, tour.Unexpected, OSError) as error:
        if _follows_interrupt(error):
            return _stopped()
        telling.say()
        telling.bad(f"The demo failed: {error}{evidence}")
        return 1
    except KeyboardInterrupt:
        return _stopped()


def _stopped() -> int:
    telling.say()
    telling.say("Stopped before the end of the tour.")
    return 130


def _follows_interrupt(error: BaseException | None) -> bool:
    """True when Ctrl-C came first: leaving a broken SMTP dialogue fails in ways of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _play(plan: stage.Plan, ends: ExitStack) -> int:
    exchange, relay = stage.Exchange(plan), stage.Relay(plan)
    telling.say("This is DMZ Relay at work, on this computer alone.")
    telling.say()
    built = stage.relay(plan, "directory", "build")
    if built.returncode != 0:
        raise stage.Trouble(f"relay directory build: {built.stderr.strip()}")
    telling.shown("relay directory build, from demo/directory.ldif and demo/restricted.txt", built.stdout.splitlines())
    # Ended in the opposite order: the relay first, so that its last deliveries find Exchange.
    ends.callback(exchange.stop)
    exchange.start()
    ends.callback(relay.stop)
    ends.callback(_deafen)
    relay.start()
    telling.shown("now running", [f"{address:18}{who}" for who, address in plan.ports.items()])
    tour.walk(tour.Scene(plan, relay, exchange))
    telling.say()
    telling.good("Everything went as told.")
    if os.environ.get("DEMO_EXIT", "0") not in {"", "0"}:
        return 0
    _try_next(plan, exchange)
    try:
        relay.watch()
    except KeyboardInterrupt:
        telling.say()
        telling.say("Ending the relay and the stand-in.")
        return 0


def _try_next(plan: stage.Plan, exchange: stage.Exchange) -> None:
    config = f"--config {_short(plan.config)}"
    relay = _short(Path(sys.executable).parent / "relay")
    smtp = plan.listeners["mx"]
    telling.say()
    telling.say(f"The relay goes on running. To try it yourself, in another terminal in {stage.ROOT}:")
    telling.say()
    absent = "" if shutil.which("swaks") else " (the Debian package swaks)"
    telling.command(f"swaks --server {smtp} --to {tour.RECEPTION}", f"Send a message{absent}.")
    telling.command(f"swaks --server {smtp} --from camera@example.com --to {tour.RECEPTION}", "Be refused.")
    telling.command(f"{relay} recipient nobody@example.com {config}", "Ask what would be answered, and why.")
    telling.command(f"{relay} sender camera@example.com -v {config}", "The same for a sender.")
    telling.command(f"{relay} queue list {config}", "See what waits for delivery.")
    telling.command(f"kill {exchange.pid}", "Switch Exchange off; send, look at the queue ...")
    again = f"{_short(Path(sys.executable))} {' '.join(_short(Path(word)) for word in exchange.command)}"
    telling.command(again, "... and switch it on again.")
    telling.command(f"tail -f {_short(plan.log)}", "Watch the log.")
    telling.command(f"ls {_short(exchange.maildir)}/new", "See the mail that Exchange has, one file a message.")
    telling.command(f"curl -s http://{plan.web}/metrics | grep ^relay_replies", "Count the replies.")
    telling.command(f"curl -s http://{plan.web}/readyz", "Ask whether mail can be taken.")
    telling.command(f"{relay} directory build {config}", "After a change of demo/directory.ldif.")
    telling.command(f"{relay} reload {config}", f"After a change of {_short(plan.config)}.")
    telling.say()
    telling.say("Ctrl-C ends the demo. demo/state stays for a look until the next one.")


def _short(path: Path) -> str:
    """As one types it in the project's folder."""
    return str(path.relative_to(stage.ROOT)) if path.is_relative_to(stage.ROOT) else str(path)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _deafen() -> None:
    """A second Ctrl-C must not leave processes behind: their end has deadlines of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
