"""Owns: the key of a snapshot's address hashes: its file, its name, and the hash itself.

Must not log or print a key, and never replaces one on its own: a new key makes every snapshot on disk unreadable.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Final

from relay.directory.layout import SnapshotError

KEY_OCTETS: Final = 32
HASH_OCTETS: Final = 8
"""Two of n addresses share a hash with probability n²/2⁶⁵: for 500,000 once in 10⁸ builds, which then take a new key."""

_KEY_ID_OCTETS: Final = 8


def key_id(key: bytes) -> str:
    """The key's name, 16 hex digits: the same for the same key, and of no use to find it."""
    return blake2b(key, digest_size=_KEY_ID_OCTETS, person=b"dmz-relay key id").hexdigest()


def new_key() -> bytes:
    """A key nobody knows yet."""
    return secrets.token_bytes(KEY_OCTETS)


def address_state(key: bytes) -> blake2b:
    """The hash before the address goes in. Copied for each address: a third cheaper than passing the key each time."""
    return blake2b(digest_size=HASH_OCTETS, key=key)


def address_hasher(key: bytes) -> Callable[[str], int]:
    """The function from a lower-case address to its 64-bit hash. ``Snapshot.lookup`` has the same lines inline."""
    fresh = address_state(key).copy

    def hash_of(address: str) -> int:
        state = fresh()
        state.update(address.encode())
        return int.from_bytes(state.digest(), "little")

    return hash_of


def read_key(path: Path) -> bytes:
    """The key. Raises SnapshotError when there is none, it has another length, or everybody may read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(KEY_OCTETS + 1)
    except FileNotFoundError:
        raise SnapshotError(f"{path}: there is no key here; relay directory build makes one") from None
    except OSError as error:
        raise SnapshotError(f"{path}: the key cannot be read: {error.strerror}; check its owner and mode") from None
    if len(key) != KEY_OCTETS:
        raise SnapshotError(
            f"{path}: a key has {KEY_OCTETS} octets, this file has another length; restore it, "
            "or remove it and run relay directory build for a new one"
        )
    if mode & stat.S_IRWXO:
        raise SnapshotError(f"{path}: the key is open to every user; chmod 600 {path}")
    return key


def write_key(path: Path, key: bytes) -> None:
    """Put the key there, mode 0600, whole or not at all. Raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
