"""Owns: ``relay queue``: what waits, since when and why, of a relay that runs or is stopped; the looking half.

The commands that change something stand in ``cli.queue_requests``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.table import Table

from relay.cli import queue_requests
from relay.cli.options import DEFAULT_CONFIG, CommandFailed, ConfigOption, JsonOption
from relay.cli.queue_options import (
    DomainOption,
    IdArguments,
    NextHopOption,
    OlderOption,
    RecipientOption,
    SenderOption,
    StateOption,
    YoungerOption,
    goals_of,
    selection,
    told,
)
from relay.cli.spoken import count, harmless, moment, plain, size, span
from relay.config.load import load
from relay.mail.address import domain_of
from relay.mail.envelope import QueueId
from relay.queue.selection import state_of
from relay.queue.store import Listed, QueuedRecipient, RecipientState
from relay.queue.view import body, find, header, listing, read_stats

app = typer.Typer(help="Mail that waits for delivery.", no_args_is_help=True, add_completion=False)

SHOWN: Final = 200  # messages of a table: more is for --json and other programs
HEADER_OCTETS: Final = 64 * 1024
ID_COLUMNS: Final = 19  # an ID is for copying: it is never folded
PIPE_COLUMNS: Final = 200  # without a terminal: wide enough for one message a line
WIDE_COLUMNS: Final = 140  # below, a message takes two lines

By = Literal["domain", "next-hop", "sender", "state", "answer"]


@app.command("list")
def list_(
    ids: IdArguments = None,
    sender: SenderOption = None,
    recipient: RecipientOption = None,
    domain: DomainOption = None,
    next_hop: NextHopOption = None,
    state: StateOption = None,
    older: OlderOption = None,
    younger: YoungerOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
    limit: Annotated[int, typer.Option(min=0, help="Most messages to show; 0: all.")] = SHOWN,
) -> None:
    """List the messages in the queue, or those selected; with --json one object a line."""
    loaded = load(config, os.environ)
    spool = loaded.server.spool
    wanted = selection(loaded, ids, sender, recipient, domain, next_hop, state, older, younger)
    now = time.time()
    with told():
        messages = (message for message in listing(spool) if wanted.means(message, now))
        shown = islice(messages, limit) if limit else messages
        if as_json:
            for message in shown:
                print(json.dumps(_fields(message)))
            return
        lines = list(shown)
        more = sum(1 for _ in messages) if not wanted.says_nothing else 0
        stats = read_stats(spool)
    if not lines:
        typer.echo("the queue is empty" if wanted.says_nothing else "no message in the queue is like that")
        return
    console = _console()
    if console.width >= WIDE_COLUMNS:
        console.print(_table(lines))
    else:
        for message in lines:
            _two_lines(console, message)
    if not wanted.says_nothing:
        typer.echo(f"{count(len(lines) + more, 'message')} selected; in all:")
    aside = f", {stats.corrupt} set aside" if stats.corrupt else ""
    typer.echo(
        f"{count(stats.messages, 'message')}{aside}, {count(stats.recipients, 'recipient')} ({stats.held} held), "
        f"{stats.octets / 2**20:.1f} MB, the oldest {span(now - stats.oldest) if stats.oldest else 'none'}"
    )


@app.command()
def show(
    queue_id: Annotated[str, typer.Argument(metavar="ID", help="The queue ID, as in the log and in relay queue list.")],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
    headers: Annotated[bool, typer.Option("--headers", help="Print nothing but the header, as it is.")] = False,
    whole: Annotated[bool, typer.Option("--body", help="Print nothing but the whole message, as it is.")] = False,
) -> None:
    """Show one message: its recipients with their last answers, and its header."""
    spool = load(config, os.environ).server.spool
    with told():
        message = find(spool, QueueId(queue_id))
        octets = header(spool, QueueId(queue_id), HEADER_OCTETS) or b""
    if message is None:
        raise CommandFailed(f"{queue_id} is not in the queue of {spool}; if it was, the log says what became of it")
    head = octets.partition(b"\r\n\r\n")[0]
    if whole or headers:
        with told():
            _raw(body(spool, QueueId(queue_id)) if whole else iter([head + b"\r\n"]))
        return
    lines = head.decode("utf-8", "replace").split("\r\n")
    if as_json:
        print(json.dumps(_fields(message) | {"header": lines}))
        return
    console = _console()
    about = Table.grid(padding=(0, 2))
    for name, text in _about(message):
        about.add_row(name, plain(text))
    console.print(about)
    table = Table("recipient", "state", "tries", "next try", "last answer", box=None, pad_edge=False)
    for recipient in message.recipients:
        answer = _answer(recipient)
        row = (recipient.mailbox, recipient.state, str(recipient.attempts), _next(message, recipient), answer)
        table.add_row(*map(plain, row))
    console.print()
    console.print(table)
    console.print()
    for line in lines:
        console.print(plain(line.expandtabs()))


@app.command()
def summary(
    by: Annotated[By, typer.Option("--by", help="What to put together.")] = "domain",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Put the queue together by recipient domain, next hop, sender, state or last answer: the most recipients first."""
    loaded = load(config, os.environ)
    goals = goals_of(loaded)

    def key_of(message: Listed, one: QueuedRecipient) -> str:
        match by:
            case "domain":
                return domain_of(one.mailbox)
            case "next-hop":
                return one.last_host or ", ".join(goals(one.mailbox)) or "none"
            case "sender":
                return message.sender or "<>"
            case "state":
                return str(state_of(message))
            case "answer":
                return message.aside or _said(one) or "not tried"

    with told():
        groups = _put_together(listing(loaded.server.spool), key_of)
    now = time.time()
    rows = sorted(groups.values(), key=lambda group: -group.recipients)
    if as_json:
        for group in rows:
            print(json.dumps(group.fields(by)))
        return
    if not rows:
        typer.echo("the queue is empty")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column(by.replace("-", " "), overflow="fold")
    for name in ("messages", "recipients", "held", "oldest"):
        table.add_column(name, justify="right", no_wrap=True)
    if by != "answer":
        table.add_column("most frequent answer", overflow="fold")
    for group in rows[:SHOWN]:
        answer = [group.answers.most_common(1)[0][0] if group.answers else ""] if by != "answer" else []
        row = [group.name, str(group.messages), str(group.recipients), str(group.held), span(now - group.oldest)]
        table.add_row(*map(plain, row + answer))
    _console().print(table)
    if len(rows) > SHOWN:
        typer.echo(f"and {len(rows) - SHOWN} more; --json has all")


