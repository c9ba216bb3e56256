"""Owns: one next hop: its connections, how many at once, whether it is healthy, who waits for it.

States: *up*; *down* after ``delivery.failures`` failed connections in a row. From ``retry_at`` on one connection probes,
opened by the sweep or by queued mail; no client waits for it. A connection that comes about, or an answer on an older one,
is the end of *down*. A 421 lowers the limit to what worked. Slow start: a lowered limit doubles with every full round of
answers. *Proven*: since the last connection that failed one came about; whoever was told of that failure may come back.
It must not judge answers about mail; only connections count as failures here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Literal

from relay.config.schema import Config
from relay.control import HopSecret
from relay.mail.answer import Answer, Stage
from relay.outbound.attempt import Attempt
from relay.outbound.client import Connection
from relay.outbound.connect import ConnectFailed, TlsFailed, connect
from relay.outbound.pace import HELD_BACK, Pace, pace_of
from relay.outbound.peer import NO_SECRETS, peer_of
from relay.policy.outcome import classify, classify_foreign
from relay.policy.route import NextHop
from relay.telemetry.maillog import MailLog

BACKOFF_S: Final = 60.0
"""Longest wait before a next hop that is down is tried again."""
MX_IDLE_S: Final = 10.0
"""A connection to a mail exchanger that is idle for longer is closed: others need the place, there and here."""
MX_LABEL: Final = "mx"
"""Label in metrics of all hosts found by MX: their names are everybody's, and without end."""
HESITATION_S: Final = 1.0
"""A next hop that has not proven itself and takes longer than this to connect to gets no more queued mail to keep waiting,
for that would fill the queue's window."""
PLAIN_AFTER_TLS_FAILURE_S: Final = 600.0
"""How long opportunistic TLS is left alone with a next hop whose STARTTLS failed."""


