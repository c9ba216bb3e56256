"""Owns: ``relay sender``: what a client is told about a sender, by the code that tells it. Decides nothing."""

from __future__ import annotations

import os
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
from relay.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption
from relay.config.load import load
from relay.config.schema import Config
from relay.inbound.transaction import Rules, Transaction
from relay.mail.reply import BAD_SENDER, OK_MAIL, Kind
from relay.policy.verdict import ACCEPT


def sender(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The sender, e.g. user@example.com, or <>.")],
    client: ClientOption = "",
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say whether ADDRESS may send, which rule decides, and the exact reply.

    With --client it is judged as that client's: strangers may not use our own domains. The exit code is 0 when it may and 1
    when it is refused.
    """
    show(judge(load(config, os.environ), address, client), verbose=verbose, as_json=as_json)


def judge(config: Config, address: str, client: str) -> Judged:
    """The answer of MAIL, or of every RCPT where senders are told there. Raises CommandFailed."""
    mailbox = parse(address, BAD_SENDER)
    if mailbox and not isinstance(mailbox, Kind) and "@" not in mailbox:  # postmaster alone is a recipient only
        mailbox = BAD_SENDER
    if isinstance(mailbox, Kind):
        return Judged(address, False, "syntax", "MAIL", reply_line(config, mailbox), (), {})
    rules = Rules.of(config)
    directory = in_use(config)
    # Without --client nobody is a stranger: the question is whether the sender is restricted.
    transaction = Transaction(mailbox, False, not client or is_trusted(config, client), rules, directory, client)
    verdict = transaction.of_sender() or ACCEPT
    return Judged(
        address=mailbox,
        accepted=verdict.kind is None,
        rule=verdict.rule,
        stage=rules.sender.stage.upper() if verdict.kind else "MAIL",
        reply=reply_line(config, verdict.kind or OK_MAIL, mailbox, verdict.text),
        not_enforced=tuple(reply_line(config, s.kind, mailbox, s.text) for s in verdict.shadow if s.kind is not None),
        facts={
            **(
                {"goes out as": primary}
                if directory.primaries and (primary := directory.primaries.get(mailbox))
                else {}
            ),
            **snapshot_facts(directory, mailbox),
        },
        asked=(rule_line(config, transaction.question_of_sender(), mailbox, mailbox),),
    )
