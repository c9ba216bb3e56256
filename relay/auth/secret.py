"""Owns: what a store holds for an account: the kinds of stored passwords, how each is read, checked and made.

Comparisons take constant time. No secret may get into an exception's text or a repr. Must not know accounts or stores.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import hmac
import re
import secrets
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from relay.auth import md5
from relay.config.auth import Mechanism

PASSWORD_OCTETS: Final = 1024
"""Longest password: what slow hashes cost grows with it, and nobody's is longer."""
SCRAM_ITERATIONS: Final = 4096  # RFC 7677 §4
LOOKUP_SALT_OCTETS: Final = 16

_PASSWORDS: Final = frozenset({Mechanism.PLAIN, Mechanism.LOGIN})
_SCRAM: Final = frozenset({Mechanism.SCRAM_SHA_256, Mechanism.SCRAM_SHA_256_PLUS})


class SecretError(ValueError):
    """A stored password that cannot be used; the text says why and never what it is."""


@dataclass(frozen=True, slots=True)
class Cleartext:
    """The password itself."""

    password: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Salted:
    """``{SSHA}`` and its like: a digest of password and salt (RFC 2307)."""

    algorithm: str
    digest: bytes = field(repr=False)
    salt: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Crypt:
    """crypt(3): ``$6$``, ``$5$``, bcrypt, yescrypt."""

    text: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Argon2:
    """``$argon2id$`` and its like (RFC 9106)."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CramContext:
    """Dovecot's ``{CRAM-MD5}``: as good as the password for CRAM-MD5."""

    states: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Scram:
    """``{SCRAM-SHA-256}ITERATIONS,SALT,STORED_KEY,SERVER_KEY`` (RFC 5803, RFC 7677)."""

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)


Secret: TypeAlias = Cleartext | Salted | Crypt | Argon2 | CramContext | Scram


# --- reading ---------------------------------------------------------------------------------------------------------
_SCHEME: Final = re.compile(r"\{([A-Za-z0-9_.-]+)\}")
_SALTED: Final = {"SSHA": "sha1", "SSHA1": "sha1", "SSHA256": "sha256", "SSHA512": "sha512", "SHA": "sha1",
                  "SHA256": "sha256", "SHA512": "sha512"}  # fmt: skip
_CRYPTS: Final = frozenset({"CRYPT", "SHA512-CRYPT", "SHA256-CRYPT", "BLF-CRYPT"})
_CRYPT_TEXT: Final = re.compile(
    r"\$6\$(?:rounds=\d{1,6}\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{86}"
    r"|\$5\$(?:rounds=\d{1,6}\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{43}"
    r"|\$2[aby]\$(?:0[4-9]|1[0-6])\$[./0-9A-Za-z]{53}"
    r"|\$y\$[./0-9A-Za-z]+\$[./0-9A-Za-z]{1,86}\$[./0-9A-Za-z]{43}"
)
_ARGON2_TEXT: Final = re.compile(
    r"\$argon2(?:id|i|d)\$v=19\$m=(\d{1,7}),t=(\d{1,3}),p=(\d{1,3})\$[A-Za-z0-9+/]{8,128}\$[A-Za-z0-9+/]{16,256}"
)
ARGON2_MEMORY_KIB: Final = 1024 * 1024
"""One check may take a gigabyte; more is a slip that would take the hub's process down."""


def read_secret(text: str) -> Secret:
    """A stored password. Without a scheme: crypt's and Argon2's own forms, else cleartext. Raises SecretError."""
    found = _SCHEME.match(text)
    scheme = found[1].upper() if found else ""
    value = text[found.end() :] if found else text
    if not value:
        raise SecretError("the password is empty")
    if scheme in _SALTED:
        return _salted(scheme, value)
    if scheme in _CRYPTS or (not scheme and re.match(r"\$(?:6|5|2[aby]|y)\$", value)):
        return _crypt(value)
    if scheme in {"ARGON2", "ARGON2I", "ARGON2ID"} or (not scheme and value.startswith("$argon2")):
        return _argon2(value)
    match scheme:
        case "CRAM-MD5" | "CRAM-MD5.HEX":
            if re.fullmatch(r"[0-9A-Fa-f]{64}", value) is None:
                raise SecretError("{CRAM-MD5} is followed by 64 hexadecimal digits")
            return CramContext(bytes.fromhex(value))
        case "SCRAM-SHA-256":
            return _scram(value)
        case "" | "PLAIN" | "CLEAR" | "CLEARTEXT":
            return Cleartext(value.encode())
        case _:
            raise SecretError(f"the scheme {{{scheme}}} is not known; relay hash-password --help lists those that are")


