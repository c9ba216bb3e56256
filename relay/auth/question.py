"""Owns: what a worker asks the hub about a login, what the hub answers, and their form on the wire between them.

A length and a frame each: questions and answers as fixed fields, since every login pays for them, everything else as a JSON
object. Both sides run the same release. No secret may get into a repr.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception
from typing import Any, Final

from relay.config.auth import Mechanism
from relay.mail.address import Mailbox
from relay.policy.ownership import Account, Grant

LENGTH: Final = Struct("<I")
FRAME_OCTETS: Final = 1024 * 1024
"""Longest object: a login of 12,288 octets fits many times; an account may own thousands of addresses."""


class FrameError(ValueError):
    """The other end is out of order."""


class Step(StrEnum):
    """What is to be looked at. SCRAM takes two questions of one tag."""

    PLAIN = "plain"
    CRAM = "cram"
    SCRAM_FIRST = "scram-first"
    SCRAM_FINAL = "scram-final"
    FORGET = "forget"
    """The client went away in the middle of SCRAM. Not answered."""


@dataclass(frozen=True, slots=True)
class Question:
    """``proof`` is what the client sent: password, digest, or SCRAM's message. ``user`` is empty for SCRAM."""

    step: Step
    mechanism: Mechanism
    user: str
    proof: bytes = field(repr=False)
    challenge: bytes = field(default=b"", repr=False)
    binding: bytes = field(default=b"", repr=False)
    """Digest of the relay's certificate, for SCRAM-SHA-256-PLUS (RFC 5929 §4)."""


class Result(StrEnum):
    """What became of a question."""

    OK = "ok"
    GO_ON = "go-on"
    """SCRAM: ``octets`` are for the client, a second question follows."""
    REFUSED = "refused"
    BLOCKED = "blocked"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Reply:
    """The hub's answer. ``user`` is the login as logs may show it, ``why`` is for logs alone."""

    result: Result
    octets: bytes = field(default=b"", repr=False)
    account: Account | None = None
    user: str = ""
    why: str = ""


_STEPS: Final = tuple(Step)
_MECHANISMS: Final = tuple(Mechanism)
_RESULTS: Final = tuple(Result)
_GRANTS: Final = tuple(Grant)
_STEP_NUMBER: Final = {step: number for number, step in enumerate(_STEPS)}
_MECHANISM_NUMBER: Final = {mechanism: number for number, mechanism in enumerate(_MECHANISMS)}
_RESULT_NUMBER: Final = {result: number for number, result in enumerate(_RESULTS)}
_GRANT_NUMBER: Final = {grant: number for number, grant in enumerate(_GRANTS)}

QUESTION: Final = 1
REPLY: Final = 2
"""First octet of a frame about a login; a JSON object begins with a bracket."""
_QUESTION: Final = Struct("<BBBxIHHHHHH")
"""Kind, step, mechanism, tag; lengths of client, listener, user, proof, challenge, binding, which follow."""
_REPLY: Final = Struct("<BBBBIHHHHI")
"""Kind, result, whether there is an account, grant, tag; lengths of octets, user, why, account name, addresses."""
_TOLD_OCTETS: Final = 1024
"""What goes to logs is cut there; it is no longer than a name of a login and a sentence."""


def pack(body: dict[str, Any]) -> bytes:
    """One frame that is a JSON object."""
    octets = json.dumps(body, separators=(",", ":")).encode()
    return LENGTH.pack(len(octets)) + octets


class Unpacker:
    """Frames out of a stream. ``feed`` raises FrameError."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete now, without their lengths."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, whole = 0, len(data)
        while whole - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(data, at)
            if not 0 < size <= FRAME_OCTETS:
                raise FrameError(f"a frame of {size} octets")
            end = at + LENGTH.size + size
            if whole < end:
                break
            yield data[at + LENGTH.size : end]
            at = end
        self._rest = data[at:]


def unpacked(frame: bytes) -> dict[str, Any]:
    """The object in a frame that is none about a login. Raises FrameError."""
    try:
        body = json.loads(frame)
    except ValueError:
        raise FrameError("a frame that is no JSON") from None
    if not isinstance(body, dict):
        raise FrameError("a frame that is no object")
    return body


def question_out(tag: int, client: str, listener: str, question: Question) -> bytes:
    """A question as frame."""
    parts = (
        client.encode(),
        listener.encode(),
        question.user.encode(),
        question.proof,
        question.challenge,
        question.binding,
    )
    lengths = [len(part) for part in parts]
    head = _QUESTION.pack(
        QUESTION, _STEP_NUMBER[question.step], _MECHANISM_NUMBER[question.mechanism], tag & 0xFFFFFFFF, *lengths
    )
    return LENGTH.pack(len(head) + sum(lengths)) + head + b"".join(parts)


def question_in(frame: bytes) -> tuple[int, str, str, Question]:
    """Tag, client, listener and question of a frame. Raises FrameError."""
    try:
        _, step, mechanism, tag, *lengths = _QUESTION.unpack_from(frame)
        client, listener, user, proof, challenge, binding = _parts(frame, _QUESTION.size, lengths)
        question = Question(_STEPS[step], _MECHANISMS[mechanism], user.decode(), proof, challenge, binding)
        return tag, client.decode(), listener.decode(), question
    except (StructError, IndexError, ValueError) as error:
        raise FrameError(f"a question that makes no sense: {type(error).__name__}") from None


def reply_out(tag: int, reply: Reply) -> bytes:
    """An answer as frame."""
    account = reply.account
    user, why = reply.user.encode()[:_TOLD_OCTETS], reply.why.encode()[:_TOLD_OCTETS]
    octets = reply.octets
    name, addresses, grant = b"", b"", 0
    if account is not None:
        name, grant = account.name.encode(), _GRANT_NUMBER[account.grant]
        addresses = "\n".join(account.addresses).encode()
    head = _REPLY.pack(
        REPLY, _RESULT_NUMBER[reply.result], account is not None, grant, tag & 0xFFFFFFFF,
        len(octets), len(user), len(why), len(name), len(addresses),
    )  # fmt: skip
    size = len(head) + len(octets) + len(user) + len(why) + len(name) + len(addresses)
    return LENGTH.pack(size) + head + octets + user + why + name + addresses


def reply_in(frame: bytes) -> tuple[int, Reply]:
    """Tag and answer of a frame. Raises FrameError."""
    try:
        _, result, known, grant, tag, *lengths = _REPLY.unpack_from(frame)
        octets, user, why, name, addresses = _parts(frame, _REPLY.size, lengths)
        account = None
        if known:
            owned = frozenset(map(Mailbox, addresses.decode().split("\n"))) if addresses else frozenset()
            account = Account(name.decode(), owned, _GRANTS[grant])
        return tag, Reply(
            _RESULTS[result], octets, account, user.decode(errors="replace"), why.decode(errors="replace")
        )
    except (StructError, IndexError, ValueError) as error:
        raise FrameError(f"an answer that makes no sense: {type(error).__name__}") from None


def _parts(frame: bytes, at: int, lengths: list[int]) -> list[bytes]:
    found = []
    for length in lengths:
        found.append(frame[at : at + length])
        at += length
    if at != len(frame):
        raise ValueError(at)
    return found
