"""Owns: the way from a file and the environment to a ``Config``, or to the list of everything that is wrong with them.

It reads the one file it is given and the transport table named there, nothing else; whether the files and users named in it exist is for
``config.files``. Environment variables override single keys: ``DMZ_RELAY__LIMITS__SESSIONS=500`` is ``sessions`` in
``[limits]``, ``DMZ_RELAY__ROUTE='[{domains = ["*"], next_hops = ["smtp:[192.0.2.7]"]}]'`` all ``[[route]]`` tables.
"""

from __future__ import annotations

import codecs
import datetime as dt
import os.path
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from relay.config.explain import explain, section_of
from relay.config.origin import ConfigErrors, Origin, Problem
from relay.config.schema import Config
from relay.config.section import Section
from relay.config.whole import UNREAD, KeyPath, WholeError, faults

PREFIX: Final = "DMZ_RELAY__"
FILE_OCTETS: Final = 200 * 1024  # some 5,000 domains; as JSON it still fits the packet that children get (control)

Tables = dict[str, object]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where its values came from."""

    config: Config
    origin: Origin


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """The configuration in ``path`` with overrides from ``environ``. Raises ConfigErrors with every problem found.

    Relative paths in it start at the folder of ``path``.
    """
    return read(path, environ).config


def read(path: Path, environ: Mapping[str, str]) -> Loaded:
    """As ``load``, with the origin of the values, for problems found later."""
    text = _text(path)
    tables = _parse(path, text)
    variables: dict[KeyPath, str] = {}
    problems = _override(tables, environ, variables)
    folder = path.absolute().parent
    origin = Origin(path, text, variables)
    problems += _fold_transport(tables, path.parent, FILE_OCTETS - len(text), origin)
    try:
        config = Config.model_validate(tables, context={"folder": folder})
    except ValidationError as error:
        raise ConfigErrors(problems + _problems(error, tables, origin)) from None
    if problems:
        raise ConfigErrors(problems)
    return Loaded(config, origin)


def _fold_transport(tables: Tables, folder: Path, room: int, origin: Origin) -> list[Problem]:
    """Put the transport table's text beside its name: processes get one configuration, whatever happens to the file."""
    routing = tables.get("routing")
    name = routing.get("transport") if isinstance(routing, dict) else None
    if not isinstance(routing, dict) or not isinstance(name, str) or not name:
        return []  # the schema says what is wrong
    at: KeyPath = ("routing", "transport")
    given = routing.pop("table", "")
    routing["table"] = UNREAD
    path = Path(os.path.normpath(folder / name))
    if given:
        return [origin.problem(at, "there is a table in [routing] as well", "remove one of the two")]
    try:
        with path.open("rb") as file:
            octets = file.read(max(0, room) + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return [origin.problem(at, f"{path} cannot be read: {why}", "write the path of the transport table")]
    if len(octets) > room:
        what = f"{path} is too large"
        return [origin.problem(at, what, f"the table and this file may have {FILE_OCTETS} octets together")]
    try:
        routing["table"] = octets.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        return [Problem(str(path), line, "", "is not UTF-8 text", "save the file with the encoding UTF-8")]
    origin.transport = path
    return []


def _text(path: Path) -> str:
    def refuse(line: int, what: str, hint: str) -> ConfigErrors:
        return ConfigErrors([Problem(str(path), line, "", what, hint)])

    try:
        with path.open("rb") as file:
            octets = file.read(FILE_OCTETS + 1)
    except OSError as error:
        raise refuse(0, f"cannot be read: {error.strerror}", "name the file with --config FILE") from None
    if len(octets) > FILE_OCTETS:
        raise refuse(0, "is too large for a configuration", f"name a file of at most {FILE_OCTETS} octets") from None
    try:
        return octets.removeprefix(codecs.BOM_UTF8).decode()  # Windows editors put the mark in front
    except UnicodeDecodeError as error:
        line = octets.count(b"\n", 0, error.start) + 1
        raise refuse(line, "is not UTF-8 text", "save the file with the encoding UTF-8") from None


_PLACE: Final = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)")
# Beginnings of tomllib's messages, with the usual mistake behind each.
_SYNTAX_HINTS: Final = (
    ("Invalid value", 'write text in quotes: key = "text"'),
    ("Expected '='", "write key = value"),
    ("Expected newline or end of document", 'write one key = value in a line, text in quotes: key = "text"'),
    ("Expected ']'", "close the table name with ], or ]] where it began with [["),
    ("Unclosed array", "separate the items by commas and close the list with ]"),
    ("Unescaped '\\'", "write backslashes twice, or the text in single quotes"),
    ("Cannot declare", "write each table once, with all its keys below it"),
    ("Cannot overwrite", "write each key once in its table"),
    ("Cannot mutate", "write each table once, with all its keys below it"),
    ("Unterminated string", "close the text with the quote it began with"),
    ("Illegal character", "close the text with the quote it began with, in the same line"),
)