queue_requests.add_to(app)


@dataclasses.dataclass(slots=True)
class _Group:
    """What a line of the summary is about. ``oldest`` is wall-clock seconds."""

    name: str
    messages: int = 0
    recipients: int = 0
    held: int = 0
    oldest: float = float("inf")
    last: int = -1
    answers: Counter[str] = dataclasses.field(default_factory=Counter)

    def fields(self, by: By) -> dict[str, Any]:
        return {
            by.replace("-", "_"): self.name,
            "messages": self.messages,
            "recipients": self.recipients,
            "held": self.held,
            "oldest": self.oldest,
            "answers": dict(self.answers.most_common(10)),
        }


def _put_together(messages: Iterator[Listed], key_of: Callable[[Listed, QueuedRecipient], str]) -> dict[str, _Group]:
    """A message counts once in each group that one of its recipients is in."""
    groups: dict[str, _Group] = {}
    for message in messages:
        for one in message.recipients:
            name = key_of(message, one)
            group = groups.get(name) or groups.setdefault(name, _Group(name))
            group.recipients += 1
            group.held += one.state is RecipientState.HELD
            group.oldest = min(group.oldest, message.created)
            if group.last != message.key:
                group.last = message.key
                group.messages += 1
            if said := message.aside or _said(one):
                group.answers[said] += 1
    return groups


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)


