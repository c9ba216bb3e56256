"""Owns: one listener: what its sessions share, the sockets' servers, the sweep that ends sessions past their deadline.

The sweep is also what ends pauses (greeting, tarpit) and sees whose message comes too slowly: no session has a timer.

Values that a reload may change are attributes read at each use, so open sessions follow the new configuration.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from relay.auth.client import AuthClient
from relay.config import schema
from relay.config.auth import Mechanism
from relay.config.schema import Config, Role
from relay.directory.snapshot import Directory
from relay.dispatch import Dispatch
from relay.hub.client import HubClient
from relay.inbound.receiver import Limits
from relay.inbound.transaction import Rules
from relay.mail.reply import TIMED_OUT, TOO_LONG, TOO_SLOW, Kind
from relay.mail.trace import date
from relay.policy.abuse import Budget
from relay.policy.client import ClientRules
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from relay.inbound.wire import Wire

SWEEP_S: Final = 0.5
"""How often deadlines are looked at; a session ends at most this much late."""

UNLIMITED: Final = 1 << 60
"""More than there can be of anything, octets, sessions or seconds."""


def _nothing() -> None: ...


class Listener:
    """What all sessions of one ``[[listener]]`` share."""

    def __init__(
        self,
        listener: schema.Listener,
        config: Config,
        *,
        directory: Directory,
        dispatch: Dispatch,
        hub: HubClient,
        log: MailLog,
        metrics: Metrics,
        tls: ssl.SSLContext | None,
        binding: bytes,
        logins: AuthClient,
    ) -> None:
        self.name = listener.name
        self.directory = directory
        self.dispatch = dispatch
        self.hub = hub
        self.log = log
        self.metrics = metrics
        self.logins = logins
        self._verifiable: Sequence[Mechanism] = ()
        self.sessions: set[Wire] = set()
        self.draining = False
        self.clock = time.monotonic
        self.now = time.monotonic()
        self.next_id = dispatch.next_id
        self._softened: dict[Kind, Kind] = {}
        self._date = ""
        self._date_until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._largest: int | None = None
        self.budgets = hub.budgets
        self.blocked = hub.budgets.blocked
        self.delayed: dict[Wire, float] = {}
        self.memory_low = False
        self.room = UNLIMITED
        self.entered: Callable[[], None] = _nothing
        self.left: Callable[[], None] = _nothing
        """Told of each session, when there are doors to be watched (``inbound.doors``)."""
        self._stressed = False
        self.configure(listener, config, tls, binding)

    def configure(self, listener: schema.Listener, config: Config, tls: ssl.SSLContext | None, binding: bytes) -> None:
        """Take over a (new) configuration. ``binding``: digest of the certificate (RFC 5929 §4), empty without."""
        limits = config.limits
        self.hostname = config.server.hostname
        self.soft_bounce = config.server.soft_bounce
        self.tls = tls
        self.implicit_tls = listener.role is Role.SUBMISSIONS
        self.require_tls = listener.role is Role.SUBMISSION or listener.require_tls
        self.tls_networks = ClientRules(listener.require_tls_from)
        self.balancers = ClientRules(listener.proxy_protocol) if listener.proxy_protocol else None
        self.require_auth = listener.role is not Role.MX
        self.takes_logins = listener.takes_logins and tls is not None and bool(config.auth.stores)
        self.show_login = config.auth.show_login
        self.binding = binding
        self._limits = limits
        self.session_timeout_s = limits.session_timeout_s or float("inf")
        self.greet_pause_s = limits.greet_pause_s
        self.tarpit_after = limits.tarpit_after if limits.tarpit_s else UNLIMITED
        self.tarpit_s = limits.tarpit_s
        self.tarpit_sessions = limits.tarpit_sessions
        self.connection_rate = limits.connections_per_minute
        self.message_rate = limits.messages_per_minute
        self.trusted_exempt = limits.trusted_exempt
        self.data_rate = limits.data_rate
        self._set_pace()
        self.guarded = self.memory_low or self.message_rate > 0
        self.rules = Rules.of(config)
        self.receive = Limits(
            limits.message_octets, limits.header_octets, config.content.line_endings, self.rules.header
        )
        self.receive.spare = limits.memory_octets or UNLIMITED
        self.banner = f"220 {self.hostname} ESMTP\r\n".encode("ascii")
        self.offer(self._largest)

    def _set_pace(self) -> None:
        """How long clients are waited for, and how many errors they have: less under stress."""
        limits = self._limits
        most_s = limits.stress_timeout_s if self._stressed else UNLIMITED
        self.command_timeout_s = min(limits.command_timeout_s, most_s)
        self.data_timeout_s = min(limits.data_timeout_s, most_s)
        self.handshake_timeout_s = min(limits.tls_handshake_timeout_s, most_s)
        self.errors = limits.errors or -1  # 0 is off, under stress too
        if self._stressed:
            self.errors = min(self.errors, limits.stress_errors)

    def strain(self, *, stressed: bool, memory_low: bool, spare: int, room: int) -> None:
        """What the worker is short of. ``spare``: octets of memory for messages; ``room``: sessions there are
        descriptors for.
        """
        self.receive.spare = spare
        self.memory_low = memory_low
        self.guarded = memory_low or self.message_rate > 0
        self.room = len(self.sessions) + room
        if stressed != self._stressed:
            self._stressed = stressed
            self._set_pace()
            if stressed:  # those who are silent now are the ones whose places are needed
                latest = self.now + self.command_timeout_s
                for session in self.sessions:
                    if latest < session.deadline < UNLIMITED:
                        session.deadline = latest

    def held(self) -> int:
        """Octets in memory of messages on their way in."""
        return sum(session.receiver.held for session in self.sessions if session.receiver is not None)

    def in_time(self, address: str) -> bool:
        """Whether a client may connect once more within this minute."""
        if self.trusted_exempt and self.rules.client.trusted(address):
            return True
        return self.budgets.may(Budget.CONNECTIONS, address, self.now)

    def delay(self, session: Wire, seconds: float) -> bool:
        """Have the sweep call ``session.go_ahead`` after so long; False when too many wait already."""
        if len(self.delayed) >= self.tarpit_sessions:
            return False
        self.delayed[session] = self.now + seconds
        return True

    def offer(self, largest: int | None) -> None:
        """Say in EHLO what is taken. ``largest``: no next hop of the own domains takes more octets; None: not known. Who
        may send elsewhere is told the relay's own limit (row T6).
        """
        self._largest = largest
        own = self.receive.message_octets
        self.offered = own if largest is None else min(own, largest)
        # Channel binding needs a certificate that it can be bound to.
        self.mechanisms = tuple(
            one
            for one in self._verifiable
            if self.takes_logins and (self.binding or one is not Mechanism.SCRAM_SHA_256_PLUS)
        )
        self.ehlo, self.ehlo_in_tls = self._ehlos(self.offered)
        self.ehlo_trusted, self.ehlo_trusted_in_tls = self._ehlos(own)

    def verify(self, mechanisms: Sequence[Mechanism]) -> None:
        """The hub says what its stores can verify now."""
        self._verifiable = mechanisms
        self.offer(self._largest)

    def _ehlos(self, size: int) -> tuple[bytes, bytes]:
        """Without and in TLS."""
        offers = ["PIPELINING", f"SIZE {size}", "8BITMIME", "ENHANCEDSTATUSCODES", "DSN", "SMTPUTF8", "CHUNKING"]
        offers.append(f"LIMITS RCPTMAX={self.rules.recipients}")  # RFC 9422; there is no MAILMAX to tell
        auth = [f"AUTH {' '.join(self.mechanisms)}"] if self.mechanisms else []
        clear = self._ehlo([*offers, "STARTTLS"] if self.tls is not None else offers)
        return clear, self._ehlo([*offers, *auth])

    def _ehlo(self, offers: list[str]) -> bytes:
        lines = [f"250-{text}" for text in (self.hostname, *offers[:-1])]
        return "\r\n".join([*lines, f"250 {offers[-1]}", ""]).encode("ascii")

    def softened(self, kind: Kind) -> Kind:
        """The 4xx twin of a 5xx (row O12), made once for each of the relay's own kinds."""
        soft = self._softened.get(kind)
        if soft is None:
            soft = kind.softened()
            if len(self._softened) < 256:  # the relay's own kinds are fewer; next hops' are made anew each time
                self._softened[kind] = soft
        return soft

    def date(self) -> str:
        """The date of the trace header, made once a second."""
        now = time.time()
        if now >= self._date_until:
            self._date = date(now, time.localtime(now).tm_gmtoff)
            self._date_until = int(now) + 1.0
        return self._date

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` to its end; kept alive here."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def sweep(self) -> None:
        """Advance the coarse clock and end sessions past their deadline; the worker calls this every SWEEP_S."""
        past = self.now
        self.now = now = self.clock()
        oldest = now - self.session_timeout_s
        if self.delayed:
            for session in [s for s, due in self.delayed.items() if due <= now]:
                del self.delayed[session]
                session.go_ahead()
        late = []
        for session in self.sessions:
            if session.deadline < now:
                late.append((session, TIMED_OUT))
            elif session.closed:
                continue  # it has its last word still to take
            elif session.receiver is not None and self.data_rate and not session.keeps_pace(now - past):
                late.append((session, TOO_SLOW))
            elif session.opened < oldest and not session.busy:
                late.append((session, TOO_LONG))
        for session, kind in late:
            session.expire(kind)

    def drain(self) -> None:
        """Say 421 to whoever is idle; the others end after what they wait for."""
        self.draining = True
        for session in list(self.sessions):
            session.drain()
