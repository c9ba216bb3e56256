"""Owns: what a worker asks the hub about a login, what the hub answers, and their form on the wire between them.

A length and a JSON object each. Both sides run the same release. No secret may get into a repr.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from struct import Struct
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


def pack(body: dict[str, Any]) -> bytes:
    """One frame."""
    octets = json.dumps(body, separators=(",", ":")).encode()
    return LENGTH.pack(len(octets)) + octets


class Unpacker:
    """Frames out of a stream. ``feed`` raises FrameError."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The objects that are complete now."""
        self._rest += data
        while len(self._rest) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._rest)
            if size > FRAME_OCTETS:
                raise FrameError(f"a frame of {size} octets")
            end = LENGTH.size + size
            if len(self._rest) < end:
                return
            octets, self._rest = self._rest[LENGTH.size : end], self._rest[end:]
            try:
                body = json.loads(octets)
            except ValueError:
                raise FrameError("a frame that is no JSON") from None
            if not isinstance(body, dict):
                raise FrameError("a frame that is no object")
            yield body


def question_out(tag: int, client: str, listener: str, question: Question) -> bytes:
    """A question as frame."""
    return pack(
        {
            "ask": "login",
            "tag": tag,
            "client": client,
            "listener": listener,
            "step": question.step,
            "mechanism": question.mechanism,
            "user": question.user,
            "proof": question.proof.decode("latin-1"),
            "challenge": question.challenge.decode("latin-1"),
            "binding": question.binding.hex(),
        }
    )


def question_in(body: dict[str, Any]) -> Question:
    """The question in a frame. Raises FrameError."""
    try:
        return Question(
            Step(body["step"]),
            Mechanism(body["mechanism"]),
            str(body["user"]),
            body["proof"].encode("latin-1"),
            body["challenge"].encode("latin-1"),
            bytes.fromhex(body["binding"]),
        )
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise FrameError(f"a question that makes no sense: {type(error).__name__}") from None


def reply_out(tag: int, reply: Reply) -> bytes:
    """An answer as frame."""
    account = reply.account
    return pack(
        {
            "tell": "login",
            "tag": tag,
            "result": reply.result,
            "octets": reply.octets.decode("latin-1"),
            "user": reply.user,
            "why": reply.why,
            "account": None
            if account is None
            else {"name": account.name, "addresses": sorted(account.addresses), "grant": account.grant},
        }
    )


def reply_in(body: dict[str, Any]) -> Reply:
    """The answer in a frame."""
    about = body["account"]
    account = (
        None
        if about is None
        else Account(str(about["name"]), frozenset(map(Mailbox, about["addresses"])), Grant(about["grant"]))
    )
    return Reply(Result(body["result"]), body["octets"].encode("latin-1"), account, str(body["user"]), str(body["why"]))
