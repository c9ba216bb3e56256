"""Owns: the words for what pydantic found: what is wrong with a value, and what to write instead. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Final, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from relay.config.schema import Config, Invalid, Section
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
    at, value, context = error["loc"], error["input"], error.get("ctx", {})
    field, name = _field(at)
    shown = _shown(value)
    reason = context.get("error")
    if isinstance(reason, Invalid):
        return reason.what, reason.hint
    match error["type"]:
        case "missing":
            return "is missing", _instead(field, name)
        case "extra_forbidden":
            return _unknown(at)
        case "int_type":
            return f"{shown} is not a whole number", _instead(field, name)
        case "float_type" | "finite_number":
            return f"{shown} is not a number", _instead(field, name)
        case "bool_type":
            return f"{shown} is neither true nor false", f"write {name} = true or {name} = false, without quotes"
        case "string_type" | "path_type":
            return f"{shown} is not a text", _quoted(value, field, name)
        case "list_type":
            return _no_list(value, field, name)
        case "model_type":
            return f"{shown} is not a table", _as_table(field, name)
        case "enum" | "literal_error":
            return f"{shown} is not one of the choices", f"write {str(context['expected']).replace(chr(39), chr(34))}"
        case "greater_than_equal":
            return f"{shown} is too small", f"write {toml(context['ge'])} or more"
        case "greater_than":
            return f"{shown} is too small", f"write more than {toml(context['gt'])}"
        case "less_than_equal":
            return f"{shown} is too large", f"write {toml(context['le'])} or less"
        case "too_short":
            return "is empty", _instead(field, name)
        case "too_long":
            return f"has {context['actual_length']} entries", f"leave at most {context['max_length']}"
        case _:
            return error["msg"], _instead(field, name)


def _steps(at: KeyPath) -> Iterator[tuple[type[Section], str]]:
    """Each key on the way with the section that should know it."""
    section: type[Section] | None = Config
    for step in at:
        if isinstance(step, str) and section is not None:
            yield section, step
            field = section.model_fields.get(step)
            section = section_of(field)[0] if field else None


def _field(at: KeyPath) -> tuple[FieldInfo | None, str]:
    """The field a place belongs to (a list item: the list's), and its name."""
    section, name = list(_steps(at))[-1]
    return section.model_fields.get(name), name


def _shown(value: object) -> str:
    match value:
        case Mapping():
            return "a table"
        case list():
            return "a list"
        case _:
            text = toml(value)
            return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _instead(field: FieldInfo | None, name: str) -> str:
    if field is None:
        return "remove it"
    if section_of(field)[0] is not None:
        return _as_table(field, name)
    if field.examples:
        return f"write {name} = {toml(field.examples[0])}"
    if field.default is not None:
        return f"write {name} = {toml(field.default)} (the default)"
    return f'write {name} = "..." or remove the line'


def _as_table(field: FieldInfo | None, name: str) -> str:
    several = field is not None and section_of(field)[1]
    return f"write a [[{name}]] table" if several else f"write a [{name}] table"


def _quoted(value: object, field: FieldInfo | None, name: str) -> str:
    return _instead(field, name) if isinstance(value, list | Mapping) else f"put it in quotes: {toml(str(toml(value)))}"


def _no_list(value: object, field: FieldInfo | None, name: str) -> tuple[str, str]:
    if field is not None and section_of(field)[0] is not None:
        return "there may be several of these tables", f"write [[{name}]] with double brackets"
    if isinstance(value, Mapping):
        return "a table is not a list", _instead(field, name)
    return f"{_shown(value)} is not a list", f"write {name} = [{toml(value)}]"


def _unknown(at: KeyPath) -> tuple[str, str]:
    section, name = list(_steps(at))[-1]
    known = list(section.model_fields)
    what = "there is no such table" if section is Config else "there is no such key"
    close = get_close_matches(name, known, n=1)
    if close:
        return what, f"did you mean {close[0]}?"
    homes = [f"[[{table}]]" if several else f"[{table}]" for table, several in _homes(name)]
    if homes:
        return what if section is not Config else "stands outside its table", f"move it to {' or '.join(homes)}"
    return what, f"remove it, or use one of: {', '.join(known)}"


def _homes(name: str) -> Iterator[tuple[str, bool]]:
    """Tables that know the key."""
    for table, field in Config.model_fields.items():
        section, several = section_of(field)
        if section is not None and name in section.model_fields:
            yield table, several