def _salted(scheme: str, value: str) -> Salted:
    algorithm = _SALTED[scheme]
    octets = _base64(value, scheme)
    size = hashlib.new(algorithm, usedforsecurity=False).digest_size
    salted = scheme.startswith("SSHA")
    if len(octets) < size + salted or (not salted and len(octets) != size):
        raise SecretError(f"what follows {{{scheme}}} is too short or too long")
    return Salted(algorithm, octets[:size], octets[size:])


def _crypt(value: str) -> Crypt:
    if _CRYPT_TEXT.fullmatch(value) is None:
        raise SecretError("this is no $6$, $5$, $2b$ or $y$ of crypt(3); older kinds are too weak to be taken")
    if _libcrypt is None:
        raise SecretError("crypt(3) is not on this machine; install the package libcrypt1")
    return Crypt(value.encode())


def _argon2(value: str) -> Argon2:
    found = _ARGON2_TEXT.fullmatch(value)
    if found is None:
        raise SecretError("this is no $argon2id$v=19$...")
    if int(found[1]) > ARGON2_MEMORY_KIB:
        raise SecretError(f"Argon2 with more than {ARGON2_MEMORY_KIB} KiB of memory")
    return Argon2(value)


def _scram(value: str) -> Scram:
    parts = value.split(",")
    if len(parts) != 4 or not (parts[0].isascii() and parts[0].isdigit()):
        raise SecretError("{SCRAM-SHA-256} is followed by ITERATIONS,SALT,STORED_KEY,SERVER_KEY")
    salt, stored, server = (_base64(part, "SCRAM-SHA-256") for part in parts[1:])
    if not SCRAM_ITERATIONS <= int(parts[0]) <= 10_000_000 or len(salt) < 12:
        raise SecretError(f"SCRAM-SHA-256 takes {SCRAM_ITERATIONS} iterations and 12 octets of salt at least")
    if len(stored) != 32 or len(server) != 32:
        raise SecretError("the keys of SCRAM-SHA-256 have 32 octets each")
    return Scram(int(parts[0]), salt, stored, server)


