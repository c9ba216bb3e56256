"""Owns: the relay's session in the place of the SMTP library's own class, for the library's own tests.

Loaded by pytest with ``-p`` before those tests are: whoever imports ``aiosmtpd.smtp.SMTP`` from then on gets ``Stand``,
which takes the library's arguments, makes a listener of them, and hands messages to the library's kind of handler.

Replies are compared by the class of their code (RFC 5321 §4.2.1): the wording is the relay's own, and among the codes of a
class the relay chooses by its own reasons (``tests/dialogue/test_matrix.py`` has them with their sections).
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiosmtpd.controller
import aiosmtpd.smtp
import pytest
from aiosmtpd.testing import statuscodes

from relay.config.schema import Config
from relay.directory.snapshot import Directory
from relay.hub.budgets import Budgets
from relay.hub.frames import Verdict as Room
from relay.inbound.listener import SWEEP_S, Listener
from relay.inbound.session import Session
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.mail.reply import Kind, operator_text
from relay.telemetry.maillog import MailLog
from tests.bed.ports import free_port
from tests.library.not_ours import NOT_OURS, STUCK

TRACE: Final = re.compile(rb"Received: .*\r\n(?:[ \t].*\r\n)*")
"""What the relay puts in front of a message."""


class SameClass(statuscodes.StatusCode):
    """A reply that equals every reply of its class."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and len(other) == 2 and other[0] // 100 == self.code // 100

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __call__(self, *args: bytes) -> SameClass:
        return SameClass(*super().__call__(*args))

    __hash__ = statuscodes.StatusCode.__hash__


class Stand(Session):
    """A session with the arguments of the library's class."""

    def __init__(
        self,
        handler: Any,
        *,
        data_size_limit: int | None = 33554432,
        hostname: str | None = None,
        tls_context: ssl.SSLContext | None = None,
        require_starttls: bool = False,
        timeout: float = 300,
        loop: asyncio.AbstractEventLoop | None = None,
        decode_data: bool = False,
        **others: Any,
    ) -> None:
        del others  # what the relay has no choice about
        name = hostname or socket.getfqdn()
        config = Config.model_validate(
            {
                "server": {"hostname": name if "." in name else "mx.example.com", "spool": "/nonexistent"},
                "listener": [{"name": "mx", "address": "127.0.0.1:25", "require_tls": require_starttls}],
                "limits": {"errors": 0, "tarpit_s": 0},
                "domain": [{"names": ["example.com"], "recipients": "any"}],
                "trusted": {"networks": ["127.0.0.0/8", "::1"]},
                "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:25"]}],
                "content": {"header_firewall": "off"},
                **({"tls": {"certificate": "/nonexistent", "key": "/nonexistent"}} if tls_context else {}),
            }
        )
        behind: Any = Behind(self)
        super().__init__(
            Listener(
                config.listener[0],
                config,
                directory=Directory(Path("/nonexistent"), b""),
                dispatch=behind,
                hub=behind,
                log=MailLog(behind, "postfix", name),
                metrics=Uncounted(),  # type: ignore[arg-type]
                tls=tls_context,
                binding=b"",
                logins=behind,
            )
        )
        self.listener.receive.message_octets = data_size_limit or 33554432
        self.listener.offer(None)
        self.listener.command_timeout_s = timeout
        self.event_handler = handler
        self.decode_data = decode_data
        self.loop = loop or asyncio.get_event_loop()
        self.hostname = name
        self.session = aiosmtpd.smtp.Session(self.loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sweep deadlines as a worker does."""
        super().connection_made(transport)
        self._sweep()

    def _sweep(self) -> None:
        if not self.closed:
            self.listener.sweep()
            self.loop.call_later(SWEEP_S, self._sweep)

    @property
    def _handler_coroutine(self) -> Any:
        """What the library's tests wait for: the end of all that was sent."""

        async def over() -> None:
            while self.busy and not self.closed:
                await asyncio.sleep(0)

        return over()


class Behind:
    """Hub, log and dispatch: room for all, no log, and a handler that gets the message."""

    budgets: Final = Budgets()

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, address: str, told: Callable[[Room], None]) -> None:
        told(Room.OK)

    def close(self, address: str) -> None: ...

    def write(self, line: str) -> None: ...

    def flush(self) -> None: ...

    def next_id(self) -> QueueId:
        return QueueId("library")

    def open_body(self) -> int:
        return os.memfd_create("library", os.MFD_CLOEXEC)

    def accept(self, envelope: Envelope, content: Content, answer: Callable[..., None]) -> None:
        task = self._stand.loop.create_task(self._hand_over(envelope, content, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over(self, envelope: Envelope, content: Content, answer: Callable[..., None]) -> None:
        octets = b"".join(content.chunks())
        content.close()
        found = TRACE.match(octets)
        assert found is not None, octets[:200]
        library = aiosmtpd.smtp.Envelope()
        library.mail_from = envelope.sender
        library.rcpt_tos = list(envelope.recipients)
        library.original_content = re.sub(rb"(?m)^\.", b"", octets[found.end() :])
        library.content = (
            library.original_content.decode(errors="surrogateescape")
            if self._stand.decode_data
            else library.original_content
        )
        hook = getattr(self._stand.event_handler, "handle_DATA", None)
        status = "250 OK" if hook is None else await hook(self._stand, self._stand.session, library)
        code, _, text = status.partition(" ")
        answer(Kind(int(code), f"{code[0]}.0.0", operator_text(text).replace("{", "(").replace("}", ")"), "handler"))


class Uncounted:
    """Metrics that count nothing."""

    def __init__(self) -> None:
        self.replies: dict[object, int] = _Zero()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Zero(dict[object, int]):
    def __missing__(self, key: object) -> int:
        return 0


def _resource_filename(package: str, name: str) -> str:
    """As in pkg_resources, which recent versions of setuptools do without."""
    __import__(package)
    return str(Path(next(iter(sys.modules[package].__path__))) / name)


sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
sys.modules["pkg_resources"].resource_filename = _resource_filename  # type: ignore[attr-defined]
for _name, _code in list(vars(statuscodes.SMTP_STATUS_CODES).items()):
    if isinstance(_code, statuscodes.StatusCode):
        setattr(statuscodes.SMTP_STATUS_CODES, _name, SameClass(*_code))
aiosmtpd.smtp.SMTP = aiosmtpd.controller.SMTP = Stand  # type: ignore[misc,assignment]


# --- as a plugin of pytest ---------------------------------------------------------------------------------------------
def _stands_for(name: str, test: str) -> bool:
    return test.startswith(name[:-1]) if name.endswith("*") else test == name


def _name(item: pytest.Item) -> str:
    return f"{item.module.__name__.rpartition('.')[2]}::{item.nodeid.partition('::')[2]}"  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is listed: it has to fail, or is not run."""
    from aiosmtpd.tests import conftest

    port = free_port()  # the library's tests all use one fixed port
    conftest.HostPort.__new__.__defaults__ = ("127.0.0.1", port)
    conftest.Global.SrvAddr = conftest.HostPort()
    unused = {*NOT_OURS, *STUCK}
    for item in items:
        test = _name(item)
        for table in (NOT_OURS, STUCK):
            for name, reason in table.items():
                if _stands_for(name, test):
                    unused.discard(name)
                    item.add_marker(
                        pytest.mark.xfail(reason=reason, run=table is NOT_OURS, strict=not name.endswith("*"))
                    )
    if unused:
        raise pytest.UsageError(f"listed, but there is no such test: {', '.join(sorted(unused))}")
