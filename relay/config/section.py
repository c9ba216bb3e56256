"""Owns: what all tables of the configuration have in common: strictness, and the types that several of them use."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from relay.config.invalid import Invalid

# Upper bounds keep slips of the keyboard (a zero too many, octets for megabytes) out of sockets, timers and memory.
DAY_S: Final = 86400.0
TABLES: Final = 10_000  # [[domain]] and [[route]] tables, and names in each
REFUSAL_OCTETS: Final = 200  # operator text in a reply; the whole reply line has 512 (RFC 5321 §4.5.3.1.5)
MANY: Final = 1_000_000


class Section(BaseModel):
    """A table of the file: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        str_strip_whitespace=True,
        defer_build=True,  # tables are built once, as part of the whole: a tenth of a second of each start
    )


def _anchored(value: Path, info: ValidationInfo) -> Path:
    """Relative paths start at the folder that the loader names: the configuration file's own."""
    if value == Path() or not str(value).isprintable():
        what = "is empty or names the folder itself" if value == Path() else f"{str(value)!r} is not a path"
        raise Invalid(what, "write a path, e.g. /etc/dmz-relay/certificate.pem")
    folder = info.context.get("folder") if info.context else None
    # By the letters, as a person reads it: ../demo is beside the folder that the file was named in, links or not.
    return Path(os.path.normpath(folder / value)) if folder else value


def _attribute(value: str) -> str:
    # RFC 4512 §1.4 has no underscore, but directories of old have such attributes.
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", value) is None:
        raise Invalid(f'"{value}" is not an attribute name', "write letters, digits and hyphens, a letter first")
    return value


def label(value: str) -> str:
    """A short name for logs, metrics and other keys. Raises Invalid."""
    if re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", value) is None:
        raise Invalid(
            f'"{value}" is not a short name',
            "write up to 31 of a-z, 0-9, - and _, a letter first, e.g. mx or submission",
        )
    return value


def ldap_filter(value: str) -> str:
    """An LDAP filter whose brackets match; the directory's own modules look at the rest. Raises Invalid."""
    depth = 0
    for position, character in enumerate(value):
        depth += (character == "(") - (character == ")")
        if depth < 0 or (depth == 0 and position != len(value) - 1):
            break
    else:
        if depth == 0 and (not value or value.startswith("(")):
            return value
    raise Invalid("the brackets of this filter do not match", "write one filter in brackets, e.g. (&(mail=*)(!(x=y)))")


FilePath = Annotated[Path, Field(strict=False), AfterValidator(_anchored)]
Seconds = Annotated[float, Field(gt=0, le=DAY_S)]
Attribute = Annotated[str, AfterValidator(_attribute)]
