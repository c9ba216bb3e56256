"""Owns: the way of what libraries, and our code below the mail log, say through ``logging`` into the mail log.

Warnings and worse only: asyncio's unhandled faults, the queue's trouble with its disk. Must not be used by code that
can reach a ``MailLog``.
"""

from __future__ import annotations

import logging

from relay.telemetry.maillog import MailLog


class LibraryLog(logging.Handler):
    """A handler for the root logger."""

    def __init__(self, log: MailLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One record as one note: name, text, and the fault behind it when there is one."""
        fault = repr(record.exc_info[1]) if record.exc_info and record.exc_info[1] is not None else ""
        level = "error" if record.levelno >= logging.ERROR else "warning"
        self._log.note(level, "library", logger=record.name, text=record.getMessage(), fault=fault)


def adopt_logging(log: MailLog) -> None:
    """Send everything that goes through ``logging`` in this process to ``log``."""
    logging.getLogger().addHandler(LibraryLog(log))