def _raw(pieces: Iterator[bytes]) -> None:
    """Octets as they are; on a terminal what is not printable is replaced."""
    if sys.stdout.isatty():
        text = b"".join(pieces).decode("utf-8", "replace").replace("\r\n", "\n")
        typer.echo("\n".join(harmless(line.expandtabs()) for line in text.split("\n")), nl=False)
        return
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _table(messages: list[Listed]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("ID", no_wrap=True, min_width=ID_COLUMNS)
    for name in ("age", "size", "sender", "state", "next try", "to", "last answer"):
        table.add_column(name, overflow="fold")
    for message in messages:
        table.add_row(*map(plain, _line(message)))
    return table


def _two_lines(console: Console, message: Listed) -> None:
    """For 80 columns: what it is, and below why it is here."""
    queue_id, age, octets, sender, state, again, to, answer = _line(message)
    again = f" (next try {again})" if again else ""
    console.print(plain(f"{queue_id:{ID_COLUMNS}}  {age:>6}  {octets:>8}  {state}{again}"))
    console.print(plain(f"    {sender} to {to}"), overflow="ellipsis", no_wrap=True)
    if answer:
        console.print(plain(f"    {answer}"), overflow="ellipsis", no_wrap=True)


def _line(message: Listed) -> tuple[str, ...]:
    pending = [one for one in message.recipients if one.state is RecipientState.PENDING]
    soonest = min(pending, key=lambda one: one.due, default=None)
    tried = [one for one in message.recipients if one.last_code or one.last_text]
    first = message.recipients[0].mailbox if message.recipients else ""
    more = len(message.recipients) - 1
    return (
        message.id,
        span(time.time() - message.created),
        size(message.size),
        f"<{message.sender}>",
        str(state_of(message)),
        _next(message, soonest) if soonest else "",
        f"{first} +{more}" if more > 0 else first,
        message.aside or (_answer(tried[0]) if tried else ""),
    )


def _about(message: Listed) -> Iterator[tuple[str, str]]:
    state = str(state_of(message))
    yield "ID", message.id
    yield "sender", f"<{message.sender}>"
    yield "size", size(message.size)
    yield "came", f"{moment(message.created)}, {span(time.time() - message.created)} ago"
    yield "expires", moment(message.expires)
    yield "state", f"{state} ({message.owner})" if message.owner else state
    if message.aside:
        yield "set aside", message.aside
    if message.waits_for:
        yield "note", f"goes as soon as {' or '.join(message.waits_for.split())} can be connected to"
    if message.possible_duplicate:
        yield "note", "an attempt ended after the final dot: the next hop may have it already"


def _fields(message: Listed) -> dict[str, Any]:
    """Times as seconds since 1970, ``due`` included."""
    fields = dataclasses.asdict(message)
    for recipient in fields["recipients"]:
        recipient["due"] = time.time() + _wait(recipient["due"])
    return fields | {"state": str(state_of(message))}


def _wait(due: float) -> float:
    return due - time.clock_gettime(time.CLOCK_BOOTTIME)


def _next(message: Listed, recipient: QueuedRecipient) -> str:
    if message.owner or message.aside or recipient.state is not RecipientState.PENDING:
        return ""
    wait = _wait(recipient.due)
    return f"in {span(wait)}" if wait > 0 else "now"


def _said(recipient: QueuedRecipient) -> str:
    code = str(recipient.last_code) if recipient.last_code else ""
    return " ".join(part for part in (code, recipient.last_enhanced, recipient.last_text) if part)


def _answer(recipient: QueuedRecipient) -> str:
    parts = (recipient.last_host and f"{recipient.last_host}:", _said(recipient))
    return " ".join(part for part in parts if part)
