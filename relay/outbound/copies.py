"""Owns: what the postmaster is told (row Q7): copies by class of failure, gathered into letters, and double bounces.

The classes are those of Postfix's notify_classes. However much goes wrong, a worker sends a letter every ``LETTER_S`` at most, and
``DOUBLE_BOUNCES`` double bounces in that time; what is beyond is counted. A copy that cannot be delivered is dropped. It
must not decide about mail, nor be waited for on the hot path.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from relay.config.schema import Config, CopyKind
from relay.mail.address import NULL_SENDER, Mailbox
from relay.mail.content import Content
from relay.mail.copies import Letter
from relay.mail.dsn import ORIGINAL_OCTETS, Cause, Notice
from relay.mail.envelope import Envelope, QueueId
from relay.mail.trace import date
from relay.queue.boot import boot_clock
from relay.queue.store import NewMessage, QueueError, Store
from relay.telemetry.maillog import MailLog, printable

GATHER_S: Final = 1.0
"""After the first event: others of the same cause come along."""
LETTER_S: Final = 300.0
"""Between two letters of a worker."""
LINES: Final = 50
"""Events of a class that a letter names; it counts the others."""
DOUBLE_BOUNCES: Final = 20
"""Double bounces passed on in LETTER_S: a flood of them is somebody's forgery, not news."""
COPY: Final = "copy for the postmaster"
"""In place of a client in a copy's envelope: what becomes of it is not worth another one."""

_CAUSES: Final[dict[Cause, CopyKind]] = {Cause.REFUSED: "bounce", Cause.EXPIRED: "bounce", Cause.DELAYED: "delay"}
_WORDS: Final[dict[CopyKind, str]] = {
    "bounce": "Returned to their senders",
    "2bounce": "Could not even be returned, and are dropped",
    "delay": "Late; the senders were warned",
    "policy": "Refused",
    "resource": "Trouble with disk or memory",
    "software": "Trouble with the relay or a next hop's configuration",
}


