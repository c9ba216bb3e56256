"""What an intake log holds is as safe as a row: after a crash it is in the queue, once, and what was over stays over."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3

import pytest

from relay.queue import intake, intake_file
from relay.queue.layout import Tuning
from relay.queue.operations import take_in
from relay.queue.rows import KeptRows
from relay.queue.store import QueueError, Settlement
from tests.contract.conftest import SMALL, Bench


async def opened(disk: Bench, slot: int = 0, tuning: Tuning = SMALL):
    """A store whose log is open: the first put opens it."""
    store = await disk.store(slot, tuning=tuning)
    for number in range(1000):
        lease, committed = store.put_soon(disk.message(f"OPEN{number}"))
        await committed
        here = store._intake.live(lease.key) is not None
        assert await store.settle_soon(Settlement(lease, (0,), ()))
        if here:
            return store
        await asyncio.sleep(0.01)
    raise AssertionError("the log was not opened")


async def put(store, disk, name, to=("user@example.org",)):
    lease, committed = store.put_soon(disk.message(name, to))
    await committed
    return lease


async def crashed(disk: Bench, into) -> Bench:
    """The spool as a kill -9 at this moment leaves it."""
    shutil.copytree(disk.folder, into)
    return Bench(into, "sqlite")


async def names_after(bench: Bench, incarnation: int = 2) -> list[str]:
    """Who is in the queue once the slot's next worker has taken over."""
    store = await bench.store(0, incarnation)
    await store.take_over_slot()
    claimed, _ = await store.claim(1000)
    for each in claimed:
        each.content.close()
    await bench.close()
    return sorted(each.envelope.id for each in claimed)


async def test_what_was_acknowledged_is_in_the_queue_after_a_crash_whole_and_once(disk, tmp_path):
    store = await opened(disk)
    await put(store, disk, "M1", ("a@example.org", "b@example.org"))
    over = await put(store, disk, "M2")
    assert await store.settle_soon(Settlement(over, (0,), ()))
    after = await crashed(disk, tmp_path / "after")
    next_store = await after.store(0, 2)
    await next_store.take_over_slot()
    [one], _ = await next_store.claim(10)
    assert one.envelope == disk.message("M1", ("a@example.org", "b@example.org")).envelope
    assert one.content.memory == disk.message("M1").content.memory
    assert [each.mailbox for each in one.recipients] == ["a@example.org", "b@example.org"]
    assert await next_store.settle(Settlement(one.lease, (0, 1), ()))
    await after.close()
    assert await names_after(after, 3) == []
    after.prepare()
    assert await names_after(after, 4) == []


async def test_a_new_tree_takes_in_the_logs_of_all_slots(disk, tmp_path):
    for slot in (0, 3):
        await put(await opened(disk, slot), disk, f"M{slot}")
    after = await crashed(disk, tmp_path / "after")
    assert after.prepare().messages == 2
    assert after.prepare().messages == 2
    assert await names_after(after) == ["M0", "M3"]


async def test_a_message_named_by_the_journal_counts_as_possible_duplicate(disk, tmp_path):
    store = await opened(disk)
    lease = await put(store, disk, "M1")
    store.mark(lease.key)
    after = await crashed(disk, tmp_path / "after")
    next_store = await after.store(0, 2)
    assert (await next_store.take_over_slot()).duplicates == ("M1",)
    [one], _ = await next_store.claim(10)
    assert one.possible_duplicate
    await after.close()


async def test_after_a_restart_of_the_machine_every_message_of_the_log_may_be_a_duplicate(disk, tmp_path):
    await put(await opened(disk), disk, "M1")
    after = await crashed(disk, tmp_path / "after")
    after.boot = "boot-b"
    assert after.prepare().duplicates == ("M1",)


async def test_a_deferred_message_goes_into_the_database_and_not_back_in_from_the_log(disk, tmp_path):
    store = await opened(disk)
    lease = await put(store, disk, "M1", ("a@example.org", "b@example.org"))
    assert await store.settle(Settlement(lease, (0,), (disk.deferral(1, 60.0),)))
    after = await crashed(disk, tmp_path / "after")
    assert await names_after(after) == []
    after.now += 100
    store = await after.store(0, 3)
    await store.take_over_slot()
    [one], _ = await store.claim(10)
    assert [each.mailbox for each in one.recipients] == ["b@example.org"]
    await after.close()


async def test_a_move_whose_done_record_never_came_does_not_bring_the_message_back(disk, tmp_path, monkeypatch):
    store = await opened(disk)
    lease = await put(store, disk, "M1")
    entry = store._intake.live(lease.key)
    # The record is never written: killed right behind the commit.
    monkeypatch.setattr(store._intake, "_say_done", lambda key, future: future.set_result(True))
    await store._intake.move([entry])
    store._intake._moved_keys.clear()
    assert await store.settle(Settlement(lease, (0,), ()))
    after = await crashed(disk, tmp_path / "after")
    assert await names_after(after) == []
    monkeypatch.undo()


