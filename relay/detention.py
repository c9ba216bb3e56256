"""Owns: that a restriction reaches mail that waits already (row S4): queued messages of senders who may no longer send are
held, with the reason, until somebody releases them.

Looks when there is another snapshot or another configuration, in a thread, in one worker. Only senders who were free before
are looked for, and no message is held a second time: what an operator released stays released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from relay.config.schema import Config, Mode
from relay.directory.snapshot import RESTRICTED, Snapshot
from relay.mail.address import Mailbox, domain_of, unquoted, without_tag
from relay.mail.reply import OperatorText, operator_text
from relay.policy.listed import SenderList
from relay.queue.detain import by_sender, detain
from relay.queue.store import QueueError
from relay.telemetry.maillog import MailLog

Restriction = Callable[[Mailbox, float], OperatorText | None]


def restriction_by(config: Config, snapshot: Snapshot | None) -> Restriction | None:
    """Sender and time → the text of its restriction, None for none. None where nobody is restricted, or nothing is held."""
    senders = config.senders
    if senders.restricted is not Mode.ENFORCE or not senders.hold_queued:
        return None
    listed = SenderList.of(config)
    known = snapshot if snapshot is not None and snapshot.restricted else None
    if listed is None and known is None:
        return None
    usual = operator_text(senders.text)
    delimiters = {name: domain.delimiter for domain in config.domain if domain.delimiter for name in domain.names}

    def restriction(sender: Mailbox, now: float) -> OperatorText | None:
        plain = unquoted(sender)
        found: OperatorText | None = None
        if known is not None:
            for name in (plain, without_tag(plain, delimiters.get(domain_of(plain), ""))):
                entry = known.entry(name) if name else None
                if entry is not None and entry.flags & RESTRICTED:
                    found = entry.text
                    break
        if listed is not None:
            found = listed.restriction(plain, found, now)
        return None if found is None else found or usual

    return restriction


class Detention:
    """For one worker. ``look`` may run in any thread."""

    def __init__(self, log: MailLog) -> None:
        self._log = log
        self._before: Restriction | None = None
        self._turn = threading.Lock()

    def look(self, spool: Path, restriction: Restriction | None, now: float) -> int:
        """Hold the mail of those restricted now and not at the last look; how many messages. Never raises."""
        with self._turn:
            return self._look(spool, restriction, now)

    def _look(self, spool: Path, restriction: Restriction | None, now: float) -> int:
        before, self._before = self._before, restriction
        if restriction is None:
            return 0
        held = 0
        try:
            for sender, keys in by_sender(spool).items():
                mailbox = Mailbox(sender)
                text = restriction(mailbox, now) if "@" in mailbox else None
                if text is None or (before is not None and before(mailbox, now) is not None):
                    continue
                reason = OperatorText(f"held: <{sender}>: Sender address rejected: {text}")
                acted = detain(spool, keys, reason)
                held += acted.messages
                if acted.messages:
                    self._log.note("warning", "queue_detained", sender=sender, messages=acted.messages, why=text)
        except QueueError as error:
            self._before = before  # the next look makes up for it
            self._log.alarm("queue_detain_failed", error=str(error))
        return held
