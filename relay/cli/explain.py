"""Owns: ``relay explain``: a whole dialogue as a client would have it, each rule that was asked, the log line, the route.

Decides nothing: the dialogue is played by the daemon's own session (``inbound.rehearsal``).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from relay.cli.directory import in_use
from relay.cli.judged import RuleLine, rule_line, show_asked
from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, EXIT_REFUSED, CommandFailed, ConfigOption, JsonOption
from relay.cli.placed import Placed
from relay.config.load import load
from relay.config.schema import Config, Listener, Mode, Role
from relay.inbound.rehearsal import Exchange, NoReply, Rehearsal
from relay.mail.address import NULL_SENDER, Mailbox

MESSAGE_OCTETS: Final = 64 * 1024 * 1024
"""Most of a message that is read for an explanation."""

_LINE_END: Final = re.compile(rb"\r?\n|\r(?!\n)")


@dataclass(frozen=True, slots=True)
class Told:
    """One command of the dialogue. ``rule`` decided it, empty where none was asked."""

    command: str
    reply: tuple[str, ...]
    accepted: bool
    rule: str
    log: tuple[str, ...]
    asked: tuple[RuleLine, ...] = ()
    looked_up: tuple[str, ...] = ()
    goes_to: str = ""
    route: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The whole dialogue. ``accepted``: every command was."""

    accepted: bool
    client: str
    trusted: bool
    listener: str
    tls: bool
    dialogue: tuple[Told, ...]
    headers: str


