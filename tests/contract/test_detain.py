"""Holding waiting mail for a reason (row S4): the reason stays, whatever an attempt says that was under way."""

from __future__ import annotations

from relay.mail.envelope import QueueId
from relay.mail.reply import OperatorText
from relay.queue.detain import by_sender, detain
from relay.queue.store import Settlement
from relay.queue.view import find

REASON = OperatorText("held: <sender@example.com>: Sender address rejected: no")


async def test_why_mail_is_held_outlasts_the_attempt_that_was_under_way(disk):
    store = await disk.store()
    (lease,) = await store.put([disk.message("M1", ("a@example.org", "b@example.org"))])
    keys = by_sender(disk.folder)["sender@example.com"]
    acted = detain(disk.folder, keys, REASON, disk.clock)
    assert (acted.messages, acted.recipients) == (1, 2)
    assert await store.settle(Settlement(lease, (0,), (disk.deferral(1, 60.0),)))
    listed = find(disk.folder, QueueId("M1"))
    assert listed is not None
    [left] = listed.recipients
    assert (left.last_text, left.last_host) == (REASON, "")
    assert (await store.claim(9))[0] == []