def _parse(path: Path, text: str) -> Tables:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigErrors(
            [Problem(str(path), 0, "", "is nested too deeply", "write lists as in the example")]
        ) from None
    except ValueError as error:  # TOMLDecodeError, and int() for numbers of thousands of digits
        message = str(error)
        found = _PLACE.fullmatch(message)
        # Tables are named as in the file, not as the tuples of keys that tomllib shows.
        what = re.sub(
            r"\('(.*?)',?\)",
            lambda at: f"[{at[1].replace(chr(39) + ', ' + chr(39), '.')}]",
            found["what"] if found else message,
        )
        line = int(found["line"]) if found and found["line"] else text.count("\n") + 1
        column = f", column {found['column']}" if found and found["column"] else ""
        hint = next((hint for start, hint in _SYNTAX_HINTS if what.startswith(start)), "mend this line")
        raise ConfigErrors([Problem(str(path), line, "", f"not TOML{column}: {what}", hint)]) from None


def _override(tables: Tables, environ: Mapping[str, str], variables: dict[KeyPath, str]) -> list[Problem]:
    """Put the variables' values into ``tables`` and their names into ``variables``; what does not fit is returned."""
    problems: list[Problem] = []
    for name in sorted(name for name in environ if name.startswith(PREFIX)):
        section, *rest = at = tuple(name.removeprefix(PREFIX).lower().split("__"))
        field = Config.model_fields.get(section)
        whole = f"{PREFIX}{section.upper()}"
        value = _value(environ[name])
        match rest:
            case []:
                tables[section] = value
            case [_] if field is not None and section_of(field)[1]:
                hint = f"set the whole list: {whole}='[{{key = \"value\"}}]'"
                problems.append(Problem(name, 0, section, "there may be several of these tables", hint))
                continue
            case [key]:
                table = tables.setdefault(section, {})
                if isinstance(table, dict):  # else the file's own mistake, reported with its line
                    table[key] = value
            case _:
                problems.append(Problem(name, 0, "", "names no key", f"write {PREFIX}SECTION__KEY=value"))
                continue
        variables[at] = name
    return problems


def _value(text: str) -> object:
    """A TOML value; text that is none (``mx.example.com``, and dates, which no key takes) stands for itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed.get("value")
    is_text = len(parsed) > 1 or isinstance(value, dt.date | dt.time)
    return text if is_text else value


def _problems(error: ValidationError, tables: Tables, origin: Origin) -> list[Problem]:
    problems: list[Problem] = []
    wrong: list[KeyPath] = []
    for details in error.errors(include_url=False):
        reason = details.get("ctx", {}).get("error")
        if isinstance(reason, WholeError):
            return [origin.told(fault) for fault in reason.faults]
        problems.append(origin.problem(details["loc"], *explain(details)))
        wrong.append(details["loc"])
    # With faults in single keys pydantic has not come to look at the whole.
    problems += [origin.told(fault) for fault in faults(_with_defaults(tables), wrong)]
    return problems


def _with_defaults(tables: Tables) -> Tables:
    filled = dict(tables)
    for name, field in Config.model_fields.items():
        table = tables.get(name, {})
        if isinstance(field.default, Section) and isinstance(table, dict):
            filled[name] = field.default.model_dump() | table
    return filled
