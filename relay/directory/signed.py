"""Owns: the signed file in which a snapshot travels from inside to the DMZ: its keys, its signature, its shape (row R12).

=============  ==================================================================================================
octets         meaning
=============  ==================================================================================================
8              ``DMZPUSH1``
4, 8           lengths of header and body, big-endian
header         JSON: name, serial, created (seconds since 1970), addresses (how many)
body           zlib: JSON with ``records`` (attributes that differ from their defaults) and ``addresses`` (number of
               the record by address); plain text, because the receiver hashes with its own key
64             Ed25519 (RFC 8032) over everything in front of it
=============  ==================================================================================================

Nothing behind the lengths is looked at before the signature is verified. Must not know folders, serials seen before, or
which addresses the receiver wants. The library is imported when it is first needed: most relays have no use for it.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from relay.config.push import KEY_PREFIX
from relay.directory.snapshot import RULED, Entry
from relay.directory.sources import Collection
from relay.mail.reply import operator_text
from relay.mail.ruling import action_of, parse_ruling

MAGIC: Final = b"DMZPUSH1"
_LENGTHS: Final = struct.Struct(">8sIQ")
SIGNATURE_OCTETS: Final = 64
FILE_OCTETS: Final = 256 << 20
"""Largest file taken: some ten million addresses."""
BODY_OCTETS: Final = 1 << 30
"""Most that a body may unfold to: only a signer could make one that unfolds without end, by mistake."""
HEADER_OCTETS: Final = 4096
KEY_FILE_OCTETS: Final = 1 << 14
_LEVEL: Final = 6
_DEFAULTS: Final = Entry(0)


class Refused(Exception):
    """A file that is not taken. The text says why, for the operator."""


class Incomplete(Refused):
    """The file is shorter than it says: still on its way, or cut off."""


class KeyFault(Exception):
    """A key file that cannot be used; the text says what, where, what to do."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. ``serial`` grows from file to file; ``created`` in seconds since 1970."""

    name: str
    serial: int
    created: float
    addresses: int


@dataclass(frozen=True, slots=True)
class Content:
    """What is said: number of the record by address (``@domain`` and spellings included, as in a Collection)."""

    addresses: dict[str, int]
    records: list[Entry]


def preload() -> None:
    """Import the library now: where the process will change its user, or forks readers."""
    for module in ("serialization", "asymmetric.ed25519", "ciphers.aead"):
        importlib.import_module(f"cryptography.hazmat.primitives.{module}")


def _library(module: str) -> Any:
    return importlib.import_module(f"cryptography.hazmat.primitives.{module}")


# --- keys --------------------------------------------------------------------------------------------------------------
def make_key(path: Path) -> str:
    """Write a new private key (PKCS 8, PEM, mode 0600) where no file is yet; returns the public one. Raises KeyFault."""
    serialization = _library("serialization")
    private = _library("asymmetric.ed25519").Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise KeyFault(
            f"{path}: there is a file already; name another one: a key that is overwritten is lost"
        ) from None
    except OSError as error:
        raise KeyFault(f"{path}: cannot be written: {error.strerror}; name a folder that is yours") from None
    return public_of(private)


def read_private_key(path: Path) -> Any:
    """The private key, as made by ``make_key`` or ``openssl genpkey -algorithm ed25519``. Raises KeyFault."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            pem = file.read(KEY_FILE_OCTETS)
    except OSError as error:
        raise KeyFault(f"{path}: cannot be read: {error.strerror}; relay directory keygen FILE makes a key") from None
    if mode & (stat.S_IRWXO | stat.S_IRWXG):
        raise KeyFault(f"{path}: the key that signs is open to other users; chmod 600 {path}")
    try:
        key = _library("serialization").load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, _library("asymmetric.ed25519").Ed25519PrivateKey):
        raise KeyFault(
            f"{path}: holds no private Ed25519 key in PEM without passphrase; relay directory keygen FILE makes one"
        )
    return key


def public_of(private: Any) -> str:
    """The public key that belongs to it, as the receiver's ``keys`` has it."""
    serialization = _library("serialization")
    raw = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return KEY_PREFIX + base64.b64encode(raw).decode("ascii")


