"""Owns: ``relay recipient``: what a client is told about a recipient, by the code that tells it. Decides nothing."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Annotated

import typer

from relay.cli.directory import in_use
from relay.cli.judged import (
    ClientOption,
    Judged,
    VerboseOption,
    is_trusted,
    parse,
    reply_line,
    rule_line,
    show,
    snapshot_facts,
)
from relay.cli.options import DEFAULT_CONFIG, CommandFailed, ConfigOption, JsonOption
from relay.cli.placed import Placed
from relay.config.load import load
from relay.config.schema import Config
from relay.directory.snapshot import Directory
from relay.inbound.transaction import Rules, Transaction
from relay.mail.address import Mailbox, is_relay_form, unquoted
from relay.mail.reply import ABOUT_SENDER, BAD_RECIPIENT, BAD_SENDER, OK_RCPT, Kind
from relay.outbound.callout import NoAnswer
from relay.outbound.probe import ask_about
from relay.policy.recipient import ASK
from relay.supervisor.keys import read_next_hops


def recipient(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The recipient, e.g. user@example.com.")],
    sender: Annotated[str, typer.Option("--sender", metavar="ADDRESS", help="Who writes; default: <>.")] = "",
    client: ClientOption = "",
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say whether mail to ADDRESS is taken, which rule decides, and the exact reply.

    The exit code is 0 when it is taken and 1 when it is refused.
    """
    show(judge(load(config, os.environ), address, sender, client), verbose=verbose, as_json=as_json)


def judge(config: Config, address: str, sender: str, client: str) -> Judged:
    """The answer of RCPT after MAIL from ``sender``. Raises CommandFailed."""
    origin = parse(sender, BAD_SENDER)
    if isinstance(origin, Kind):
        raise CommandFailed(f"--sender {sender}: not an address; MAIL would be answered {reply_line(config, origin)}")
    mailbox = parse(address, BAD_RECIPIENT)
    if not mailbox:  # the null sender is no recipient
        mailbox = BAD_RECIPIENT
    if isinstance(mailbox, Kind):
        return Judged(address, False, "syntax", "RCPT", reply_line(config, mailbox), (), {})
    rules = Rules.of(config)
    if "@" not in mailbox:  # RFC 5321 §4.5.1
        mailbox = rules.postmaster or mailbox
    directory = in_use(config)
    transaction = Transaction(origin, False, is_trusted(config, client), rules, directory, client)
    form = is_relay_form(mailbox)
    steps: list[str] = []
    questions = list(transaction.questions(mailbox, form, steps.append))
    verdict = transaction.judge_recipient(mailbox, form)
    if verdict is ASK:
        _ask(config, mailbox, directory, steps)
        questions = list(transaction.questions(mailbox, form))
        verdict = transaction.judge_recipient(mailbox, form)
    named = origin if verdict.kind in ABOUT_SENDER else mailbox
    return Judged(
        address=mailbox,
        accepted=verdict.kind is None,
        rule=verdict.rule,
        stage="RCPT",
        reply=reply_line(config, verdict.kind or OK_RCPT, named, verdict.text),
        not_enforced=tuple(
            reply_line(config, s.kind, origin if s.kind in ABOUT_SENDER else mailbox, s.text)
            for s in verdict.shadow
            if s.kind is not None
        ),
        facts={
            **({"goes to": verdict.instead} if verdict.instead else {}),
            "next hops": _next_hops(config, verdict.instead or mailbox),
            **snapshot_facts(directory, mailbox),
        },
        asked=tuple(rule_line(config, one, mailbox, origin) for one in questions),
        looked_up=tuple(steps),
    )


def _ask(config: Config, mailbox: Mailbox, directory: Directory, steps: list[str]) -> None:
    """What a session would wait for. Nothing is remembered for the daemon, whose workers ask by themselves."""
    try:
        next_hop, heard = asyncio.run(ask_about(mailbox, config, read_next_hops(config, [])))
    except NoAnswer as why:
        steps.append(f"callout: {why}")
        return
    if heard.anything:
        steps.append(f"callout: {next_hop.name} takes a random address, so it takes any: it is not asked")
    else:
        steps.append(f"callout: {next_hop.name} refuses a random address, and says {heard.said}")
    directory.answers.put(unquoted(mailbox), time.monotonic() + 60.0, valid=heard.valid)


def _next_hops(config: Config, mailbox: Mailbox) -> str:
    route = Placed(config).route(mailbox)
    return route.described if route else "none: no route for this domain"