def explain(
    recipients: Annotated[list[str], typer.Option("--to", metavar="ADDRESS", help="A recipient; may be repeated.")],
    client: Annotated[str, typer.Option("--client", metavar="IP", help="The client's address.")] = "192.0.2.1",
    helo: Annotated[str, typer.Option("--helo", metavar="NAME", help="What it says in EHLO.")] = "client.example",
    sender: Annotated[str, typer.Option("--from", metavar="ADDRESS", help="The sender; default: <>.")] = "",
    size: Annotated[int, typer.Option("--size", metavar="OCTETS", min=0, help="The size it announces.")] = 0,
    tls: Annotated[bool, typer.Option("--tls", help="It says STARTTLS first.")] = False,
    listener: Annotated[
        str, typer.Option("--listener", metavar="NAME", help="Where it connects; default: the first.")
    ] = "",
    message: Annotated[
        Path | None, typer.Option("--message", metavar="FILE", help="Play this message, too; - is standard input.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say what a client would hear, which rules are asked in which order, what is logged, and where mail would go.

    Nothing is sent or changed. Exit code 0: all is accepted; 1: something is refused; 2: wrong usage or configuration.
    """
    loaded = load(config, os.environ)
    try:
        told = play(loaded, client, helo, sender, recipients, size, listener, _read(message), tls=tls)
    except CommandFailed as fault:  # not 1, which says that mail is refused
        sys.stderr.write(f"relay: {fault}\n")
        raise typer.Exit(EXIT_REFUSED) from None
    if as_json:
        typer.echo(json.dumps(asdict(told), indent=2))
    else:
        _show(told)
    if not told.accepted:
        raise typer.Exit(EXIT_FAILED)


def play(
    config: Config,
    client: str,
    helo: str,
    sender: str,
    recipients: list[str],
    size: int,
    listener: str,
    message: bytes | None,
    *,
    tls: bool,
) -> Explanation:
    """Play the dialogue. Raises CommandFailed for what cannot be asked."""
    address = _as_a_socket_gives_it(client)
    for word in (helo, sender, *recipients):
        if "\r" in word or "\n" in word:
            raise CommandFailed(f"{word!r}: an argument of a command is one line")
    chosen = _listener(config, listener)
    implicit = chosen.role is Role.SUBMISSIONS
    if tls and not implicit and config.tls.certificate is None:
        raise CommandFailed("--tls: the relay offers no STARTTLS: set certificate and key in [tls]")
    lines = [f"EHLO {helo}"]
    if tls and not implicit:
        lines += ["STARTTLS", f"EHLO {helo}"]
    utf8 = "" if f"{sender}{''.join(recipients)}".isascii() else " SMTPUTF8"
    lines.append(f"MAIL FROM:{_path(sender)}{f' SIZE={size}' if size else ''}{utf8}")
    lines += [f"RCPT TO:{_path(recipient)}" for recipient in recipients]
    try:
        exchanges, trusted, headers = asyncio.run(_played(config, chosen, address, lines, message))
    except NoReply as fault:
        raise CommandFailed(f"{fault}; this is a fault of the relay, report it") from None
    routes = Placed(config)
    dialogue = tuple(_told(config, routes, one, sender) for one in exchanges)
    return Explanation(
        all(one.accepted for one in dialogue), address, trusted, chosen.name, tls or implicit, dialogue, headers
    )


def _as_a_socket_gives_it(client: str) -> str:
    family = socket.AF_INET6 if ":" in client else socket.AF_INET
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, client))
    except (OSError, ValueError):
        raise CommandFailed(f"--client {client}: not an IP address; write for example 192.0.2.7") from None


async def _played(
    config: Config, listener: Listener, client: str, lines: list[str], message: bytes | None
) -> tuple[list[Exchange], bool, str]:
    rehearsal = Rehearsal(config, listener, in_use(config), client)
    done = [await rehearsal.greeting()]
    for line in lines:
        if rehearsal.session.closed:
            break
        done.append(await rehearsal.say(line))
        done += filter(None, [rehearsal.last_words()])
    taken = any(one.accepted for one in done if one.command.startswith("RCPT"))
    if message is not None and taken and not rehearsal.session.closed:
        done.append(await rehearsal.say("DATA"))
        if done[-1].accepted:
            done.append(await rehearsal.data(_wire(message)))
    trusted = rehearsal.session.trusted
    return done, trusted, _headers(config, trusted=trusted)


def _told(config: Config, routes: Placed, exchange: Exchange, sender: str) -> Told:
    named = Mailbox(_inner(exchange.command.partition(":")[2]))
    asked = tuple(rule_line(config, one, named, Mailbox(_inner(_path(sender)))) for one in exchange.asked)
    route = _route(routes, exchange.goes_to) if exchange.goes_to else ""
    elsewhere = exchange.goes_to if exchange.goes_to.lower() != named.lower() else ""
    rule = exchange.asked[-1].rule if exchange.asked else ""
    return Told(
        exchange.command, exchange.reply, exchange.accepted, rule, exchange.log, asked, exchange.looked_up,
        elsewhere, route,
    )  # fmt: skip


def _route(routes: Placed, mailbox: Mailbox) -> str:
    decision = routes.decide(mailbox)
    if decision is None:
        return "none: it would wait in the queue; add a [[route]]"
    return f"{decision.route.described}, by the entry {decision.pattern} (asked: {', '.join(decision.asked)})"


def _headers(config: Config, *, trusted: bool) -> str:
    """What the header firewall would do to any message of this client."""
    content = config.content
    if content.header_firewall is Mode.OFF:
        return 'kept as they are: content.header_firewall = "off"'
    if trusted:
        taken = [
            *(content.remove_headers if content.outbound else ()),
            *(["Received"] if content.hide_received else ()),
        ]
        leaving = f"; from mail that leaves are removed: {', '.join(taken)}" if taken else ""
        return f"kept as they are: the client is trusted{leaving}"
    names = ", ".join([*content.remove_headers, f"Authentication-Results of {config.server.hostname}"])
    return f"{'logged' if content.header_firewall is Mode.LOG else 'removed'} where they occur: {names}"


def _listener(config: Config, name: str) -> Listener:
    if not name:
        return config.listener[0]
    for listener in config.listener:
        if listener.name == name:
            return listener
    names = ", ".join(listener.name for listener in config.listener)
    raise CommandFailed(f"--listener {name}: there is none; there are {names}")


def _path(address: str) -> str:
    """The address in brackets; what has some, or parameters behind them, stays as it is."""
    return address if address.startswith("<") else f"<{address}>"


def _inner(path: str) -> str:
    return path[1 : path.rfind(">")] if path.startswith("<") and ">" in path else NULL_SENDER


def _read(message: Path | None) -> bytes | None:
    if message is None:
        return None
    if str(message) == "-":
        return sys.stdin.buffer.read(MESSAGE_OCTETS)
    try:
        with message.open("rb") as file:
            return file.read(MESSAGE_OCTETS)
    except OSError as error:
        raise CommandFailed(f"--message {message}: {error.strerror}") from None


def _wire(message: bytes) -> bytes:
    """A file as a client sends it: CR LF lines, dots doubled (RFC 5321 §4.5.2)."""
    lines = _LINE_END.split(message)
    if lines[-1] == b"":
        lines.pop()
    return b"".join(b"." * line.startswith(b".") + line + b"\r\n" for line in lines)


def _show(told: Explanation) -> None:
    trust = "trusted" if told.trusted else "not trusted"
    typer.echo(f"client {told.client} ({trust}) at listener {told.listener}{', TLS' if told.tls else ''}")
    for one in told.dialogue:
        if one.command:
            typer.echo(f"> {one.command}")
        for line in one.reply:
            typer.echo(f"< {line}")
        for step in one.looked_up:
            typer.echo(f"    look-up: {step}")
        show_asked(one.asked, "    ")
        if one.goes_to:
            typer.echo(f"    goes to {one.goes_to}")
        if one.route:
            typer.echo(f"    route: {one.route}")
        for line in one.log:
            typer.echo(f"    log: {line}")
    typer.echo(f"headers: {told.headers}")
    typer.echo("accepted" if told.accepted else "refused")
