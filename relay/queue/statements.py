"""Owns: reading the SQL files of ``sql/``: statements by name, and the schema's migrations. Must not run any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from typing import Final

_NAME: Final = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_COMMENT: Final = re.compile(r"^--.*\n", re.MULTILINE)


def _read(name: str) -> str:
    return (resources.files("relay.queue") / "sql" / name).read_text("ascii")


def _named(text: str) -> dict[str, str]:
    parts = _NAME.split(text)[1:]
    return {name: _COMMENT.sub("", body + "\n").strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


SQL: Final = _named(_read("statements.sql"))
"""Statement by name."""

MIGRATIONS: Final = ("schema_0001.sql", "schema_0002.sql", "schema_0003.sql", "schema_0004.sql")
"""The n-th file leads from schema version n-1 to n. Files that were released never change; new ones are added."""


def migration(version: int) -> Iterator[str]:
    """The single statements that lead to ``version``."""
    text = re.sub(r"--.*", "", _read(MIGRATIONS[version - 1]))
    for statement in text.split(";"):
        if statement.strip():
            yield statement.strip()
