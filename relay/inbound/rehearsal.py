"""Owns: a dialogue that is only played: the daemon's own listener and session, on a transport in memory.

What stands behind them promises nothing: the hub has room, dispatch takes a message and forgets it, nothing is counted,
and the log is a list. So ``relay explain`` says what a client would hear without a second implementation of anything.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

from relay.config import schema
from relay.config.addresses import split_address
from relay.config.schema import Config
from relay.directory.snapshot import Directory
from relay.dispatch import Dispatch
from relay.hub.budgets import Budgets
from relay.hub.client import HubClient
from relay.hub.frames import Verdict as Room
from relay.inbound.listener import Listener
from relay.inbound.session import Session
from relay.inbound.transaction import Asked, Transaction
from relay.mail import reply
from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.mail.reply import Kind, OperatorText
from relay.policy.verdict import Verdict
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics

REPLY_S: Final = 60.0
"""Longest wait for a reply: pauses that a session makes on purpose are shorter."""
LOOK_S: Final = 0.005
TLS: Final = ("TLSv1.3", "TLS_AES_256_GCM_SHA384")
"""What a played handshake comes to."""

_ID: Final = QueueId("REHEARSAL")
_REPLY: Final = re.compile(rb"(?:\d\d\d-[^\r]*\r\n)*\d\d\d [^\r]*\r\n")  # RFC 5321 §4.2.1


class NoReply(Exception):
    """The session said nothing: a fault of the relay, which the text tells."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One command (empty: the greeting) and what came of it. ``reply`` without line ends, ``log`` as it would be written.

    ``asked`` are the rules in their order, of which the last decided; ``looked_up`` the steps of the recipient's look-up;
    ``goes_to`` the mailbox that an accepted recipient's mail goes to.
    """

    command: str
    reply: tuple[str, ...]
    log: tuple[str, ...]
    asked: tuple[Asked, ...] = ()
    looked_up: tuple[str, ...] = ()
    goes_to: Mailbox = NULL_SENDER

    @property
    def accepted(self) -> bool:
        """Whether the reply is no refusal."""
        return self.reply[-1][:1] in "23"


class Rehearsal:
    """One played session. Made and used inside a running event loop."""

    def __init__(self, config: Config, listener: schema.Listener, directory: Directory, client: str) -> None:
        """``client``: an IP address."""
        self._log: list[str] = []
        self._transport = _Transport(client, split_address(listener.address)[0])
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if config.tls.certificate else None  # offered, never used
        self.listener = Listener(
            listener,
            config,
            directory=directory,
            dispatch=cast("Dispatch", _Dispatch()),
            hub=cast("HubClient", _Hub()),
            log=MailLog(_Lines(self._log), config.log.format, config.server.hostname),
            metrics=cast("Metrics", _Uncounted()),
            tls=tls,
            binding=b"",
            logins=cast("Any", None),  # a rehearsal logs nobody in
        )
        self.session = _Session(self.listener)

    async def greeting(self) -> Exchange:
        """Connect."""
        self.session.connection_made(cast("asyncio.Transport", self._transport))
        return await self._exchange("")

    async def say(self, line: str) -> Exchange:
        """One command."""
        self.session.begin()
        self.session.data_received(f"{line}\r\n".encode(errors="replace"))
        done = await self._exchange(line)
        asked = tuple(self.session.questions(line))
        watched = self.session.watched
        looked_up = watched.looked_up if watched is not None and line[:4].upper() == "RCPT" else ()
        return Exchange(line, done.reply, done.log, asked, looked_up, self.session.instead)

    async def data(self, message: bytes) -> Exchange:
        """The message behind 354, in wire form without the final dot, which is said here."""
        self.session.begin()
        self.session.data_received(message + b".\r\n")
        return await self._exchange("(message)")

    def last_words(self) -> Exchange | None:
        """What the session said of itself behind its last reply: 421 and why."""
        return self._heard("") if self._transport.answered else None

    async def _exchange(self, command: str) -> Exchange:
        until = asyncio.get_running_loop().time() + REPLY_S
        while not self._transport.answered:
            if asyncio.get_running_loop().time() > until:
                raise NoReply(f"{command or 'the greeting'}: the session said nothing for {REPLY_S:.0f} s")
            await asyncio.sleep(LOOK_S)
        return self._heard(command)

    def _heard(self, command: str) -> Exchange:
        log, self._log[:] = tuple(self._log), []
        return Exchange(command, self._transport.take(), log)


class _Watched(Transaction):
    """A transaction that notes the questions that were asked."""

    __slots__ = ("heard", "instead", "looked_up")

    def __init__(self, *facts: Any) -> None:
        super().__init__(*facts)
        self.forget()

    def forget(self) -> None:
        """Before the next recipient."""
        self.heard: tuple[Asked, ...] = ()
        self.looked_up: tuple[str, ...] = ()
        self.instead = NULL_SENDER

    def judge_sender(self) -> Verdict | None:
        """As the session is told at MAIL."""
        self.heard = (self.question_of_sender(),)
        return super().judge_sender()

    def quick(self, mailbox: Mailbox) -> Verdict | None:
        """Never: every rule is to be asked by its name."""
        return None

    def judge_recipient(self, mailbox: Mailbox, relay_form: bool) -> Verdict:  # noqa: FBT001 - a fact
        """As the session is told, with the way there kept."""
        steps: list[str] = []
        self.heard = tuple(self.questions(mailbox, relay_form, steps.append))
        self.looked_up = tuple(steps)
        verdict = super().judge_recipient(mailbox, relay_form)
        self.instead = verdict.instead or mailbox
        return verdict


class _Session(Session):
    """A session that notes what it was asked, and takes TLS for granted."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self.kind: Kind | None = None
        self.verdict: Verdict | None = None
        self.watched: _Watched | None = None
        self.open_transaction = self._open

    def _open(self, *facts: Any) -> _Watched:
        self.watched = _Watched(*facts)
        return self.watched

    @property
    def instead(self) -> Mailbox:
        """Where mail of the recipient just accepted goes."""
        watched = self.watched
        return NULL_SENDER if watched is None or self.kind is not reply.OK_RCPT else watched.instead

    def begin(self) -> None:
        """A new command: forget what was said to the last one."""
        self.kind = self.verdict = None
        if self.watched is not None:
            self.watched.forget()

    def say(self, kind: Kind, mailbox: Mailbox = NULL_SENDER, text: OperatorText | QueueId = OperatorText("")) -> None:
        """Note what is said."""
        self.kind = kind
        super().say(kind, mailbox, text)

    def _reject(self, verdict: Verdict, stage: str, named: Mailbox, sender: Mailbox, recipient: Mailbox | None) -> None:
        self.kind, self.verdict = verdict.kind, verdict
        super()._reject(verdict, stage, named, sender, recipient)

    async def _start_tls(self) -> None:
        self.tls_is_up(*TLS)

    def questions(self, line: str) -> Iterator[Asked]:
        """The rules that were asked about a command, up to the one that decided."""
        refusal = self.kind if self.kind is not None and self.kind.code >= 400 else None
        command = line[:4].upper()
        asked = self._of_mail() if command == "MAIL" else self._of_recipient() if command == "RCPT" else iter(())
        heard: list[Asked] = []
        for one, refuses in asked:
            if refusal is not None and refuses is refusal:
                yield from heard
                yield one._replace(verdict=self.verdict or Verdict(refusal, one.rule))
                return
            heard.append(one)
        if refusal is None:
            yield from heard
        else:  # none of these rules was the one, so nobody knows here which were asked before
            rule = self.verdict.rule if self.verdict is not None else refusal.reason
            why = "by the form of the command, or by its place in the dialogue"
            yield Asked(rule, why, self.verdict or Verdict(refusal, rule))

    def _of_mail(self) -> Iterator[tuple[Asked, Kind | None]]:
        """What MAIL asks, and how each would refuse."""
        listener = self.listener
        words = f"TLS is {'on' if self.tls else 'off'}, and {'required' if self.needs_tls else 'not required'}"
        yield Asked("listener.require_tls", words, None), reply.NEED_TLS
        words = f"a login is {'required' if listener.require_auth else 'not required'}"
        yield Asked("listener.role", words, None), reply.NEED_AUTH
        most = listener.receive.message_octets
        yield Asked("limits.message_octets", f"at most {most} octets", None), reply.MESSAGE_TOO_BIG
        if listener.rules.sender.stage == "mail":
            yield from self._of_recipient()

    def _of_recipient(self) -> Iterator[tuple[Asked, Kind | None]]:
        for one in self.watched.heard if self.watched is not None else ():
            yield one, None if one.verdict is None else one.verdict.kind


