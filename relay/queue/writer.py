"""Owns: the writer thread: what waits becomes one transaction (group commit), its outcome goes to the event loop.

    submit ──► waiting ──► write lock ──► BEGIN ──► all that waits ──► COMMIT ──► unlock ──► outcomes, one wake-up

An operation may be withdrawn until the transaction takes it; then it is waited for. After a failed commit or sync the
connection is given up, and nothing more is written before a new one has copied the whole log into the database and
synced it: a failed sync is never tried again in the hope that it says yes. Must not know what an operation does.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final, TypeVar

from relay.queue.bodies import Bodies
from relay.queue.boot import Clock
from relay.queue.database import Log, checkpoint, code_of, connect, fault, truncate
from relay.queue.layout import Layout, Tuning, WriteLock
from relay.queue.operations import Circumstances, Operation, perform_group
from relay.queue.quiet import quiet
from relay.queue.statements import SQL
from relay.queue.store import QueueError

T = TypeVar("T")

WAITING: Final = 10_000
"""Operations that may wait for the disk; more than all sessions of a worker can have under way."""

GROUP: Final = 256
"""Operations in one transaction: beyond some 100 a larger group gains nothing and delays the other processes."""

GROUP_OCTETS: Final = 4 * 1024 * 1024
"""Bodies in one transaction: with it the log stays within its length."""

LINGER_S: Final = 0.0008
"""Where several came together the last time, a group waits this long for more of them."""

PATIENCE_S: Final = 0.02
"""How long settlements wait for a put to share its transaction: those that come alone would make every put wait for a
sync of theirs. A process killed meanwhile leaves them in the journal."""

_RETRY_S: Final = 1.0
"""Pause between attempts to open the database again, and between checkpoints that a reader hinders."""

_STATEMENT_FAULTS: Final = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    QueueError,
    OSError,
    UnicodeError,
    OverflowError,
    ValueError,
    TypeError,
)
"""Faults of one operation that say nothing about the database: the others of its group are done without it."""

_logger: Final = logging.getLogger("relay.queue")


class Writer:
    """The thread and its queue. All methods are for the event loop's thread."""

    def __init__(
        self,
        layout: Layout,
        name: str,
        slot: int,
        *,
        loop: asyncio.AbstractEventLoop,
        bodies: Bodies,
        unlink: Callable[[list[str]], None],
        clock: Clock,
        lease_s: float,
        timeout_s: float,
        tuning: Tuning,
    ) -> None:
        """Start the thread and open the database. Raises QueueError, OSError.

        ``unlink`` is called in the writer thread with files whose messages are gone.
        """
        self._layout = layout
        self._name = name
        self._slot = slot
        self._loop = loop
        self._bodies = bodies
        self._unlink = unlink
        self._clock = clock
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._tuning = tuning
        self._condition = threading.Condition(threading.Lock())
        self._waiting: deque[Operation[Any]] = deque()
        self._urgent = 0
        """Among those waiting: how many are not patient."""
        self._idle = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._group: list[Operation[Any]] = []
        self._doubtful: list[Operation[Any]] = []
        """Told as failed, while the log may hold their commit: undone before anything else is written. One group."""
        self._lock = WriteLock(layout)
        self._connection: sqlite3.Connection | None = None
        self._log: Log | None = None
        self._next_checkpoint = 0.0
        self.holder = 0
        """Our number: owner of our leases; our keys start at ``holder << 32``."""
        started = threading.Event()
        problem: list[QueueError] = []
        self._thread = threading.Thread(
            target=self._live, args=(started, problem), name=f"queue-writer-{slot}", daemon=True
        )
        self._thread.start()
        started.wait()
        if problem:
            self._thread.join()
            self._lock.close()
            raise problem[0]

    # --- on the event loop --------------------------------------------------------------------------------------
    async def perform(self, operation: Operation[T]) -> T:
        """Have it done in the next transaction. Raises QueueError: then it was not done and never will be.

        Cancelled while it waits, it is dropped. Cancelled later, it is waited for, and ``CancelledError`` comes with
        the operation's ``future`` done: the caller takes back what was committed.
        """
        future = self.submit(operation)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() or self._withdraw(operation):
                raise
            if operation.future is None or operation.future is future:
                operation.future = self._loop.create_future()
            future = operation.future
            while not future.done():
                try:
                    await asyncio.wait((future,))
                except asyncio.CancelledError:
                    continue
            raise

    def submit(self, operation: Operation[T]) -> asyncio.Future[T]:
        """Let it wait for the next transaction."""
        future: asyncio.Future[T] = self._loop.create_future()
        operation.future = future
        operation.deadline = self._loop.time() + self._timeout_s
        with self._condition:
            if self._closing or len(self._waiting) >= WAITING:
                why = "is closing" if self._closing else f"has {WAITING} operations waiting for the disk"
                future.set_exception(QueueError(f"the queue {why}"))
                return future
            self._waiting.append(operation)
            if not operation.patient:
                self._urgent += 1
            if self._idle and (self._urgent or len(self._waiting) == 1 or len(self._waiting) >= GROUP):
                self._idle = False
                self._condition.notify()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._expire)
        return future

    def _withdraw(self, operation: Operation[Any]) -> bool:
        """True when it was still waiting: it will not be done."""
        with self._condition:
            waited, operation.waiting = operation.waiting, False
        return waited

    def _expire(self) -> None:
        """Give up what has waited too long; look again when the next one might have."""
        self._timer = None
        now = self._loop.time()
        with self._condition:
            late = [operation for operation in self._waiting if operation.deadline <= now and operation.waiting]
            for operation in late:
                operation.waiting = False
            if self._waiting:
                again = max(min(o.deadline for o in self._waiting) - now, self._timeout_s / 10)
                self._timer = self._loop.call_later(again, self._expire)
        for operation in late:
            text = f"{self._layout.database}: not written within {self._timeout_s:g} s; is the disk stuck?"
            _resolve([(operation, QueueError(text))])

    async def close(self) -> None:
        """Finish what waits, end the thread, let go of the files."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)
        if self._timer is not None:
            self._timer.cancel()
        # Outcomes the thread has sent are resolved by now: call_soon_threadsafe keeps its order with to_thread's own.

    # --- in the writer thread -------------------------------------------------------------------------------------
    def _live(self, started: threading.Event, problem: list[QueueError]) -> None:
        try:
            with self._lock.held():
                self._open()
                self._register()
        except (sqlite3.Error, OSError) as error:
            problem.append(fault(error, self._layout.database))
            self._let_go()
            return
        finally:
            started.set()
        while self._await_work():
            try:
                self._work()
            except Exception as error:  # the thread's boundary: an unknown fault costs the connection, not the queue
                _logger.exception("queue: the writer failed; the database is opened again")
                told = self._told(error)
                self._give_up(told)
                self._report([(operation, told) for operation in self._group])
        try:
            with self._lock.held():
                self._let_go()
        finally:
            self._lock.close()

    def _await_work(self) -> bool:
        """Wait for something to do; False when everything is done and the queue closes."""
        with self._condition:
            while not self._waiting and not self._closing:
                self._idle = True
                self._condition.wait()
            if not self._urgent and len(self._waiting) < GROUP and not self._closing:
                self._idle = True
                self._condition.wait(PATIENCE_S)
            self._idle = False
            busy = len(self._group) > 1 and not self._closing
            some = bool(self._waiting)
        if busy and some:
            time.sleep(LINGER_S)
        return some

    def _work(self) -> None:
        """One transaction."""
        with self._lock.held():
            if self._connection is None and not self._reopen():
                outcomes = self._fail_waiting_while_closing()
            else:
                group = self._take()
                outcomes = self._transact(group) if group else []
            long = self._connection is not None and self._log is not None and self._log.is_long()
            if long:
                # The callers first: they wait for nothing but the commit.
                self._report(outcomes)
                outcomes = []
                self._checkpoint()
        self._report(outcomes)
        if self._connection is None:
            with self._condition:
                if not self._closing:
                    self._condition.wait(_RETRY_S)

    def _take(self) -> list[Operation[Any]]:
        """What waits, up to the bounds of a group; it can no longer be withdrawn."""
        group: list[Operation[Any]] = []
        octets = 0
        with self._condition:
            waiting = self._waiting
            while waiting and len(group) < GROUP and octets < GROUP_OCTETS:
                operation = waiting.popleft()
                if not operation.patient:
                    self._urgent -= 1
                if operation.waiting:
                    operation.waiting = False
                    operation.begun = True
                    octets += operation.octets
                    group.append(operation)
        self._group = group
        return group

    def _transact(self, group: list[Operation[Any]]) -> list[tuple[Operation[Any], QueueError | None]]:
        """All in one transaction; if one of them is at fault, each in one of its own."""
        try:
            self._commit(group)
        except _STATEMENT_FAULTS as error:
            self._rollback()
            if len(group) > 1:
                return [outcome for operation in group for outcome in self._transact([operation])]
            return [(group[0], self._told(error))]
        except sqlite3.Error as error:
            told = self._told(error)
            if code_of(error) == sqlite3.SQLITE_FULL:
                # No room to write the log: what was there before is untouched, so a rollback is enough.
                self._rollback()
            else:
                self._doubtful = group
                self._give_up(told)
            return [(operation, told) for operation in group]
        return [(operation, None) for operation in group]

    def _commit(self, group: list[Operation[Any]]) -> None:
        connection = self._connection
        if connection is None:
            raise QueueError(f"{self._layout.database}: given up after a fault")
        unlink: list[str] = []
        at = Circumstances(connection, self.holder, self._clock(), self._lease_s, self._bodies, self._layout, unlink)
        with quiet(self._loop) if len(group) > 1 else nullcontext():
            connection.execute("BEGIN IMMEDIATE")
            perform_group(at, group)
        connection.execute("COMMIT")
        if unlink:
            self._unlink(unlink)

    def _told(self, error: Exception) -> QueueError:
        if isinstance(error, QueueError):
            return error
        if isinstance(error, sqlite3.Error | OSError):
            return fault(error, self._layout.database)
        return QueueError(f"{self._layout.database}: {error!r}")

    def _rollback(self) -> None:
        connection = self._connection
        try:
            if connection is not None and connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            self._give_up(fault(error, self._layout.database))

    def _checkpoint(self) -> None:
        """Copy the log back, so that the next commit starts it anew. Its faults are retried with all of the log."""
        now = time.monotonic()
        if self._connection is None or now < self._next_checkpoint:
            return
        try:
            if not checkpoint(self._connection):
                self._next_checkpoint = now + _RETRY_S
        except sqlite3.Error as error:
            self._next_checkpoint = now + _RETRY_S
            if code_of(error) == sqlite3.SQLITE_FULL:
                _logger.warning("queue: %s: no room to copy the log back; free some space", self._layout.database)
            else:
                self._give_up(fault(error, self._layout.database))

    def _open(self) -> None:
        """Raises sqlite3.Error, OSError. The log is created by the first statement that reads."""
        self._connection = connect(self._layout)
        self._connection.execute(SQL["boot_of"]).fetchone()
        self._log = Log(self._layout, self._tuning.wal_octets, self._tuning.checkpoint_octets)

    def _register(self) -> None:
        assert self._connection is not None
        self._connection.execute("BEGIN IMMEDIATE")
        rows = self._connection.execute(SQL["register_holder"], (self._name, self._slot)).fetchall()
        self._connection.execute("COMMIT")
        self.holder = int(rows[0][0])

    def _give_up(self, why: QueueError) -> None:
        _logger.error("queue: %s; no message is taken until it was opened and synced again", why)
        self._let_go()

    def _let_go(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                connection.close()
            except sqlite3.Error as error:
                _logger.warning("queue: %s: closing failed: %s", self._layout.database, error)

    def _reopen(self) -> bool:
        """True when the database is open again and nothing in it hangs on the sync that failed."""
        try:
            self._connection = connect(self._layout)
            truncate(self._connection)
            self._log = Log(self._layout, self._tuning.wal_octets, self._tuning.checkpoint_octets)
            self._undo_doubtful()
        except (sqlite3.Error, OSError, QueueError) as error:
            self._give_up(self._told(error))
            return False
        _logger.warning("queue: %s is open again, its log copied and synced", self._layout.database)
        return True

    def _undo_doubtful(self) -> None:
        """A commit whose sync failed has its frames in the log, and whoever recovers that log takes them for good; but
        their callers were told that it failed. Raises sqlite3.Error, OSError, QueueError.
        """
        undo = [each for operation in self._doubtful if (each := operation.undo()) is not None]
        if undo:
            self._commit(undo)
        self._doubtful = []

    def _fail_waiting_while_closing(self) -> list[tuple[Operation[Any], QueueError | None]]:
        """A queue that closes does not wait for its disk to come back."""
        if not self._closing:
            return []
        error = QueueError(f"{self._layout.database} could not be opened again before the queue was closed")
        return [(operation, error) for operation in self._take()]

    def _report(self, outcomes: list[tuple[Operation[Any], QueueError | None]]) -> None:
        """One wake-up of the loop for all of them."""
        if outcomes:
            try:
                self._loop.call_soon_threadsafe(_resolve, outcomes)
            except RuntimeError:
                _logger.warning("queue: %d outcomes came after the event loop was closed", len(outcomes))


def _resolve(outcomes: list[tuple[Operation[Any], QueueError | None]]) -> None:
    for operation, error in outcomes:
        future = operation.future
        if future is not None and future.cancelled():
            # Its caller was cancelled and has not run since: leave the outcome where perform() will look for it.
            operation.future = future = future.get_loop().create_future()
        if future is None or future.done():
            continue
        if error is None:
            future.set_result(operation.result)
        else:
            future.set_exception(error)
