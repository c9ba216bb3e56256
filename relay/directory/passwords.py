"""Owns: where the passwords of directory accounts come from. Must not keep, print or log one.

Read by who has the right to: the supervisor for the hub, and commands for themselves.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from relay.config.ldap import LdapProfile
from relay.config.schema import Config
from relay.directory.layout import SnapshotError

PASSWORD_OCTETS: Final = 1024
"""Longest password read: no directory takes more than some hundred characters."""


def read_passwords(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """The password of each profile by its name, "" for anonymous ones. Raises SnapshotError."""
    return {profile.name: password_of(profile, environ) for profile in config.directory.ldap}


def password_of(profile: LdapProfile, environ: Mapping[str, str]) -> str:
    """One profile's password. Raises SnapshotError, which names the place and never the content."""
    here = f"[[directory.ldap]] {profile.name}"
    if profile.password_file is not None:
        return _read(profile.password_file, here)
    if profile.password_credential is not None:
        folder = environ.get("CREDENTIALS_DIRECTORY", "")
        if not folder:
            raise SnapshotError(
                f"{here}: there are no credentials (CREDENTIALS_DIRECTORY is not set); "
                f"add LoadCredential={profile.password_credential}:FILE to the unit, or use password_file"
            )
        return _read(Path(folder) / profile.password_credential, here, guarded=False)
    if profile.password_env is not None:
        password = environ.get(profile.password_env, "")
        if not password:
            raise SnapshotError(f"{here}: the environment variable {profile.password_env} is not set or empty; set it")
        return _checked(password, f"{here}: {profile.password_env}")
    return ""


def _read(path: Path, here: str, *, guarded: bool = True) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            octets = file.read(PASSWORD_OCTETS + 1)
    except OSError as error:
        raise SnapshotError(f"{here}: {path}: {error.strerror}; check the path, its owner and mode") from None
    if guarded and mode & stat.S_IRWXO:
        raise SnapshotError(f"{here}: {path} is open to every user; chmod 600 {path}")
    if len(octets) > PASSWORD_OCTETS:
        raise SnapshotError(f"{here}: {path} is longer than a password; let it hold the password alone")
    try:
        return _checked(octets.decode("utf-8").removesuffix("\n").removesuffix("\r"), f"{here}: {path}")
    except UnicodeDecodeError:
        raise SnapshotError(f"{here}: {path} is not UTF-8 text; save it as such") from None


def _checked(password: str, place: str) -> str:
    """An empty password would be a login as nobody that succeeds (RFC 4513 §5.1.2); controls are an editor's accident."""
    if not password:
        raise SnapshotError(f"{place} is empty; write the password into it")
    if not password.isprintable():
        raise SnapshotError(f"{place} has control characters or several lines; let it hold the password alone")
    return password
