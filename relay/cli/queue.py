"""Owns: ``relay queue``: what waits, since when and why, of a relay that runs or is stopped. Reads only."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relay.cli.options import DEFAULT_CONFIG, CommandFailed, ConfigOption, JsonOption
from relay.config.load import load
from relay.mail.envelope import QueueId
from relay.queue.store import Listed, QueuedRecipient, QueueError, RecipientState
from relay.queue.view import find, header, listing, read_stats

app = typer.Typer(help="Mail that waits for delivery.", no_args_is_help=True, add_completion=False)

SHOWN: Final = 200  # messages of a table: more is for --json and other programs
HEADER_OCTETS: Final = 64 * 1024
ID_COLUMNS: Final = 19  # an ID is for copying: where the terminal is narrow, the other columns are folded
PIPE_COLUMNS: Final = 200  # without a terminal: wide enough for one message a line


@app.command("list")
def list_(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
    limit: Annotated[int, typer.Option(min=0, help="Most messages to show; 0: all.")] = SHOWN,
) -> None:
    """List the messages in the queue, one a line; with --json one object a line."""
    spool = load(config, os.environ).server.spool
    with _told():
        messages = listing(spool)
        shown = islice(messages, limit) if limit else messages
        if as_json:
            for message in shown:
                print(json.dumps(_fields(message)))
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("ID", no_wrap=True, min_width=ID_COLUMNS)
        for name in ("age", "size", "sender", "state", "next try", "to", "last answer"):
            table.add_column(name, overflow="fold")
        for message in shown:
            table.add_row(*map(_plain, _line(message)))
        stats = read_stats(spool)
    if not table.row_count:
        typer.echo("the queue is empty")
        return
    _console().print(table)
    aside = f", {stats.corrupt} set aside" if stats.corrupt else ""
    typer.echo(
        f"{_count(stats.messages, 'message')}{aside}, {_count(stats.recipients, 'recipient')} ({stats.held} held), "
        f"{stats.octets / 2**20:.1f} MB, the oldest {_span(time.time() - stats.oldest) if stats.oldest else 'none'}"
    )


@app.command()
def show(
    queue_id: Annotated[str, typer.Argument(metavar="ID", help="The queue ID, as in the log and in relay queue list.")],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show one message: its recipients with their last answers, and its header."""
    spool = load(config, os.environ).server.spool
    with _told():
        message = find(spool, QueueId(queue_id))
        octets = header(spool, QueueId(queue_id), HEADER_OCTETS) or b""
    if message is None:
        raise CommandFailed(f"{queue_id} is not in the queue of {spool}; if it was, the log says what became of it")
    lines = octets.partition(b"\r\n\r\n")[0].decode("utf-8", "replace").split("\r\n")
    if as_json:
        print(json.dumps(_fields(message) | {"header": lines}))
        return
    console = _console()
    about = Table.grid(padding=(0, 2))
    for name, text in _about(message):
        about.add_row(name, _plain(text))
    console.print(about)
    table = Table("recipient", "state", "tries", "next try", "last answer", box=None, pad_edge=False)
    for recipient in message.recipients:
        answer = _answer(recipient)
        row = (recipient.mailbox, recipient.state, str(recipient.attempts), _next(message, recipient), answer)
        table.add_row(*map(_plain, row))
    console.print()
    console.print(table)
    console.print()
    for line in lines:
        console.print(_plain(line.expandtabs()))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except QueueError as error:
        raise CommandFailed(str(error)) from None


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)


def _plain(text: str) -> Text:
    """For a terminal: what a stranger wrote must not steer it, nor be taken for rich's own markup."""
    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text))


def _state(message: Listed) -> str:
    if message.aside:
        return "set aside"
    if message.owner:
        return "in delivery"
    held = all(recipient.state is RecipientState.HELD for recipient in message.recipients)
    return "held" if held else "waiting"


def _line(message: Listed) -> tuple[str, ...]:
    pending = [one for one in message.recipients if one.state is RecipientState.PENDING]
    soonest = min(pending, key=lambda one: one.due, default=None)
    tried = [one for one in message.recipients if one.last_code or one.last_text]
    first = message.recipients[0].mailbox if message.recipients else ""
    more = len(message.recipients) - 1
    return (
        message.id,
        _span(time.time() - message.created),
        _size(message.size),
        f"<{message.sender}>",
        _state(message),
        _next(message, soonest) if soonest else "",
        f"{first} +{more}" if more > 0 else first,
        message.aside or (_answer(tried[0]) if tried else ""),
    )


def _about(message: Listed) -> Iterator[tuple[str, str]]:
    yield "ID", message.id
    yield "sender", f"<{message.sender}>"
    yield "size", _size(message.size)
    yield "came", f"{_moment(message.created)}, {_span(time.time() - message.created)} ago"
    yield "expires", _moment(message.expires)
    yield "state", f"{_state(message)} ({message.owner})" if message.owner else _state(message)
    if message.aside:
        yield "set aside", message.aside
    if message.possible_duplicate:
        yield "note", "an attempt ended after the final dot: the next hop may have it already"


def _fields(message: Listed) -> dict[str, Any]:
    """Times as seconds since 1970, ``due`` included."""
    fields = dataclasses.asdict(message)
    for recipient in fields["recipients"]:
        recipient["due"] = time.time() + _wait(recipient["due"])
    return fields | {"state": _state(message)}


def _wait(due: float) -> float:
    return due - time.clock_gettime(time.CLOCK_BOOTTIME)


def _next(message: Listed, recipient: QueuedRecipient) -> str:
    if message.owner or message.aside or recipient.state is not RecipientState.PENDING:
        return ""
    wait = _wait(recipient.due)
    return f"in {_span(wait)}" if wait > 0 else "now"


def _answer(recipient: QueuedRecipient) -> str:
    code = str(recipient.last_code) if recipient.last_code else ""
    parts = (recipient.last_host and f"{recipient.last_host}:", code, recipient.last_enhanced, recipient.last_text)
    return " ".join(part for part in parts if part)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _span(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def _size(octets: int) -> str:
    return f"{octets / 2**20:.1f} MB" if octets >= 2**20 else f"{octets / 1024:.1f} KB"
