"""Owns: the queue store on SQLite: what the event loop sees of it.

The writer thread does what changes the database, one reader thread what only looks, a few more place and remove body
files. Must not know SMTP or who decides about retries.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from relay.config.schema import Queue
from relay.mail.envelope import QueueId
from relay.queue import intake_file
from relay.queue.bodies import Bodies
from relay.queue.boot import Clock, boot_clock, boot_id
from relay.queue.database import connect_readonly, fault
from relay.queue.intake import Intake
from relay.queue.intake_segment import Entry
from relay.queue.journal import Journal
from relay.queue.layout import Layout, Tuning
from relay.queue.loading import load
from relay.queue.operations import (
    SWEEP_FILES,
    Aside,
    Claim,
    ForgetMoved,
    Import,
    Move,
    Operation,
    Put,
    Release,
    Renew,
    Settle,
    Sweep,
    TakeBack,
    Void,
)
from relay.queue.requests import Act
from relay.queue.rows import NewRows
from relay.queue.statements import MIGRATIONS, SQL
from relay.queue.store import (
    AWAITED,
    MANY,
    Acted,
    Action,
    Claimed,
    Lease,
    NewMessage,
    QueueError,
    SetAside,
    Settlement,
    Stats,
    TakeOver,
)
from relay.queue.view import stats_of
from relay.queue.writer import Writer

T = TypeVar("T")

_BODY_THREADS: Final = 4
"""Syncs of body files under way at once; more wait for the same disk."""

_WAITING_BODIES: Final = 1000
"""Body files that may wait for a thread."""

_SPACE_CHECK_S: Final = 0.1
"""How old an answer about free space may be; the reserve is far more than arrives meanwhile."""

_SWEEP_S: Final = 3600.0
"""Between two looks for orphaned body files."""

_BACK_DELAY_S: Final = 60.0
"""When to try again a message whose body could not be opened (no descriptors left, disk trouble)."""

_logger: Final = logging.getLogger("relay.queue")


def log_set_aside(entry: SetAside) -> None:
    """Tell the operator about an entry that was set aside."""
    _logger.error(
        "queue: entry %x (%s) set aside: %s; nothing of it was deleted, see docs/queue.md",
        entry.key,
        entry.id or "no readable id",
        entry.reason,
    )


class SqliteStore:
    """See ``relay.queue.store.Store``. ``prepare`` has been run on the spool; made on the event loop, after any fork."""

    def __init__(
        self,
        spool: Path,
        owner: str,
        slot: int,
        config: Queue,
        loop: asyncio.AbstractEventLoop,
        *,
        on_aside: Callable[[SetAside], None] = log_set_aside,
        clock: Clock = boot_clock,
        boot: str | None = None,
        tuning: Tuning = Tuning(),  # noqa: B008  frozen
    ) -> None:
        """Open the queue as ``owner`` (``BOOTID:SLOT:INCARNATION``). Raises QueueError."""
        self._layout = layout = Layout.of(spool)
        self._slot = slot
        self._loop = loop
        self._lease_s = config.lease_s
        self._timeout_s = config.write_timeout_s
        self._on_aside = on_aside
        self._clock = clock
        self._tuning = tuning
        self._placing = 0
        self._space_checked = -1.0
        try:
            self._journal = Journal(layout.journal(slot), boot or boot_id())
            self._bodies = Bodies(layout.bodies, tuning.reserve_octets)
        except OSError as error:
            raise fault(error, layout.queue) from None
        self._files = ThreadPoolExecutor(_BODY_THREADS, "queue-bodies")
        self._reader = ThreadPoolExecutor(1, "queue-reader")
        try:
            self._read_connection = connect_readonly(layout)
            self._writer = Writer(
                layout,
                owner,
                slot,
                loop=loop,
                bodies=self._bodies,
                unlink=self._unlink_later,
                clock=clock,
                lease_s=config.lease_s,
                timeout_s=config.write_timeout_s,
                tuning=tuning,
            )
        except (sqlite3.Error, OSError) as error:
            self._bodies.close()
            self._journal.close()
            raise fault(error, layout.database) from None
        self._next_key = self._writer.holder << 32
        self._intake = Intake(
            layout,
            slot,
            len(MIGRATIONS),
            loop=loop,
            move=self._move,
            forget=lambda keys: self._post(ForgetMoved(keys)),
            timeout_s=config.write_timeout_s,
            tuning=tuning,
        )
        self._tasks: set[asyncio.Task[bool]] = set()
        self._sweep_timer = loop.call_later(_SWEEP_S, self._sweep)

    # --- messages in ------------------------------------------------------------------------------------------------
    def open_body(self) -> int:
        try:
            self._check_space()
            return self._bodies.open_new()
        except OSError as error:
            raise fault(error, self._layout.bodies) from None

    async def put(self, messages: Sequence[NewMessage]) -> list[Lease]:
        self._guard_space()
        if not messages:
            return []
        rows = self._rows(messages)
        leases = [row.lease for row in rows]
        operation = Put(rows)
        await self._with_files(operation, rows, messages, lambda: self._post(TakeBack(leases)))
        return leases

    def put_soon(self, message: NewMessage) -> tuple[Lease, asyncio.Future[None]]:
        self._guard_space()
        rows = self._rows((message,))
        if message.leased:
            future = self._intake.put(rows[0])
            if future is not None:
                return rows[0].lease, future
        return rows[0].lease, self._writer.submit(Put(rows))

    def _rows(self, messages: Sequence[NewMessage], *, reports: bool = False) -> list[NewRows]:
        now = self._clock()
        wall = time.time()
        rows: list[NewRows] = []
        for message in messages:
            self._next_key += 1
            owner = self._writer.holder if message.leased and not reports else None
            rows.append(NewRows(self._next_key, message, now, wall, owner, now + self._lease_s))
        return rows

    async def _with_files(
        self, operation: Operation[T], rows: Sequence[NewRows], messages: Sequence[NewMessage], undo: Callable[[], None]
    ) -> T:
        """Place the body files, then have the operation done; on any failure the files go again."""
        names = [row.file for row in rows if row.file]
        if not names:
            return await self._perform(operation, undo)
        try:
            await self._place([(m, row.file) for m, row in zip(messages, rows, strict=True) if row.file])
            return await self._perform(operation, undo)
        except QueueError:
            if not operation.begun:
                self._unlink_later(names)
            raise
        except asyncio.CancelledError:
            # Committed (then undone, which removes the files only after its own commit) or not: nobody reads them.
            if not operation.begun:
                self._unlink_later(names)
            raise

    async def _perform(self, operation: Operation[T], undo: Callable[[], None]) -> T:
        try:
            return await self._writer.perform(operation)
        except asyncio.CancelledError:
            if _is_committed(operation):
                undo()
            raise

    async def _place(self, bodies: Sequence[tuple[NewMessage, str]]) -> None:
        """Name and sync body files, several at once. Raises QueueError; nothing is under way any more then."""
        if self._placing + len(bodies) > _WAITING_BODIES:
            raise QueueError(f"{self._layout.bodies}: {self._placing} bodies wait for the disk already")
        try:
            jobs: list[Future[None]] = [
                self._files.submit(self._bodies.place, m.content.descriptor, m.content.size, name) for m, name in bodies
            ]
        except RuntimeError:
            raise _closing() from None
        self._placing += len(bodies)
        waits = [asyncio.wrap_future(job, loop=self._loop) for job in jobs]
        cancelled = False
        timeout: float | None = self._timeout_s
        try:
            while pending := [wait for wait in waits if not wait.done()]:
                try:
                    await asyncio.wait(pending, timeout=timeout)
                except asyncio.CancelledError:
                    cancelled = True
                if cancelled or (timeout is not None and any(not wait.done() for wait in waits)):
                    # What has not begun is dropped; what has begun cannot be stopped and is waited for.
                    for job in jobs:
                        job.cancel()
                    timeout = None
        finally:
            self._placing -= len(bodies)
        faults = [wait.exception() for wait in waits if not wait.cancelled()]
        if cancelled:
            raise asyncio.CancelledError
        if any(wait.cancelled() for wait in waits):
            raise QueueError(f"{self._layout.bodies}: body not synced within {self._timeout_s:g} s; is the disk stuck?")
        for error in faults:
            if isinstance(error, QueueError):
                raise error
            if isinstance(error, OSError):
                raise fault(error, self._layout.bodies)
            if error is not None:
                raise QueueError(f"{self._layout.bodies}: {error!r}")

    # --- attempts ---------------------------------------------------------------------------------------------------
    async def settle(self, settlement: Settlement) -> bool:
        entry = self._intake.live(settlement.lease.key)
        if entry is not None:
            if _is_over(entry, settlement):
                return await self._intake.finish(entry.rows.key)
            await asyncio.shield(entry.moving or self._intake.move([entry]))
        reports = self._rows(settlement.reports, reports=True) if settlement.reports else []
        operation = Settle(settlement, reports)
        if not reports:
            return await self._writer.perform(operation)
        settled = await self._with_files(operation, reports, settlement.reports, _nothing)
        if not settled:
            self._unlink_later([row.file for row in reports if row.file])
        return settled

    def settle_soon(self, settlement: Settlement) -> asyncio.Future[bool]:
        entry = self._intake.live(settlement.lease.key)
        if entry is None:
            return self._writer.submit(Settle(settlement, ()))
        if _is_over(entry, settlement):
            return self._intake.finish(entry.rows.key)
        task = self._loop.create_task(self.settle(settlement))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _move(self, entries: Sequence[Entry]) -> asyncio.Future[None]:
        return self._writer.submit(Move([entry.rows.leased_until(entry.until) for entry in entries]))

    async def claim(
        self, limit: int, ready: Sequence[str] = (), parked: int = MANY
    ) -> tuple[list[Claimed], float | None]:
        operation = Claim(limit, ready, parked)
        keys: list[int] = []

        def give_back() -> None:
            self._post(Release(keys or _result(operation)[0], 0.0))

        keys, again = await self._perform(operation, give_back)
        if not keys:
            return [], again
        try:
            job = self._reader.submit(
                load, self._read_connection, self._bodies, self._writer.holder, keys, self._clock()
            )
        except RuntimeError:
            give_back()
            raise _closing() from None
        try:
            loaded = await asyncio.wrap_future(job, loop=self._loop)
        except asyncio.CancelledError:
            job.add_done_callback(_close_contents)
            give_back()
            raise
        except sqlite3.Error as error:
            give_back()
            raise fault(error, self._layout.database) from None
        if loaded.back:
            self._post(Release(loaded.back, _BACK_DELAY_S))
        if loaded.aside:
            await self._set_aside(loaded.aside)
        return loaded.messages, again

    async def awaited(self) -> list[str]:
        return await self._read(lambda c: [str(row[0]) for row in c.execute(SQL["awaited"], (AWAITED,))])

    async def renew(self, leases: Sequence[Lease]) -> list[Lease | None]:
        until = self._clock() + self._lease_s
        for lease in leases:
            entry = self._intake.live(lease.key)
            if entry is not None and entry.moving is not None:
                with suppress(QueueError):
                    await asyncio.shield(entry.moving)
        renewed: dict[int, Lease | None] = {}
        for lease in leases:
            entry = self._intake.live(lease.key)
            if entry is not None:
                entry.until = until
                renewed[lease.key] = Lease(lease.key, lease.token, until)
        others = [lease for lease in leases if lease.key not in renewed]
        if others:
            found = await self._writer.perform(Renew(others))
            renewed.update({lease.key: new for lease, new in zip(others, found, strict=True)})
        return [renewed[lease.key] for lease in leases]

    async def _set_aside(self, entries: list[tuple[int, str]]) -> None:
        """Never fails: what could not be written now is found again when the lease is over."""
        for key, reason in entries:
            name = QueueId("")
            with suppress(QueueError):
                name = await self._read(partial(_id_of, key=key))
                if not await self._writer.perform(Aside([(key, reason)])):
                    continue
            self._on_aside(SetAside(key, name, reason))

    # --- the rest ---------------------------------------------------------------------------------------------------
    async def take_over_slot(self) -> TakeOver:
        paths = intake_file.segments(self._layout.queue, self._slot)
        try:
            found = await asyncio.to_thread(intake_file.read_all, paths)
        except OSError as error:
            raise fault(error, self._layout.queue) from None
        if found:
            await self._writer.perform(Import(found))
        voided, names = await self._writer.perform(Void(self._slot, self._journal.inherited))
        self._journal.forget_inherited()
        return TakeOver(voided, tuple(QueueId(bytes(name).decode("ascii", "replace")) for name in names))

    async def act(self, queue_id: QueueId, action: Action) -> Acted:
        # The look-up reads every row: not under the write lock.
        found = await self._read(lambda c: c.execute(SQL["keys_of_id"], (queue_id,)).fetchall())
        return await self._writer.perform(Act([row[0] for row in found], action)) if found else Acted()

    async def stats(self) -> Stats:
        return await self._read(stats_of)

    def mark(self, key: int) -> int:
        return self._journal.mark(key)

    def clear(self, cell: int) -> None:
        self._journal.clear(cell)

    async def close(self) -> None:
        self._sweep_timer.cancel()
        try:
            await self._intake.close()
        except QueueError as error:
            _logger.warning("queue: %s; what it still holds is taken in by the next start", error)
        await asyncio.to_thread(self._reader.shutdown)
        self._read_connection.close()
        await self._writer.close()
        await asyncio.to_thread(self._files.shutdown)
        self._bodies.close()
        self._journal.close()

    # --- inside -----------------------------------------------------------------------------------------------------
    def _check_space(self) -> None:
        now = self._loop.time()
        if now - self._space_checked >= _SPACE_CHECK_S:
            self._bodies.check_space()
            self._space_checked = now

    def _guard_space(self) -> None:
        try:
            self._check_space()
        except OSError as error:
            raise fault(error, self._layout.bodies) from None

    async def _read(self, look: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await self._loop.run_in_executor(self._reader, look, self._read_connection)
        except sqlite3.Error as error:
            raise fault(error, self._layout.database) from None
        except RuntimeError:
            raise _closing() from None

    def _post(self, operation: Operation[Any]) -> None:
        """Have it done without waiting for it."""
        self._writer.submit(operation).add_done_callback(_log_fault)

    def _unlink_later(self, names: Iterable[str]) -> None:
        with suppress(RuntimeError):  # closed: they are orphans and go later
            self._files.submit(self._bodies.remove, *names)

    def _sweep(self) -> None:
        self._sweep_timer = self._loop.call_later(_SWEEP_S, self._sweep)
        self._files.submit(self._list_old).add_done_callback(self._sweep_old)

    def _list_old(self) -> list[str]:
        return list(self._bodies.older_than(self._tuning.orphan_age_s))

    def _sweep_old(self, job: Future[list[str]]) -> None:
        """In a file thread; the writer is the event loop's."""
        if job.exception() is not None:
            _logger.warning("queue: orphaned bodies could not be looked for: %s", job.exception())
            return
        names = job.result()
        for start in range(0, len(names), SWEEP_FILES):
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._post, Sweep(names[start : start + SWEEP_FILES]))


def _is_over(entry: Entry, settlement: Settlement) -> bool:
    """Everybody is served and nothing else is to be recorded: the log can say so by itself."""
    return (
        entry.moving is None
        and not settlement.deferred
        and not settlement.reports
        and not settlement.keep
        and len(settlement.finished) == len(entry.rows.recipients)
    )


def _result(operation: Operation[T]) -> T:
    future = operation.future
    assert future is not None
    return future.result()


def _is_committed(operation: Operation[Any]) -> bool:
    future = operation.future
    return future is not None and future.done() and not future.cancelled() and future.exception() is None


def _id_of(connection: sqlite3.Connection, key: int) -> QueueId:
    found = connection.execute(SQL["ids_of"], (f"[{key}]",)).fetchone()
    return QueueId(bytes(found[0]).decode("ascii", "replace") if found else "")


def _closing() -> QueueError:
    return QueueError("the queue is closing")


def _nothing() -> None:
    """A settlement that is committed stays, whoever was cancelled."""


def _log_fault(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is not None:
        _logger.warning("queue: %s", future.exception())


def _close_contents(job: Future[Any]) -> None:
    if not job.cancelled() and job.exception() is None:
        for claimed in job.result().messages:
            claimed.content.close()
