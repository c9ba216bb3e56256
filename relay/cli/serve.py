"""Owns: ``relay serve``: nothing starts unless the whole configuration is good."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from relay.auth.stores import check_stores
from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, CommandFailed, ConfigOption
from relay.config.files import check_files
from relay.config.load import Loaded, read
from relay.config.origin import ConfigErrors, Problem
from relay.supervisor import tree


def serve(
    config: ConfigOption = DEFAULT_CONFIG,
    pidfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the supervisor's pid; appears once all listeners accept."),
    ] = None,
) -> None:
    """Run the relay in the foreground until SIGTERM. SIGHUP reloads the configuration."""
    loaded = read(config, os.environ)
    problems = [*check_files(loaded.config, loaded.origin), *_check_stores_apart(loaded)]
    if problems:
        raise ConfigErrors(problems)
    if loaded.config.log.file is not None and sys.stderr.isatty():  # else a person sees nothing and wonders
        typer.echo(f"starting; the log goes to {loaded.config.log.file}, Ctrl-C ends the relay", err=True)
    raise typer.Exit(tree.run(config, loaded.config, pidfile))


def _check_stores_apart(loaded: Loaded) -> list[Problem]:
    """Look at the stores in a process of its own: all roles are forked from this one, and no worker may find stored
    passwords in its memory.
    """
    if not loaded.config.auth.stores:
        return []
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = EXIT_FAILED
        try:
            with os.fdopen(writing, "w") as told:
                json.dump([dataclasses.astuple(one) for one in check_stores(loaded.config, loaded.origin)], told)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise CommandFailed("the stores could not be looked at; relay check says more")
    return [Problem(*fields) for fields in json.loads(text)]
