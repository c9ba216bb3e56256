"""Owns: the queue store in memory: the same promise as on disk, but for the disk. For tests and for trying things out.

``MemorySpool`` stands for the disk: stores made on the same one see the same messages, like workers of one spool. Must
not outlive the process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

from relay.config.schema import Queue
from relay.mail.content import Content
from relay.mail.envelope import QueueId
from relay.queue.boot import Clock, boot_clock
from relay.queue.journal import CELLS
from relay.queue.rows import in_turn
from relay.queue.store import (
    MANY,
    Acted,
    Action,
    Claimed,
    Lease,
    NewMessage,
    QueuedRecipient,
    QueueError,
    RecipientState,
    Settlement,
    Stats,
    TakeOver,
    shared,
)


@dataclass(slots=True)
class _Message:
    new: NewMessage
    content: Content
    expires: float
    recipients: dict[int, QueuedRecipient]
    due: float | None = None
    owner: tuple[int, str] | None = None
    token: int = 0
    until: float = 0.0
    possible_duplicate: bool = False
    waits_for: str = ""
    warned: bool = False
    given_up: bool = False

    def date(self) -> None:
        """When it is to be claimed: its earliest pending recipient or its expiry."""
        pending = [r.due for r in self.recipients.values() if r.state is RecipientState.PENDING]
        self.due = min(*pending, self.expires) if pending else None


@dataclass(slots=True)
class MemorySpool:
    """What would be on disk. ``journals``: cells by slot."""

    messages: dict[int, _Message] = field(default_factory=dict)
    journals: dict[int, dict[int, int]] = field(default_factory=dict)
    last_key: int = 0


class MemoryStore:
    """See ``relay.queue.store.Store``; a store that was not closed died with its leases."""

    def __init__(self, spool: MemorySpool, owner: str, slot: int, config: Queue, *, clock: Clock = boot_clock) -> None:
        self._spool = spool
        self._owner = (slot, owner)
        self._slot = slot
        self._lease_s = config.lease_s
        self._clock = clock
        self._inherited = tuple(spool.journals.get(slot, {}))
        self._cells = spool.journals.setdefault(slot, {})
        self._closed = False

    async def take_over_slot(self) -> TakeOver:
        self._check_open()
        voided = 0
        marked = {self._cells.pop(cell) for cell in self._inherited}
        self._inherited = ()
        duplicates: list[QueueId] = []
        for key, message in self._spool.messages.items():
            if key in marked:
                message.possible_duplicate = True
                duplicates.append(message.new.envelope.id)
            if message.owner is not None and message.owner[0] == self._slot and message.owner != self._owner:
                message.owner = None
                message.token += 1
                voided += 1
        return TakeOver(voided, tuple(duplicates))

    def open_body(self) -> int:
        self._check_open()
        return os.memfd_create("body", os.MFD_CLOEXEC)

    async def put(self, messages: Sequence[NewMessage]) -> list[Lease]:
        self._check_open()
        built = [self._build(message) for message in messages]
        return [self._insert(message, leased=message.new.leased) for message in built]

    def put_soon(self, message: NewMessage) -> tuple[Lease, asyncio.Future[None]]:
        self._check_open()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return self._insert(self._build(message), leased=message.leased), future

    def settle_soon(self, settlement: Settlement) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        future.set_result(self._settled(settlement))
        return future

    async def settle(self, settlement: Settlement) -> bool:
        return self._settled(settlement)

    def _settled(self, settlement: Settlement) -> bool:
        self._check_open()
        message = self._held(settlement.lease)
        if message is None:
            return False
        reports = [self._build(report) for report in settlement.reports]
        for report in reports:
            self._insert(report, leased=False)
        for number in settlement.finished:
            message.recipients.pop(number, None)
        for deferral in settlement.deferred:
            if deferral.number in message.recipients:
                message.recipients[deferral.number] = replace(
                    message.recipients[deferral.number],
                    attempts=deferral.attempts,
                    due=deferral.due,
                    last_code=deferral.code,
                    last_enhanced=deferral.enhanced,
                    last_text=deferral.text,
                    last_host=deferral.host,
                )
        if not message.recipients:
            self._delete(settlement.lease.key)
            return True
        if settlement.finished or settlement.deferred:
            message.date()
        if not settlement.keep:
            message.owner = None
            message.possible_duplicate = settlement.possible_duplicate
            message.waits_for = settlement.waits_for
            message.warned = message.warned or settlement.warned
        elif settlement.possible_duplicate:
            message.possible_duplicate = True
        return True

    async def claim(
        self, limit: int, ready: Sequence[str] = (), parked: int = MANY
    ) -> tuple[list[Claimed], float | None]:
        self._check_open()
        now = self._clock()
        free = sorted(
            (message.due, key)
            for key, message in self._spool.messages.items()
            if message.due is not None and (message.owner is None or message.until <= now)
        )
        ordinary = [key for due, key in free if due <= now and not self._parked(key)]
        aside = [key for due, key in free if due <= now and self._parked(key)]
        keys = shared(ordinary, aside[:parked], limit)
        back = [key for _, key in free if self._parked(key) and self._spool.messages[key].waits_for in ready]
        keys += [key for key in back if key not in keys][: limit - len(keys)]
        claimed = [self._claim_one(key, now) for key in keys]
        waiting = [message.due if message.owner is None else message.until for message in self._spool.messages.values()]
        return claimed, min((moment for moment in waiting if moment is not None), default=None)

    async def awaited(self) -> list[str]:
        self._check_open()
        messages = self._spool.messages
        return sorted(
            {messages[key].waits_for for key in messages if messages[key].due is not None and self._parked(key)}
        )

    async def renew(self, leases: Sequence[Lease]) -> list[Lease | None]:
        self._check_open()
        until = self._clock() + self._lease_s
        renewed: list[Lease | None] = []
        for lease in leases:
            message = self._held(lease)
            if message is not None:
                message.until = until
            renewed.append(None if message is None else Lease(lease.key, lease.token, until))
        return renewed

    async def act(self, queue_id: QueueId, action: Action) -> Acted:
        self._check_open()
        found = [key for key, message in self._spool.messages.items() if message.new.envelope.id == queue_id]
        return sum((self._act(key, action) for key in found), Acted())

    def _act(self, key: int, action: Action) -> Acted:
        message, now = self._spool.messages[key], self._clock()
        if message.owner is not None and action not in {Action.HOLD, Action.RELEASE}:
            return Acted(busy=1)
        everybody = len(message.recipients)
        match action:
            case Action.HOLD:
                changed = _change(message, RecipientState.PENDING, state=RecipientState.HELD)
            case Action.RELEASE:
                changed = _change(message, RecipientState.HELD, state=RecipientState.PENDING, due=now)
            case Action.RETRY | Action.REROUTE:
                changed = _change(message, RecipientState.PENDING, due=now)
                message.waits_for = message.waits_for if action is Action.RETRY else ""
            case Action.BOUNCE:
                _change(message, RecipientState.HELD, state=RecipientState.PENDING, due=now)
                message.waits_for, message.given_up, message.due = "", True, now
                return Acted(1, everybody)
            case Action.DELETE:
                self._delete(key)
                return Acted(1, everybody)
            case _:
                assert_never(action)
        message.date()
        return Acted(1 if changed else 0, changed)

    def mark(self, key: int) -> int:
        free = next((cell for cell in range(CELLS) if cell not in self._cells), None)
        if free is None:
            raise QueueError(f"journal: {CELLS} final dots are under way already")
        self._cells[free] = key
        return free

    def clear(self, cell: int) -> None:
        self._cells.pop(cell, None)

    async def stats(self) -> Stats:
        messages = self._spool.messages.values()
        recipients = [recipient for message in messages for recipient in message.recipients.values()]
        return Stats(
            messages=len(messages),
            recipients=len(recipients),
            held=sum(recipient.state is RecipientState.HELD for recipient in recipients),
            leased=sum(message.owner is not None for message in messages),
            octets=sum(message.content.size for message in messages),
            oldest=min((message.new.created for message in messages), default=0.0),
            corrupt=0,
        )

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise QueueError("the queue is closing")

    def _held(self, lease: Lease) -> _Message | None:
        message = self._spool.messages.get(lease.key)
        return None if message is None or message.owner is None or message.token != lease.token else message

    def _build(self, new: NewMessage) -> _Message:
        """Raises QueueError."""
        count = len(new.envelope.recipients)
        tried = {deferral.number: deferral for deferral in new.deferrals}
        if not count or (tried and not 0 <= min(tried) <= max(tried) < count):
            raise QueueError(f"{new.envelope.id}: a queued message needs recipients, and deferrals only of these")
        message = _Message(new, _copy(new.content), self._clock() + new.expires_in, {}, waits_for=new.waits_for)
        for number, mailbox in enumerate(new.envelope.recipients):
            d = tried.get(number)
            message.recipients[number] = QueuedRecipient(
                number,
                mailbox,
                RecipientState.PENDING,
                d.attempts if d else 0,
                d.due if d else new.due,
                d.code if d else 0,
                d.enhanced if d else "",
                d.text if d else "",
                d.host if d else "",
                new.envelope.terms.of(number),
            )
        message.date()
        return message

    def _insert(self, message: _Message, *, leased: bool) -> Lease:
        self._spool.last_key += 1
        key = self._spool.last_key
        message.until = self._clock() + self._lease_s
        if leased:
            message.owner = self._owner
            message.token = 1
        self._spool.messages[key] = message
        return Lease(key, message.token, message.until)

    def _parked(self, key: int) -> bool:
        message = self._spool.messages[key]
        return message.owner is None and message.waits_for != ""

    def _delete(self, key: int) -> None:
        self._spool.messages.pop(key).content.close()

    def _claim_one(self, key: int, now: float) -> Claimed:
        message = self._spool.messages[key]
        if message.owner is not None and key in self._spool.journals.get(message.owner[0], {}).values():
            message.possible_duplicate = True
        message.owner = self._owner
        message.token += 1
        message.until = now + self._lease_s
        recipients = [message.recipients[number] for number in sorted(message.recipients)]
        expired = message.given_up or message.expires <= now
        return Claimed(
            lease=Lease(key, message.token, message.until),
            envelope=replace(
                message.new.envelope,
                recipients=tuple(r.mailbox for r in recipients),
                terms=message.new.envelope.terms.only([r.number for r in recipients]),
            ),
            content=_copy(message.content),
            created=message.new.created,
            expired=expired,
            recipients=in_turn(recipients, now, everybody=expired or message.waits_for != ""),
            possible_duplicate=message.possible_duplicate,
            waits_for=message.waits_for,
            warned=message.warned,
            given_up=message.given_up,
        )


def _change(message: _Message, before: RecipientState, /, **changes: Any) -> int:
    """How many recipients were in that state."""
    found = [number for number, recipient in message.recipients.items() if recipient.state is before]
    for number in found:
        message.recipients[number] = replace(message.recipients[number], **changes)
    return len(found)


def _copy(content: Content) -> Content:
    """The same octets, with a descriptor of its own when they are in a file. Raises QueueError."""
    if content.memory is not None:
        return Content.of(content.memory)
    descriptor = os.memfd_create("body", os.MFD_CLOEXEC)
    try:
        if os.fstat(content.descriptor).st_size != content.size:
            raise QueueError("message body has another size than it says")
        for piece in content.chunks():
            os.write(descriptor, piece)
    except BaseException:
        os.close(descriptor)
        raise
    return Content(None, descriptor, content.size, f"/proc/self/fd/{descriptor}")
