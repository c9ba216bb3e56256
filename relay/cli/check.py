"""Owns: ``relay check``: the configuration and this machine, judged and printed."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Annotated, Final

import typer

from relay.auth.stores import check_stores
from relay.cli.findings import findings
from relay.cli.grade import Finding, Grade, mark
from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, EXIT_REFUSED, ConfigOption, JsonOption
from relay.config.files import check_files
from relay.config.load import read
from relay.config.origin import ConfigErrors

_COLOURS: Final = {
    Grade.OK: typer.colors.GREEN,
    Grade.WARNING: typer.colors.YELLOW,
    Grade.ERROR: typer.colors.RED,
}
_WORST_FIRST: Final = (Grade.ERROR, Grade.WARNING, Grade.OK)


OfflineOption = Annotated[bool, typer.Option("--offline", help="Do not connect to next hops.")]


def check(offline: OfflineOption = False, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Judge the configuration, what it needs on this machine, and the next hops. Nothing is started or changed.

    Exit code 0: it will run, warnings or not; 1: something it needs is wrong; 2: the file itself is wrong.
    """
    try:
        loaded = read(config, os.environ)
    except ConfigErrors as errors:
        if not as_json:
            raise
        print(
            json.dumps(
                {"grade": Grade.ERROR, "mark": "F", "problems": [dataclasses.asdict(one) for one in errors.problems]}
            )
        )
        raise typer.Exit(EXIT_REFUSED) from None
    problems = [*check_files(loaded.config, loaded.origin), *check_stores(loaded.config, loaded.origin)]
    report = findings(loaded.config, problems, offline=offline)
    grade = next(grade for grade in _WORST_FIRST if any(finding.grade is grade for finding in report))
    if as_json:
        print(
            json.dumps(
                {"grade": grade, "mark": mark(report), "findings": [dataclasses.asdict(finding) for finding in report]}
            )
        )
    else:
        _show(report)
        counts = {each: sum(finding.grade is each for finding in report) for each in _WORST_FIRST}
        typer.echo(f"{config}: {counts[Grade.ERROR]} errors, {counts[Grade.WARNING]} warnings, mark {mark(report)}")
    raise typer.Exit(EXIT_FAILED if grade is Grade.ERROR else 0)


def _show(report: list[Finding]) -> None:
    width = max(len(finding.topic) for finding in report)
    for finding in report:
        grade = typer.style(f"{finding.grade:8}", fg=_COLOURS[finding.grade])
        text = f"{finding.text}; {finding.hint}" if finding.hint else finding.text
        typer.echo(f"{grade} {finding.topic:{width}}  {text}")
