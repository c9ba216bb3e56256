"""Owns: ``relay directory diff``, and what history and rollback show of it: generations compared by name. Decides nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer

from relay.cli.options import DEFAULT_CONFIG, CommandFailed, ConfigOption, JsonOption
from relay.config.load import load
from relay.config.schema import Config
from relay.directory.layout import SnapshotError
from relay.directory.names import Named, NoNames, compare, known
from relay.directory.snapshot import inspect

SHOWN: Final = 20
"""Addresses that a rollback names; relay directory diff has them all."""


def diff(
    old: Annotated[int | None, typer.Argument(help="A generation; default: the one before NEW.")] = None,
    new: Annotated[int | None, typer.Argument(help="A later one; default: the one in use.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Name the addresses that were added (+), removed (-) or changed (~) between two generations.

    Needs directory.names_max_age_s; the snapshots hold hashes alone.
    """
    loaded = load(config, os.environ)
    try:
        later = new if new is not None else inspect(loaded.snapshot_path).generation
        earlier = old if old is not None else next((one for one in known(loaded) if one < later), later - 1)
        found = compare(loaded, earlier, later)
    except (NoNames, SnapshotError) as error:
        raise CommandFailed(str(error)) from None
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    typer.echo(f"generation {found.old} to {found.new}: {_numbers(found)}")
    for line in _lines(found):
        typer.echo(line)


def since(config: Config, generations: Sequence[int]) -> list[dict[str, Any]]:
    """For each generation, newest first, what the one after it changed; empty where the names are not there."""
    there = known(config)
    found: list[dict[str, Any]] = []
    for generation in generations:
        later = next((one for one in reversed(there) if one > generation), None)
        try:
            named = compare(config, generation, later) if later is not None and generation in there else None
        except NoNames:
            named = None
        counted = {} if named is None else {key: len(getattr(named, key)) for key in ("added", "removed", "changed")}
        found.append(counted)
    return found


def show_between(config: Config, before: int, now: int) -> None:
    """After a rollback: what it brought back and took away."""
    try:
        found = compare(config, before, now)
    except NoNames as error:
        typer.echo(f"not named: {error}", err=True)
        return
    typer.echo(f"difference  {_numbers(found)}")
    lines = list(_lines(found))
    for line in lines[:SHOWN]:
        typer.echo(f"            {line}")
    if len(lines) > SHOWN:
        typer.echo(f"            and {len(lines) - SHOWN} more; relay directory diff {before} {now} has them all")


def _numbers(found: Named) -> str:
    return f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed"


def _lines(found: Named) -> list[str]:
    return [
        *(f"+ {address} ({words})" for address, words in sorted(found.added.items())),
        *(f"- {address} ({words})" for address, words in sorted(found.removed.items())),
        *(f"~ {address} ({was} -> {now})" for address, (was, now) in sorted(found.changed.items())),
    ]
