"""Owns: sessions on a clock that tests turn: the daemon's listener and session on a transport in memory (as ``relay explain``
plays them). Nothing here waits, so what takes minutes is tested in no time and by no luck.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from relay.config.schema import Config
from relay.directory import build as builder
from relay.directory.key import read_key
from relay.directory.snapshot import Directory
from relay.hub.budgets import Budgets
from relay.inbound.listener import Listener
from relay.inbound.rehearsal import Rehearsal
from relay.inbound.session import Session

PEER = "192.0.2.1"


class Wire:
    """What a session writes to: octets in the order they left, and whether it ended."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.octets = b""
        self.ended = self.cut = False

    def write(self, octets: bytes) -> None:
        self.octets += octets

    def get_extra_info(self, name: str, default: object = None) -> object:
        return (self._address, 0) if name == "peername" else default

    def is_closing(self) -> bool:
        return self.ended

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = self.cut = True


class Dialogue:
    """One client."""

    def __init__(self, stage: Stage, address: str) -> None:
        self.wire = Wire(address)
        self.session = Session(stage.listener)
        self.session.connection_made(cast("asyncio.Transport", self.wire))

    def heard(self) -> list[str]:
        """The last line of each reply since the last call, code and enhanced code."""
        lines = self.wire.octets.decode().split("\r\n")[:-1]
        self.wire.octets = b""
        return [line for line in lines if line[3:4] == " "]

    def codes(self) -> list[int]:
        return [int(line[:3]) for line in self.heard()]

    def send(self, octets: bytes) -> None:
        if not self.wire.ended:
            self.session.data_received(octets)

    def say(self, *lines: str) -> list[str]:
        """A pipelined group; what is heard at once."""
        self.send("".join(f"{line}\r\n" for line in lines).encode())
        return self.heard()

    def envelope(self, *recipients: str) -> list[str]:
        return self.say("MAIL FROM:<a@example.net>", *[f"RCPT TO:<{one}>" for one in recipients])


class Stage:
    """A listener with its clock."""

    def __init__(self, folder: Path, limits: dict[str, Any], **server: Any) -> None:
        listed = folder / "list"
        listed.write_text("user@example.com\n")
        self.config = Config.model_validate(
            {
                "server": {"hostname": "mx.example.com", "spool": folder / "spool", **server},
                "process": {"user": "", "hub_user": ""},
                "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
                "domain": [{"names": ["example.com"]}],
                "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
                "directory": {"sources": [{"type": "list", "path": listed}]},
                "trusted": {"networks": ["198.51.100.0/24"]},
                "limits": limits,
            }
        )
        builder.build(self.config, 0.0)
        directory = Directory(self.config.snapshot_path, read_key(self.config.key_path))
        rehearsal = Rehearsal(self.config, self.config.listener[0], directory, PEER)
        self.listener: Listener = rehearsal.listener
        self.log = rehearsal._log
        self.budgets = Budgets()
        self.budgets.configure(self.config.limits)
        self.listener.budgets = self.budgets
        self.listener.blocked = self.budgets.blocked
        self.time = 1000.0
        self.listener.clock = lambda: self.time
        self.listener.sweep()

    def passes(self, seconds: float) -> None:
        """Time goes by, with a sweep every half second as in a worker."""
        for _ in range(max(1, round(seconds * 2))):
            self.time += seconds / max(1, round(seconds * 2))
            self.listener.sweep()

    def client(self, address: str = PEER) -> Dialogue:
        return Dialogue(self, address)

    def ready(self, address: str = PEER) -> Dialogue:
        """Behind EHLO."""
        made = self.client(address)
        made.say("EHLO client.example.net")
        return made
