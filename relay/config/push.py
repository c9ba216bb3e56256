"""Owns: the shape of ``[[directory.push]]``: a folder into which the inside network drops signed snapshots (row R12).

Plain values only. What the files hold is ``directory.signed``'s, what becomes of them ``directory.push``'s.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from relay.config.invalid import Invalid
from relay.config.section import DAY_S, FilePath, Section, label

KEY_PREFIX: Final = "ed25519:"
KEY_OCTETS: Final = 32


def public_key(value: str) -> bytes:
    """The 32 octets of a public key as ``relay directory keygen`` prints it. Raises Invalid."""
    try:
        octets = base64.b64decode(value.removeprefix(KEY_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        octets = b""
    if not value.startswith(KEY_PREFIX) or len(octets) != KEY_OCTETS:
        raise Invalid(
            f'"{value[:80]}" is not a public key',
            "write ed25519: and 44 characters, as relay directory keygen prints it",
        )
    return octets


def _key(value: str) -> str:
    public_key(value)
    return value


class Push(Section):
    """Signed snapshots from inside, so that this host needs no way to the directory."""

    name: Annotated[str, AfterValidator(label), Field(examples=["inside"])]
    """Short name: what the signer calls it with --name, and what logs and commands call it."""
    folder: Annotated[FilePath, Field(examples=["/var/spool/dmz-relay-push"])]
    """Where files named NAME.push arrive. Others must not be able to enter it; the user who reads (``process.hub_user``)
    must be able to take files out of it."""
    keys: Annotated[
        list[Annotated[str, AfterValidator(_key)]],
        Field(min_length=1, max_length=8, examples=[["ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="]]),
    ]
    """Public keys of who may sign; several while one takes over from another."""
    max_age_s: Annotated[float, Field(ge=1, le=30 * DAY_S)] = DAY_S
    """A file signed longer ago than this is refused when it arrives, seconds."""
