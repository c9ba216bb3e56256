"""Owns: the connection of a session: the one subclass of ``aiosmtpd.smtp.SMTP``, its hot and faulty methods overridden
together. Octets in, command lines and message blocks handed on, replies out; deadlines, flow control, TLS.

The library's loop (a task, a stream reader and a timer for each connection, one write for each reply, one await for each
line of a message) is replaced by a parser that runs inside ``data_received``; what that gains stands in
``docs/performance.md``, what was wrong with each replaced method in ``docs/decisions.md``.

=========  ====================================================================================================
phase      what the next octets are
=========  ====================================================================================================
greeting   nothing yet: the hub is asked whether there is room; octets wait
command    command lines
data       a message, given to ``receiver``
busy       nothing yet: a reply is being waited for (dispatch, TLS handshake); octets wait, bounded
closed     nothing any more
=========  ====================================================================================================

It must not know what a command means (``inbound.session`` does).
"""

from __future__ import annotations

import asyncio
import ssl
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final

from aiosmtpd.smtp import SMTP

from relay.hub.frames import Verdict as Room
from relay.inbound.receiver import Receiver
from relay.mail import reply
from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.envelope import QueueId
from relay.mail.reply import Kind, OperatorText

if TYPE_CHECKING:
    from relay.inbound.listener import Listener

LINE_OCTETS: Final = 2048
"""Longest command: 512 octets (RFC 5321 §4.5.3.1.4) and what extensions add to it."""

WAITING_OCTETS: Final = 64 * 1024
"""What a client may send ahead while it is owed a reply; then its connection is not read."""

NO_TEXT: Final = OperatorText("")


