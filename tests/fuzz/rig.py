"""Owns: the relay's own listener and sessions on transports in memory, with everything behind them that remembers or forgets."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from relay.config.schema import Config
from relay.directory.snapshot import Directory
from relay.hub.budgets import Budgets
from relay.hub.frames import Verdict as Room
from relay.inbound.listener import Listener
from relay.inbound.session import Session
from relay.mail import reply
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.telemetry.maillog import MailLog

REPLY: Final = re.compile(rb"(?:(\d{3})-[ -~]*\r\n)*([2-5]\d\d) [ -~]*\r\n")
LINE_OCTETS: Final = 512  # RFC 5321 §4.5.3.1.5
NO_ENHANCED: Final = (b"220", b"250", b"354", b"334")


class Fault(Exception):
    """The relay did what it must not do."""


class Rig:
    """One listener. ``messages`` are those taken since they were last looked at."""

    def __init__(self, endings: str) -> None:
        config = Config.model_validate(
            {
                "server": {"hostname": "mx.example.com", "spool": "/nonexistent"},
                "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
                "limits": {"errors": 0, "tarpit_s": 0, "message_octets": 4_000_000, "header_octets": 4_000_000},
                "domain": [{"names": ["example.com"]}, {"names": ["any.example.com"], "recipients": "any"}],
                "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:25"]}],
                "content": {"header_firewall": "off", "line_endings": endings},
            }
        )
        self.messages: list[bytes] = []
        self.lines: list[str] = []
        behind: Any = _Behind(self)
        self.listener = Listener(
            config.listener[0],
            config,
            directory=Directory(Path("/nonexistent"), b""),
            dispatch=behind,
            hub=behind,
            log=MailLog(behind, "postfix", "mx.example.com"),
            metrics=_Uncounted(),  # type: ignore[arg-type]
            tls=None,
            binding=b"",
            logins=behind,
        )

    def connect(self) -> Connection:
        """A client that has read its banner."""
        connection = Connection(self)
        if connection.replies() != [b"220"]:
            raise Fault("no banner")
        return connection

    def complaints(self) -> None:
        """Raise Fault when the log tells of a fault of the relay; forget the rest."""
        for line in self.lines:
            if "session_fault" in line or "Traceback" in line:
                raise Fault(line)
        self.lines.clear()


class Connection:
    """One session and its transport."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.octets = b""
        self.closed = False
        self.session = Session(rig.listener)
        self.session.connection_made(self)  # type: ignore[arg-type]

    async def send(self, *packets: bytes) -> None:
        """The client's octets; the session has its turns until it waits for more."""
        for packet in packets:
            self.session.data_received(packet)
            for _ in range(10_000):
                if not self.session.busy or self.closed:
                    break
                await asyncio.sleep(0)
            else:
                raise Fault("the session hangs")

    def replies(self) -> list[bytes]:
        """The codes of the replies since they were last asked for, each checked for its form."""
        codes, at = [], 0
        while at < len(self.octets):
            found = REPLY.match(self.octets, at)
            if found is None:
                raise Fault(f"no reply: {self.octets[at : at + 200]!r}")
            for line in found[0].split(b"\r\n"):
                if len(line) > LINE_OCTETS - 2:
                    raise Fault(f"a reply of {len(line)} octets")
                if line and line[:3] != found[2]:
                    raise Fault(f"a reply of several codes: {found[0]!r}")
            last = found[0][found.start(2) - at :]
            if found[2] not in NO_ENHANCED and last[4:6] != found[2][:1] + b".":
                raise Fault(f"no enhanced code: {last!r}")
            codes.append(found[2])
            at = found.end()
        self.octets = b""
        return codes

    def leave(self) -> None:
        """The client goes."""
        self.closed = True
        self.session.connection_lost(None)
        if self.rig.listener.sessions:
            raise Fault("a session that is over is still known")

    # --- as a transport ---
    def write(self, octets: bytes) -> None:
        self.octets += octets

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 25) if name in ("peername", "sockname") else default

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class _Behind:
    """Hub, log writer and dispatch: room for all, lines kept, every message taken and kept."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.budgets = Budgets()  # without limits

    def open(self, address: str, told: Callable[[Room], None]) -> None:
        told(Room.OK)

    def close(self, address: str) -> None: ...

    def write(self, line: str) -> None:
        self._rig.lines.append(line)

    def flush(self) -> None: ...

    def next_id(self) -> QueueId:
        return QueueId("fuzz")

    def open_body(self) -> int:
        return os.memfd_create("fuzz", os.MFD_CLOEXEC)

    def accept(self, envelope: Envelope, content: Content, answer: Callable[..., None]) -> None:
        if not envelope.recipients:
            raise Fault("a message for nobody")
        self._rig.messages.append(b"".join(content.chunks()))
        content.close()
        answer(reply.OK_QUEUED, envelope.id)


class _Uncounted:
    """Metrics that count nothing."""

    def __init__(self) -> None:
        self.replies: Counter[object] = Counter()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
