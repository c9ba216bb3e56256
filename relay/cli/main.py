"""Owns: the command ``relay``: its list of commands, each imported only when it runs, and the exit code of a failure.

Lazy imports keep ``relay serve`` quick to its first greeting and let a command work where another one's module is broken.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from typing import Final, cast

import typer
from typer.core import TyperCommand, TyperGroup

from relay import __version__
from relay.cli.options import EXIT_FAILED, EXIT_REFUSED, CommandFailed
from relay.config.origin import ConfigErrors

# In the order of `relay --help`: what runs the relay, what asks it, what looks after it.
_COMMANDS: Final = {
    "serve": "relay.cli.serve:serve",
    "check": "relay.cli.check:check",
    "schema": "relay.cli.schema:schema",
    "reload": "relay.cli.reload:reload",
    "directory": "relay.cli.directory:app",
    "recipient": "relay.cli.recipient:recipient",
    "sender": "relay.cli.sender:sender",
    "route": "relay.cli.route:route",
    "explain": "relay.cli.explain:explain",
    "firewall": "relay.cli.firewall:firewall",
    "probe": "relay.cli.probe:probe",
    "auth": "relay.cli.auth:app",
    "login": "relay.cli.login:login",
    "hash-password": "relay.cli.hash_password:hash_password",
    "queue": "relay.cli.queue:app",
    "import": "relay.cli.imports:app",
    "version": "relay.cli.main:version",
}


class _Commands(TyperGroup):
    """A group that knows its commands by name and loads each when it is asked for."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: object, cmd_name: str) -> TyperCommand | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        target = getattr(import_module(module), name)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False)
            target.command(cmd_name)(function)
        target.info.name = cmd_name
        return cast("TyperCommand", typer.main.get_command(target))


def version() -> None:
    """Print the version of the relay and of the Python it runs on."""
    typer.echo(f"dmz-relay {__version__} (Python {platform.python_version()})")


def main() -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong configuration or usage."""
    commands = _Commands(
        name="relay",
        help="DMZ Relay: an SMTP relay that stands in the DMZ in front of Exchange.",
        commands={name: TyperCommand(name) for name in _COMMANDS},  # for "did you mean" alone
        no_args_is_help=True,
    )
    arguments = sys.argv[1:]
    if arguments == ["--version"]:  # what people try first
        arguments = ["version"]
    try:
        commands(arguments, prog_name="relay")
    except ConfigErrors as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    except CommandFailed as error:
        sys.stderr.write(f"relay: {error}\n")
        return EXIT_FAILED
    except PermissionError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"relay: {error.filename}: {error.strerror}; run this as root or as the relay's user\n")
        return EXIT_FAILED
    return 0
