"""Owns: reading certificate, key and snapshot key with the supervisor's rights, and noticing that they changed.

Must not keep what it read: every child is forked from this process and would inherit it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TypeAlias

from relay.config.schema import Config
from relay.control import Secrets
from relay.directory.key import read_key
from relay.directory.layout import SnapshotError
from relay.directory.passwords import read_passwords
from relay.supervisor.errors import Refusal

PEM_MAX: Final = 64 * 1024
"""Octets of a certificate chain or key: ten times a long chain, and it has to fit a control packet."""

Fingerprint: TypeAlias = tuple[tuple[int, int, int] | None, ...]


def read_secrets(config: Config) -> Secrets:
    """What a worker may know. No snapshot key yet is fine: no snapshot was built. Raises Refusal."""
    problems: list[str] = []
    certificate = _pem("tls.certificate", config.tls.certificate, problems)
    key = _pem("tls.key", config.tls.key, problems)
    snapshot_key = b""
    if config.key_path.exists():
        try:
            snapshot_key = read_key(config.key_path)
        except SnapshotError as error:
            problems.append(f"directory.key_file: {error}")
    passwords: dict[str, str] = {}
    try:
        passwords = read_passwords(config, os.environ)
    except SnapshotError as error:
        problems.append(str(error))
    if problems:
        raise Refusal(*problems)
    return Secrets(certificate, key, snapshot_key, passwords)


def _pem(key: str, path: Path | None, problems: list[str]) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            octets = file.read(PEM_MAX + 1)
        text = octets.decode("ascii")
    except OSError as error:
        problems.append(f"{key}: cannot read {path}: {error.strerror}; check the path, its owner and mode")
    except UnicodeDecodeError:
        problems.append(f"{key}: {path} is not a PEM file; convert it (openssl x509 -inform der, openssl pkey)")
    else:
        if len(octets) <= PEM_MAX:
            return text
        problems.append(f"{key}: {path} has more than {PEM_MAX} octets; name a file with one chain or key only")
    return ""


def fingerprint(config: Config) -> Fingerprint:
    """Changes whenever one of the files is replaced or written."""
    passwords = (profile.password_file for profile in config.directory.ldap)
    return tuple(_stat(path) for path in (config.tls.certificate, config.tls.key, config.key_path, *passwords))


def _stat(path: Path | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
