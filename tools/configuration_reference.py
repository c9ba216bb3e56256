"""Write the key tables of docs/configuration.md from the schema; what stands above the marker is written by hand.

Usage: .venv/bin/python tools/configuration_reference.py [--check]     --check: change nothing, exit 1 when it is old
"""

from __future__ import annotations

import ast
import datetime as dt
import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from relay.config.explain import section_of, toml
from relay.config.schema import Config
from relay.config.section import Section

DOCUMENT: Final = Path(__file__).parents[1] / "docs/configuration.md"
MARKER: Final = "<!-- From here on written by tools/configuration_reference.py. -->\n"


def document() -> str:
    """The whole text as it should be."""
    above = DOCUMENT.read_text("utf-8").partition(MARKER)[0]
    return above + MARKER + "".join(f"\n{line}" for line in reference())


def reference() -> Iterator[str]:
    """The tables, one for each section, in the order of the schema."""
    for name, field in Config.model_fields.items():
        section, several = section_of(field)
        assert section is not None
        yield from _section(f"[[{name}]]" if several else f"[{name}]", section)
        for key, inner in section.model_fields.items():
            item, _ = section_of(inner)
            if item is not None:
                yield from _section(f"[[{name}.{key}]]", item)


def _section(header: str, section: type[Section]) -> Iterator[str]:
    yield f"## `{header}`\n"
    yield f"{_prose(section.__doc__ or '')}\n"
    yield "| key | default | values | meaning |"
    yield "|---|---|---|---|"
    meanings = _docstrings(section)
    for key, field in section.model_fields.items():
        yield f"| `{key}` | {_default(field)} | {_values(field)} | {_prose(meanings[key])} |"
    yield ""


def _docstrings(section: type[Section]) -> dict[str, str]:
    """The text below each key. Pydantic could read it, at 50 ms for each start of the relay."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        key.target.id: text.value.value
        for key, text in pairwise(definition.body)
        if isinstance(key, ast.AnnAssign)
        and isinstance(key.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _prose(text: str) -> str:
    """A docstring in one line of Markdown."""
    line = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return re.sub(r" \(rows? [^)]*\)", "", line)  # rows of the feature list: for developers


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    return "none" if field.default is None else f"`{toml(field.default)}`"


def _values(field: FieldInfo) -> str:
    kind: Any = field.annotation
    section, several = section_of(field)
    if section is not None:
        return "tables" if several else "table"
    kinds = [one for one in get_args(kind) if one is not type(None)] if get_origin(kind) not in {list, Literal} else []
    kind = kinds[0] if kinds else kind
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    if get_origin(kind) is Literal:
        return _choices(get_args(kind))
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        return "list of numbers" if getattr(item, "__origin__", item) is float else "list of texts"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choices(tuple(kind))
    names = {dt.date: "date", bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    return names[kind] + _bounds(field)


def _choices(values: tuple[object, ...]) -> str:
    return ", ".join(f"`{toml(value)}`" for value in values)


def _bounds(field: FieldInfo) -> str:
    found = {name: getattr(each, name) for each in field.metadata for name in ("ge", "gt", "le") if hasattr(each, name)}
    low = f"from {toml(found['ge'])}" if "ge" in found else f"above {toml(found['gt'])}" if "gt" in found else ""
    high = f"to {toml(found['le'])}" if "le" in found else ""
    return f", {' '.join(filter(None, (low, high)))}" if low or high else ""


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(DOCUMENT.read_text("utf-8") != document())
    DOCUMENT.write_text(document(), "utf-8")
