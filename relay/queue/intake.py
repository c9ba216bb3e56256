"""Owns: the intake log of one worker: where a message that its worker delivers at once is made durable.

Most durable mail is delivered a moment after it was acknowledged. For that it needs no row, no index and no lock that
other processes hold: a record in a file of this worker's own, synced, is as safe. Whatever is not over soon goes into the
database, where it can be seen, claimed and operated on:

    put ──► record, sync ──► 250 ──► delivered within MOVE_AFTER_S ──► done record
                                 └─► anything else (refused, deferred, slow, drain) ──► rows in the database ──► done record

Two segments are used in turn; one is begun again when nothing in it is live. After a crash, what no done record names is put
into the database before anything else (``relay.queue.intake_file`` reads it, ``relay.queue.operations.Import`` puts it).
One thread writes and syncs, one group at a time; the rest is the event loop's. After a failed write or sync nothing is
written before all that is live is in the database and a segment was begun anew. Must not know SQL.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from relay.queue import intake_file
from relay.queue.database import fault
from relay.queue.intake_segment import Entry, Group, Segment
from relay.queue.layout import FILE_MODE, Layout, Tuning, grow
from relay.queue.rows import NewRows
from relay.queue.store import QueueError

MOVE_AFTER_S: Final = 1.0
"""A message older than this goes into the database: commands and other workers look there."""

SWEEP_S: Final = 0.25
"""How often old messages and late writes are looked for."""

MOVE_AT_ONCE: Final = 100
"""Messages moved in one transaction; more would hold the write lock for too long."""

PATIENCE_S: Final = 0.02
"""How long done records wait for a put to share its sync. A process killed meanwhile leaves them in the journal."""

LINGER_S: Final = 0.001
"""Where several puts came together the last time, a group waits this long for more of them."""

DONE_RESERVE: Final = 256 * 1024
"""Room kept in a segment for done records: more than there can be live messages."""

OPEN_AGAIN_S: Final = 10.0
"""Between attempts to make the files, where the disk had no room for them."""

CLOSING_TRIES: Final = 5
"""How often a log that failed is begun anew before its worker ends all the same."""

GROUP_OCTETS: Final = 4 * 1024 * 1024
"""Written and synced at once."""

_logger: Final = logging.getLogger("relay.queue")


class Intake:
    """The log of one worker. All methods are for the event loop's thread."""

    def __init__(
        self,
        layout: Layout,
        slot: int,
        schema: int,
        *,
        loop: asyncio.AbstractEventLoop,
        move: Callable[[Sequence[Entry]], asyncio.Future[None]],
        forget: Callable[[list[int]], None],
        timeout_s: float,
        tuning: Tuning,
    ) -> None:
        """``move`` puts live messages into the database; its future raises QueueError when that failed. ``forget`` is
        told the keys of moved messages once the log says that they are done.

        The files are opened, and made where they are missing, by the first put.
        """
        self._layout = layout
        self._slot = slot
        self._schema = schema
        self._loop = loop
        self._move = move
        self._forget = forget
        self._moved_keys: list[int] = []
        self._timeout_s = timeout_s
        self._octets = tuning.intake_octets
        self._reserve_octets = tuning.reserve_octets
        self._open_after = 0.0
        self._live: dict[int, Entry] = {}
        self._segments: list[Segment] = []
        self._opened: list[Segment] = []
        """What the thread is opening."""
        self._groups: deque[Group] = deque()
        self._writing: Group | None = None
        self._homeless: list[tuple[int, asyncio.Future[bool]]] = []
        """Done records without room, or whose group failed; they go into the next segment that is begun."""
        self._urgent = False
        self._puts = 0
        self._last_puts = 0
        self._scheduled = False
        self._opening = False
        self._broken = False
        self._closing = False
        self._go = threading.Lock()
        self._go.acquire()
        self._job: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name=f"queue-intake-{slot}", daemon=True)
        self._thread.start()
        self._patience: asyncio.TimerHandle | None = None
        self._timer = loop.call_later(SWEEP_S, self._sweep)

    # --- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._go.acquire()
            job = self._job
            if job is None:
                return
            error: OSError | None = None
            try:
                job()
            except OSError as failed:
                error = failed
            try:
                self._loop.call_soon_threadsafe(self._done, error)
            except RuntimeError:  # the loop is closed
                return

    def _open_files(self) -> None:
        """Segments as long as they will get: a sync over allocated blocks is fast. Raises OSError."""
        paths = [self._layout.queue / intake_file.segment_name(self._slot, letter) for letter in "ab"]
        missing = sum(self._octets for path in paths if not path.exists() or path.stat().st_size < self._octets)
        status = os.statvfs(self._layout.queue)
        if missing and status.f_bavail * status.f_frsize < missing + 2 * self._reserve_octets:
            raise OSError(errno.ENOSPC, "less free space than it should leave to others", str(paths[0]))
        for path in paths:
            grow(path, self._octets)
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
            self._opened.append(Segment(descriptor, str(path)))

    # --- messages ------------------------------------------------------------------------------------------------------

    def put(self, rows: NewRows) -> asyncio.Future[None] | None:
        """Make a message durable; the future raises QueueError. None: not here and now, the database takes it."""
        if not self._segments or self._broken or self._closing:
            if not self._segments and not self._opening and not self._closing:
                self._open()
            return None
        segment = self._segments[0]
        record = intake_file.put_record(segment.seed, rows)
        if segment.reserved + len(record) > self._octets - DONE_RESERVE:
            if not self._turn():
                return None
            segment = self._segments[0]
            record = intake_file.put_record(segment.seed, rows)
            if segment.reserved + len(record) > self._octets - DONE_RESERVE:
                return None
        future: asyncio.Future[None] = self._loop.create_future()
        self._append(segment, record, rows.key, future)
        segment.live += 1
        self._live[rows.key] = Entry(rows, segment, self._loop.time())
        self._urgent = True
        self._puts += 1
        if not self._scheduled and self._writing is None:
            self._schedule()
        return future

    def _schedule(self) -> None:
        """Write in a moment: where several came together lately, after a linger for more of them."""
        self._scheduled = True
        if self._puts > 1 or self._last_puts > 1:
            self._loop.call_later(LINGER_S, self._write_next)
        else:
            self._loop.call_soon(self._write_next)

    def _open(self) -> None:
        now = self._loop.time()
        if now >= self._open_after:
            self._open_after = now + OPEN_AGAIN_S
            self._opening = True
            self._start(self._open_files)

    def live(self, key: int) -> Entry | None:
        """The message, while it is here and nowhere else."""
        return self._live.get(key)

    def finish(self, key: int) -> asyncio.Future[bool]:
        """The message is over, or in the database; the future is done when the log says so."""
        future: asyncio.Future[bool] = self._loop.create_future()
        entry = self._live.pop(key)
        entry.segment.live -= 1
        self._say_done(key, future)
        return future

    def _say_done(self, key: int, future: asyncio.Future[bool]) -> None:
        segment = self._segments[0]
        if self._broken or segment.reserved + intake_file.DONE_OCTETS > self._octets:
            self._homeless.append((key, future))
            return
        self._append(segment, intake_file.done_record(segment.seed, key), key, future)
        if self._patience is None and self._writing is None and not self._scheduled:
            self._patience = self._loop.call_later(PATIENCE_S, self._lose_patience)

    def _lose_patience(self) -> None:
        self._patience = None
        self._urgent = True
        self._write_next()

    def _append(
        self, segment: Segment, record: bytes, key: int, future: asyncio.Future[None] | asyncio.Future[bool]
    ) -> None:
        group = self._groups[-1] if self._groups else None
        if group is None or group.segment is not segment or group.size > GROUP_OCTETS:
            group = Group(segment, self._loop.time() + self._timeout_s, self._schema)
            self._groups.append(group)
        group.parts.append(record)
        group.futures.append((key, future))
        group.size += len(record)
        segment.reserved += len(record)

    def _turn(self) -> bool:
        """Go on in the other segment; False while something in it is live, which is then moved."""
        other = self._segments[1]
        if other.live or any(group.segment is other for group in self._groups) or self._holds(other):
            self._move_some([entry for entry in self._live.values() if entry.segment is other])
            return False
        other.begin()
        self._segments.reverse()
        homeless, self._homeless = self._homeless, []
        for key, future in homeless:
            self._say_done(key, future)
        return True

    def _holds(self, segment: Segment) -> bool:
        return self._writing is not None and self._writing.segment is segment

    # --- writing -------------------------------------------------------------------------------------------------------

    def _start(self, job: Callable[[], None]) -> None:
        self._job = job
        self._go.release()

    def _write_next(self) -> None:
        self._scheduled = False
        self._last_puts, self._puts = self._puts, 0
        if self._writing is not None or self._opening or not self._groups or not self._urgent:
            return
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        group = self._writing = self._groups.popleft()
        self._urgent = bool(self._groups)
        self._start(group.write)

    def _done(self, error: OSError | None) -> None:
        """The thread's outcome."""
        if self._opening:
            self._opening = False
            self._segments, self._opened = self._opened, []
            if error is not None:
                self._forget_files()
                _logger.warning("queue: no intake log for now: %s; the database takes all mail", error)
            return
        group, self._writing = self._writing, None
        assert group is not None
        if error is not None:
            self._fail(group, error)
            return
        for _, future in group.futures:
            if not future.done():
                # A put wants None and a done record True: a future takes either.
                future.set_result(True)  # type: ignore[arg-type]
        if self._groups and not self._scheduled:
            if self._urgent:
                self._schedule()
            elif self._patience is None:
                self._patience = self._loop.call_later(PATIENCE_S, self._lose_patience)

    def _fail(self, group: Group, error: OSError) -> None:
        """Nothing more is written to these segments: who was told no must not come back, who was told yes must not go."""
        self._broken = True
        _logger.error("queue: %s: %s; all mail goes through the database until the log is begun anew",
                      group.segment.path, error.strerror or error)  # fmt: skip
        told = fault(error, self._layout.queue)
        groups = [group, *self._groups]
        self._groups.clear()
        for each in groups:
            for key, future in each.futures:
                entry = self._live.get(key)
                if entry is not None and not entry.moving and not future.done():
                    del self._live[key]
                    entry.segment.live -= 1
                    future.set_exception(told)
                elif not future.done():
                    self._homeless.append((key, future))  # type: ignore[arg-type]

    # --- upkeep --------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        now = self._loop.time()
        self._timer = self._loop.call_later(SWEEP_S, self._sweep)
        self._expire(now)
        if self._moved_keys:
            keys, self._moved_keys = self._moved_keys, []
            self._forget(keys)
        if self._broken:
            self._move_some(list(self._live.values()))
            self._begin_anew()
            return
        before = now - MOVE_AFTER_S
        old: list[Entry] = []
        for entry in self._live.values():
            if entry.since > before:
                break
            old.append(entry)
        self._move_some(old)

    def _expire(self, now: float) -> None:
        """Puts that were not begun in time are refused and never written; done records wait on."""
        if not self._groups or self._groups[0].deadline > now:
            return
        text = f"{self._layout.queue}: not written within {self._timeout_s:g} s; is the disk stuck?"
        self._fail_waiting(QueueError(text))

    def _fail_waiting(self, told: QueueError) -> None:
        """Take what waits back, puts and all; the segment goes on where the group under way will end."""
        groups = list(self._groups)
        self._groups.clear()
        for segment in self._segments:
            waiting = [group for group in groups if group.segment is segment]
            if waiting:
                segment.reserved = waiting[0].offset
                if waiting[0].header:
                    segment.begun = False
        for group in groups:
            for key, future in group.futures:
                entry = self._live.get(key)
                if entry is not None and not entry.moving and not future.done():
                    del self._live[key]
                    entry.segment.live -= 1
                    future.set_exception(told)
                elif not future.done():
                    self._say_done(key, future)  # type: ignore[arg-type]

    def _move_some(self, entries: Sequence[Entry]) -> None:
        """Put live messages into the database; each is over here when that is committed."""
        waiting = [entry for entry in entries if entry.moving is None and self._is_written(entry)][:MOVE_AT_ONCE]
        if waiting:
            self.move(waiting)

    def _is_written(self, entry: Entry) -> bool:
        """Its put was answered: before that the log is all there is to wait for."""
        groups = [*self._groups, self._writing] if self._writing is not None else self._groups
        return not any(entry.rows.key == key for group in groups for key, future in group.futures if not future.done())

    def move(self, entries: Sequence[Entry]) -> asyncio.Future[None]:
        """Put these into the database, under their keys and leases. The future raises QueueError when that failed."""
        moved = self._move(entries)
        for entry in entries:
            entry.moving = moved
        moved.add_done_callback(lambda future: self._moved(entries, future))
        return moved

    def _moved(self, entries: Sequence[Entry], future: asyncio.Future[None]) -> None:
        failed = future.cancelled() or future.exception() is not None
        for entry in entries:
            if failed:
                entry.moving = None
            elif (key := entry.rows.key) in self._live:
                self.finish(key).add_done_callback(lambda _, key=key: self._moved_keys.append(key))  # type: ignore[misc]

    def _begin_anew(self) -> None:
        """After a fault, when nothing is live any more: begin both segments again, on whatever the disk says now."""
        if self._live or self._writing is not None or self._opening:
            return
        for segment in self._segments:
            segment.live = 0
            segment.begin()
        self._broken = False
        homeless, self._homeless = self._homeless, []
        for segment in self._segments:
            # Both at once: neither may be found with a put of before that was told no.
            self._groups.append(Group(segment, self._loop.time() + self._timeout_s, self._schema))
        for key, future in homeless:
            self._say_done(key, future)
        self._urgent = True
        self._write_next()

    # --- the end -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Move what is live into the database, write what waits, end the thread. Raises QueueError when it cannot be
        moved: it is found in the log by the next start.
        """
        self._closing = True
        self._timer.cancel()
        try:
            while self._opening:  # noqa: ASYNC110 - once in the life of a worker
                await asyncio.sleep(0.01)
            while self._live:
                entries = [entry for entry in self._live.values() if entry.moving is None]
                moving = [entry.moving for entry in self._live.values() if entry.moving is not None]
                if entries:
                    moving.append(self.move(entries[:MOVE_AT_ONCE]))
                await moving[0]
            await self._written_out()
            for _ in range(CLOSING_TRIES):
                if not self._broken:
                    break
                self._begin_anew()  # a put that was told no must not be found by the next start
                await self._written_out()
        finally:
            if self._patience is not None:
                self._patience.cancel()
            self._job = None
            self._go.release()
            await asyncio.to_thread(self._thread.join)
            self._forget_files()

    async def _written_out(self) -> None:
        while self._writing is not None or (self._groups and not self._broken):
            self._urgent = True
            self._write_next()
            await asyncio.sleep(0.001)

    def _forget_files(self) -> None:
        for segment in self._segments:
            os.close(segment.descriptor)
        self._segments = []
