"""Owns: how an operator says which messages are meant: the options that ``relay queue``'s commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Annotated

import typer

from relay.cli.options import CommandFailed
from relay.cli.spoken import parse_span
from relay.config.schema import Config
from relay.mail.address import Mailbox
from relay.policy.route import RouteTable
from relay.queue.selection import Selection, State
from relay.queue.store import QueueError

_WORDS = {"waiting": State.WAITING, "delivering": State.DELIVERING, "held": State.HELD, "aside": State.ASIDE}


def _state(text: str) -> str:
    if text not in _WORDS:
        raise typer.BadParameter(f'"{text}" is no state; write {", ".join(_WORDS)}')
    return text


IdArguments = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="Queue IDs, as in the log and in relay queue list.")
]
SenderOption = Annotated[
    list[str] | None, typer.Option("--sender", metavar="ADDRESS", help='Of this sender; * as in "*@example.net", "<>".')
]
RecipientOption = Annotated[
    list[str] | None, typer.Option("--recipient", metavar="ADDRESS", help="With such a recipient; * matches anything.")
]
DomainOption = Annotated[
    list[str] | None, typer.Option("--domain", metavar="DOMAIN", help="With a recipient in this domain.")
]
NextHopOption = Annotated[
    list[str] | None,
    typer.Option("--next-hop", metavar="HOST", help="Tried at this next hop, or routed there; with or without port."),
]
StateOption = Annotated[
    list[str] | None,
    typer.Option("--state", metavar="STATE", callback=lambda values: values and [_state(each) for each in values],
                 help="waiting, delivering, held or aside."),
]  # fmt: skip
OlderOption = Annotated[str | None, typer.Option("--older", metavar="TIME", help="Came so long ago: 30m, 2h, 1d.")]
YoungerOption = Annotated[str | None, typer.Option("--younger", metavar="TIME", help="Came since: 30m, 2h, 1d.")]


def goals_of(config: Config) -> Callable[[Mailbox], Sequence[str]]:
    """Address to the next hops that its route names."""
    table = RouteTable(config)

    @cache
    def of_domain(mailbox: Mailbox) -> Sequence[str]:
        route = table.find(mailbox)
        return [goal.name for goal in route.goals] if route is not None else []

    return of_domain


def selection(
    config: Config,
    ids: Sequence[str] | None,
    senders: Sequence[str] | None,
    recipients: Sequence[str] | None,
    domains: Sequence[str] | None,
    next_hops: Sequence[str] | None,
    states: Sequence[str] | None,
    older: str | None,
    younger: str | None,
) -> Selection:
    """What the options say. Raises typer.BadParameter."""
    return Selection(
        frozenset(ids or ()),
        senders or (),
        recipients or (),
        domains or (),
        next_hops or (),
        [_WORDS[state] for state in states or ()],
        None if older is None else parse_span(older),
        None if younger is None else parse_span(younger),
        goals_of(config),
    )


@contextmanager
def told() -> Iterator[None]:
    """A fault of the queue ends the command with its text."""
    try:
        yield
    except QueueError as error:
        raise CommandFailed(str(error)) from None
