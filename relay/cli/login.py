"""Owns: ``relay login``: one login tried by the daemon's own code, each step told.

In this process, not in the hub: it is not counted there, and says so; a directory counts a wrong password all the same.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import os
from dataclasses import dataclass, field
from typing import Annotated, Final

import typer
from scramp import ScramClient, ScramException

from relay.auth.abilities import Ambiguous, StoreAway
from relay.auth.filestore import Accounts, fold
from relay.auth.mechanism import Circumstances, Dialogue, Hopeless, begin
from relay.auth.question import Question, Reply, Result
from relay.auth.stores import Stores, offered, prepare, stores_of
from relay.auth.verifier import Exchange, Verifier
from relay.cli.hash_password import ask_password
from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, CommandFailed, ConfigOption, JsonOption
from relay.config.auth import Mechanism
from relay.config.load import load
from relay.config.schema import Config
from relay.directory.layout import SnapshotError
from relay.directory.passwords import read_passwords
from relay.policy.ownership import Grant, OwnershipRules

HERE: Final = "127.0.0.1"
_SHOWN: Final = 20
_ANSWERS: Final = {
    Result.OK: "235 logged in",
    Result.REFUSED: "535 refused",
    Result.BLOCKED: "454 blocked",
    Result.UNAVAILABLE: "454 not to be checked now",
    Result.GO_ON: "334",
}


@dataclass(slots=True)
class Tried:
    """What came of it, for people and programs."""

    listener: str
    mechanism: str = ""
    steps: list[str] = field(default_factory=list)
    reply: Reply = field(default_factory=lambda: Reply(Result.UNAVAILABLE))


def login(
    user: Annotated[str, typer.Argument(metavar="USER", help="The name as a client would send it.")],
    listener: Annotated[
        str, typer.Option(metavar="NAME", help="As if to this listener; default: the first that takes logins.")
    ] = "",
    mechanism: Annotated[
        str,
        typer.Option(metavar="NAME", help="PLAIN, CRAM-MD5, ...; default: the first offered of PLAIN and the others."),
    ] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Ask for a password and try to log in, by the daemon's own code: mechanism, store, steps, result.

    The relay does not count it as a guess. A directory does, when the password is wrong.
    """
    loaded = load(config, os.environ)
    names = [one.name for one in loaded.listener if one.takes_logins]
    chosen = listener or next(iter(names), "")
    if chosen not in names or not loaded.auth.stores:
        known = ", ".join(names) if loaded.auth.stores else "there is no store in auth.stores"
        raise CommandFailed(f'nobody can log in at the listener "{chosen}"; choose another one: {known}')
    password = ask_password()
    tried = asyncio.run(_try(loaded, chosen, user, password, mechanism.upper()))
    _tell(loaded, tried, as_json=as_json)
    if tried.reply.result is not Result.OK:
        raise typer.Exit(EXIT_FAILED)


async def _try(config: Config, listener: str, user: str, password: str, wanted: str) -> Tried:
    try:
        passwords = read_passwords(config, os.environ)
    except SnapshotError as error:
        raise CommandFailed(str(error)) from None
    stores, problems = prepare(config, passwords)
    if problems:
        raise CommandFailed("; ".join(problems))
    tried = Tried(listener)
    verifier = Verifier(config, stores)
    try:
        tried.mechanism = _choose(config, stores, listener, wanted)
        await _look(config, stores, tried, user)
        tried.reply = await _ask(verifier, tried, user, password)
    finally:
        verifier.close()
    return tried


def _choose(config: Config, stores: Stores, listener: str, wanted: str) -> Mechanism:
    entry = next(one for one in config.listener if one.name == listener)
    offers = offered(config, entry, stores.abilities())
    chosen = wanted or ("PLAIN" if Mechanism.PLAIN in offers else next(iter(offers), ""))
    if chosen not in offers or chosen == Mechanism.SCRAM_SHA_256_PLUS:  # -PLUS needs a TLS connection to bind to
        raise CommandFailed(f"{chosen or 'nothing'}: the listener {listener} offers {' '.join(offers) or 'nothing'}")
    return Mechanism(chosen)