class Wire(SMTP):
    """One client connection."""

    def __init__(self, listener: Listener) -> None:
        # SMTP.__init__ is not called: its two inspect.getmembers() per connection cost a third of a short session,
        # and what it sets up (stream reader, hooks, timer) is not used here.
        self.listener = listener
        self.transport: Any = None
        self.address = ""
        self.client = ""
        self.tls = ""
        self.trusted = False
        self.deadline = float("inf")
        self.receiver: Receiver | None = None
        self.busy = True
        self.closed = False
        self.commands = 0
        self.messages = 0
        self._out: list[bytes] = []
        self._waiting = b""
        self._running = False
        self._admitted = False
        self._skipping = False
        self._paused = False
        self._ended = False
        self._errors = 0

    def __del__(self) -> None:
        """Nothing: the base class looks for a future that is never made here."""

    @abstractmethod
    def command(self, line: bytes) -> None:
        """One command line, CR LF taken off."""

    @abstractmethod
    def message_complete(self, receiver: Receiver) -> None:
        """The final dot was read."""

    @abstractmethod
    def forget(self) -> None:
        """TLS begins: nothing that was said before counts (RFC 3207 §4.2)."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """True when no transaction is open."""

    # --- the connection ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there; ask the hub for room before a word is said."""
        if self.transport is not None:  # called again by start_tls of some loops
            return
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else "0.0.0.0"
        self.client = f"unknown[{self.address}]"
        listener = self.listener
        self.deadline = listener.now + listener.command_timeout_s
        listener.sessions.add(self)
        listener.log.connect(self.client, listener.name)
        listener.metrics.session_opened(listener.name)
        listener.hub.open(self.address, self._admit)

    def _admit(self, room: Room) -> None:
        """The hub's answer."""
        self._admitted = room is Room.OK
        if self.closed:
            if self._admitted:
                self.listener.hub.close(self.address)
            return
        listener = self.listener
        if room is not Room.OK:
            self.end(reply.SERVICE_BUSY if room is Room.BUSY else reply.CLIENT_BUSY)
        elif listener.draining:
            self.end(reply.SHUTTING_DOWN)
        elif listener.implicit_tls:
            listener.background(self._start_tls())
        else:
            self._greet()

    def _greet(self) -> None:
        self.trusted = self.listener.rules.client.trusted(self.address)
        self.busy = False
        self.transport.write(self.listener.banner)
        if self._waiting:
            self._resume()

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone. A message in the hands of dispatch goes its way without us."""
        self.closed = True
        if self.receiver is not None:
            self.receiver.discard()
            self.receiver = None
        listener = self.listener
        listener.sessions.discard(self)
        if self._admitted:
            self._admitted = False
            listener.hub.close(self.address)
        listener.log.disconnect(self.client, listener.name, self.commands, self.messages, self._errors)
        listener.metrics.session_closed(listener.name)

    def eof_received(self) -> bool:
        """A half-close: whatever is under way is finished and answered, then the connection ends (RFC 9293 §3.6)."""
        self._ended = True
        return self.busy and not self.tls

    def pause_writing(self) -> None:
        """The client does not read its replies: take no more commands from it."""
        self._paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        if not self.closed and len(self._waiting) <= WAITING_OCTETS:
            self.transport.resume_reading()

    def expire(self) -> None:
        """The listener's sweep found this session past its deadline."""
        self.end(reply.TIMED_OUT)

    def shut_down(self) -> None:
        """The relay ends now, whatever the session waits for: nothing it was not told 250 for is promised."""
        self.end(reply.SHUTTING_DOWN)

    def drain(self) -> None:
        """The relay stops: idle sessions end now, the others after the reply they wait for."""
        if not self.busy and self.receiver is None and self.idle:
            self.end(reply.SHUTTING_DOWN)

    def data_received(self, data: bytes) -> None:
        """Octets from the client."""
        listener = self.listener
        if self.busy:
            self._waiting += data
            if len(self._waiting) > WAITING_OCTETS:
                self.transport.pause_reading()
            return
        self.deadline = listener.now + (
            listener.command_timeout_s if self.receiver is None else listener.data_timeout_s
        )
        if self._waiting:
            data, self._waiting = self._waiting + data, b""
        try:
            self._run(data)
        except Exception as error:  # noqa: BLE001 - the task boundary of a session: it must answer and go
            listener.log.alarm("session_fault", client=self.client, error=repr(error))
            self.end(reply.SHUTTING_DOWN if listener.draining else reply.SESSION_FAULT)

    def _resume(self) -> None:
        """Go on with what came while the session was busy."""
        data, self._waiting = self._waiting, b""
        if not self._paused:
            self.transport.resume_reading()
        self.data_received(data)

    def _run(self, data: bytes) -> None:
        """Work through ``data``; replies of a pipelined group leave in one write (RFC 2920 §3.2)."""
        position, size = 0, len(data)
        self._running = True
        while position < size:
            if self.receiver is not None:
                end = self.receiver.feed(data[position:] if position else data)
                if end < 0:
                    position = size
                    break
                position += end
                self.message_complete(self.receiver)
            else:
                end = data.find(b"\n", position)
                if end < 0:
                    if size - position > LINE_OCTETS:
                        self._skipping = True
                        position = size
                    elif self._skipping:
                        position = size
                    break
                end += 1
                if self._skipping or end - position > LINE_OCTETS:
                    self._skipping = False
                    self.say(reply.LINE_TOO_LONG)
                else:
                    self.commands += 1
                    if data[end - 2 : end - 1] != b"\r" or data.find(b"\r", position, end - 2) >= 0:
                        self.say(reply.BARE_NEWLINE)  # RFC 5321 §2.3.8
                    else:
                        self.command(data[position : end - 2])
                position = end
            if self.busy or self.closed:
                break
        self._running = False
        if position < size and not self.closed:
            self._waiting = data[position:] + self._waiting
        if self._out:
            self._flush()

    def _flush(self) -> None:
        out = self._out
        self._out = []
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(out[0] if len(out) == 1 else b"".join(out))

    def say(self, kind: Kind, mailbox: Mailbox = NULL_SENDER, text: OperatorText | QueueId = NO_TEXT) -> None:
        """Queue a reply and count it."""
        if kind.code >= 400:
            if self.listener.soft_bounce:
                kind = self.listener.softened(kind)
            self.refuse(kind, kind.fixed or kind.wire(mailbox, text))
            return
        self.listener.metrics.replied(kind)
        self._out.append(kind.fixed or kind.wire(mailbox, text))

    def refuse(self, kind: Kind, line: bytes) -> None:
        """Queue a refusal, count it, and end the session when its error budget is spent."""
        listener = self.listener
        self._errors += 1
        listener.metrics.replied(kind)
        self._out.append(line)
        if self._errors == listener.errors and kind.code != 421:
            self.end(reply.TOO_MANY_ERRORS)

    def end(self, kind: Kind) -> None:
        """Say a last word and close."""
        if self.closed:
            return
        self.closed = True
        self.busy = False
        self.listener.metrics.replied(kind)
        if self.tls or not self.listener.implicit_tls:
            self._out.append(kind.wire())
            self._flush()
        self.transport.close()

    def answered(self) -> None:
        """What made the session busy is over and answered: go on with what waits."""
        listener = self.listener
        self.deadline = listener.now + listener.command_timeout_s
        if self._running or self.closed:  # answered before the loop in _run came back to see
            return
        self._flush()
        if self._ended:
            self.end(reply.BYE)
        elif listener.draining:
            self.end(reply.SHUTTING_DOWN)
        elif self._waiting:
            self._resume()

    # --- TLS -----------------------------------------------------------------------------------------------------------

    def upgrade(self) -> None:
        """Start the handshake after the reply to STARTTLS."""
        self.busy = True
        self._flush()
        self.listener.background(self._start_tls())

    async def _start_tls(self) -> None:
        """The handshake. All that was said or sent before it in the clear is forgotten (RFC 3207 §4.2)."""
        listener = self.listener
        context = listener.tls
        assert context is not None
        self.busy = True
        self.deadline = float("inf")  # the handshake has its own
        loop = asyncio.get_running_loop()
        self._waiting = b""
        try:
            transport = await loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=listener.handshake_timeout_s
            )
        except (OSError, ssl.SSLError, TimeoutError) as error:
            listener.log.tls_failed(self.client, str(error))
            self.transport.close()
            return
        if transport is None or self.closed:
            return
        self.transport = transport
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        cipher = tls.cipher()
        self.tls = f"{tls.version()} {cipher[0] if cipher else ''}"
        listener.log.tls(self.client, tls.version() or "", cipher[0] if cipher else "")
        self.forget()
        self.deadline = listener.now + listener.command_timeout_s
        if listener.implicit_tls:
            self._greet()
            return
        self.busy = False
        if self._waiting:
            self._resume()
