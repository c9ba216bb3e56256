"""Owns: what a validator says of a value that cannot stay."""

from __future__ import annotations


class Invalid(ValueError):
    """A value that cannot stay: ``what`` is wrong with it, and the ``hint`` what to write instead."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}; {hint}")
        self.what = what
        self.hint = hint
