"""Owns: the commands of the inside that signs: ``relay directory keygen`` and ``export --signed`` (row R12). Decides nothing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from relay.cli.options import CommandFailed
from relay.config.invalid import Invalid
from relay.config.schema import Config
from relay.config.section import label
from relay.directory.failure import LdapFailure
from relay.directory.layout import SnapshotError
from relay.directory.outgoing import everything
from relay.directory.passwords import read_passwords
from relay.directory.push import SUFFIX
from relay.directory.signed import KeyFault, make_key, public_of, read_private_key, sign

SignedOption = Annotated[
    bool, typer.Option("--signed", help="A signed file for a relay without a way to the directory.")
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="The key that signs; relay directory keygen makes one.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar=f"FILE{SUFFIX}", help="Where the signed file goes.")
]
NameOption = Annotated[str, typer.Option("--name", help="The name of the receiver's [[directory.push]].")]
SerialOption = Annotated[
    int, typer.Option("--serial", min=0, help="Number above all before; default: the time in milliseconds.")
]


def keygen(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The private key: new, or with --public an existing one.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Make nothing; print the public key of FILE.")] = False,
) -> None:
    """Make the key pair that signs snapshots for the DMZ; print the public key, which goes into the receiver's keys."""
    try:
        typer.echo(public_of(read_private_key(file)) if public else make_key(file))
    except KeyFault as fault:
        raise CommandFailed(str(fault)) from None


def export_signed(loaded: Config, key: Path | None, output: Path | None, name: str, serial: int) -> None:
    """Read, sign, write. Raises CommandFailed, and then FILE is as it was."""
    if key is None or output is None or not name:
        raise CommandFailed(f"--signed needs --key FILE, --output FILE{SUFFIX} and --name NAME")
    if not output.name.endswith(SUFFIX) or output.name.startswith("."):
        raise CommandFailed(f"--output {output}: the receiver takes files named *{SUFFIX}; name it so")
    try:
        label(name)
        private = read_private_key(key)
        collection, tally = everything(loaded, read_passwords(loaded, os.environ), time.time(), _progress)
    except Invalid as fault:
        raise CommandFailed(f"--name {name}: {fault}") from None
    except (KeyFault, SnapshotError, LdapFailure) as fault:
        raise CommandFailed(f"nothing was written: {fault}") from None
    for example in tally.examples:
        typer.echo(f"left out: {example}", err=True)
    now = time.time()
    number = serial or int(now * 1000)
    whole = sign(collection, name, number, now, private)
    try:
        _write(output, whole)
    except OSError as error:
        raise CommandFailed(f"{output}: cannot be written: {error.strerror}; name a folder that is yours") from None
    typer.echo(f"{output}: {len(collection.addresses)} addresses, serial number {number}, {len(whole)} octets")


def _write(output: Path, whole: bytes) -> None:
    """Whole or not at all: what copies it may look at any moment."""
    beside = output.with_name(f".{output.name}.part")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(whole)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(output)


def _progress(profile: str, entries: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rreading {profile}: {entries} entries ")
