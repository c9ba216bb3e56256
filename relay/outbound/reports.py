"""Owns: which reports an attempt leads to, as messages to be put in the same transaction; each is logged.

Who may get one, and how it reads, is ``mail.dsn``'s. It must not touch the queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from relay.config.schema import Config
from relay.mail.address import NULL_SENDER
from relay.mail.content import Content
from relay.mail.dsn import (
    ORIGINAL_OCTETS,
    Cause,
    Notice,
    Report,
    answerable,
    delivery_report,
    header_of,
    reportable,
)
from relay.mail.envelope import Envelope, QueueId
from relay.mail.terms import PLAIN, Terms
from relay.mail.trace import date
from relay.outbound.copies import Copies
from relay.queue.boot import boot_clock
from relay.queue.store import NewMessage
from relay.telemetry.maillog import MailLog


class Reports:
    """Makes reports for one worker."""

    def __init__(self, config: Config, log: MailLog, next_id: Callable[[], QueueId], copies: Copies) -> None:
        self._log = log
        self._copies = copies
        self._next_id = next_id
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a (new) configuration."""
        self._hostname = config.server.hostname
        self._expire_s = config.queue.expire_after_s
        self._copies.configure(config)

    def make(
        self, envelope: Envelope, content: Content, created: float, notices: Sequence[Notice], until: float = 0.0
    ) -> tuple[NewMessage, ...]:
        """The reports on ``notices`` to the sender of ``envelope``: one for each action; none when nobody may get one.

        ``until``: wall-clock time up to which delayed mail is tried.
        """
        if not notices:
            return ()
        try:
            head = content.head(ORIGINAL_OCTETS)
        except OSError:
            head = b""
        wanted = [notice for notice in notices if notice.is_wanted]
        if not reportable(envelope.sender):
            wanted = []
        elif not all(notice.terms.notify for notice in wanted) and not answerable(envelope.sender, header_of(head)):
            # Who asked gets an answer whatever the header says (RFC 3461 §5.2.6); for the others it was never said.
            wanted = [notice for notice in wanted if notice.terms.notify]
        if len(wanted) < len(notices):
            self._log.note("info", "report_suppressed", id=envelope.id, sender=envelope.sender)
        by_action: dict[str, list[Notice]] = {}
        for notice in wanted:
            by_action.setdefault(notice.action, []).append(notice)
        return self._copies.about(envelope, head, content.size, notices) + tuple(
            self._one(envelope, head, content.size, created, group, action, until)
            for action, group in by_action.items()
        )

    def _one(
        self,
        envelope: Envelope,
        head: bytes,
        size: int,
        created: float,
        notices: Sequence[Notice],
        action: str,
        until: float,
    ) -> NewMessage:
        now = time.time()
        offset = time.localtime(now).tm_gmtoff
        queue_id = self._next_id()
        octets = delivery_report(
            Report(
                hostname=self._hostname,
                sender=envelope.sender,
                queue_id=envelope.id,
                arrived=date(created, offset),
                date=date(now, offset),
                message_id=f"{queue_id}@{self._hostname}",
                boundary=f"={queue_id}=",
                original=head,
                original_size=size,
                terms=envelope.terms,
                until=date(until, offset) if until else "",
            ),
            notices,
        )
        notice = Envelope(
            queue_id,
            NULL_SENDER,
            (envelope.sender,),
            not octets.isascii(),
            "",
            f"report on {envelope.id}",
            PLAIN if envelope.sender.isascii() else Terms(utf8=True),
        )
        self._log.report(queue_id, envelope.id, envelope.sender, action)
        return NewMessage(
            envelope=notice,
            content=Content.of(octets),
            created=now,
            expires_in=self._expire_s,
            due=boot_clock(),
            leased=False,
        )


def arrival(protocol: str) -> Cause:
    """What a next hop's 250 means where it does not report itself: LMTP is the last step (RFC 2033), SMTP is not."""
    return Cause.DELIVERED if protocol == "lmtp" else Cause.RELAYED
