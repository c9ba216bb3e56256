"""Owns: the dialogue of each SASL mechanism, from the server's side, octets decoded. Pure: no socket, no store.

A mechanism is a generator: it yields a ``Challenge`` and is sent the client's response, yields a ``Question`` for the
hub and is sent the octets of its answer, and returns when the client is logged in. It raises ``Malformed``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from relay.auth.question import Question, Step
from relay.auth.secret import PASSWORD_OCTETS
from relay.config.auth import Mechanism

NAME_OCTETS: Final = 512
"""Longest login: above a mailbox (RFC 5321 §4.5.3.1: 64 + 1 + 255) and a Windows name with its domain."""

# NUL ends a string in C, and directories cut or interpret the rest; no keyboard makes the others.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Challenge:
    """To be sent as 334."""

    octets: bytes


class Malformed(Exception):
    """What the client sent is not what the mechanism wants: 501."""


class Hopeless(Exception):
    """A login that no store has to be asked about: empty, too long, with control characters. ``user`` is for the log."""

    def __init__(self, user: str, why: str) -> None:
        super().__init__(why)
        self.user = user


@dataclass(frozen=True, slots=True)
class Circumstances:
    """``challenge`` is new for each dialogue (RFC 2195 §2); ``binding``: digest of the certificate in use."""

    challenge: bytes
    binding: bytes = field(default=b"", repr=False)


Dialogue: TypeAlias = Generator[Challenge | Question, bytes, None]


def begin(mechanism: Mechanism, initial: bytes | None, around: Circumstances) -> Dialogue:
    """Start. ``initial`` is the initial response (RFC 4954 §4), None when there was none, b"" for ``=``."""
    return _DIALOGUES[mechanism](mechanism, initial, around)


def _text(octets: bytes) -> str:
    try:
        return octets.decode()
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None


def _password(mechanism: Mechanism, user: bytes, password: bytes) -> Question:
    """The question about name and password, unless the answer is plain already (row A6)."""
    name = _name(user)
    if not password:  # to a directory that would be an anonymous bind, which succeeds (RFC 4513 §5.1.2)
        raise Hopeless(name, "empty password")
    if len(password) > PASSWORD_OCTETS or _CONTROL.search(_text(password)):
        raise Hopeless(name, "a password that cannot be")
    return Question(Step.PLAIN, mechanism, name, password)


def _name(octets: bytes) -> str:
    name = _text(octets)
    if not name:
        raise Hopeless("", "empty user name")
    if len(octets) > NAME_OCTETS or _CONTROL.search(name):
        raise Hopeless(name[:NAME_OCTETS], "a user name that cannot be")
    return name


def _plain(mechanism: Mechanism, initial: bytes | None, _: Circumstances) -> Dialogue:
    """RFC 4616."""
    message = (yield Challenge(b"")) if initial is None else initial
    parts = message.split(b"\0")
    if len(parts) != 3:
        raise Malformed("PLAIN has two NULs")
    authorization, user, password = parts
    if authorization and authorization != user:
        raise Hopeless(_text(user)[:NAME_OCTETS], "wants to act as somebody else")
    yield _password(mechanism, user, password)


def _login(mechanism: Mechanism, initial: bytes | None, _: Circumstances) -> Dialogue:
    """draft-murchison-sasl-login: never a standard, spoken by everybody."""
    user = (yield Challenge(b"Username:")) if initial is None else initial
    password = yield Challenge(b"Password:")
    yield _password(mechanism, user, password)


def _cram_md5(mechanism: Mechanism, initial: bytes | None, around: Circumstances) -> Dialogue:
    """RFC 2195. The server speaks first, so there is no initial response."""
    if initial is not None:
        raise Malformed("CRAM-MD5 has no initial response")
    response = yield Challenge(around.challenge)
    user, space, digest = response.rpartition(b" ")
    if not space or re.fullmatch(rb"[0-9a-f]{32}", digest) is None:
        raise Malformed("CRAM-MD5 answers NAME and 32 hexadecimal digits")
    yield Question(Step.CRAM, mechanism, _name(user), digest, around.challenge)


def _scram(mechanism: Mechanism, initial: bytes | None, around: Circumstances) -> Dialogue:
    """RFC 5802, RFC 7677. The server's last message goes as a challenge that is answered by nothing (RFC 4954 §4)."""
    first = (yield Challenge(b"")) if initial is None else initial
    answer = yield Question(Step.SCRAM_FIRST, mechanism, "", first, binding=around.binding)
    final = yield Challenge(answer)
    proof = yield Question(Step.SCRAM_FINAL, mechanism, "", final)
    if (yield Challenge(proof)):
        raise Malformed("nothing was to be said")


_DIALOGUES: Final[dict[Mechanism, Callable[[Mechanism, bytes | None, Circumstances], Dialogue]]] = {
    Mechanism.PLAIN: _plain,
    Mechanism.LOGIN: _login,
    Mechanism.CRAM_MD5: _cram_md5,
    Mechanism.SCRAM_SHA_256: _scram,
    Mechanism.SCRAM_SHA_256_PLUS: _scram,
}
