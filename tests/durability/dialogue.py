"""Owns: what the relay and its next hops told each other, read from a trace: when it knew what became of whom.

Until the relay has read a next hop's 2xx to the final dot, a recipient of an acknowledged message must be on the disk.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.durability.trace import READS, WRITES, Call

_REPLY: Final = re.compile(rb"([2-5]\d\d)([ -])[^\r\n]*\r\n")
_END: Final = b"\r\n.\r\n"


@dataclass(frozen=True, slots=True)
class Answered:
    """A next hop's last word about one recipient of one attempt. ``line``: the relay has read it.

    ``message``: in wire form, empty when it was not sent.
    """

    line: int
    sender: str
    recipient: str
    code: int
    message: bytes


@dataclass(slots=True)
class _Connection:
    """One connection to a next hop, seen from the relay."""

    waiting: deque[str] = field(default_factory=lambda: deque(["banner"]))
    """Commands without their reply."""
    said: bytes = b""
    heard: bytes = b""
    sender: str = ""
    recipients: list[str] = field(default_factory=list)
    body: bytearray | None = None
    message: bytes = b""

    def say(self, octets: bytes) -> None:
        if self.body is not None:
            self.body += octets
            if self.body.endswith(_END):
                self.message, self.body = bytes(self.body[2 : -len(_END) + 2]), None
                self.waiting.append(".")
            return
        self.said += octets
        *lines, self.said = self.said.split(b"\r\n")
        self.waiting.extend(line.decode("latin-1") for line in lines)

    def hear(self, octets: bytes, line: int) -> Iterator[Answered]:
        self.heard += octets
        end = 0
        for reply in _REPLY.finditer(self.heard):
            end = reply.end()
            if reply[2] == b" " and self.waiting:
                yield from self._replied(self.waiting.popleft(), int(reply[1]), line)
        self.heard = self.heard[end:]

    def _replied(self, command: str, code: int, line: int) -> Iterator[Answered]:
        verb = command[:4].upper()
        if verb == "MAIL":
            self.sender, self.recipients, self.message = _path(command), [], b""
        elif verb == "RCPT" and code < 300:
            self.recipients.append(_path(command))
        elif verb == "RCPT":
            yield Answered(line, self.sender, _path(command), code, b"")
        elif command == "." or (verb == "DATA" and code != 354):
            for recipient in self.recipients:
                yield Answered(line, self.sender, recipient, code, self.message)
        elif verb == "DATA":
            self.body = bytearray(b"\r\n")


def _path(command: str) -> str:
    return command[command.index("<") + 1 : command.index(">")]


def answers(calls: Iterable[Call]) -> list[Answered]:
    """Everything next hops said about recipients, in order. A connection to one is known by its 220, which is heard."""
    found: list[Answered] = []
    connections: dict[tuple[int, str], _Connection | None] = {}
    for call in calls:
        if not call.path.startswith("socket:") or call.result <= 0:
            continue
        if call.name in READS:
            connection = connections.setdefault(
                (call.process, call.path), _Connection() if call.data.startswith(b"220") else None
            )
            if connection is not None:
                found.extend(connection.hear(call.data, call.end))
        elif call.name in WRITES:
            connection = connections.setdefault((call.process, call.path), None)
            if connection is not None:
                connection.say(call.data)
    return found
