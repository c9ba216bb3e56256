"""Owns: ``relay directory``: build the snapshot, and say what is in place. Must not know the file's format."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from relay.cli import differences, push, readings
from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, CommandFailed, ConfigOption, JsonOption
from relay.config.load import load
from relay.config.schema import Config
from relay.directory import build as builder
from relay.directory import names
from relay.directory.export import recipient_lines, sender_lines
from relay.directory.key import key_id, read_key
from relay.directory.layout import SnapshotError
from relay.directory.snapshot import Directory, Snapshot, previous_path
from relay.directory.sources import gather
from relay.directory.sync import Purpose

app = typer.Typer(
    help="The snapshot of valid recipients and restricted senders.", no_args_is_help=True, add_completion=False
)

NO_FILE: Final = "there is none"

_WIDTH: Final = 12

app.command("sync")(readings.sync)
app.command("test")(readings.trial)
app.command("accept")(readings.accept)
app.command("history")(readings.history)
app.command("rollback")(readings.rollback)
app.command("audit")(readings.audit)
app.command("keygen")(push.keygen)
app.command("diff")(differences.diff)


def in_use(config: Config) -> Directory:
    """The snapshot as a worker would take it now. Raises CommandFailed when the key cannot be read."""
    try:
        key = read_key(config.key_path) if config.key_path.exists() else b""
    except SnapshotError as error:
        raise CommandFailed(str(error)) from None
    except OSError as error:
        raise CommandFailed(f"{config.key_path}: {error.strerror}; run this as root or as the relay's user") from None
    found = Directory(config.snapshot_path, key)
    found.note_age(time.time(), config.snapshot_max_age_s)
    return found


def ago(seconds: float) -> str:
    """A span of time as one number an operator can take in."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{max(seconds, 0):.0f} s ago"


@app.command()
def build(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Make a new snapshot from the configured sources; running workers take it within a second.

    When a source cannot be read or the result cannot be right, the snapshot in use stays and the exit code is 1.
    """
    loaded = load(config, os.environ)
    if loaded.directory.scheduled:
        readings.sync_now(loaded, Purpose.ASKED, as_json=False)
        return
    try:
        built = builder.build(loaded, time.time(), kept=names.keep)
    except SnapshotError as error:
        raise CommandFailed(f"no new snapshot: {error}") from None
    for example in built.examples:
        typer.echo(f"left out: {example}", err=True)
    snapshot = built.snapshot
    _line("generation", f"{snapshot.generation}")
    _line("addresses", f"{snapshot.addresses}")
    _line("recipients", f"{snapshot.recipients}")
    _line("restricted", f"{snapshot.restricted}")
    for reason, count in sorted(built.skipped.items()):
        _line("left out", f"{count} × {reason}")
    if built.new_key:
        _line("new key", f"{snapshot.key_id} in {loaded.key_path}")
    _line("file", f"{snapshot.path} ({snapshot.size} octets)")


@app.command()
def export(
    senders: Annotated[
        bool, typer.Option("--senders", help="The restricted senders instead, as an access map.")
    ] = False,
    signed: push.SignedOption = False,
    key: push.KeyOption = None,
    output: push.OutputOption = None,
    name: push.NameOption = "",
    serial: push.SerialOption = 0,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Print the recipients as a Postfix map (ADDRESS OK), read from the sources: the snapshot holds hashes alone.

    With --signed: read sources and directories, and write a file for the relay in the DMZ ([[directory.push]]).
    """
    loaded = load(config, os.environ)
    if signed:
        push.export_signed(loaded, key, output, name, serial)
        return
    if key or output or name or serial:
        raise CommandFailed("--key, --output, --name and --serial belong to --signed; add it")
    try:
        collection, _ = gather(loaded, dt.datetime.now(dt.UTC).date())
    except SnapshotError as error:
        raise CommandFailed(str(error)) from None
    said = {address: collection.records[number] for address, number in sorted(collection.addresses.items())}
    lines = sender_lines(said, loaded.senders.text) if senders else recipient_lines(said)
    for line in lines:
        typer.echo(line)


@app.command()
def status(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Say which snapshots are in place, whether they are good, and whether their sources changed since.

    The exit code is 1 when the current snapshot cannot be used.
    """
    found = _status(load(config, os.environ), time.time())
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if not found["current"]["valid"]:
        raise typer.Exit(EXIT_FAILED)


def _status(config: Config, now: float) -> dict[str, Any]:
    key = b""
    problem = ""
    try:
        key = read_key(config.key_path)
    except SnapshotError as error:
        problem = str(error)
    current = _file(config.snapshot_path, key, now)
    return {
        "current": current,
        "previous": _file(previous_path(config.snapshot_path), key, now),
        "key": {"path": str(config.key_path), "id": key_id(key) if key else "", "problem": problem},
        "sources": [
            {"type": source.type, "path": str(source.path), "state": _source_state(source.path, current.get("created"))}
            for source in config.directory.sources
        ],
        "directories": readings.remembered(config, now) if config.directory.scheduled else None,
    }


def _file(path: Path, key: bytes, now: float) -> dict[str, Any]:
    if not path.exists():
        return {"path": str(path), "valid": False, "problem": NO_FILE}
    try:
        snapshot = Snapshot.open(path, key)
    except SnapshotError as error:
        return {"path": str(path), "valid": False, "problem": str(error)}
    return {
        "path": str(path),
        "valid": True,
        "problem": "",
        "generation": snapshot.generation,
        "created": snapshot.created,
        "age_s": round(now - snapshot.created, 3),
        "addresses": snapshot.addresses,
        "recipients": snapshot.recipients,
        "restricted": snapshot.restricted,
        "size": snapshot.size,
        "key_id": snapshot.key_id,
        "built_from": snapshot.origin.get("sources", []),
        "left_out": snapshot.origin.get("skipped", {}),
    }


def _source_state(path: Path, built: float | None) -> str:
    try:
        modified = path.stat().st_mtime
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if built is None:
        return "not built"
    return "changed since the build" if modified > built else "unchanged since the build"


def _print(found: dict[str, Any]) -> None:
    for name in ("current", "previous"):
        file = found[name]
        if not file["valid"]:
            none_yet = name == "previous" and file["problem"] == NO_FILE
            _line(name, "none yet" if none_yet else f"not usable: {file['problem']}")
            continue
        _line(name, f"generation {file['generation']}, built {ago(file['age_s'])}, good")
        _line("", f"{file['recipients']} recipients, {file['restricted']} restricted, {file['addresses']} addresses")
        _line("", f"{file['path']} ({file['size']} octets)")
        for reason, count in sorted(file["left_out"].items()):
            _line("", f"left out at the build: {count} × {reason}")
    key = found["key"]
    _line("key", key["problem"] or f"{key['id']} in {key['path']}")
    if found["directories"] is not None:
        for name, text in readings.remembered_lines(found["directories"]):
            _line(name, text)
    for source in found["sources"]:
        _line("source", f"{source['type']} {source['path']}: {source['state']}")


def _line(name: str, text: str) -> None:
    typer.echo(f"{name:{_WIDTH}}{text}")
