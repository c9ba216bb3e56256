"""What the postmaster is told: in few letters, however much goes wrong, from whichever thread, disk or no disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from relay.config.schema import Config
from relay.mail.envelope import QueueId
from relay.outbound import copies as module
from relay.outbound.copies import LINES, Copies
from relay.queue.store import Lease, NewMessage, QueueFull, Store
from relay.telemetry.maillog import MailLog
from tests.unit.scripted_hop import configuration, wait_until

BOX = "postmaster@example.com"


class Disk:
    """The part of a store that letters need, and the log's writer."""

    def __init__(self) -> None:
        self.put_in: list[NewMessage] = []
        self.full = False

    async def put(self, messages: Sequence[NewMessage]) -> list[Lease]:
        if self.full:
            raise QueueFull("no room")
        self.put_in += messages
        return []

    def write(self, line: str) -> None:
        pass

    def flush(self) -> None:
        pass

    @property
    def letters(self) -> list[str]:
        return [(message.content.memory or b"").decode() for message in self.put_in]


def told(notify: Sequence[str]) -> Config:
    return configuration().model_copy(
        update={
            "postmaster": Config.model_fields["postmaster"].default.model_copy(
                update={"mailbox": BOX, "notify": notify}
            )
        }
    )


@pytest.fixture
async def disk() -> Disk:
    return Disk()


@pytest.fixture
async def log(disk: Disk) -> MailLog:
    return MailLog(disk, "postfix", "mx.example.com")


@pytest.fixture
async def copies(disk: Disk, log: MailLog, monkeypatch: pytest.MonkeyPatch) -> Copies:
    monkeypatch.setattr(module, "GATHER_S", 0.01)
    return Copies(told(["resource", "policy", "software"]), cast("Store", disk), log, lambda: QueueId("ID"))


async def test_a_thousand_refusals_and_an_alarm_are_one_letter(copies: Copies, disk: Disk, log: MailLog) -> None:
    for number in range(1000):
        log.reject(
            "c[192.0.2.1]", "RCPT", f"554 5.7.1 no {number}", "r", "rule", "s@x.example", "r@x.example", "ESMTP", "h"
        )
    log.alarm("queue_full", id="X", error="less than 64 MB free")
    await wait_until(lambda: disk.letters)
    [letter] = disk.letters
    assert letter.count("reject: RCPT from") == LINES
    assert f"and {1000 - LINES} more, which are in the log" in letter
    assert "queue_full id=X" in letter
    log.alarm("queue_full", id="Y", error="again")
    await asyncio.sleep(0.1)
    assert len(disk.letters) == 1, "the next one waits for its time"
    await copies.flush()
    assert "id=Y" in disk.letters[1]


async def test_what_is_not_asked_for_and_what_is_over_is_not_told(copies: Copies, disk: Disk, log: MailLog) -> None:
    copies.note("bounce", "x")
    log.alarm("next_hop_mended", next_hop="x")
    log.alarm("next_hop_down", next_hop="x")
    await copies.flush()
    assert disk.letters == []
    copies.configure(configuration())
    assert log.copy is None, "rules that refuse pay nothing"


async def test_an_alarm_from_another_thread_is_told(copies: Copies, disk: Disk, log: MailLog) -> None:
    assert copies is not None
    await asyncio.to_thread(log.alarm, "snapshot_refused", cause="damaged")
    await wait_until(lambda: disk.letters)
    assert "snapshot_refused cause=damaged" in disk.letters[0]


async def test_a_full_disk_keeps_the_letter_until_there_is_room(copies: Copies, disk: Disk) -> None:
    disk.full = True
    for number in range(80):
        copies.note("resource", f"full {number}")
    await copies.flush()
    copies.note("resource", "full at last")
    disk.full = False
    await wait_until(lambda: disk.letters)
    assert "(resource): 81" in disk.letters[0]
    assert disk.letters[0].count("full ") >= LINES
