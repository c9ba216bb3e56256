"""Owns: ``relay probe``: what a next hop says to this relay, command by command, and what is to be done about a refusal.

Connection, TLS and login are the daemon's own; causes and advice come from ``policy.outcome``. Nothing is delivered.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from typing import Annotated, Final

import typer

from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, CommandFailed, ConfigOption, JsonOption
from relay.config.destination import Host, parse_next_hop
from relay.config.invalid import Invalid
from relay.config.load import load
from relay.config.schema import Config
from relay.control import HopSecret
from relay.mail.address import AddressFault, parse_mailbox
from relay.mail.answer import Answer
from relay.outbound.peer import settings_of
from relay.outbound.probe import Asked, walk
from relay.policy.exchange_rights import cure
from relay.policy.outcome import Outcome, advice, classify, fault
from relay.policy.route import NextHop
from relay.supervisor.keys import read_next_hops

STRANGER: Final = "probe@dmz-relay.invalid"
"""A sender of the outside, as most mail has; RFC 6761: such a domain never exists."""


def probe(
    next_hop: Annotated[str, typer.Argument(metavar="NEXTHOP", help="smtp:[host]:port as in a route, or host[:port].")],
    sender: Annotated[str, typer.Option("--from", metavar="ADDRESS", help="The sender to try.")] = STRANGER,
    recipient: Annotated[
        str, typer.Option("--to", metavar="ADDRESS", help="Default: postmaster of the first own domain.")
    ] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Connect, TLS, AUTH, MAIL, RCPT, RSET to a next hop, without sending anything, and explain a refusal.

    The exit code is 0 when all was taken and 1 when something was refused.
    """
    loaded = load(config, os.environ)
    hop = _hop(next_hop)
    first = next((name for domain in loaded.domain for name in domain.names), "")
    recipient = recipient or (f"postmaster@{first}" if first else "postmaster")
    for option, address in (("--from", sender), ("--to", recipient)):
        if address and isinstance(parse_mailbox(address), AddressFault):
            raise CommandFailed(f"{option} {address}: not an address")
    asked = asyncio.run(walk(hop, loaded, _secrets(hop, loaded), sender, recipient))
    if as_json:
        typer.echo(json.dumps(_fields(hop, asked), indent=2))
    else:
        _show(asked)
    if asked.answer is not None:
        raise typer.Exit(EXIT_FAILED)


def _hop(text: str) -> NextHop:
    try:
        target = parse_next_hop(text if text.startswith(("smtp:", "lmtp:")) else f"smtp:{_bracketed(text)}")
    except Invalid as fault:
        raise CommandFailed(f"{text}: {fault}") from None
    if not isinstance(target, tuple) or len(target) != 1 or not isinstance(target[0], Host):
        raise CommandFailed(f"{text}: name one host, e.g. smtp:[exchange.example.com]:25")
    return NextHop(target[0].host, target[0].port, target[0].protocol)


def _bracketed(text: str) -> str:
    host, colon, port = text.partition(":")
    return text if text.startswith("[") else f"[{host}]{colon}{port}"


def _secrets(hop: NextHop, config: Config) -> Mapping[str, HopSecret]:
    problems: list[str] = []
    secrets = read_next_hops(config, problems)
    entry = settings_of(hop, config)
    if problems and entry is not None:
        raise CommandFailed("\n".join(problems))
    return secrets


def _fields(hop: NextHop, asked: Asked) -> dict[str, object]:
    answer = asked.answer
    return {
        "next_hop": hop.name,
        "steps": [{"step": step, "said": said} for step, said in asked.steps],
        "refused": None
        if answer is None
        else {
            "stage": answer.stage,
            "code": answer.code,
            "enhanced": answer.enhanced,
            "text": answer.text,
            "cause": _cause(answer),
            "advice": _advice(answer),
            "cure": list(cure(answer)),
        },
    }


def _show(asked: Asked) -> None:
    for step, said in asked.steps:
        typer.echo(f"{step:9}{said}")
    answer = asked.answer
    if answer is None:
        typer.echo("everything was taken; RSET, nothing was sent")
        return
    if not asked.steps or asked.steps[-1][0] != answer.stage:
        code = f"{answer.code} {answer.enhanced} ".replace("  ", " ") if answer.code else ""
        typer.echo(f"{answer.stage:9}{code}{answer.text}")
    typer.echo(f"\ncause    {_cause(answer)}\n{_advice(answer)}")
    for line in cure(answer):
        typer.echo(f"    {line}")


def _cause(answer: Answer) -> str:
    return str(fault(answer)) if classify(answer) is Outcome.OUR_FAULT else str(classify(answer))


def _advice(answer: Answer) -> str:
    match classify(answer):
        case Outcome.OUR_FAULT:
            return advice(answer)
        case Outcome.REFUSED:
            return "This is about the sender or recipient that was tried; mail like it is returned to its sender."
        case _:
            return _FOR_NOW.get(
                answer.enhanced, "Refused for now, or no answer: mail waits in the queue and is tried again."
            )


_FOR_NOW: Final = {
    "4.3.1": "Exchange is short of disk or memory (back pressure): free space on the volume of its queue database.",
    "4.3.2": (
        "Exchange does not take mail now, or has too many connections of this relay: look at Get-ServerComponentState and at "
        "MaxInboundConnectionPerSource, and lower delivery.concurrency."
    ),
}
