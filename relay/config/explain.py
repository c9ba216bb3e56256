"""Owns: the words for what pydantic found: what is wrong with a value, and what to write instead. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Final, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from relay.config.invalid import Invalid
from relay.config.schema import Config
from relay.config.section import Section
from relay.config.whole import KeyPath

SHOWN: Final = 60  # characters of a wrong value in a message: enough to know it again


def toml(value: object) -> str:
    """The value as one would write it in the file."""
    match value:
        case bool():
            return "true" if value else "false"
        case Enum():
            return toml(value.value)
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)
        case float():
            return f"{value:.15g}"
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case Mapping():
            return f"{{ {', '.join(f'{key} = {toml(item)}' for key, item in value.items())} }}"
        case _:
            return str(value)


def section_of(field: FieldInfo) -> tuple[type[Section] | None, bool]:
    """The section that a field holds, if any, and whether it is a list of them."""
    annotation = field.annotation
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return (item, True) if isinstance(item, type) and issubclass(item, Section) else (None, True)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    return None, False


def explain(error: ErrorDetails) -> tuple[str, str]:
    """What is wrong, and what to write instead."""
    value, context = error["input"], error.get("ctx", {})
    key, shown = _key(error["loc"]), _shown(error["input"])
    reason = context.get("error")
    if isinstance(reason, Invalid):
        return reason.what, reason.hint
    match error["type"]:
        case "missing":
            return "is missing", key.instead
        case "extra_forbidden":
            return _unknown(key)
        case "int_type":
            return f"{shown} is not a whole number", key.instead
        case "float_type" | "finite_number":
            return f"{shown} is not a number", key.instead
        case "bool_type":
            return (
                f"{shown} is neither true nor false",
                f"write {key.name} = true or {key.name} = false, without quotes",
            )
        case "string_type" | "path_type" if isinstance(value, list | Mapping):
            return f"{shown} is not a text", key.instead
        case "string_type" | "path_type":
            return f"{shown} is not a text", f"put it in quotes: {toml(str(toml(value)))}"
        case "list_type" if key.section is not None:
            return "there may be several of these tables", f"write {key.table} with double brackets"
        case "list_type":
            return f"{shown} is not a list", key.instead if isinstance(
                value, Mapping
            ) else f"write {key.name} = [{toml(value)}]"
        case "model_type" if isinstance(value, list):
            return "there is only one such table", f"write {key.table} with single brackets"
        case "model_type":
            return f"{shown} is not a table", key.instead
        case "enum" | "literal_error":
            return f"{shown} is not one of the choices", f"write {str(context['expected']).replace(chr(39), chr(34))}"
        case "greater_than_equal":
            return f"{shown} is too small", f"write {toml(context['ge'])} or more"
        case "greater_than":
            return f"{shown} is too small", f"write more than {toml(context['gt'])}"
        case "less_than_equal":
            return f"{shown} is too large", f"write {toml(context['le'])} or less"
        case "too_short":
            return "is empty", key.instead
        case "too_long":
            return f"has {context['actual_length']} entries", f"leave at most {context['max_length']}"
        case _:
            return error["msg"], key.instead


@dataclass(frozen=True, slots=True)
class _Key:
    """A key of the schema, or one that it does not know (``field`` is None), and the section it stands in."""

    parent: type[Section]
    names: tuple[str, ...]
    field: FieldInfo | None

    @property
    def name(self) -> str:
        return self.names[-1]

    @property
    def section(self) -> type[Section] | None:
        return section_of(self.field)[0] if self.field else None

    @property
    def table(self) -> str:
        """The header of the table that the key is."""
        several = self.field is not None and section_of(self.field)[1]
        return f"[[{'.'.join(self.names)}]]" if several else f"[{'.'.join(self.names)}]"

    @property
    def instead(self) -> str:
        """What could be written here."""
        if self.field is None:
            return "remove it"
        if self.section is not None:
            return f"write a {self.table} table"
        if self.field.examples:
            return f"write {self.name} = {toml(self.field.examples[0])}"
        if self.field.default is not None:
            return f"write {self.name} = {toml(self.field.default)} (the default)"
        return f'write {self.name} = "..." or remove the line'


def _key(at: KeyPath) -> _Key:
    """The innermost key on the way to a place; a list item belongs to the list's."""
    parent: type[Section] = Config
    names: tuple[str, ...] = ()
    field: FieldInfo | None = None
    for step in at:
        if isinstance(step, str):
            parent = (section_of(field)[0] if field else None) or parent
            names = (*names, step)
            field = parent.model_fields.get(step)
    return _Key(parent, names, field)


def _shown(value: object) -> str:
    match value:
        case Mapping():
            return "a table"
        case list():
            return "a list"
        case _:
            text = toml(value)
            return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _unknown(key: _Key) -> tuple[str, str]:
    known = list(key.parent.model_fields)
    top = key.parent is Config
    what = "there is no such table" if top else "there is no such key"
    close = get_close_matches(key.name, known, n=1)
    homes = [home.table for home in (_key((table,)) for table in Config.model_fields) if _knows(home.section, key.name)]
    if close and not (homes and top):  # a key that is right elsewhere is no misspelt table
        return what, f"did you mean {close[0]}?"
    if homes:
        return "stands outside its table" if top else what, f"move it to {' or '.join(homes)}"
    return what, f"remove it, or use one of: {', '.join(known)}"


def _knows(section: type[Section] | None, name: str) -> bool:
    return section is not None and name in section.model_fields
