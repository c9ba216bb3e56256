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
from relay.inbound.chunks import Chunk, is_chunk
from relay.inbound.receiver import Receiver
from relay.mail import reply
from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.envelope import QueueId
from relay.mail.reply import Kind, OperatorText
from relay.net.tls import feed
from relay.policy.abuse import RULES, Budget

if TYPE_CHECKING:
    from relay.inbound.listener import Listener

LINE_OCTETS: Final = 2048
"""Longest command: 512 octets (RFC 5321 §4.5.3.1.4) and what extensions add to it."""

WAITING_OCTETS: Final = 64 * 1024
"""What a client may send ahead while it is owed a reply; then its connection is not read."""

REPLIES_AT_ONCE: Final = 256
"""Commands of one block that are answered before others have their turn: what a client gets that sends 256 KB of NOOP
and reads nothing stays small, and is noticed before more is made."""

LAST_WORD_S: Final = 10.0
"""A client that has not taken its last reply by then is cut off: closing waits for what is still to be sent."""

NO_TEXT: Final = OperatorText("")


class Wire(SMTP):
    """One client connection."""

    # Of few sessions: what stands here costs the others nothing.
    exempt = False
    opened = 0.0
    _held: tuple[bytes, ...] = ()
    _greeted = False
    _paced: Receiver | Chunk | None = None
    _credit_s = 0.0
    _seen = 0

    def __init__(self, listener: Listener) -> None:
        # SMTP.__init__ is not called: its two inspect.getmembers() per connection cost a third of a short session,
        # and what it sets up (stream reader, hooks, timer) is not used here.
        self.listener = listener
        self.transport: Any = None
        self.address = ""
        self.client = ""
        self.came_from = ""
        self.tls = ""
        self.trusted = False
        self.needs_tls = False
        self.deadline = float("inf")
        self.receiver: Receiver | Chunk | None = None
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
        self._yielded = False
        self._errors = 0
        self._excused = 0

    def __del__(self) -> None:
        """Nothing: the base class looks for a future that is never made here."""

    @abstractmethod
    def command(self, line: bytes) -> None:
        """One command line, CR LF taken off."""

    @abstractmethod
    def message_complete(self, receiver: Receiver | Chunk) -> None:
        """The final dot was read, or the last octet of a chunk."""

    @abstractmethod
    def forget(self) -> None:
        """TLS begins: nothing that was said before counts (RFC 3207 §4.2). Or the session is over: let go of everything."""

    @abstractmethod
    def may_be_long(self, line: bytes) -> bool:
        """Whether a line of more than ``LINE_OCTETS``, or what there is of it, may still be taken."""

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
        self.address = self.came_from or (str(peer[0]) if peer else "0.0.0.0")
        self.client = f"unknown[{self.address}]"
        listener = self.listener
        self.opened = listener.now
        self.deadline = listener.now + listener.command_timeout_s
        listener.sessions.add(self)
        listener.entered()
        listener.hub.open(self.address, self._admit)

    def _admit(self, room: Room) -> None:
        """The hub's answer."""
        listener = self.listener
        if self.closed:
            if room is Room.OK:
                listener.hub.close(self.address)
            return
        if room is not Room.OK:
            self._turn_away(*_NO_ROOM[room])
            return
        self._admitted = True
        listener.log.connect(self.client, listener.name)
        listener.metrics.session_opened(listener.name)
        if listener.draining:
            self.end(reply.SHUTTING_DOWN)
        elif len(listener.sessions) > listener.room:
            self._turn_away(reply.SERVICE_BUSY, "open files")
        elif listener.connection_rate and not listener.in_time(self.address):
            self._turn_away(reply.CONNECTION_RATE, RULES[Budget.CONNECTIONS])
        elif listener.implicit_tls:
            self.transport.pause_reading()  # what comes from now on must wait for the TLS layer, which reads on
            listener.background(self._start_tls())
        else:
            self._greet()

    def _turn_away(self, kind: Kind, rule: str) -> None:
        self.listener.log.reject(
            self.client, "CONNECT", kind.line(), kind.reason, rule, NULL_SENDER, None, "SMTP", ""
        )  # fmt: skip
        self.end(kind)

    def _greet(self) -> None:
        listener = self.listener
        self.trusted = listener.rules.client.trusted(self.address)
        self.needs_tls = listener.require_tls or listener.tls_networks.trusted(self.address)
        self.exempt = self.trusted and listener.trusted_exempt
        if (
            listener.greet_pause_s
            and not self.exempt
            and not listener.implicit_tls  # there the client has talked first, as it should
            and listener.delay(self, listener.greet_pause_s)
        ):
            self.deadline = float("inf")
            return
        self._greeted = True
        self.busy = False
        self.transport.write(listener.banner)
        self._go_on()

    def go_ahead(self) -> None:
        """A pause is over: of the greeting, or of replies that were held back."""
        if self.closed:
            return
        listener = self.listener
        if not self._greeted:
            if self._waiting:
                self._turn_away(
                    listener.softened(reply.EARLY_TALKER) if listener.soft_bounce else reply.EARLY_TALKER,
                    "limits.greet_pause_s",
                )
                return
            self._greeted = True
            self._held = (listener.banner,)
        self._out = [*self._held, *self._out]
        self._held = ()
        self.busy = False
        self.answered()

    def keeps_pace(self, passed_s: float) -> bool:
        """Whether the message comes at ``limits.data_rate`` on average; a client may be behind by the time-out for a block.
        The sweep asks, so a message that is there within half a second is never looked at.
        """
        receiver, listener = self.receiver, self.listener
        assert receiver is not None
        if self._paced is not receiver:
            self._paced, self._credit_s, self._seen = receiver, listener.data_timeout_s, receiver.octets
            return True
        gained = (receiver.octets - self._seen) / listener.data_rate
        self._seen = receiver.octets
        self._credit_s = min(self._credit_s + gained, listener.data_timeout_s) - passed_s
        return self._credit_s > 0

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone. A message in the hands of dispatch goes its way without us."""
        if self not in self.listener.sessions:  # told before, when TLS failed
            return
        self.closed = True
        if self.receiver is not None:
            self.receiver.discard()
            self.receiver = None
        self.forget()
        listener = self.listener
        listener.sessions.discard(self)
        listener.left()
        if self._admitted:
            self._admitted = False
            listener.hub.close(self.address)
            listener.log.disconnect(self.client, listener.name, self.commands, self.messages, self._errors)
            listener.metrics.session_closed(listener.name)

    def eof_received(self) -> bool:
        """A half-close: whatever came before it is finished and answered, then the connection ends (RFC 9293 §3.6)."""
        self._ended = True
        return self.busy and not self.tls

    def pause_writing(self) -> None:
        """The client does not read its replies: take no more commands from it."""
        self._paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        self._take_turn()
        self._read_on()

    def _read_on(self) -> None:
        """Read from the client again, unless it is ahead of us already or behind with its own reading."""
        if not self._paused and not self.closed and len(self._waiting) <= WAITING_OCTETS:
            self.transport.resume_reading()

    def expire(self, kind: Kind) -> None:
        """The listener's sweep found this session past its deadline."""
        if self.closed:
            self.transport.abort()
        else:
            self.end(kind)

    def drain(self) -> None:
        """The relay stops: idle sessions end now, the others after the reply they wait for."""
        if not self.busy and self.receiver is None and self.idle:
            self.end(reply.SHUTTING_DOWN)

    def data_received(self, data: bytes) -> None:
        """Octets from the client."""
        listener = self.listener
        if self.closed:
            return
        if self.busy:
            self._waiting += data
            if len(self._waiting) > WAITING_OCTETS:
                self.transport.pause_reading()
            return
        if self.receiver is not None:
            self.deadline = listener.now + listener.data_timeout_s
        elif b"\n" in data:  # a command, not the next octet of one that never ends
            self.deadline = listener.now + listener.command_timeout_s
        if self._waiting:
            data, self._waiting = self._waiting + data, b""
        try:
            self._run(data)
        except Exception as error:  # noqa: BLE001 - the task boundary of a session: it must answer and go
            listener.log.alarm("session_fault", client=self.client, error=repr(error))
            self.end(reply.SHUTTING_DOWN if listener.draining else reply.SESSION_FAULT)

    def _go_on(self) -> None:
        """Work through what came while the session was busy; then, after a half-close, nothing is left to do."""
        if self._waiting:
            data, self._waiting = self._waiting, b""
            self.data_received(data)
            self._read_on()
        if self._ended and not self.busy and not self.closed:
            self.transport.close()

    def _take_turn(self) -> None:
        """Go on with a long group of commands, others having had their turn and the client its replies."""
        if self._yielded and not self._paused and not self.closed:
            self._yielded = self.busy = False
            self._go_on()

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
                    if size - position > LINE_OCTETS and not self.may_be_long(data[position:]):
                        self._skipping = True
                        if is_chunk(data, position):
                            self._cannot_read(reply.LINE_TOO_LONG, data, position)
                        position = size
                    elif self._skipping:
                        position = size
                    break
                end += 1
                if self._skipping or (end - position > LINE_OCTETS and not self.may_be_long(data[position:end])):
                    self._skipping = False
                    self._cannot_read(reply.LINE_TOO_LONG, data, position)
                else:
                    self.commands += 1
                    if data[end - 2 : end - 1] != b"\r" or data.find(b"\r", position, end - 2) >= 0:
                        self._cannot_read(reply.BARE_NEWLINE, data, position)  # RFC 5321 §2.3.8
                    else:
                        self.command(data[position : end - 2])
                position = end
            if self.busy or self.closed or len(self._out) >= REPLIES_AT_ONCE:
                break
        self._running = False
        if position < size and not self.closed:
            self._waiting = data[position:] + self._waiting
            if not self.busy and len(self._out) >= REPLIES_AT_ONCE:
                self._yielded = self.busy = True
                asyncio.get_running_loop().call_soon(self._take_turn)
        if self._out:
            self._flush()

    def _cannot_read(self, why: Kind, data: bytes, at: int) -> None:
        """A line that is no command. Behind BDAT octets follow, and how many was not heard."""
        self.say(why)
        if is_chunk(data, at):
            self.end(reply.OUT_OF_STEP)

    def _flush(self) -> None:
        out = self._out
        if len(out) == 1 and not self.closed:
            line = out.pop()
            if not self.transport.is_closing():
                self.transport.write(line)
            return
        self._out = []
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(out[0] if len(out) == 1 else b"".join(out))

    def say(self, kind: Kind, mailbox: Mailbox = NULL_SENDER, text: OperatorText | QueueId = NO_TEXT) -> None:
        """Queue a reply and count it."""
        if kind.code >= 400:
            said = self.listener.softened(kind) if self.listener.soft_bounce else kind
            self.refuse(kind, said, said.fixed or said.wire(mailbox, text))
            return
        self.listener.metrics.replies[kind] += 1
        self._out.append(kind.fixed or kind.wire(mailbox, text))

    def refuse(self, kind: Kind, said: Kind, line: bytes) -> None:
        """Queue a refusal, count it, and end the session when its error budget is spent.

        ``kind`` is what was decided, ``said`` what ``soft_bounce`` made of it. A 4xx is no fault of the client and does
        not spend the budget: one that names more recipients than fit must still get the first ones through (RFC 5321
        §4.5.3.1.10), and one that meets a full disk has done nothing wrong.
        """
        listener = self.listener
        self._errors += 1
        if kind.code < 500:
            self._excused += 1
        listener.metrics.replies[said] += 1
        self._out.append(line)
        if 0 < listener.errors <= self._errors - self._excused:
            self.end(reply.TOO_MANY_ERRORS)
        elif self._errors > listener.tarpit_after and not self.exempt and listener.delay(self, listener.tarpit_s):
            self._held, self._out = tuple(self._out), []
            self.busy = True
            self.deadline = float("inf")

    def end(self, kind: Kind) -> None:
        """Say a last word and close."""
        if self.closed:
            return
        self.closed = True
        self.busy = False
        self.deadline = self.listener.now + LAST_WORD_S
        self.listener.metrics.replied(kind)
        if self._held:
            self._out = [*self._held, *self._out]
            self._held = ()
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
        if listener.draining:
            self.end(reply.SHUTTING_DOWN)
        else:
            self._go_on()

    def wait(self) -> None:
        """What comes next from the client waits, until ``answered``, for an answer that comes in bounded time."""
        self.busy = True
        self.deadline = float("inf")

    # --- TLS -----------------------------------------------------------------------------------------------------------

    def upgrade(self) -> None:
        """Start the handshake after the reply to STARTTLS."""
        self.busy = True
        # What comes before the reply is dropped, what comes after it must wait for the TLS layer, which reads on.
        self.transport.pause_reading()
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
        early, self._waiting = self._waiting, b""
        upgrade = loop.create_task(
            loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=listener.handshake_timeout_s
            )
        )
        if listener.implicit_tls and early:
            # The client's first octets came while the hub was asked. They belong to TLS, not to the session.
            await asyncio.sleep(0)  # start_tls has changed the protocol and asked the loop to begin with it
            loop.call_soon(feed, self.transport.get_protocol(), early)
        try:
            transport = await upgrade
        except OSError as error:  # SSLError and TimeoutError are OSErrors
            self._tls_failed(str(error) or type(error).__name__)
            return
        tls: ssl.SSLObject | None = None if transport is None else transport.get_extra_info("ssl_object")
        if transport is None or tls is None or self.closed:
            self._tls_failed("connection lost")
            return
        self.transport = transport
        cipher = tls.cipher()
        self.tls_is_up(tls.version() or "", cipher[0] if cipher else "", resumed=bool(tls.session_reused))

    def tls_is_up(self, version: str, cipher: str, *, resumed: bool = False) -> None:
        """The handshake is over: the session begins anew."""
        listener = self.listener
        self.tls = f"{version} {cipher}"
        listener.log.tls(self.client, version, cipher, resumed=resumed)
        self.forget()
        self.deadline = listener.now + listener.command_timeout_s
        if listener.implicit_tls:
            self._greet()
            return
        self.busy = False
        self._go_on()

    def _tls_failed(self, why: str) -> None:
        """The session ends here: the TLS layer tells nobody of a connection that is lost during its handshake."""
        if not self.closed:
            self.listener.log.tls_failed(self.client, why)
        self.transport.abort()
        if self in self.listener.sessions:
            self.connection_lost(None)


_NO_ROOM: Final = {
    Room.BUSY: (reply.SERVICE_BUSY, "limits.sessions"),
    Room.CLIENT_BUSY: (reply.CLIENT_BUSY, "limits.sessions_per_client"),
}
