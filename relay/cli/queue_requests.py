"""Owns: the commands of ``relay queue`` that change something: hold, release, retry, reroute, bounce, delete.

They work beside a running relay and on a stopped one's spool, leave alone what is being delivered, and say what they did.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import typer

from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, EXIT_REFUSED, CommandFailed, ConfigOption, JsonOption
from relay.cli.queue_options import (
    DomainOption,
    IdArguments,
    NextHopOption,
    OlderOption,
    RecipientOption,
    SenderOption,
    StateOption,
    YoungerOption,
    selection,
    told,
)
from relay.cli.spoken import count
from relay.config.load import load
from relay.config.schema import Config
from relay.queue.change import request
from relay.queue.selection import State, state_of
from relay.queue.store import Acted, Action, Listed
from relay.queue.view import listing
from relay.telemetry.maillog import MailLog

NAMED: Final = 20
"""IDs named in a sentence; --json and relay queue list have all."""

AllOption = Annotated[bool, typer.Option("--all", help="Every message in the queue.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]

_DONE: Final = {
    Action.HOLD: "held",
    Action.RELEASE: "released, due now",
    Action.RETRY: "due now",
    Action.REROUTE: "due now, routed anew",
    Action.BOUNCE: "returned to the sender with the next look at the queue",
    Action.DELETE: "deleted",
}
_HELP: Final = {
    Action.HOLD: "Keep messages as they are: not tried and not expired until they are released.",
    Action.RELEASE: "Let held messages go on, and messages that were set aside and are mended: due now.",
    Action.RETRY: "Make waiting messages due now, whatever their own date. A running relay takes them within a second.",
    Action.REROUTE: "Like retry, and they wait for no next hop any more: the routes of now decide.",
    Action.BOUNCE: "Give messages up: no attempt any more, a report goes to the sender as after expiry.",
    Action.DELETE: "Delete messages for good. Nobody is told, neither sender nor recipients.",
}
_FINAL: Final = frozenset({Action.BOUNCE, Action.DELETE})
"""These cannot be taken back: they are asked for."""


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``relay queue``."""
    for action in Action:
        command = _with_question(action) if action in _FINAL else _without_question(action)
        app.command(str(action), help=_HELP[action])(command)


def _without_question(action: Action) -> Callable[..., None]:
    def command(
        ids: IdArguments = None,
        sender: SenderOption = None,
        recipient: RecipientOption = None,
        domain: DomainOption = None,
        next_hop: NextHopOption = None,
        state: StateOption = None,
        older: OlderOption = None,
        younger: YoungerOption = None,
        everything: AllOption = False,
        config: ConfigOption = DEFAULT_CONFIG,
        as_json: JsonOption = False,
    ) -> None:
        given = (ids, sender, recipient, domain, next_hop, state, older, younger)
        _do(action, config, given, everything=everything, as_json=as_json, sure=True)

    return command


def _with_question(action: Action) -> Callable[..., None]:
    def command(
        ids: IdArguments = None,
        sender: SenderOption = None,
        recipient: RecipientOption = None,
        domain: DomainOption = None,
        next_hop: NextHopOption = None,
        state: StateOption = None,
        older: OlderOption = None,
        younger: YoungerOption = None,
        everything: AllOption = False,
        yes: YesOption = False,
        config: ConfigOption = DEFAULT_CONFIG,
        as_json: JsonOption = False,
    ) -> None:
        given = (ids, sender, recipient, domain, next_hop, state, older, younger)
        _do(action, config, given, everything=everything, as_json=as_json, sure=yes)

    return command


def _do(action: Action, config: Path, given: tuple, *, everything: bool, as_json: bool, sure: bool) -> None:  # type: ignore[type-arg]
    loaded = load(config, os.environ)
    wanted = selection(loaded, *given)
    if wanted.says_nothing and not everything:
        raise CommandFailed("say which: IDs, --sender, --recipient, --domain, --next-hop, --state, --older; or --all")
    if everything and not wanted.says_nothing:
        raise CommandFailed("--all and a selection contradict each other; leave one of them")
    now = time.time()
    with told():
        found = [message for message in listing(loaded.server.spool) if wanted.means(message, now)]
    missing = sorted(wanted.ids - {message.id for message in found})
    if found and not sure:
        _ask(action, found)
    with told():
        acted = request(loaded.server.spool, [message.key for message in found], action) if found else Acted()
    busy = [message.id for message in found if state_of(message) is State.DELIVERING] if acted.busy else []
    if found:
        _note(loaded, action, [message for message in found if message.id not in busy])
    if as_json:
        fields = {"action": str(action), "messages": acted.messages, "recipients": acted.recipients}
        print(json.dumps(fields | {"in_delivery": acted.busy, "selected": len(found), "not_found": missing}))
    else:
        _say(action, found, acted, busy, missing)
    if missing or acted.busy:
        raise typer.Exit(EXIT_FAILED)


def _ask(action: Action, found: Sequence[Listed]) -> None:
    what = f"{action} {count(len(found), 'message')} ({_named([message.id for message in found])})"
    if not sys.stdin.isatty():
        sys.stderr.write(f"relay: this would {what}; nothing was done, add --yes if that is meant\n")
        raise typer.Exit(EXIT_REFUSED)
    if not typer.confirm(f"{what[0].upper()}{what[1:]}?"):
        typer.echo("nothing was done")
        raise typer.Exit(EXIT_REFUSED)


def _say(action: Action, found: Sequence[Listed], acted: Acted, busy: Sequence[str], missing: Sequence[str]) -> None:
    if not found and not missing:
        typer.echo("no message in the queue is like that")
        return
    if acted.messages or not acted.busy:
        typer.echo(f"{count(acted.messages, 'message')} with {count(acted.recipients, 'recipient')} {_DONE[action]}")
    if acted.messages < len(found) - acted.busy:
        typer.echo(f"{count(len(found) - acted.busy - acted.messages, 'message')} had nothing to change")
    if acted.busy:
        which = f" ({_named(busy)})" if busy else ""
        typer.echo(
            f"{count(acted.busy, 'message')}{which} in delivery at this moment and left alone: try again in a moment, or "
            "hold first what must not be tried again"
        )
    for each in missing:
        sys.stderr.write(f"relay: {each} is not in the queue; if it was, the log says what became of it\n")


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more


class _Appended:
    """The log file of the relay, which exists."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, line: str, /) -> None:
        with suppress(OSError):  # the request was done all the same
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)

    def flush(self) -> None:
        """Every line is written at once."""


def _note(config: Config, action: Action, found: Sequence[Listed]) -> None:
    """So that the log tells what became of a message. Without a log file only the operator's shell knows."""
    if config.log.file is None:
        return
    log = MailLog(_Appended(config.log.file), config.log.format, config.server.hostname)
    who = os.environ.get("SUDO_USER") or getpass.getuser()
    for message in found:
        log.note("info", "queue_request", action=str(action), id=message.id, by=who)
