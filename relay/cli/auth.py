"""Owns: ``relay auth``: which mechanisms each store can verify, and who is blocked."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from relay.auth.abilities import Abilities
from relay.auth.filestore import StoreError, read
from relay.auth.ldapstore import abilities
from relay.auth.question import Unpacker, pack, unpacked
from relay.auth.stores import ORDER, offered, stores_of
from relay.cli.options import DEFAULT_CONFIG, CommandFailed, ConfigOption, JsonOption
from relay.config.auth import Mechanism
from relay.config.load import load
from relay.config.schema import Config
from relay.hub.frames import REQUEST, VERSION, Ask

app = typer.Typer(help="Logging in: mechanisms, stores, blocks.", no_args_is_help=True, add_completion=False)

PATIENCE_S: Final = 5.0


@app.command()
def matrix(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show which mechanisms the accounts of each store can use, and what each listener offers."""
    loaded = load(config, os.environ)
    held: dict[str, Abilities] = {}
    sizes: dict[str, int] = {}
    for store in loaded.auth.stores:
        if store.path is None:
            held[store.name] = abilities(store)
            continue
        try:
            accounts = read(store.path)
        except StoreError as error:
            raise CommandFailed(str(error)) from None
        held[store.name] = accounts.abilities
        sizes[store.name] = len(accounts.entries)
    listeners = {
        listener.name: [str(one) for one in offered(loaded, listener, held)]
        for listener in loaded.listener
        if listener.takes_logins
    }
    if as_json:
        stores = {
            name: {"accounts": sizes.get(name), "mechanisms": {str(one): one in able.mechanisms for one in ORDER}}
            for name, able in held.items()
        }
        typer.echo(json.dumps({"stores": stores, "listeners": listeners}, indent=2))
        return
    if not held:
        typer.echo("no store: nobody can log in; see auth.stores in the configuration")
    for name, able in held.items():
        typer.echo(f"store {name}, {sizes[name]:,} accounts" if name in sizes else f"store {name}, a directory")
        for one in ORDER:
            typer.echo(f"  {one:20}{_serves(able, one, counted=name in sizes)}")
    for name, mechanisms in listeners.items():
        asked = ", ".join(store.name for store in stores_of(loaded, name)) or "no store"
        typer.echo(f"listener {name} ({asked}) offers {' '.join(mechanisms) or 'nothing'}")


def _serves(able: Abilities, mechanism: Mechanism, *, counted: bool) -> str:
    why = able.lacking.get(mechanism)
    if why is None:
        return "every account"
    return f"not every account, e.g. not {why.removeprefix('account ')}" if counted else f"no: {why}"


@app.command()
def blocks(
    release: Annotated[
        str | None, typer.Option(metavar="NAME", help="Release this account, client or network.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show accounts, clients and networks that are blocked after too many failed logins; or release one."""
    loaded = load(config, os.environ)
    if release is not None:
        if not ask(loaded, {"ask": "release", "name": release})["released"]:
            raise CommandFailed(f"{release} has no failed logins; relay auth blocks shows the names")
        typer.echo(f"{release}: released")
        return
    found = ask(loaded, {"ask": "blocks"})["blocks"]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif not found:
        typer.echo("nobody is blocked")
    for block in [] if as_json else found:
        typer.echo(f"{block['what']:8} {block['name']}: {block['failures']} failures, {block['left_s']:.0f} s left")


def ask(config: Config, question: dict[str, Any]) -> dict[str, Any]:
    """Ask the hub of the running relay. Raises CommandFailed."""
    path = config.server.spool / "run" / "hub"
    try:
        return _ask(path, question)
    except FileNotFoundError:
        raise CommandFailed(f"{path} is not there: the relay does not run") from None
    except PermissionError:
        raise CommandFailed(f"{path}: permission denied; run this as root") from None
    except (OSError, ValueError) as error:
        raise CommandFailed(f"the relay does not answer at {path}: {error}; is there a store in auth.stores?") from None


def _ask(path: Path, question: dict[str, Any]) -> dict[str, Any]:
    unpacker = Unpacker()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(PATIENCE_S)
        link.connect(str(path))
        link.sendall(REQUEST.pack(Ask.LOGINS, VERSION, 0))
        asked = False
        while octets := link.recv(65536):
            for body in map(unpacked, unpacker.feed(octets)):
                if body["tell"] != "offers":
                    return body
                if not asked:  # the hub has taken in what this connection is for
                    asked = True
                    link.sendall(pack(question))
    raise ConnectionError("it closed the connection")