# --- writing -----------------------------------------------------------------------------------------------------------
def sign(collection: Collection, name: str, serial: int, created: float, private: Any) -> bytes:
    """The whole file."""
    said = {"records": [_plain(entry) for entry in collection.records], "addresses": collection.addresses}
    body = zlib.compress(json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode(), _LEVEL)
    header = {"name": name, "serial": serial, "created": created, "addresses": len(collection.addresses)}
    head = json.dumps(header).encode("ascii")
    whole = _LENGTHS.pack(MAGIC, len(head), len(body)) + head + body
    return whole + bytes(private.sign(whole))


def _plain(entry: Entry) -> dict[str, Any]:
    """Only what differs from a default: an attribute that nobody has does not matter to older receivers."""
    found: dict[str, Any] = {}
    for field in fields(Entry):
        value = getattr(entry, field.name)
        if field.name == "ruling":
            if value is not None:
                found["ruling"] = action_of(value)
        elif value != getattr(_DEFAULTS, field.name):
            found[field.name] = value
    return found


# --- reading -----------------------------------------------------------------------------------------------------------
def verify(whole: bytes, keys: Iterable[bytes]) -> Header:
    """The header of a file that one of ``keys`` (32 octets each) has signed. Raises Refused."""
    if len(whole) < _LENGTHS.size:
        raise Incomplete(f"{len(whole)} octets are less than the beginning of a signed snapshot")
    magic, head, body = _LENGTHS.unpack_from(whole)
    if magic != MAGIC:
        raise Refused("is not a signed snapshot of this version (relay directory export --signed)")
    size = _LENGTHS.size + head + body + SIGNATURE_OCTETS
    if size > len(whole):
        raise Incomplete(f"truncated: {len(whole)} of {size} octets")
    if size < len(whole) or head > HEADER_OCTETS:
        raise Refused(f"{len(whole)} octets instead of {size}")
    ed25519 = _library("asymmetric.ed25519")
    wrong = importlib.import_module("cryptography.exceptions").InvalidSignature
    signed, signature = whole[:-SIGNATURE_OCTETS], whole[-SIGNATURE_OCTETS:]
    for key in keys:
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
        except wrong:
            continue
        return _header(whole[_LENGTHS.size : _LENGTHS.size + head])
    raise Refused("the signature is not by one of the keys of this source, or the file was changed")


def _header(octets: bytes) -> Header:
    try:
        found = json.loads(octets)
        name, serial, created, addresses = (found[key] for key in ("name", "serial", "created", "addresses"))
        if isinstance(name, str) and isinstance(serial, int) and isinstance(addresses, int):
            return Header(name, serial, float(created), addresses)
    except (ValueError, TypeError, KeyError):
        pass
    raise Refused("is signed, and its header makes no sense; do both sides have the same version?")


def content(whole: bytes) -> Content:
    """What a verified file says. Raises Refused."""
    _, head, body = _LENGTHS.unpack_from(whole)
    start = _LENGTHS.size + head
    unfold = zlib.decompressobj()
    try:
        octets = unfold.decompress(whole[start : start + body], BODY_OCTETS)
        if not unfold.eof:
            raise Refused(f"unfolds to more than {BODY_OCTETS} octets")
        found = json.loads(octets)
        records = [_entry(one) for one in found["records"]]
        addresses = found["addresses"]
        if not isinstance(addresses, dict) or not all(type(n) is int for n in addresses.values()):
            raise ValueError
        if addresses and not 0 <= min(addresses.values()) <= max(addresses.values()) < len(records):
            raise ValueError
    except (zlib.error, ValueError, TypeError, KeyError):
        raise Refused("is signed, and its contents make no sense; do both sides have the same version?") from None
    return Content(addresses, records)


def _entry(said: dict[str, Any]) -> Entry:
    known = {field.name for field in fields(Entry)}
    if strange := set(said) - known:
        raise Refused(f"says {', '.join(sorted(strange))}, which this relay does not know; update it first")
    values: dict[str, Any] = {"flags": 0}
    for name, value in said.items():
        default = getattr(_DEFAULTS, name)
        if name == "ruling":
            value = parse_ruling(value)
        elif isinstance(default, str) and isinstance(value, str):
            value = operator_text(value)
        elif isinstance(default, tuple):
            value = tuple(value)
        if type(value) is not type(default) and name != "ruling":
            raise ValueError(name)
        values[name] = value
    entry = Entry(**values)
    if entry.flags < 0 or entry.flags >> 32 or bool(entry.ruling) != bool(entry.flags & RULED):
        raise ValueError("flags")
    return entry
