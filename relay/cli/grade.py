"""Owns: what a finding of ``relay check`` is, and the mark for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Grade(StrEnum):
    """How bad it is; ``error`` means the relay does not do its work like this."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``hint`` says what to do, empty for grade ok."""

    grade: Grade
    topic: str
    text: str
    hint: str = ""


_MARKS: Final = ((0, "A"), (2, "B"), (5, "C"), (10, "D"))
"""Most warnings for each mark."""


def mark(findings: Iterable[Finding]) -> str:
    """A for nothing to say, B, C, D and E for more and more warnings, F for any error."""
    grades = [finding.grade for finding in findings]
    if Grade.ERROR in grades:
        return "F"
    warnings = grades.count(Grade.WARNING)
    return next((letter for most, letter in _MARKS if warnings <= most), "E")
