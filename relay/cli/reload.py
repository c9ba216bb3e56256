"""Owns: ``relay reload``: tell a running relay to take up its configuration, after a look at whether it can."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from relay.auth.stores import check_stores
from relay.cli.options import DEFAULT_CONFIG, CommandFailed, ConfigOption
from relay.config.files import check_files
from relay.config.load import read
from relay.config.origin import ConfigErrors


def reload(
    config: ConfigOption = DEFAULT_CONFIG,
    pid: Annotated[int, typer.Option(min=0, help="The supervisor's pid; 0: the relay on the configured spool.")] = 0,
) -> None:
    """Check the configuration and have the running relay take it up. It takes all of it or nothing; its log says which."""
    loaded = read(config, os.environ)
    problems = [*check_files(loaded.config, loaded.origin), *check_stores(loaded.config, loaded.origin)]
    if problems:
        raise ConfigErrors(problems)
    supervisor = pid or _supervisor(loaded.config.server.spool / "lock")
    try:
        os.kill(supervisor, signal.SIGHUP)
    except ProcessLookupError:
        raise CommandFailed(f"no process has the pid {supervisor}; is the relay running?") from None
    except PermissionError:
        raise CommandFailed(
            f"process {supervisor} is another user's; run this as the user that started the relay"
        ) from None
    typer.echo(f"asked the relay (pid {supervisor}) to take up {config}; its log says whether it did")


def _supervisor(lock: Path) -> int:
    """The pid in the spool's lock, as long as somebody holds it: afterwards the number may be anybody's."""
    try:
        with lock.open("r", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{lock}: cannot tell which relay holds it ({error}); name it with --pid") from None
    raise CommandFailed(f"no relay runs on the spool {lock.parent}; start it with relay serve, or name it with --pid")
