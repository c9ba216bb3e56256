"""Owns: reading certificate, key and snapshot key with the supervisor's rights, and noticing that they changed.

Must not keep what it read: every child is forked from this process and would inherit it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TypeAlias

from relay.config.schema import Config
from relay.control import HopSecret, Secrets
from relay.directory.key import read_key
from relay.directory.layout import SnapshotError
from relay.directory.passwords import read_passwords
from relay.supervisor.errors import Refusal

PEM_MAX: Final = 64 * 1024
"""Octets of a certificate chain or key: ten times a long chain, and it has to fit a control packet."""
NAMED_MAX: Final = 160 * 1024
"""Octets of all further certificates and keys together: the packet has to hold the configuration, too."""

PASSWORD_MAX: Final = 1024

Fingerprint: TypeAlias = tuple[tuple[int, int, int] | None, ...]


def read_secrets(config: Config) -> Secrets:
    """What a worker may know. No snapshot key yet is fine: no snapshot was built. Raises Refusal."""
    problems: list[str] = []
    certificate = _pem("tls.certificate", config.tls.certificate, problems)
    key = _pem("tls.key", config.tls.key, problems)
    named = tuple(
        (
            tuple(entry.names),
            _pem(f"tls.named[{number}].certificate", entry.certificate, problems),
            _pem(f"tls.named[{number}].key", entry.key, problems),
        )
        for number, entry in enumerate(config.tls.named)
    )
    if sum(len(certificate) + len(key) for _, certificate, key in named) > NAMED_MAX:
        problems.append(f"tls.named: certificates and keys of more than {NAMED_MAX} octets; leave some out")
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
    next_hops = read_next_hops(config, problems)
    if problems:
        raise Refusal(*problems)
    return Secrets(certificate, key, snapshot_key, passwords, next_hops, named)


def read_next_hops(config: Config, problems: list[str]) -> dict[str, HopSecret]:
    """What the ``[[next_hop]]`` tables point to; what cannot be read is added to ``problems``."""
    found: dict[str, HopSecret] = {}
    for index, entry in enumerate(config.next_hop):
        at = f"next_hop[{index}]"
        found[entry.own_key] = HopSecret(
            _password(f"{at}.password_file", entry.password_file, problems),
            _pem(f"{at}.authorities", entry.authorities, problems),
            _pem(f"{at}.certificate", entry.certificate, problems),
            _pem(f"{at}.key", entry.key, problems),
        )
    return found


def _password(key: str, path: Path | None, problems: list[str]) -> str:
    if path is None:
        return ""
    try:
        with path.open(encoding="utf-8") as file:
            password = file.readline(PASSWORD_MAX + 2).rstrip("\r\n")
    except OSError as error:
        problems.append(f"{key}: cannot read {path}: {error.strerror}; check the path, its owner and mode")
    except UnicodeDecodeError:
        problems.append(f"{key}: {path} is not UTF-8; write the password alone into it")
    else:
        if 0 < len(password) <= PASSWORD_MAX and password.isprintable():
            return password
        problems.append(f"{key}: {path} has no password in its first line; write the password alone into it")
    return ""


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
    of_hops = [
        path
        for entry in config.next_hop
        for path in (entry.password_file, entry.authorities, entry.certificate, entry.key)
    ]
    named = (path for entry in config.tls.named for path in (entry.certificate, entry.key))
    fixed = (config.tls.certificate, config.tls.key, config.key_path)
    return tuple(_stat(path) for path in (*fixed, *passwords, *of_hops, *named))


def _stat(path: Path | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
