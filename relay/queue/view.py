"""Owns: looking at the queue from outside, running or stopped: for the command line and the web process.

Read-only connections, each call its own; long listings go page by page, so that no reader keeps the log from being
used again. Text that cannot be read is replaced, never raised. Must not change anything.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from relay.mail.address import Mailbox
from relay.mail.content import CHUNK_OCTETS
from relay.mail.envelope import QueueId
from relay.mail.terms import PLAIN_RECIPIENT, RecipientTerms
from relay.queue.change import check_version
from relay.queue.database import connect_readonly, fault
from relay.queue.layout import Layout
from relay.queue.rows import Row, listed_of
from relay.queue.statements import SQL
from relay.queue.store import Listed, QueuedRecipient, QueueError, RecipientState, Stats

_STATES: Final = frozenset(each.value for each in RecipientState)

_SHARE: Final = 20
"""One part in so many of a core may go into counting."""

_PAGE: Final = 500
"""Messages read at once."""


def listing(spool: Path) -> Iterator[Listed]:
    """All messages, those put by one worker in the order they came. Raises QueueError."""
    layout = Layout.of(spool)
    last = -1
    while True:
        with reading(layout) as (connection,):
            rows = connection.execute(SQL["list_messages"], (last, _PAGE)).fetchall()
            page = _listed(connection, rows)
        yield from page
        if len(rows) < _PAGE:
            return
        last = rows[-1][0]


def find(spool: Path, queue_id: QueueId) -> Listed | None:
    """The message of that identifier. Raises QueueError."""
    layout = Layout.of(spool)
    with reading(layout) as (connection,):
        found = connection.execute(SQL["keys_of_id"], (queue_id,)).fetchone()
        rows = connection.execute(SQL["list_messages"], (found[0] - 1, 1)).fetchall() if found else []
        return next(iter(_listed(connection, rows)), None)


def header(spool: Path, queue_id: QueueId, limit: int) -> bytes | None:
    """The first ``limit`` octets of the message, None when there is none. Raises QueueError."""
    layout = Layout.of(spool)
    with reading(layout) as (connection,):
        found = connection.execute(SQL["keys_of_id"], (queue_id,)).fetchone()
        content = connection.execute(SQL["select_content"], (found[0],)).fetchone() if found else None
        if content is None:
            return None
        if not content[0]:
            body = connection.execute(SQL["body_head"], (limit, found[0])).fetchone()
            return bytes(body[0]) if body else None
        try:
            descriptor = os.open(layout.bodies / content[0], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return os.pread(descriptor, limit, 0)
        finally:
            os.close(descriptor)


def body(spool: Path, queue_id: QueueId) -> Iterator[bytes]:
    """The message as it was, dots no longer stuffed, piece by piece; nothing when there is none. Raises QueueError."""
    layout = Layout.of(spool)
    with reading(layout) as (connection,):
        found = connection.execute(SQL["keys_of_id"], (queue_id,)).fetchone()
        content = connection.execute(SQL["select_content"], (found[0],)).fetchone() if found else None
        if content is None:
            return
        if not content[0]:
            row = connection.execute(SQL["select_body"], (found[0],)).fetchone()
            pieces: Iterable[bytes] = [bytes(row[0])] if row else []
        else:
            pieces = _file(layout.bodies / content[0])
        yield from _unstuffed(pieces)


def _file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_OCTETS):
            yield piece


def _unstuffed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """RFC 5321 section 4.5.2: the first dot of a line goes, wherever a piece ends."""
    before = b"\r\n"
    for piece in pieces:
        text = before + piece
        yield text.replace(b"\r\n.", b"\r\n")[len(before) :]
        before = text[-2:]


def read_stats(spool: Path) -> Stats:
    """Depth and age. Raises QueueError."""
    with reading(Layout.of(spool)) as (connection,):
        return stats_of(connection)


def stats_of(connection: sqlite3.Connection) -> Stats:
    """Depth and age. Raises sqlite3.Error."""
    messages, leased, octets, oldest, corrupt, recipients, held = connection.execute(SQL["stats"]).fetchone()
    of_corrupt = connection.execute(SQL["recipients_aside"]).fetchone()[0] if corrupt else 0
    return Stats(
        messages=messages,
        recipients=recipients - of_corrupt,
        held=held,
        leased=leased,
        octets=octets,
        oldest=oldest,
        corrupt=corrupt,
    )


class Figures:
    """Depth and age for somebody who asks often: counting a hundred thousand messages takes a tenth of a second, so the answer
    is kept for ``_SHARE`` times as long as it took to get.
    """

    def __init__(self) -> None:
        self._spool = Path()
        self._stats: Stats | None = None
        self._until = 0.0

    def read(self, spool: Path) -> Stats:
        """Raises QueueError, and remembers nothing then."""
        begun = time.monotonic()
        if self._stats is None or spool != self._spool or begun >= self._until:
            self._stats = None
            self._stats = read_stats(spool)
            self._spool = spool
            now = time.monotonic()
            self._until = now + (now - begun) * _SHARE
        return self._stats


class reading:  # noqa: N801  used like a function
    """A read-only connection for one look; its faults come as QueueError."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __enter__(self) -> tuple[sqlite3.Connection]:
        if not self._layout.database.exists():
            raise QueueError(f"{self._layout.database} does not exist; is server.spool the folder of a relay?")
        try:
            self._connection = connect_readonly(self._layout)
        except sqlite3.Error as error:
            raise fault(error, self._layout.database) from None
        try:
            check_version(self._connection, self._layout)
        except (sqlite3.Error, QueueError) as error:
            self._connection.close()
            raise error if isinstance(error, QueueError) else fault(error, self._layout.database) from None
        self._connection.text_factory = _lenient
        self._connection.execute("BEGIN")  # message and recipients of one moment
        return (self._connection,)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, sqlite3.Error | OSError):
            raise fault(error, self._layout.database) from None


def _lenient(octets: bytes) -> str:
    return octets.decode("utf-8", "replace")


def _listed(connection: sqlite3.Connection, rows: Sequence[Row]) -> list[Listed]:
    """Messages from ``list_messages``, with their recipients."""
    recipients: defaultdict[int, list[QueuedRecipient]] = defaultdict(list)
    if rows:
        for key, *rest in connection.execute(SQL["list_recipients"], (rows[0][0], rows[-1][0])):
            recipients[key].append(_recipient(tuple(rest)))
    return [listed_of(row, recipients[row[0]]) for row in rows]


def _recipient(row: Row) -> QueuedRecipient:
    """As it is, for a person to look at: an unknown state counts as held, for nobody will try it."""
    number, mailbox, state, attempts, due, code, enhanced, text, host, terms = row
    known = state in _STATES
    return QueuedRecipient(
        number=number,
        mailbox=Mailbox(str(mailbox)),
        state=RecipientState(state) if known else RecipientState.HELD,
        attempts=attempts,
        due=due,
        last_code=code,
        last_enhanced=str(enhanced),
        last_text=str(text),
        last_host=str(host),
        terms=RecipientTerms.read(str(terms)) or PLAIN_RECIPIENT,
    )