async def test_what_is_not_over_soon_shows_in_the_database_and_keeps_its_lease(disk, monkeypatch):
    monkeypatch.setattr(intake, "MOVE_AFTER_S", 0.0)
    store = await opened(disk)
    lease = await put(store, disk, "M1")
    while store._intake.live(lease.key) is not None:
        await asyncio.sleep(0.01)
    assert (await store.stats()).leased == 1
    [renewed] = await store.renew([lease])
    assert renewed is not None
    assert await store.settle_soon(Settlement(renewed, (0,), ()))
    assert (await store.stats()).messages == 0


async def test_a_lease_renewed_in_the_log_lasts_when_the_message_is_moved(disk):
    store = await opened(disk)
    lease = await put(store, disk, "M1")
    disk.now += 50
    [renewed] = await store.renew([lease])
    assert renewed.until == disk.now + 60
    await store._intake.move([store._intake.live(lease.key)])
    disk.now += 55
    other = await disk.store(1)
    assert (await other.claim(10))[0] == [], "nobody may have it before its renewed lease is over"


async def test_segments_are_used_in_turn_and_what_is_live_survives_every_turn(disk, tmp_path):
    tuning = Tuning(
        wal_octets=256 << 10, checkpoint_octets=128 << 10, intake_octets=intake.DONE_RESERVE + (64 << 10), reserve_octets=0
    )  # fmt: skip
    store = await opened(disk, tuning=tuning)
    epochs = set()
    kept, settled = [], []
    for number in range(1200):
        lease = await put(store, disk, f"M{number:04}")
        if number % 300 == 7:
            kept.append(f"M{number:04}")
        else:
            settled.append(store.settle_soon(Settlement(lease, (0,), ())))
        epochs.add(store._intake._segments[0].epoch)
    assert all(await asyncio.gather(*settled))
    assert len(epochs) > 3
    after = await crashed(disk, tmp_path / "after")
    assert await names_after(after) == kept


async def test_closing_leaves_everything_in_the_database(disk):
    await put(await opened(disk), disk, "M1")
    await disk.close()
    for path in intake_file.segments(disk.folder / "queue"):
        path.unlink()
    assert await names_after(disk) == ["M1"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "no header"])
async def test_damage_ends_a_segment_and_what_stands_before_it_counts(disk, tmp_path, damage):
    store = await opened(disk)
    await put(store, disk, "M1")
    whole = store._intake._segments[0].reserved
    await put(store, disk, "M2")
    after = await crashed(disk, tmp_path / "after")
    path = after.folder / "queue" / os.path.basename(store._intake._segments[0].path)
    with path.open("r+b") as file:
        match damage:
            case "torn":
                file.seek(whole + 100)
                file.write(bytes(1000))
            case "flipped":
                file.seek(whole + 60)
                file.write(b"\xff")
            case _:
                file.write(bytes(16))
    assert await names_after(after) == ([] if damage == "no header" else ["M1"])


async def test_a_failed_sync_fails_the_put_and_the_log_is_begun_anew_without_it(disk, tmp_path, monkeypatch):
    store = await opened(disk)
    await put(store, disk, "M1")
    real = os.fdatasync
    failing = {"left": 1}

    def fdatasync(descriptor):
        real(descriptor)
        if failing["left"]:
            failing["left"] -= 1
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("relay.queue.intake.os.fdatasync", fdatasync)
    with pytest.raises(QueueError, match="Input/output error"):
        await put(store, disk, "M2")
    lease = await put(store, disk, "M3")
    assert store._intake.live(lease.key) is None, "the database takes it while the log is not trusted"
    while store._intake._broken:
        await asyncio.sleep(0.01)
    lease = await put(store, disk, "M4")
    assert store._intake.live(lease.key) is not None
    after = await crashed(disk, tmp_path / "after")
    assert await names_after(after) == ["M1", "M3", "M4"], "who was told no is not in the queue"


async def test_a_log_of_an_earlier_release_whose_rows_had_fewer_columns_is_taken_in(disk):
    store = await opened(disk)
    lease = await put(store, disk, "M1")
    rows = store._intake.live(lease.key).rows
    older = KeptRows(
        rows.key + 1, (rows.key + 1, *rows.message[1:17]), [(rows.key + 1, *rows.recipients[0][1:10])], b"x"
    )
    connection = sqlite3.connect(disk.folder / "queue" / "queue.db", isolation_level=None)
    assert take_in(connection, [intake_file.Found(1, {older.key: older}, frozenset())]) == 1
    assert connection.execute("SELECT count(*) FROM recipient WHERE message = ?", (older.key,)).fetchone() == (1,)
    connection.close()
