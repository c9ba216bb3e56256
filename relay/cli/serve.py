"""Owns: ``relay serve``: nothing starts unless the whole configuration is good."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from relay import supervisor
from relay.cli.options import DEFAULT_CONFIG, ConfigOption
from relay.config.files import check_files
from relay.config.load import read
from relay.config.origin import ConfigErrors


def serve(
    config: ConfigOption = DEFAULT_CONFIG,
    pidfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the supervisor's pid; appears once all listeners accept."),
    ] = None,
) -> None:
    """Run the relay in the foreground until SIGTERM. SIGHUP reloads the configuration."""
    loaded = read(config, os.environ)
    problems = check_files(loaded.config, loaded.origin)
    if problems:
        raise ConfigErrors(problems)
    if loaded.config.log.file is not None and sys.stderr.isatty():  # else a person sees nothing and wonders
        typer.echo(f"starting; the log goes to {loaded.config.log.file}, Ctrl-C ends the relay", err=True)
    raise typer.Exit(supervisor.run(config, loaded.config, pidfile))
