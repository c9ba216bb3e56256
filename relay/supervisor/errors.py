"""Owns: why a tree does not start, with the exit code that says whose fault it is."""

from __future__ import annotations

from typing import Final

EXIT_FAILED: Final = 1
"""A member of the tree could not start."""
EXIT_REFUSED: Final = 2
"""Configuration, addresses, users or spool do not allow a start; nothing was started."""


class Refusal(Exception):
    """Nothing can be started; one line per problem."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
