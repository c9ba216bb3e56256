"""Owns: the wiring of one worker and its life: start, upkeep, reload, drain."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import signal
import ssl
import time
from collections.abc import Callable
from typing import Final

import uvloop

from relay.auth.client import AuthClient, Offers
from relay.config.schema import Config
from relay.control import (
    Abort,
    Child,
    Commit,
    Control,
    Drain,
    Prepare,
    Prepared,
    Ready,
    Refused,
    Reopen,
    Secrets,
    Workers,
)
from relay.detention import Detention, restriction_by
from relay.directory.placement import placement
from relay.directory.snapshot import Directory
from relay.dispatch import Dispatch
from relay.hub.budgets import EXCHANGE_S
from relay.hub.client import HubClient
from relay.inbound.doors import Doors
from relay.inbound.listener import SWEEP_S, Listener
from relay.inbound.proxied import Proxied
from relay.inbound.session import Session
from relay.inbound.strain import Strain
from relay.mail.reply import SHUTTING_DOWN
from relay.net.tls import TlsError, endpoint_binding, server_context
from relay.outbound import lanes
from relay.outbound.lanes import Lanes
from relay.outbound.peer import check_peers
from relay.queue.sqlite import SqliteStore
from relay.queue.store import QueueError, SetAside
from relay.telemetry.library import adopt_logging
from relay.telemetry.logs import LogWriter
from relay.telemetry.maillog import MailLog, adopt
from relay.telemetry.metrics import FLUSH_S, Metrics

EXPRESS_SWEEP_S: Final = 0.05
"""How often express deadlines are looked at."""
SNAPSHOT_S: Final = 1.0
"""How often a new snapshot is looked for; nothing but a stat when there is none."""
DRAIN_POLL_S: Final = 0.05
HEAP_KEPT_OCTETS: Final = 8 * 1024 * 1024
"""Free memory a worker keeps at the top of its heap."""
_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
DRAIN_MARGIN_S: Final = 1.0
"""A draining worker gives up this much before the supervisor would kill it, so that it can say 421."""


def run(child: Child) -> int:
    """Be a worker until drained; the exit code."""
    # Sessions are many small objects that live long: full collections at the default rate cost some 5 % and find nothing.
    gc.set_threshold(20_000, 20, 100)
    _keep_heap()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Worker(child).serve())


class Worker:
    """One worker process."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._config = child.config
        self._writer = LogWriter(child.config.log.file)
        self.log = MailLog(self._writer, child.config.log.format, child.config.server.hostname)
        adopt(self.log)
        adopt_logging(self.log)
        self.metrics = Metrics(child.config.server.spool / "metrics", f"worker-{child.slot}")
        if self.metrics.problem is not None:
            self.log.alarm("metrics_not_shared", cause=str(self.metrics.problem))
        self._tls = _tls(child.config, child.secrets)
        self._binding = endpoint_binding(child.secrets.tls_certificate)
        self.listeners: list[Listener] = []
        self.logins = AuthClient(child.hub_address, self._offered)
        self.directory = Directory(child.config.snapshot_path, child.secrets.snapshot_key)
        self._offers: Offers = {}
        self._prepared: tuple[Config, ssl.SSLContext | None, Secrets] | None = None
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}
        self._drained = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None
        self._largest: int | None = None
        self._detention = Detention(self.log)

    async def serve(self) -> int:
        """Start, say ready, work until drained."""
        child, config = self._child, self._config
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGINT)
        self._writer.start(loop, self.metrics.log_lines_lost)
        self._report_snapshot(taken=self.directory.snapshot is not None)
        self.store = SqliteStore(
            config.server.spool, child.owner, child.slot, config.queue, loop, on_aside=self._entry_set_aside
        )
        await self._take_over()
        self.lanes = Lanes(config, child.live_workers, self.log, self.metrics, child.secrets.next_hops)
        self.lanes.hop_of = placement(self.directory, config)
        self.dispatch = Dispatch(config, child.slot, self.store, self.lanes, self.log, self.metrics)
        self.dispatch.answers = self.directory.answers
        self.hub = HubClient(
            child.hub_address, config.limits.sessions, config.limits.sessions_per_client, child.live_workers
        )
        self.hub.budgets.configure(config.limits)
        self.strain = Strain(config, child.live_workers, self.hub, self.log, self.metrics)
        await self.hub.start()
        if config.auth.stores:
            await self.logins.start()
        self.listeners = [
            Listener(
                entry, config, directory=self.directory, dispatch=self.dispatch, hub=self.hub, log=self.log,
                metrics=self.metrics, tls=self._tls, binding=self._binding, logins=self.logins,
            )
            for entry, _ in child.listeners
        ]  # fmt: skip
        self._offered(self._offers)
        self._every(FLUSH_S, self.metrics.flush)
        self._every(lanes.SWEEP_S, self._sweep_lanes)
        self._every(SWEEP_S, self._sweep_sessions)
        self._every(EXCHANGE_S, self.hub.exchange)
        self._every(EXPRESS_SWEEP_S, self.dispatch.sweep)
        self._every(SNAPSHOT_S, self._look_for_snapshot)
        doors = [
            (_factory(listener), sock) for listener, (_, sock) in zip(self.listeners, child.listeners, strict=True)
        ]
        self._doors = Doors(doors, child.sessions, child.slot)
        for listener in self.listeners:
            listener.entered, listener.left = self._doors.entered, self._doors.left
        await self._doors.open()
        await asyncio.to_thread(self._detain)
        self.dispatch.runner.start()
        self._control = control = Control(child.control, loop, config.process.heartbeat_timeout_s)
        control.on(Prepare, self._prepare)
        control.on(Commit, self._commit)
        control.on(Abort, self._abort)
        control.on(Reopen, lambda _: self._writer.reopen())
        control.on(Workers, self._workers)
        control.on(Drain, lambda _: self._drained.set())
        control.send(Ready())
        await self._drained.wait()
        await self._drain()
        return 0

    async def _take_over(self) -> None:
        """Free what an earlier process of this slot held, and name what it may have delivered."""
        taken = await self.store.take_over_slot()
        for queue_id in taken.duplicates:
            self.log.possible_duplicate(queue_id)
        if taken.voided:
            self.log.note("info", "leases_voided", count=taken.voided)

    def _entry_set_aside(self, entry: SetAside) -> None:
        self.log.alarm("queue_entry_set_aside", id=entry.id, key=entry.key, cause=entry.reason)

    def _offered(self, offers: Offers) -> None:
        """The hub says what the listeners may offer for logging in."""
        self._offers = offers
        for listener in self.listeners:
            listener.verify(offers.get(listener.name, []))

    # --- upkeep --------------------------------------------------------------------------------------------------------

    def _every(self, interval: float, work: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def turn() -> None:
            self._timers[turn] = loop.call_later(interval, turn)
            work()

        turn()

    def _sweep_lanes(self) -> None:
        self.lanes.sweep()
        largest = self.lanes.largest
        if largest != self._largest:
            self._largest = largest
            for listener in self.listeners:
                listener.offer(largest)

    def _sweep_sessions(self) -> None:
        for listener in self.listeners:
            listener.sweep()
        self.strain.look(self.listeners)

    def _look_for_snapshot(self) -> None:
        was = self.directory.stale
        self.directory.note_age(time.time(), self._config.snapshot_max_age_s)
        if self.directory.stale and not was:
            self.log.alarm("snapshot_stale", max_age_s=self._config.directory.max_age_s)
        if self.directory.changed() and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.get_running_loop().create_task(asyncio.to_thread(self._refresh_snapshot))

    def _refresh_snapshot(self) -> None:
        """Take a new generation; when it is refused, the one in use serves on."""
        taken = self.directory.refresh()
        self._report_snapshot(taken=taken)
        if taken:
            self._detain()

    def _detain(self) -> None:
        """Restrictions reach mail that is queued already. One worker is enough, and runs this in a thread."""
        if self._child.slot == 0:
            config = self._config
            self._detention.look(
                config.server.spool, restriction_by(config, self.directory.snapshot), time.time()
            )  # fmt: skip

    def _report_snapshot(self, *, taken: bool) -> None:
        snapshot = self.directory.snapshot
        if self.directory.refused:
            self.metrics.snapshot_refused()
            self.log.alarm("snapshot_refused", cause=self.directory.refused)
        if taken and snapshot is not None:
            self.metrics.snapshot_in_use(snapshot.generation)
            self.log.note("info", "snapshot_taken", generation=snapshot.generation, addresses=snapshot.addresses)

    # --- control -------------------------------------------------------------------------------------------------------

    def _prepare(self, message: Prepare) -> None:
        try:
            check_peers(message.config, message.secrets.next_hops)
            self._prepared = (message.config, _tls(message.config, message.secrets), message.secrets)
        except TlsError as error:
            self._control.send(Refused(str(error)))
        else:
            self._control.send(Prepared())

    def _abort(self, _: Abort) -> None:
        self._prepared = None

    def _commit(self, _: Commit) -> None:
        """Switch: everything below only assigns, so it cannot stop half-way."""
        if self._prepared is None:
            return
        config, tls, secrets = self._prepared
        self._prepared = None
        self._config = config
        self.lanes.configure(config, self.lanes.live_workers, secrets.next_hops)
        self.lanes.hop_of = placement(self.directory, config)
        self.dispatch.configure(config)
        self.hub.limit(config.limits.sessions, config.limits.sessions_per_client)
        self.hub.budgets.configure(config.limits)
        self.strain.configure(config, self.hub.live_workers)
        entries = {entry.name: entry for entry in config.listener}
        for listener in self.listeners:
            listener.configure(entries[listener.name], config, tls, endpoint_binding(secrets.tls_certificate))
        if config.auth.stores:
            self.logins.go_on()
        self.directory.rekey(secrets.snapshot_key)
        asyncio.get_running_loop().run_in_executor(None, self._detain)
        self.log.note("info", "reloaded")

    def _workers(self, message: Workers) -> None:
        self.hub.live_workers = message.live
        self.strain.configure(self._config, message.live)
        self.lanes.configure(self._config, message.live)

    # --- drain ---------------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Accept nothing new; let sessions and deliveries come to an end; what is queued stays queued."""
        self._doors.close()
        for listener in self.listeners:
            listener.drain()
        self.dispatch.drain()
        until = time.monotonic() + max(0.0, self._config.process.drain_timeout_s - DRAIN_MARGIN_S)
        # Polled: what is waited for ends in many places, once in the life of a worker.
        while time.monotonic() < until and (any(x.sessions for x in self.listeners) or self.dispatch.busy):  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        for listener in self.listeners:
            for session in list(listener.sessions):
                session.end(SHUTTING_DOWN)  # whatever it waits for: nothing it was not told 250 for is promised
        self.dispatch.runner.stop()
        self.lanes.close()
        await asyncio.sleep(DRAIN_POLL_S)  # last words leave
        try:
            await self.store.close()
        except QueueError as error:
            self.log.alarm("queue_close_failed", error=str(error))
        self.hub.stop()
        self.logins.stop()
        for timer in self._timers.values():
            timer.cancel()
        self.log.note("info", "drained")
        self._control.close()
        self.metrics.close()
        self._writer.close()


def _keep_heap() -> None:
    """Have glibc keep what large messages needed: their blocks of 256 KB would otherwise be given back to the kernel and
    faulted in again for each one (a tenth of the CPU of a 1 MB message). No such call elsewhere: then nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, HEAP_KEPT_OCTETS)
        mallopt(_M_TRIM_THRESHOLD, HEAP_KEPT_OCTETS)


def _tls(config: Config, secrets: Secrets) -> ssl.SSLContext | None:
    if not secrets.tls_certificate:
        return None
    return server_context(
        secrets.tls_certificate, secrets.tls_key, config.tls.minimum_version, config.tls.ciphers, secrets.tls_named
    )


def _factory(listener: Listener) -> Callable[[], Session | Proxied]:
    """Asked for each connection: a reload may put a balancer in front of a listener, or take it away."""
    return lambda: Session(listener) if listener.balancers is None else Proxied(listener, lambda: Session(listener))
