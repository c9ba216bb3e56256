"""Owns: where each value of the configuration came from, and how a problem with it is told to the operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from relay.config.lines import key_lines
from relay.config.whole import TABLE, Fault, KeyPath


def dotted(at: KeyPath) -> str:
    """``("listener", 0, "name")`` as ``listener[0].name``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).removeprefix(".")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend: where it stands, which key it is, what is wrong, what to do.

    ``file`` is the file's name as it was given, or the name of the environment variable; ``line`` counts from 1, 0 when
    there is none. ``key`` is empty when the whole file is meant.
    """

    file: str
    line: int
    key: str
    what: str
    hint: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.key, f"{self.what}; {self.hint}") if part)


class ConfigErrors(Exception):
    """The configuration cannot be used. ``str`` prints one line for each problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(dict.fromkeys(problems), key=lambda problem: (problem.file, problem.line, problem.key))
        super().__init__("\n".join(map(str, self.problems)))


class Origin:
    """A file's text, the environment variables that override it, and the file of the transport table, if it has one."""

    def __init__(self, file: Path, text: str, variables: Mapping[KeyPath, str], transport: Path | None = None) -> None:
        self.transport = transport
        self._file = str(file)
        self._text = text
        self._variables = variables

    @cached_property
    def _lines(self) -> dict[KeyPath, int]:
        try:
            return key_lines(self._text)
        except RecursionError:  # lists nested to the edge of what tomllib takes: the message does without its line
            return {}

    def told(self, fault: Fault) -> Problem:
        """The fault with its place; where the file has not its key (a default), the place beside it."""
        here = self.problem(fault.at, fault.what, fault.hint)
        if fault.beside and fault.at not in self._lines and here.file == self._file:
            there = self.problem(fault.beside, fault.what, fault.hint)
            return replace(there, key=here.key)
        return here

    def problem(self, at: KeyPath, what: str, hint: str) -> Problem:
        """The problem, at its own place or that of the nearest table around it."""
        if self.transport is not None and _in_table(at):
            return Problem(str(self.transport), int(at[2]), "", what, hint)
        for variable, name in self._variables.items():
            if at[: len(variable)] == variable or (variable[: len(at)] == at and at not in self._lines):
                return Problem(name, 0, dotted(at), what, hint)
        place = at
        while place and place not in self._lines:
            place = place[:-1]
        line = self._lines.get(place, 0)
        if line and place == TABLE and _in_table(at):
            opened = self._text.splitlines()[line - 1].rstrip().endswith(('"""', "'''"))
            line, at = line + int(at[2]) - (0 if opened else 1), TABLE  # TOML drops the line end behind the quotes
        return Problem(self._file, line, dotted(at), what, hint)


def _in_table(at: KeyPath) -> bool:
    return at[:2] == TABLE and len(at) == 3
