"""Owns: showing what policy says of an address, the way the daemon would say it. Decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Final

import typer

from relay.cli.directory import ago
from relay.cli.options import EXIT_FAILED, CommandFailed
from relay.config.schema import Config
from relay.directory.snapshot import ACCEPT, IMAP, NEEDS_AUTH, RESTRICTED, Directory, Entry
from relay.inbound.transaction import Asked
from relay.mail.address import NULL_SENDER, AddressFault, Mailbox, parse_path, parse_utf8_path, unquoted
from relay.mail.reply import NOT_UTF8, RELAY_FORM, SENDER_RESTRICTED, Kind, OperatorText
from relay.mail.ruling import action_of
from relay.policy.client import ClientRules

NO_TEXT: Final = OperatorText("")

# As in inbound.session, which is held to this by a test.
_FAULTS: Final = {AddressFault.NON_ASCII: NOT_UTF8, AddressFault.SOURCE_ROUTE: RELAY_FORM}

ClientOption = Annotated[
    str, typer.Option("--client", metavar="IP", help="Judge as if this client had asked; default: an untrusted one.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print the facts behind the verdict, too.")]


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer, ready to be printed. ``facts`` are name and text of what it rests on.

    ``asked`` are the rules in the order they were asked, the last one decided; ``looked_up`` the steps of the look-up,
    where there were several.
    """

    address: str
    accepted: bool
    rule: str
    stage: str
    reply: str
    not_enforced: tuple[str, ...]
    facts: dict[str, str]
    asked: tuple[RuleLine, ...] = ()
    looked_up: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleLine:
    """A rule that was asked: what its answer rests on, and the answer (``next``: it had no objection)."""

    rule: str
    why: str
    answer: str


def rule_line(config: Config, asked: Asked, mailbox: Mailbox, sender: Mailbox) -> RuleLine:
    """One question in words."""
    verdict = asked.verdict
    if verdict is None:
        return RuleLine(asked.rule, asked.why, "next")
    refusals = [verdict] if verdict.kind is not None else list(verdict.shadow)
    said = [
        reply_line(config, one.kind, sender if one.kind is SENDER_RESTRICTED else mailbox, one.text)
        for one in refusals
        if one.kind is not None
    ]
    if verdict.kind is not None:
        return RuleLine(asked.rule, asked.why, f"refuses: {said[0]}")
    return RuleLine(asked.rule, asked.why, f"would refuse: {said[0]}" if said else "accepts")


def parse(text: str, wrong: Kind) -> Mailbox | Kind:
    """What a session makes of ``<text>``: a mailbox, "" for the null sender, or the refusal of a bad one.

    ``wrong`` is the refusal of this command's paths. Angle brackets may be there or not.
    """
    inner = text.removeprefix("<").removesuffix(">")
    path, rest = parse_path(f"<{inner}>".encode(errors="replace"))
    if path is AddressFault.NON_ASCII:  # as if SMTPUTF8 had been said
        path, rest = parse_utf8_path(f"<{inner}>".encode(errors="replace"))
    if isinstance(path, AddressFault):
        return _FAULTS.get(path, wrong)
    return wrong if rest else path


def is_trusted(config: Config, client: str) -> bool:
    """Whether the client may relay. Raises CommandFailed for what is no IP address."""
    try:
        return bool(client) and ClientRules(config.trusted.networks).trusted(client)
    except ValueError:
        raise CommandFailed(f"--client {client}: not an IP address; write for example 192.0.2.7") from None


def reply_line(config: Config, kind: Kind, mailbox: Mailbox = NULL_SENDER, text: OperatorText = NO_TEXT) -> str:
    """The reply line as it would go out, softened where the configuration says so."""
    return (kind.softened() if config.server.soft_bounce else kind).line(mailbox, text)


def snapshot_facts(directory: Directory, mailbox: Mailbox) -> dict[str, str]:
    """What the snapshot says of the mailbox, and which snapshot that is."""
    snapshot = directory.snapshot
    facts = {"refused": directory.refused} if directory.refused else {}
    if snapshot is None:
        return facts
    facts["snapshot"] = f"generation {snapshot.generation}, built {ago(time.time() - snapshot.created)}"
    entry = snapshot.entry(unquoted(mailbox))
    facts["entry"] = "none" if entry is None else _words(entry)
    return facts


def _words(entry: Entry) -> str:
    names = (
        (ACCEPT, "recipient"),
        (RESTRICTED, "restricted sender"),
        (NEEDS_AUTH, "needs authentication"),
        (IMAP, "IMAP access"),
    )
    words = [name for flag, name in names if entry.flags & flag]
    if entry.size_limit:
        words.append(f"takes at most {entry.size_limit} octets")
    if entry.next_hop:
        words.append(f"mail host {entry.next_hop}")
    if entry.ruling is not None:
        words.append(f"ruling {action_of(entry.ruling)}")
    return ", ".join([*words, f'"{entry.text}"'] if entry.text else words)


def show(judged: Judged, *, verbose: bool, as_json: bool) -> None:
    """Print it, and end with exit code 1 when it is a refusal, so that scripts can ask."""
    if as_json:
        typer.echo(json.dumps(asdict(judged), indent=2))
    else:
        verdict = "accepted" if judged.accepted else f"refused at {judged.stage} by {judged.rule}"
        typer.echo(f"{judged.address or '<>'}: {verdict}")
        typer.echo(judged.reply)
        for reply in judged.not_enforced:
            typer.echo(f"would be refused if its rule were enforced: {reply}")
        if verbose:
            for name, text in judged.facts.items():
                typer.echo(f"{name:12}{text}")
            for step in judged.looked_up:
                typer.echo(f"{'look-up':12}{step}")
            show_asked(judged.asked)
    if not judged.accepted:
        raise typer.Exit(EXIT_FAILED)


def show_asked(asked: Sequence[RuleLine], indent: str = "") -> None:
    """The rules in their order, a line each."""
    width = max((len(one.rule) for one in asked), default=0)
    for number, one in enumerate(asked, start=1):
        typer.echo(f"{indent}{number}. {one.rule:{width}}  {one.why}: {one.answer}")
