"""Owns: what all commands share: the option ``--config``, exit codes, and the way a failure is told. No command's logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

EXIT_FAILED: Final = 1
"""The command was understood and could not do it, or found an error."""
EXIT_REFUSED: Final = 2
"""Configuration or usage is wrong; nothing was started or changed."""

DEFAULT_CONFIG: Final = Path("/etc/dmz-relay/relay.toml")

ConfigOption = Annotated[
    Path,
    typer.Option("--config", "-c", metavar="FILE", envvar="DMZ_RELAY_CONFIG", help="The configuration file."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


class CommandFailed(Exception):
    """The command cannot do it. The text says what, where and what to do, and is all the operator sees."""