class Lane:
    """All that one worker knows of one next hop."""

    def __init__(
        self, next_hop: NextHop, config: Config, live_workers: int, log: MailLog,
        origin: Literal["route", "mx"] = "route", secrets: Mapping[str, HopSecret] = NO_SECRETS,
    ) -> None:  # fmt: skip
        self.next_hop = next_hop
        self.name = next_hop.name
        self.origin = origin
        self.label = next_hop.name if origin == "route" else MX_LABEL
        self._level = "error" if origin == "route" else "info"  # what others run is not the operator's to mend
        self.classify = classify if origin == "route" else classify_foreign
        self.addresses: tuple[str, ...] = ()
        self.retired: Callable[[Lane], None] | None = None
        self.used = 0.0
        self.largest: int | None = None
        """What its SIZE said: the largest message in octets, 0 for no limit; None before the first connection."""
        self.log = log
        self.now: Callable[[], float] = time.monotonic
        self.retry_at = 0.0
        self.last_failure: Answer | None = None
        self.misconfigured = ""
        self.draining = False
        self.proven = False
        self.back: Callable[[Lane], None] = _nobody
        """Told each time the next hop proves itself again."""
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._opening_since = 0.0
        self._express: deque[Attempt] = deque()
        self._queued: deque[Attempt] = deque()
        self._turn = False
        self._failures = 0
        self._backoff = 1.0
        self._successes = 0
        self._plain_until = 0.0
        self._secrets = secrets
        self._pace: Pace | None = None
        self._limit = 1
        self._full_limit = 1
        self.configure(config, live_workers)
        self._limit = self._full_limit

    def configure(self, config: Config, live_workers: int, secrets: Mapping[str, HopSecret] | None = None) -> None:
        """Take over a (new) configuration, or another number of workers to share the limit with."""
        if secrets is not None:
            self._secrets = secrets
        delivery = config.delivery
        self.hostname = config.server.hostname
        self.connect_timeout_s = delivery.connect_timeout_s
        self.command_timeout_s = delivery.command_timeout_s
        self.final_reply_timeout_s = delivery.final_reply_timeout_s
        self.eight_bit = delivery.eight_bit
        self._reuse_s = delivery.reuse_s
        self._idle_s = delivery.idle_s if self.origin == "route" else min(delivery.idle_s, MX_IDLE_S)
        self._max_failures = delivery.failures
        self._first_retry_s = config.queue.retry_s[0]
        self.peer = peer_of(self.next_hop, config, self._secrets)
        self._pace = pace_of(self.next_hop, config, live_workers, self.now(), self._pace)
        full = max(1, delivery.concurrency // max(1, live_workers))
        if self._limit >= self._full_limit:
            self._limit = full
        self._full_limit = full
        self._limit = min(self._limit, full)
        if self._pace is None and self._idle and (self._express or self._queued):
            self._next_turns(None, self.now())  # there was a pace, and they waited for it

    # --- asking for a delivery ---------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """False while the circuit breaker is open: express mail does not come here."""
        return not self.retry_at

    @property
    def worth_trying(self) -> bool:
        """True when queued mail may be handed in: up, or due to be probed."""
        return not self.retry_at or self.now() >= self.retry_at

    @property
    def hesitates(self) -> bool:
        """True while the first connection for long, or since the last failure, takes its time."""
        return not self.proven and bool(self._opening) and self.now() - self._opening_since > HESITATION_S

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    def has_room(self) -> bool:
        """True when an express message finds a slot now or in the next round: at most one waits for each slot."""
        if self.draining or not self.up:
            return False
        if self._pace is not None and (self._express or self._queued or not self._pace.free(self.now())):
            return False
        return bool(self._idle) or len(self._express) < self._limit

    def puts_off(self, *, expired: bool) -> Answer | None:
        """Why queued mail is not to be handed in now, None when it is. ``expired``: it will not be tried again."""
        if not self.worth_trying or (self.hesitates and not expired):
            return self.failure()
        if self._pace is not None and not expired and self._pace.holds(len(self._express) + len(self._queued)):
            return HELD_BACK
        return None

    def turn_in_s(self) -> float:
        """How long until the turn of a message that was held back; each asked for is one of its own."""
        if self._pace is None:
            return 0.0
        now = self.now()
        return self._pace.book(now, len(self._express) + len(self._queued)) - now

    def submit(self, attempt: Attempt, *, express: bool) -> None:
        """Deliver as soon as a connection is free; ``attempt.done`` is called in every case."""
        if self._pace is not None:
            self._submit_paced(self._pace, attempt, self._express if express else self._queued)
            return
        now = self.now()
        while self._idle:
            connection = self._idle.pop()
            if now - connection.opened > self._reuse_s or connection.transport.is_closing():
                connection.quit()
                continue
            connection.start(attempt, now)
            return
        if not self.worth_trying:
            attempt.done([self.failure()] * len(attempt.recipients), self.label)
            return
        (self._express if express else self._queued).append(attempt)
        self._open_more()

    def _submit_paced(self, pace: Pace, attempt: Attempt, line: deque[Attempt]) -> None:
        """The same behind those who wait; the sweep goes on when the next turn comes."""
        if not self._idle and not self.worth_trying:
            attempt.done([self.failure()] * len(attempt.recipients), self.label)
            return
        line.append(attempt)
        self._next_turns(pace, self.now())

    def withdraw(self, attempt: Attempt) -> bool:
        """Take back an attempt that still waits for a connection; False when it is under way or over."""
        for waiting in (self._express, self._queued):
            if attempt in waiting:
                waiting.remove(attempt)
                return True
        return False

    def turn_away(self) -> None:
        """Queued mail that has waited for a connection for longer than connecting may take goes back to the queue."""
        before = self.now() - (self.connect_timeout_s if self.proven else min(self.connect_timeout_s, HESITATION_S))
        answer = Answer(Stage.CONNECT, 0, "", "no connection became free")
        for attempt in [waiting for waiting in self._queued if waiting.started < before]:
            self._queued.remove(attempt)
            attempt.done([answer] * len(attempt.recipients), self.label)

    def failure(self) -> Answer:
        """Why nothing can be delivered now."""
        if self.hesitates and self.up:
            return Answer(Stage.CONNECT, 0, "", "no connection yet")
        return self.last_failure or Answer(Stage.CONNECT, 0, "", "next hop is down")

    def again(self, attempt: Attempt) -> None:
        """An idle connection was already dead when it was used: take another."""
        self.submit(attempt, express=True)

    # --- connections ---------------------------------------------------------------------------------------------------

    def _open_more(self) -> None:
        if self.retired is not None:
            self.retired(self)
        wanted = len(self._express) + len(self._queued)
        if self.retry_at:  # one probe, even when an old connection hangs
            wanted, limit = min(wanted, 1), self._full_limit
        else:
            limit = self._limit
        while len(self._opening) < wanted and len(self._connections) + len(self._opening) < limit:
            self._open_one()

    def _open_one(self) -> None:
        if not self._opening:
            self._opening_since = self.now()
        task = asyncio.get_running_loop().create_task(self._open())
        self._opening.add(task)

    async def _open(self) -> None:
        opened = await self._connect()
        # Here and not in a callback: what follows may ask at once how many are being opened.
        self._opening.discard(asyncio.current_task())
        if isinstance(opened, Answer):
            self._refused(opened)
            return
        self._connections.add(opened)
        self.largest = opened.capabilities.size
        self._failures = 0
        if self.retry_at:
            self._limit = len(self._connections)  # 1, unless older ones hang: the probe is not one too many
            self._come_up()
        self.released(opened)
        if not self.proven:
            self.proven = True
            self.back(self)

    async def try_connection(self) -> Connection | Answer:
        """A connection as a delivery would get it, for whoever only wants to know; or why there is none."""
        return await self._connect()

    async def _connect(self) -> Connection | Answer:
        """A connection, or why there is none: to the first of its addresses that takes one (RFC 5321 §5.1)."""
        opened: Connection | Answer = Answer(Stage.CONNECT, 0, "", "no address")
        enough = self.now() + self.connect_timeout_s  # two that do not answer at all: the next hop's turn
        for address in self.addresses or (self.next_hop.host,):
            opened = await self._connect_to(address)
            if not isinstance(opened, Answer) or self.now() > enough:
                break
        return opened

    async def _connect_to(self, address: str) -> Connection | Answer:
        peer = self.peer
        in_clear = replace(peer, context=None)
        try:
            try:
                return await connect(
                    self, address, in_clear if not peer.required and self.now() < self._plain_until else peer
                )
            except TlsFailed as error:
                if peer.required:
                    raise
                if self.now() >= self._plain_until:  # connections opened at the same time fail together: one alarm
                    self.log.note(self._level, "next_hop_tls_failed", next_hop=self.name, cause=error.answer.text)
                self._plain_until = self.now() + PLAIN_AFTER_TLS_FAILURE_S
                return await connect(self, address, in_clear)
        except ConnectFailed as error:
            return error.answer
        except Exception as error:  # noqa: BLE001 - the boundary of this task: whoever waits for the connection must hear of it
            self.log.alarm("next_hop_fault", next_hop=self.name, cause=repr(error))
            return Answer(Stage.CONNECT, 0, "", "local error")

    def _refused(self, answer: Answer) -> None:
        """A connection could not be made."""
        self.last_failure = answer
        others = len(self._opening) + len(self._connections)
        if answer.code == 421 and others > 0 and not self.retry_at:
            self._lower_limit(len(self._connections))  # it serves us, but not with so many at once
            return
        self._failures += 1
        if self._failures >= self._max_failures or self.retry_at:
            self._go_down(answer)
        elif others > 0:
            return
        self.proven = False
        waiting = [*self._express, *self._queued]
        self._express.clear()
        self._queued.clear()
        for attempt in waiting:
            attempt.done([answer] * len(attempt.recipients), self.label)

    def _go_down(self, answer: Answer) -> None:
        now = self.now()
        if not self.retry_at:
            self.log.note(
                self._level, "next_hop_down", next_hop=self.name, stage=answer.stage, code=answer.code, cause=answer.text
            )  # fmt: skip
        wait = min(self._first_retry_s, self._backoff, BACKOFF_S)
        self.retry_at = now + wait
        self._backoff = min(self._backoff * 2, BACKOFF_S)
        self._limit = 1
        self._successes = 0

    def _come_up(self) -> None:
        self.retry_at = 0.0
        self._backoff = 1.0
        self.log.note("info", "next_hop_up", next_hop=self.name)
        self.proven = True
        self.back(self)

    def released(self, connection: Connection) -> None:
        """A connection is free: give it the next message, express and queue in turn."""
        now = self.now()
        if connection.transport.is_closing():
            self.forget(connection)
            return
        if now - connection.opened > self._reuse_s or len(self._connections) > self._limit:
            connection.quit()  # whoever waits gets the next one
            return
        self._turn = not self._turn
        first, second = (self._express, self._queued) if self._turn else (self._queued, self._express)
        waiting = first or second
        if waiting and (self._pace is None or self._pace.take(now)):
            connection.start(waiting.popleft(), now)
        else:
            connection.idle_since = now
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._express or self._queued:
            self._open_more()

    def answered(self, answer: Answer) -> None:
        """A transaction got this last answer: what it says about the next hop's health."""
        if answer.code == 421:
            self.last_failure = answer
            self._lower_limit(len(self._connections) - 1)
            return
        if answer.code == 0:
            return
        if self.retry_at:
            self._come_up()
        if self._limit < self._full_limit:
            self._successes += 1
            if self._successes >= self._limit:  # doubles each round: slow start
                self._successes = 0
                self._limit = min(self._limit * 2, self._full_limit)
                self._open_more()

    def _lower_limit(self, working: int) -> None:
        self._limit = max(1, min(self._limit, working))
        self._successes = 0

    # --- upkeep --------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """End connections past their deadline or idle for too long, and probe when it is time; called several times a
        second.
        """
        now = self.now()
        for connection in [c for c in self._connections if c.deadline < now]:
            connection.expire()
        for connection in [
            c for c in self._idle if now - c.idle_since > self._idle_s or now - c.opened > self._reuse_s
        ]:
            connection.quit()
        if self._pace is not None and (self._express or self._queued):
            self._next_turns(self._pace, now)
        # Strangers are probed by mail for them only.
        due = self.retry_at and now >= self.retry_at and self.origin == "route"
        if due and not (self._opening or self._connections or self.draining):
            self._open_one()

    def _next_turns(self, pace: Pace | None, now: float) -> None:
        """Those whose turn has come go."""
        while self._idle and (self._express or self._queued) and (pace is None or pace.free(now)):
            self.released(self._idle.pop())
        if (pace is None or pace.free(now)) and not self._idle and self.worth_trying:
            self._open_more()

    def probe(self) -> None:
        """Find out whether it is there, unless that is known or being found out."""
        if not (self.proven or self.retry_at or self._opening or self._connections or self.draining):
            self._open_one()

    @property
    def empty(self) -> bool:
        """True while it holds neither mail nor connections."""
        return not (self._express or self._queued or self._connections or self._opening)

    @property
    def busy(self) -> bool:
        """True while an attempt waits or is under way."""
        return bool(self._express or self._queued) or len(self._connections) > len(self._idle)

    def close(self) -> None:
        """Say QUIT to whoever is idle and give up what is being opened."""
        for connection in list(self._idle):
            connection.quit()
        for task in self._opening:
            task.cancel()


def _nobody(_: Lane) -> None:
    """Where nobody waits for a next hop."""
