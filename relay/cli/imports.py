"""Owns: ``relay import``: foreign configurations as this relay's, printed for a person to look at. Changes nothing."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import TypeAdapter, ValidationError

from relay.cli.options import EXIT_FAILED, CommandFailed
from relay.config.ldap import LdapProfile
from relay.migrate.ldap_table import NoTable, Profile, convert

FILE_OCTETS: Final = 1 << 16
"""Longest table read: they have some twenty lines."""

app = typer.Typer(
    help="Configurations of other mail systems as this one's.", no_args_is_help=True, add_completion=False
)


@app.callback()
def what() -> None:
    """Configurations of other mail systems as this one's."""


@app.command()
def ldap(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.cf...", help="Postfix's LDAP tables (ldap_table(5)).")],
) -> None:
    """Print the [[directory.ldap]] tables for Postfix's LDAP tables, with a comment for all that has no counterpart.

    Name the tables of recipients first; those of restricted senders or next hops of the same entries are added to them.
    Exit code 1 when a result needs a hand before it is a valid configuration.
    """
    profiles: list[Profile] = []
    for file in files:
        try:
            made = convert(str(file), _text(file), profiles)
        except NoTable as why:
            raise CommandFailed(f"{file}: {why}") from None
        if made is not None:
            profiles.append(made)
    complete = True
    for profile in profiles:
        faults = _faults(profile)
        complete = complete and not faults
        for line in [*profile.lines(), *(f"# TO DO: {fault}" for fault in faults), ""]:
            typer.echo(line)
    typer.echo("# Then: relay check, relay directory test, relay directory sync --dry-run")
    if not complete:
        raise typer.Exit(EXIT_FAILED)


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return os.read(opened.fileno(), FILE_OCTETS).decode()
    except OSError as error:
        raise CommandFailed(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CommandFailed(f"{file}: is not UTF-8 text") from None


def _faults(profile: Profile) -> list[str]:
    """What the configuration would be refused for."""
    try:
        [found] = tomllib.loads("\n".join(profile.lines()))["directory"]["ldap"]
        TypeAdapter(LdapProfile).validate_python(found)
    except ValidationError as errors:
        return [
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in errors.errors()
        ]
    return []
