"""Owns: how messages become rows and rows become messages again; what comes back is checked, for it goes into SMTP
commands and logs. Must not run SQL or open files.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

from relay.mail.address import AddressFault, Mailbox, parse_utf8_mailbox
from relay.mail.envelope import Envelope, QueueId
from relay.mail.terms import PLAIN, RecipientTerms, Terms, some
from relay.queue.bodies import file_name
from relay.queue.store import (
    Claimed,
    Deferral,
    Lease,
    Listed,
    NewMessage,
    QueuedRecipient,
    QueueError,
    RecipientState,
)

Row = tuple[Any, ...]

_TEXT_OCTETS: Final = 1024
"""Nothing the relay writes into such a column is longer."""


class Unreadable(Exception):
    """The entry is not what was written; the text says in what."""


class NewRows:
    """One message as rows. Built on the event loop, so that the writer thread has little left to do."""

    __slots__ = ("file", "key", "lease", "message", "octets", "recipients")

    def __init__(self, key: int, new: NewMessage, now: float, wall: float, owner: int | None, until: float) -> None:
        """Raises QueueError when the message makes no sense."""
        envelope = new.envelope
        content = new.content
        count = len(envelope.recipients)
        tried = {deferral.number: deferral for deferral in new.deferrals}
        if not count or (tried and not 0 <= min(tried) <= max(tried) < count):
            raise QueueError(f"{envelope.id}: a queued message needs recipients, and deferrals only of these")
        self.key = key
        self.lease = Lease(key, 0 if owner is None else 1, until)
        self.octets = content.memory
        self.file = "" if content.memory is not None else file_name(key)
        terms = envelope.terms
        self.recipients: list[Row] = [
            _new_recipient(key, number, mailbox, new.due, tried.get(number), terms)
            for number, mailbox in enumerate(envelope.recipients)
        ]
        expires = now + new.expires_in
        due = new.due if not tried else min(recipient[_DUE] for recipient in self.recipients)
        self.message: Row = (
            key,
            envelope.id,
            self.file,
            envelope.sender,
            envelope.listener,
            envelope.client,
            1 if envelope.body_8bit else 0,
            content.size,
            zlib.crc32(content.memory) if content.memory is not None else 0,
            new.created,
            wall + new.expires_in,
            expires,
            min(due, expires),
            owner,
            self.lease.token,
            until,
            1 if new.possible_duplicate else 0,
            new.waits_for,
            "" if terms is PLAIN else terms.words,
        )

    def leased_until(self, until: float) -> KeptRows:
        """The same with a lease that was extended meanwhile."""
        message = (*self.message[:_UNTIL], until, *self.message[_UNTIL + 1 :])
        return KeptRows(self.key, message, self.recipients, self.octets)


class KeptRows:
    """One message as rows that were made before: what ``NewRows`` made, its body in memory."""

    __slots__ = ("file", "key", "message", "octets", "recipients")

    def __init__(self, key: int, message: Row, recipients: list[Row], octets: bytes | None) -> None:
        self.key = key
        self.message = message
        self.recipients = recipients
        self.octets = octets
        self.file = ""


_UNTIL: Final = 15
_DUE: Final = 5


def _new_recipient(key: int, number: int, mailbox: Mailbox, due: float, tried: Deferral | None, terms: Terms) -> Row:
    said = terms.recipients[number].words if terms.recipients else ""
    if tried is None:
        return (key, number, mailbox, "pending", 0, due, 0, "", "", "", said)
    return (
        key,
        number,
        mailbox,
        "pending",
        tried.attempts,
        tried.due,
        tried.code,
        tried.enhanced,
        tried.text,
        tried.host,
        said,
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise Unreadable("a text column holds something else")
    return value


def _cleaned(value: object) -> str:
    """Text that only informs: not worth setting an entry aside."""
    text = value if isinstance(value, str) else ""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:_TEXT_OCTETS])


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise Unreadable("a number column holds something else")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float):
        raise Unreadable("a time column holds something else")
    return float(value)


def _mailbox(value: object) -> Mailbox:
    text = value if isinstance(value, str) else ""
    if parse_utf8_mailbox(text) in {AddressFault.SYNTAX, AddressFault.NON_ASCII, AddressFault.TOO_LONG}:
        raise Unreadable("an address is none")
    return Mailbox(text)


def _recipient_terms(value: object) -> RecipientTerms:
    found = RecipientTerms.read(value) if isinstance(value, str) else None
    if found is None:
        raise Unreadable("what was said with a recipient cannot be read")
    return found


def recipient_of(row: Row) -> QueuedRecipient:
    """A recipient from ``select_recipients``. Raises Unreadable."""
    number, mailbox, state, attempts, due, code, enhanced, text, host, terms = row
    try:
        where = RecipientState(state)
    except ValueError:
        raise Unreadable(f"a recipient has the state {state!r}") from None
    return QueuedRecipient(
        number=_number(number),
        mailbox=_mailbox(mailbox),
        state=where,
        attempts=_number(attempts),
        due=_seconds(due),
        last_code=_number(code),
        last_enhanced=_cleaned(enhanced),
        last_text=_cleaned(text),
        last_host=_cleaned(host),
        terms=_recipient_terms(terms),
    )


def in_turn(recipients: Sequence[QueuedRecipient], now: float, *, everybody: bool) -> tuple[QueuedRecipient, ...]:
    """Those an attempt is for: pending and due; all pending ones when the message is expired or waits for a next hop."""
    return tuple(r for r in recipients if r.state is RecipientState.PENDING and (everybody or r.due <= now))


class ClaimedRow:
    """A row of ``select_claimed``, checked. Raises Unreadable."""

    __slots__ = ("_key", "_row", "checksum", "file", "id", "size")

    def __init__(self, key: int, row: Row) -> None:
        self._key = key
        self._row = row
        self.id = QueueId(_text(row[0]))
        self.file = _text(row[1])
        self.size = _number(row[6])
        self.checksum = _number(row[7])
        if self.file not in {"", file_name(key)}:
            raise Unreadable(f"the body file is named {self.file!r}")

    def body(self, octets: object) -> bytes:
        """The body as it was put. Raises Unreadable."""
        if not isinstance(octets, bytes):
            raise Unreadable("the body is not there")
        if len(octets) != self.size or zlib.crc32(octets) != self.checksum:
            raise Unreadable("the body is not what was put")
        return octets

    def lease(self) -> Lease:
        return Lease(self._key, _number(self._row[10]), _seconds(self._row[11]))

    def claimed(self, recipients: Sequence[QueuedRecipient], content: Any, now: float) -> Claimed:
        """The whole; its envelope names the recipients still queued."""
        (
            _, _, sender, listener, client, body_8bit, _, _, created, expires, _, _, duplicate, waits_for, warned,
            given_up, said,
        ) = self._row  # fmt: skip
        if not recipients:
            raise Unreadable("it has no recipients")
        if recipients[0].number < 0:
            raise Unreadable("a recipient has a negative number")
        expired = bool(given_up) or _seconds(expires) <= now
        terms = Terms.read(said, some([each.terms for each in recipients])) if isinstance(said, str) else None
        if terms is None:
            raise Unreadable("what was said with the message cannot be read")
        return Claimed(
            lease=self.lease(),
            envelope=Envelope(
                id=self.id,
                sender=Mailbox("") if sender == "" else _mailbox(sender),
                recipients=tuple(recipient.mailbox for recipient in recipients),
                body_8bit=bool(_number(body_8bit)),
                listener=_cleaned(listener),
                client=_cleaned(client),
                terms=terms,
            ),
            content=content,
            created=_seconds(created),
            expired=expired,
            recipients=in_turn(recipients, now, everybody=expired or waits_for != ""),
            possible_duplicate=bool(_number(duplicate)),
            waits_for=_cleaned(waits_for),
            warned=bool(warned),
            given_up=bool(given_up),
        )


def listed_of(row: Row, recipients: Sequence[QueuedRecipient]) -> Listed:
    """From ``list_messages`` and its recipients; unreadable text was replaced when it was read."""
    key, queue_id, sender, size, created, expires, owner, duplicate, aside, waits_for = row
    return Listed(
        id=QueueId(str(queue_id)),
        sender=str(sender),
        size=int(size),
        created=float(created),
        expires=float(expires),
        owner=str(owner),
        possible_duplicate=bool(duplicate),
        aside=str(aside),
        recipients=tuple(recipients),
        waits_for=str(waits_for),
        key=int(key),
    )