class Copies:
    """Gathers for one worker."""

    def __init__(self, config: Config, store: Store, log: MailLog, next_id: Callable[[], QueueId]) -> None:
        self._store = store
        self._log = log
        self._next_id = next_id
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._lines: dict[CopyKind, list[str]] = {}
        self._counts: Counter[CopyKind] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._again = 0.0
        self._doubles = 0
        self._doubles_until = 0.0
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a (new) configuration."""
        postmaster = config.postmaster
        self._hostname = config.server.hostname
        self._expire_s = config.queue.expire_after_s
        self._mailbox = Mailbox(postmaster.mailbox or "")
        self._double_mailbox = Mailbox(postmaster.double_bounces or "")
        self._kinds = frozenset(postmaster.notify) if self._mailbox else frozenset()
        if not self._double_mailbox and "2bounce" in self._kinds:
            self._double_mailbox = self._mailbox
        self._log.copy = self.note if self._kinds else None

    def note(self, kind: CopyKind, line: str) -> None:
        """Something happened that a letter may tell. May be called in any thread: snapshots are read beside the loop."""
        if kind not in self._kinds:
            return
        if threading.get_ident() != self._thread:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to write
                self._loop.call_soon_threadsafe(self.note, kind, line)
            return
        self._counts[kind] += 1
        lines = self._lines.setdefault(kind, [])
        if len(lines) < LINES:
            lines.append(printable(line, 500))
        if self._timer is None:
            wait = max(GATHER_S, self._again - time.monotonic())
            self._timer = self._loop.call_later(wait, self._send)

    def about(self, envelope: Envelope, head: bytes, size: int, notices: Sequence[Notice]) -> tuple[NewMessage, ...]:
        """Take note of what became of recipients; a double bounce is to be put in the same transaction."""
        if envelope.client == COPY or not (self._kinds or self._double_mailbox):
            return ()
        told = [notice for notice in notices if notice.cause in _CAUSES]
        if not told:
            return ()
        lines = [f"to <{one.recipient}>: {one.host or 'no next hop'}: {_said(one)}" for one in told]
        if not envelope.sender and told[0].cause is not Cause.DELAYED:
            return self._double_bounce(envelope, head, size, lines)
        for one, line in zip(told, lines, strict=True):
            self.note(_CAUSES[one.cause], f"{envelope.id}: from <{envelope.sender}> {line}")
        return ()

    def _double_bounce(
        self, envelope: Envelope, head: bytes, size: int, lines: Sequence[str]
    ) -> tuple[NewMessage, ...]:
        now = time.monotonic()
        if now >= self._doubles_until:
            self._doubles, self._doubles_until = 0, now + LETTER_S
        self._doubles += 1
        if not self._double_mailbox or self._doubles > DOUBLE_BOUNCES:
            for line in lines:
                self.note("2bounce", f"{envelope.id}: {line}")
            return ()
        queue_id = self._next_id()
        letter = self._letter(
            queue_id,
            self._double_mailbox,
            "Undeliverable mail that could not be returned",
            [
                f"This is the mail system at {self._hostname}.",
                "",
                "The message below has the null sender, so nobody can be told that it was not delivered:",
                "",
                *(printable(line, 500) for line in lines),
                "",
                f"Identifier in the log: {envelope.id}",
            ],
        )
        octets = letter.around(head, f"={queue_id}=", whole=size <= ORIGINAL_OCTETS and len(head) == size)
        self._log.note("info", "double_bounce", id=queue_id, for_id=envelope.id, to=self._double_mailbox)
        return (self._message(queue_id, self._double_mailbox, octets),)

    def _letter(self, queue_id: QueueId, to: Mailbox, subject: str, lines: Sequence[str]) -> Letter:
        now = time.time()
        day = date(now, time.localtime(now).tm_gmtoff)
        return Letter(self._hostname, to, subject, day, f"{queue_id}@{self._hostname}", lines)

    def _message(self, queue_id: QueueId, to: Mailbox, octets: bytes) -> NewMessage:
        envelope = Envelope(queue_id, NULL_SENDER, (to,), not octets.isascii(), "", COPY)
        return NewMessage(envelope, Content.of(octets), time.time(), self._expire_s, boot_clock(), leased=False)

    def _send(self) -> None:
        self._timer = None
        self._sending = self._loop.create_task(self.flush())

    async def flush(self) -> None:
        """Put the letter, if there is anything to tell; where the disk refuses, it waits for the next time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lines:
            return
        self._again = time.monotonic() + LETTER_S
        lines, counts, self._lines, self._counts = self._lines, self._counts, {}, Counter()
        queue_id = self._next_id()
        subject = f"{self._hostname}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        letter = self._letter(queue_id, self._mailbox, subject, _text(self._hostname, lines, counts))
        try:
            await self._store.put([self._message(queue_id, self._mailbox, letter.wire())])
        except QueueError:
            # The alarm about the disk came from whoever met it first.
            for kind, earlier in lines.items():
                self._lines[kind] = (earlier + self._lines.get(kind, []))[:LINES]
            self._counts += counts
            self._again = time.monotonic() + GATHER_S
            self._timer = self._loop.call_later(GATHER_S * 10, self._send)
        else:
            self._log.note("info", "postmaster_told", id=queue_id, to=self._mailbox)


def _text(hostname: str, lines: dict[CopyKind, list[str]], counts: Counter[CopyKind]) -> list[str]:
    text = [f"This is the mail system at {hostname}. Since its last letter:", ""]
    for kind, told in sorted(lines.items()):
        text += [f"{_WORDS[kind]} ({kind}): {counts[kind]}", "", *told]
        if counts[kind] > len(told):
            text.append(f"and {counts[kind] - len(told)} more, which are in the log")
        text.append("")
    return [*text, f"The next letter comes in {LETTER_S / 60:.0f} minutes at the earliest."]


def _said(notice: Notice) -> str:
    answer = notice.answer
    return " ".join(part for part in (str(answer.code or ""), answer.enhanced, answer.text) if part)
