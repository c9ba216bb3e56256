"""Owns: checks of a configuration against this machine: certificate and key, users, inputs, folders.

Read-only: nothing is made or changed. ``relay serve`` and a reload refuse what is found here as they refuse a wrong key.
"""

from __future__ import annotations

import errno
import os
import pwd
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from relay.config.origin import Origin, Problem
from relay.config.schema import Config
from relay.config.whole import Fault, KeyPath

NOWHERE: Final = Origin(Path("configuration"), "", {})


def check_files(config: Config, origin: Origin = NOWHERE) -> list[Problem]:
    """Everything on this machine that keeps the relay from starting with ``config``; empty when all is well."""
    found = [*_tls(config), *_users(config), *_inputs(config), *_folders(config)]
    return [origin.told(fault) for fault in found]


def _tls(config: Config) -> Iterator[Fault]:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(config.tls.ciphers)
    except ssl.SSLError:
        yield Fault(
            ("tls", "ciphers"),
            f'"{config.tls.ciphers}" chooses no cipher suite',
            "write it as for: openssl ciphers -v 'ECDHE+AESGCM:ECDHE+CHACHA20'",
        )
    if config.tls.certificate is not None and config.tls.key is not None:
        yield from _pair(("tls",), config.tls.certificate, config.tls.key)
    for number, entry in enumerate(config.tls.named):
        yield from _pair(("tls", "named", number), entry.certificate, entry.key)


def _pair(at: tuple[str | int, ...], certificate: Path, key: Path) -> Iterator[Fault]:
    """What is wrong with one certificate and its key."""
    unreadable = [
        *_unreadable((*at, "certificate"), certificate, "write the path of the certificate (PEM)"),
        *_unreadable((*at, "key"), key, "write the path of the private key (PEM)"),
    ]
    if unreadable:
        yield from unreadable
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(cafile=certificate)
    except ssl.SSLError:
        yield Fault(
            (*at, "certificate"), f"{certificate} holds no certificate", "name a PEM file, -----BEGIN CERTIFICATE"
        )
        return
    try:
        # Without a password callback OpenSSL would ask on the terminal for the passphrase of an encrypted key.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            yield Fault(
                (*at, "key"),
                f"{key} does not belong to {certificate}",
                "name the key that the certificate was made for",
            )
        elif error.reason:  # read, but e.g. too weak for OpenSSL's security level
            yield Fault(
                (*at, "certificate"), f"OpenSSL refuses it: {error.reason}", "get a certificate of 2048 bits or more"
            )
        else:
            yield Fault(
                (*at, "key"),
                f"{key} holds no usable private key",
                "name a PEM file without passphrase, -----BEGIN PRIVATE KEY",
            )


def _users(config: Config) -> Iterator[Fault]:
    if os.geteuid() != 0:
        return  # nothing can be dropped, so the names are not used
    for key, user in (("user", config.process.user), ("hub_user", config.process.hub_user)):
        if not user:
            continue
        try:
            uid = pwd.getpwnam(user).pw_uid
        except KeyError:
            make = f"useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {user}"
            yield Fault(
                ("process", key), f'there is no user "{user}"', f'make it ({make}), or write {key} = "" to stay root'
            )
            continue
        if uid == 0:
            yield Fault(
                ("process", key), f'"{user}" is root', f'name an ordinary user, or write {key} = "" to stay root'
            )


def _inputs(config: Config) -> Iterator[Fault]:
    for index, source in enumerate(config.directory.sources):
        yield from _unreadable(
            ("directory", "sources", index, "path"), source.path, "write the path of an existing file"
        )

    for index, profile in enumerate(config.directory.ldap):
        for key, path in (("ca_file", profile.ca_file), ("password_file", profile.password_file)):
            if path is not None:
                yield from _unreadable(("directory", "ldap", index, key), path, "write the path of an existing file")


def _folders(config: Config) -> Iterator[Fault]:
    spool = config.server.spool
    # The rest of the path is made at the start.
    standing = next(folder for folder in (spool, *spool.parents) if os.path.exists(folder))
    yield from _unwritable_folder(("server", "spool"), standing)
    if config.log.file is not None:
        if os.path.isdir(config.log.file):
            yield Fault(("log", "file"), f"{config.log.file} is a folder", "write the path of a file")
        else:
            yield from _unwritable_folder(("log", "file"), config.log.file.parent)


def _unreadable(at: KeyPath, path: Path, hint: str) -> Iterator[Fault]:
    yield from _refused(at, path, hint, lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
    if os.path.isdir(path):
        yield Fault(at, f"{path} is a folder", hint)


def _unwritable_folder(at: KeyPath, folder: Path) -> Iterator[Fault]:
    def look() -> None:
        with os.scandir(folder):
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    yield from _refused(at, folder, f"make the folder {folder} and let the relay write to it", look)


def _refused(at: KeyPath, path: Path, hint: str, look: Callable[[], object]) -> Iterator[Fault]:
    try:
        look()
    except OSError as error:
        yield Fault(at, f"{path}: {error.strerror}", hint)