def _base64(text: str, scheme: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SecretError(f"what follows {{{scheme}}} is not base64") from None


# --- what each can do ------------------------------------------------------------------------------------------------
def verifies(secret: Secret) -> frozenset[Mechanism]:
    """The mechanisms that this kind of stored password can serve (row A2)."""
    match secret:
        case Cleartext():
            return frozenset(Mechanism)
        case CramContext():
            return _PASSWORDS | {Mechanism.CRAM_MD5}
        case Scram():
            return _PASSWORDS | _SCRAM
        case Salted() | Crypt() | Argon2():
            return _PASSWORDS


def is_equivalent(secret: Secret) -> bool:
    """Whether who steals it can log in with it, without guessing."""
    return isinstance(secret, Cleartext | CramContext)


def is_slow(secret: Secret) -> bool:
    """Whether a check takes so long that it belongs in a thread."""
    return isinstance(secret, Crypt | Argon2 | Scram)


def check(secret: Secret, password: bytes) -> bool:
    """Whether ``password`` is the right one."""
    match secret:
        case Cleartext(right):
            return hmac.compare_digest(right, password)
        case Salted(algorithm, digest, salt):
            return hmac.compare_digest(hashlib.new(algorithm, password + salt, usedforsecurity=False).digest(), digest)
        case Crypt(text):
            made = _crypt_r(password, text)
            return made is not None and hmac.compare_digest(made, text)
        case Argon2(text):
            return _argon2_check(text, password)
        case CramContext(states):
            return hmac.compare_digest(md5.context(password), states)
        case Scram(iterations, salt, stored, _):
            return hmac.compare_digest(scram_keys(password, salt, iterations).stored_key, stored)


def cram_digest(secret: Secret, challenge: bytes) -> str | None:
    """What CRAM-MD5 has to answer to ``challenge``; None when the kind cannot tell."""
    match secret:
        case Cleartext(password):
            return hmac.new(password, challenge, "md5").hexdigest()
        case CramContext(states):
            return md5.hmac_md5(states, challenge)
        case _:
            return None


def as_scram(secret: Secret, salt: bytes) -> Scram | None:
    """What SCRAM-SHA-256 needs; from cleartext it is made with ``salt`` (some milliseconds). None when it cannot be."""
    match secret:
        case Scram():
            return secret
        case Cleartext(password):
            return scram_keys(password, salt, SCRAM_ITERATIONS)
        case _:
            return None


def scram_keys(password: bytes, salt: bytes, iterations: int) -> Scram:
    """RFC 5802 §3. Characters that SASLprep (RFC 4013) would refuse are taken as they are."""
    prepared = _prepared(password)
    salted = hashlib.pbkdf2_hmac("sha256", prepared, salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return Scram(iterations, salt, hashlib.sha256(client_key).digest(), server_key)


def _prepared(password: bytes) -> bytes:
    if password.isascii():
        return password
    try:
        return unicodedata.normalize("NFKC", password.decode()).encode()
    except UnicodeDecodeError:
        return password


# --- making ----------------------------------------------------------------------------------------------------------
def _b64(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")


def _make_crypt(prefix: bytes) -> Callable[[bytes], str]:
    def make(password: bytes) -> str:
        alphabet = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
        salt = bytes(secrets.choice(alphabet) for _ in range(LOOKUP_SALT_OCTETS))
        made = _crypt_r(password, prefix + salt + b"$")
        if made is None:
            raise SecretError("crypt(3) is not on this machine; install the package libcrypt1")
        return "{CRYPT}" + made.decode("ascii")

    return make


def _make_ssha(password: bytes) -> str:
    salt = secrets.token_bytes(LOOKUP_SALT_OCTETS)
    return "{SSHA512}" + _b64(hashlib.sha512(password + salt).digest() + salt)


def _make_scram(password: bytes) -> str:
    made = scram_keys(password, secrets.token_bytes(LOOKUP_SALT_OCTETS), SCRAM_ITERATIONS)
    keys = ",".join(map(_b64, (made.salt, made.stored_key, made.server_key)))
    return f"{{SCRAM-SHA-256}}{made.iterations},{keys}"


def _make_argon2(password: bytes) -> str:
    from argon2 import PasswordHasher  # noqa: PLC0415 - no role but the hub and two commands need it

    return "{ARGON2}" + PasswordHasher().hash(password)


SCHEMES: Final[dict[str, Callable[[bytes], str]]] = {
    "SCRAM-SHA-256": _make_scram,
    "CRAM-MD5": lambda password: "{CRAM-MD5}" + md5.context(password).hex(),
    "ARGON2": _make_argon2,
    "SHA512-CRYPT": _make_crypt(b"$6$"),
    "SHA256-CRYPT": _make_crypt(b"$5$"),
    "SSHA512": _make_ssha,
}
"""What ``relay hash-password`` makes, by name."""


def _argon2_check(text: str, password: bytes) -> bool:
    from argon2 import PasswordHasher  # noqa: PLC0415 - loaded by the hub before its rights are dropped
    from argon2.exceptions import Argon2Error, InvalidHashError  # noqa: PLC0415

    try:
        return PasswordHasher().verify(text, password)
    except (Argon2Error, InvalidHashError):
        return False


def _load_libcrypt() -> ctypes.CDLL | None:
    """libxcrypt, which every Debian has; Python's own crypt is gone with 3.13. ctypes lets other threads run meanwhile."""
    for name in ("libcrypt.so.1", "libcrypt.so.2"):
        try:
            library = ctypes.CDLL(name)
            library.crypt_r.restype = ctypes.c_char_p
            library.crypt_r.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p]
        except (OSError, AttributeError):
            continue
        return library
    return None


_libcrypt: Final = _load_libcrypt()
_CRYPT_DATA_OCTETS: Final = 256 * 1024
"""``struct crypt_data`` has 32 KB in libxcrypt and 128 KB in old glibc."""


def _crypt_r(password: bytes, setting: bytes) -> bytes | None:
    """crypt_r(3): the hash, None when it refuses (its error tokens begin with ``*``)."""
    if _libcrypt is None or b"\0" in password:
        return None
    made: bytes | None = _libcrypt.crypt_r(password, setting, ctypes.create_string_buffer(_CRYPT_DATA_OCTETS))
    return None if made is None or made.startswith(b"*") else made