class _Transport:
    """What a session writes to."""

    def __init__(self, client: str, here: str) -> None:
        self._ends = {"peername": (client, 0), "sockname": (here, 0)}
        self._octets = b""

    @property
    def answered(self) -> bool:
        """Whether a whole reply is there."""
        return _REPLY.match(self._octets) is not None

    def take(self) -> tuple[str, ...]:
        """The lines of the first reply."""
        found = _REPLY.match(self._octets)
        assert found is not None
        self._octets = self._octets[found.end() :]
        return tuple(found[0].decode("ascii", "replace").split("\r\n")[:-1])

    def write(self, octets: bytes) -> None:
        self._octets += octets

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._ends.get(name, default)

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class _Hub:
    """A hub with room for everybody, who have asked for nothing yet."""

    budgets: Final = Budgets()

    def open(self, address: str, told: Callable[[Room], None]) -> None:
        told(Room.OK)

    def close(self, address: str) -> None: ...


class _Dispatch:
    """Takes a message and forgets it."""

    def next_id(self) -> QueueId:
        return _ID

    def open_body(self) -> int:
        return os.memfd_create("rehearsal", os.MFD_CLOEXEC)

    def accept(self, envelope: Envelope, content: Content, answer: Callable[[Kind, QueueId], None]) -> None:
        content.close()
        answer(reply.OK_QUEUED, envelope.id)

    def call_out(self, mailbox: Mailbox, told: Callable[[bool | None], None]) -> None:
        """Nobody is asked in a rehearsal."""
        told(None)


class _Uncounted:
    """Metrics that count nothing, whatever is to be counted, by a call or by an item."""

    def __getattr__(self, name: str) -> _Uncounted:
        return self

    def __call__(self, *_: object, **__: object) -> None: ...

    def __getitem__(self, _: object) -> int:
        return 0

    def __setitem__(self, _: object, __: int) -> None: ...


class _Lines:
    """A log that is a list."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append

    def flush(self) -> None: ...
