"""Owns: ``relay hash-password``: what stands in a store for a password."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from relay.auth.secret import PASSWORD_OCTETS, SCHEMES
from relay.cli.options import CommandFailed

DEFAULT_SCHEME: Final = "SCRAM-SHA-256"
_SAID: Final = ", ".join(SCHEMES)


def hash_password(
    scheme: Annotated[str, typer.Option(metavar="SCHEME", help=f"One of {_SAID}.")] = DEFAULT_SCHEME,
    user: Annotated[
        str, typer.Option(metavar="NAME", help="Print the whole line of a file of accounts for this login.")
    ] = "",
    address: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="With --user: an address it may send as; may be repeated."),
    ] = None,
) -> None:
    """Ask for a password and print what to store for it. Without a terminal the first line of the input is the password.

    SCRAM-SHA-256 serves SCRAM, PLAIN and LOGIN; CRAM-MD5 serves CRAM-MD5, PLAIN and LOGIN, but who steals it can log in
    with it; the others serve PLAIN and LOGIN.
    """
    make = SCHEMES.get(scheme.upper())
    if make is None:
        raise CommandFailed(f"--scheme {scheme}: not known; write one of {_SAID}")
    password = ask_password(twice=True)
    text = make(password.encode())
    typer.echo(f"{user}:{text}:{','.join(address or [])}" if user else text)


def ask_password(*, twice: bool = False) -> str:
    """The password, from the terminal without echo, else the first line of standard input. Raises CommandFailed."""
    if sys.stdin.isatty():
        password: str = typer.prompt("Password", hide_input=True, confirmation_prompt=twice, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise CommandFailed("the password is empty")
    if len(password.encode()) > PASSWORD_OCTETS or not password.isprintable():
        raise CommandFailed(f"a password has at most {PASSWORD_OCTETS} octets and no control characters")
    return password
