"""Owns: reading claimed messages whole: rows, recipients, body. What cannot be read is named, not guessed at.

Runs in the reader's thread, on its read-only connection. Must not change anything.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass, field
from typing import Any

from relay.mail.content import Content
from relay.queue.bodies import Bodies
from relay.queue.database import code_of, is_corrupt
from relay.queue.rows import ClaimedRow, Unreadable, recipient_of
from relay.queue.statements import SQL
from relay.queue.store import Claimed


@dataclass(slots=True)
class Loaded:
    """What came of a claim: messages, entries to set aside with the reason, keys to give back for now."""

    messages: list[Claimed] = field(default_factory=list)
    aside: list[tuple[int, str]] = field(default_factory=list)
    back: list[int] = field(default_factory=list)


def load(connection: sqlite3.Connection, bodies: Bodies, holder: int, keys: list[int], now: float) -> Loaded:
    """Read the messages of ``keys`` that ``holder`` has leased, in this order. Raises sqlite3.Error."""
    loaded = Loaded()
    for key in keys:
        try:
            claimed = _load_one(connection, bodies, holder, key, now)
        except Unreadable as error:
            loaded.aside.append((key, str(error)))
        except OSError as error:
            # The file is there but cannot be opened now (descriptors, disk): another time.
            loaded.back.append(key)
            if isinstance(error, FileNotFoundError):
                loaded.back.pop()
                loaded.aside.append((key, f"the body file {error.filename} is missing"))
        except sqlite3.Error as error:
            # Text that is not UTF-8 comes as OperationalError without a code; a damaged page as SQLITE_CORRUPT.
            if not is_corrupt(error) and code_of(error) not in {0, sqlite3.SQLITE_ERROR}:
                raise
            loaded.aside.append((key, f"its rows cannot be read: {error}"))
        else:
            if claimed is not None:
                loaded.messages.append(claimed)
    return loaded


def _load_one(connection: sqlite3.Connection, bodies: Bodies, holder: int, key: int, now: float) -> Claimed | None:
    found: Any = connection.execute(SQL["select_claimed"], (key, holder)).fetchone()
    if found is None:
        return None  # lost again already
    row = ClaimedRow(key, found)
    recipients = [recipient_of(each) for each in connection.execute(SQL["select_recipients"], (key,))]
    if not row.file:
        body = connection.execute(SQL["select_body"], (key,)).fetchone()
        return row.claimed(recipients, Content.of(row.body(body[0] if body else None)), now)
    descriptor = bodies.open_named(row.file)
    try:
        size = os.fstat(descriptor).st_size
        if size != row.size:
            raise Unreadable(f"the body file {row.file} has {size} octets instead of {row.size}")
        content = Content(None, descriptor, size, str(bodies.folder / row.file))
        return row.claimed(recipients, content, now)
    except BaseException:
        os.close(descriptor)
        raise
