"""Owns: how log lines reach a file or standard error without holding up the event loop.

Lines wait in memory for at most ``FLUSH_S``; one thread writes them in whole lines, so that several processes may share
one file (O_APPEND) or one pipe. Nothing is dropped for want of room: a producer that is too fast writes itself. Must
not know what a line means. Make the writer after the fork: threads and waiting lines do not survive one.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

FLUSH_S: Final = 0.1
"""Longest wait of a line in memory, seconds."""
BATCH_OCTETS: Final = 64 * 1024
"""With so much the thread is rung: a good size for a disk, and it keeps single lines from waiting for a timer under load."""
PIECE_OCTETS: Final = 2 * BATCH_OCTETS
"""So much is written to a file at once: a batch, and the line that made it full."""
BACKLOG_OCTETS: Final = 16 * 1024 * 1024
"""So much may wait for a slow disk; then the producer waits with it. Some 100,000 lines."""
FILE_MODE: Final = 0o640
STOP_S: Final = 5.0
"""How long ``close`` waits for the thread when the disk or the reader of a pipe hangs."""

STDERR: Final = 2


class LogWriter:
    """Appends lines to ``path`` (None: standard error). Raises OSError when the file cannot be opened.

    Until ``start`` every line is written at once, which is what the supervisor wants. ``lost`` counts lines that could
    not be written; ``problem`` says why, "" while all is well.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._descriptor = STDERR if path is None else _open(path)
        self._piece = _piece_octets(self._descriptor)
        self._torn = False
        self._reopen = False
        self.lost = 0
        self.problem = ""

        self._lines: list[str] = []  # producer's side
        self._octets = 0
        self._batches: deque[tuple[list[str], int]] = deque()
        self._handed = 0  # octets; written by the producer only, so no lock is needed
        self._written = 0  # octets; written under the lock only
        self._lock = threading.Lock()

        self._thread: threading.Thread | None = None
        self._bell = threading.Event()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._report: Callable[[int], None] | None = None
        self._reported = 0

    def start(self, loop: asyncio.AbstractEventLoop, report: Callable[[int], None] | None = None) -> None:
        """Write in a thread from now on. ``report`` is told on the loop how many more lines were lost."""
        self._loop = loop
        self._report = report
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="log", daemon=True)
        self._thread.start()
        self._timer = loop.call_later(FLUSH_S, self._tick)

    def write(self, line: str) -> None:
        """Append one line (printable, without line end). From the loop's thread only; 0.2 µs once started."""
        self._lines.append(line)
        self._octets += len(line) + 1
        if self._octets >= BATCH_OCTETS or self._thread is None:
            self._hand_over()

    def flush(self) -> None:
        """Write everything that waits; returns when it is with the system or counted as lost."""
        self._hand_over()
        self._write_batches()

    def reopen(self) -> None:
        """Open the file again by its name (after it was rotated). On failure the old one stays, and it is tried again."""
        self._reopen = self._path is not None
        if self._thread is None:
            self._write_batches()
        else:
            self._bell.set()

    def close(self) -> None:
        """Stop the thread and write what waits. Lines after this are lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._thread is not None:
            self._stopping = True
            self._bell.set()
            self._thread.join(STOP_S)
            stuck = self._thread.is_alive()
            self._thread = None
            if stuck:
                return
        self.flush()
        self._report_lost()
        if self._path is not None and self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._path = None

    def _tick(self) -> None:
        assert self._loop is not None
        self._hand_over()
        self._report_lost()
        self._timer = self._loop.call_later(FLUSH_S, self._tick)

    def _report_lost(self) -> None:
        lost = self.lost
        if lost > self._reported and self._report is not None:
            self._report(lost - self._reported)
            self._reported = lost

    def _hand_over(self) -> None:
        if self._lines:
            self._handed += self._octets
            self._batches.append((self._lines, self._octets))
            self._lines = []
            self._octets = 0
        if self._thread is None or self._handed - self._written > BACKLOG_OCTETS:
            self._write_batches()
        elif self._batches:
            self._bell.set()

    def _serve(self) -> None:
        while not self._stopping:
            self._bell.wait()
            self._bell.clear()
            self._write_batches()

    def _write_batches(self) -> None:
        """Write all batches in order. Whoever holds the lock writes for all."""
        with self._lock:
            if self._reopen:
                self._open_again()
            while self._batches:
                lines, octets = self._batches.popleft()
                self._write_lines(lines)
                self._written += octets

    def _write_lines(self, lines: list[str]) -> None:
        if self._descriptor < 0 and self._path is not None:
            self._open_again()
        if self._descriptor < 0:
            self.lost += len(lines)
            return
        pieces = _pieces(lines, self._piece)
        for number, piece in enumerate(pieces):
            octets = b"\n" + piece if self._torn else piece
            written, error = self._write_octets(octets)
            if error is not None:
                unwritten = octets[written:].count(b"\n") + sum(later.count(b"\n") for later in pieces[number + 1 :])
                self.lost += unwritten
                self.problem = f"{self._path or 'standard error'}: {error.strerror}"
                if self._path is not None:
                    os.close(self._descriptor)
                    self._descriptor = -1
                return
        self.problem = ""

    def _write_octets(self, octets: bytes) -> tuple[int, OSError | None]:
        """How much was written, and what stopped it. A line cut off by a full disk is ended before the next write."""
        position = 0
        while position < len(octets):
            try:
                position += os.write(self._descriptor, octets[position:])
            except BlockingIOError:  # a parent may have made standard error non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError as error:
                if position:
                    self._torn = octets[position - 1] != 0x0A
                return position, error
        self._torn = False
        return position, None

    def _open_again(self) -> None:
        assert self._path is not None
        try:
            descriptor = _open(self._path)
        except OSError as error:
            self.problem = f"{self._path}: {error.strerror}"
            return
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self._piece = _piece_octets(descriptor)
        self._reopen = False


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)


def _piece_octets(descriptor: int) -> int:
    """How much one write may carry so that lines of several processes do not mix: files take any, pipes PIPE_BUF."""
    return PIECE_OCTETS if stat.S_ISREG(os.fstat(descriptor).st_mode) else select.PIPE_BUF


def _pieces(lines: list[str], limit: int) -> list[bytes]:
    """Whole lines joined to pieces of at most ``limit`` octets (a longer line stands alone)."""
    whole = ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")
    if len(whole) <= limit:  # a file's: the lines of a dictionary attack are not taken in hand one by one
        return [whole]
    pieces: list[bytes] = []
    gathered: list[bytes] = []
    size = 0
    for line in lines:
        octets = line.encode("utf-8", "backslashreplace") + b"\n"
        if gathered and size + len(octets) > limit:
            pieces.append(b"".join(gathered))
            gathered, size = [], 0
        gathered.append(octets)
        size += len(octets)
    if gathered:
        pieces.append(b"".join(gathered))
    return pieces