async def _look(config: Config, stores: Stores, tried: Tried, user: str) -> None:
    """Where the name is found. The verifier does the same again."""
    for store, held in zip(stores_of(config, tried.listener), stores.chain(tried.listener) or (), strict=True):
        what = f"store {store.name} ({'file' if isinstance(held, Accounts) else f'directory {store.directory}, {store.check}'})"
        try:
            entry = held.entries.get(fold(user)) if isinstance(held, Accounts) else await held.find(user)
        except (StoreAway, Ambiguous) as error:
            tried.steps.append(f"{what}: {error}")
            return
        if entry is not None:
            shown = f"account {entry.account.name}"
            kinds = ", ".join(type(secret).__name__ for secret in entry.secrets)
            how = (
                "the directory checks the password" if entry.bind is not None else f"stored password: {kinds or 'none'}"
            )
            tried.steps.append(f"{what}: {entry.barred or f'{shown}; {how}'}")
            return
        tried.steps.append(f"{what}: no such account")


async def _ask(verifier: Verifier, tried: Tried, user: str, password: str) -> Reply:
    """The dialogue of the mechanism, both sides of it."""
    mechanism = Mechanism(tried.mechanism)
    exchange: list[Exchange] = []
    try:
        question, client, dialogue = _opening(mechanism, user, password)
        reply = await verifier.answer(question, HERE, tried.listener, exchange)
        if reply.result is Result.GO_ON and client is not None:
            challenge = dialogue.send(reply.octets)
            assert not isinstance(challenge, Question)
            client.set_server_first(challenge.octets.decode())
            second = dialogue.send(client.get_client_final().encode())
            assert isinstance(second, Question)
            reply = await verifier.answer(second, HERE, tried.listener, exchange)
    except Hopeless as error:
        return Reply(Result.REFUSED, user=user, why=f"{error}; no store is asked")
    except ScramException as error:
        return Reply(Result.REFUSED, user=user, why=str(error))
    return reply


def _opening(mechanism: Mechanism, user: str, password: str) -> tuple[Question, ScramClient | None, Dialogue]:
    around = Circumstances(b"<" + base64.b16encode(os.urandom(8)) + b"@relay.login>")
    client = None
    match mechanism:
        case Mechanism.CRAM_MD5:
            dialogue = begin(mechanism, None, around)
            challenge = next(dialogue)
            assert not isinstance(challenge, Question)
            digest = hmac.new(password.encode(), challenge.octets, "md5").hexdigest()
            question = dialogue.send(f"{user} {digest}".encode())
        case Mechanism.SCRAM_SHA_256:
            client = ScramClient([mechanism], user, password)
            dialogue = begin(mechanism, client.get_client_first().encode(), around)
            question = next(dialogue)
        case Mechanism.LOGIN:
            dialogue = begin(mechanism, user.encode(), around)
            next(dialogue)
            question = dialogue.send(password.encode())
        case _:
            dialogue = begin(mechanism, f"\0{user}\0{password}".encode(), around)
            question = next(dialogue)
    assert isinstance(question, Question)
    return question, client, dialogue


def _tell(config: Config, tried: Tried, *, as_json: bool) -> None:
    reply = tried.reply
    account = reply.account
    rules = OwnershipRules.of(config)
    grant = Grant.OWN if account is None else rules.grant(account)
    if as_json:
        said = {
            "listener": tried.listener,
            "mechanism": tried.mechanism,
            "steps": tried.steps,
            "result": reply.result,
            "why": reply.why,
            "account": None if account is None else account.name,
            "addresses": [] if account is None else sorted(account.addresses),
            "grant": grant,
        }
        typer.echo(json.dumps(said, indent=2))
        return
    typer.echo(f"listener {tried.listener}, mechanism {tried.mechanism}")
    for step in tried.steps:
        typer.echo(step)
    typer.echo(f"result: {_ANSWERS[reply.result]}{f': {reply.why}' if reply.why else ''}")
    if account is not None:
        shown = sorted(account.addresses)
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        owned = ", ".join(shown[:_SHOWN]) + more if shown else "no address"
        typer.echo(f"account {account.name} may send as {owned}{_WIDER[grant]}")
    typer.echo("the relay has not counted this; a directory counts a wrong password all the same")


_WIDER: Final = {Grant.OWN: "", Grant.DOMAINS: ", and as anybody of the own domains", Grant.ANY: ", and as anybody"}
