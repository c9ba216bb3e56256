"""What the store on SQLite promises beyond the contract: start, damage, full disks, stuck disks, several processes."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import zlib
from contextlib import closing, suppress
from pathlib import Path

import pytest

from relay.config.schema import Queue
from relay.mail.content import MEMORY_OCTETS, Content
from relay.mail.envelope import QueueId
from relay.mail.terms import PLAIN, Terms
from relay.queue.bodies import Bodies, file_name
from relay.queue.layout import Layout, Tuning, WriteLock
from relay.queue.statements import MIGRATIONS, migration
from relay.queue.store import Acted, Action, QueueCorrupt, QueueError, QueueFull, Settlement
from relay.queue.view import find, header, listing, read_stats


def done(lease, *numbers, reports=()):
    return Settlement(lease, numbers, (), reports)


def sql(bench, statement, *parameters):
    """Change the database behind the store's back."""
    with closing(sqlite3.connect(Layout.of(bench.folder).database, isolation_level=None)) as connection:
        return connection.execute(statement, parameters).fetchall()


def bodies(bench):
    return sorted(path.name for path in Layout.of(bench.folder).bodies.iterdir())


def large(store, octets=2 * MEMORY_OCTETS):
    descriptor = store.open_body()
    os.write(descriptor, bytes(octets))
    return Content(None, descriptor, octets)


async def eventually(condition):
    """Wait for what another thread or process is about to do; the test's own time-out is the limit."""
    while not condition():
        await asyncio.sleep(0.01)


# --- start ------------------------------------------------------------------------------------------------------------
async def test_the_spool_is_for_its_owner_alone_and_its_log_is_long_beforehand(disk):
    layout = Layout.of(disk.folder)
    assert stat.S_IMODE(layout.queue.stat().st_mode) == 0o700
    assert stat.S_IMODE(layout.bodies.stat().st_mode) == 0o700
    assert stat.S_IMODE(layout.database.stat().st_mode) == 0o600
    assert layout.wal.stat().st_size == 256 * 1024
    store = await disk.store()
    await store.put([disk.message()])
    assert layout.wal.stat().st_size == 256 * 1024
    for path in layout.queue.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


async def test_a_new_tree_voids_what_the_last_one_held_and_names_its_duplicates(disk):
    old = await disk.store()
    first, _ = await old.put([disk.message("M1"), disk.message("M2")])
    old.mark(first.key)
    report = disk.prepare()
    assert (report.messages, report.voided, report.marked, report.duplicates) == (2, 2, 1, ("M1",))
    assert not report.restarted
    assert not await old.settle(done(first, 0))
    new = await disk.store(0, 2)
    claimed, _ = await new.claim(10)
    assert {each.envelope.id: each.possible_duplicate for each in claimed} == {"M1": True, "M2": False}
    assert disk.prepare().marked == 0


async def test_after_a_restart_of_the_machine_everything_is_due_and_expiry_goes_by_the_wall_clock(disk):
    store = await disk.store()
    (lease,) = await store.put([disk.message("M1", expires_in=5000)])
    await store.put([disk.message("M2", leased=False, due=disk.now + 4000, expires_in=5000)])
    await store.put([disk.message("M3", leased=False, due=disk.now + 4000, expires_in=-1)])
    store.mark(lease.key)
    await disk.close()
    disk.boot, disk.now = "boot-b", 7.0
    report = disk.prepare()
    assert (report.restarted, report.voided, report.marked, report.duplicates) == (True, 1, 1, ("M1",))
    store = await disk.store()
    assert (await store.take_over_slot()).duplicates == ()
    claimed, _ = await store.claim(10)
    assert {c.envelope.id: (c.possible_duplicate, c.expired) for c in claimed} == {
        "M1": (True, False),
        "M2": (False, False),
        "M3": (False, True),
    }
    deferred = [disk.deferral(0, 90_000)]
    assert await store.settle(Settlement(claimed[1].lease, (), tuple(deferred)))
    (wait,) = sql(disk, "SELECT due FROM message WHERE owner IS NULL")
    assert 4900 < wait[0] - disk.now <= 5000, "claimed at its expiry"


async def test_keys_are_never_used_again(disk):
    seen = set()
    for incarnation in range(3):
        store = await disk.store(0, incarnation)
        (lease,) = await store.put([disk.message()])
        assert await store.settle(done(lease, 0))
        assert lease.key not in seen
        seen.add(lease.key)
        await disk.close()
        disk.prepare()


@pytest.fixture
def released(fresh):
    """A queue as the first schema left it: one message in memory with three recipients, of which one was tried."""
    layout = Layout.of(fresh.folder)
    layout.make()
    body = b"Subject: old\r\n\r\nhello\r\n"
    with closing(sqlite3.connect(layout.database, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for statement in migration(1):
            database.execute(statement)
        database.execute("PRAGMA user_version = 1")
        database.execute("INSERT INTO boot (id) VALUES (?)", (fresh.boot,))
        row = (7, "OLD1", "", "s@example.com", "mx", "c", 1, len(body), zlib.crc32(body), 1e9, 9e9, 5000, 900, 0, 0, 0)
        database.execute(
            "INSERT INTO message (key, id, file, sender, listener, client, body_8bit, size, checksum, created,"
            " expires_wall, expires, due, token, until, possible_duplicate) VALUES (" + ", ".join("?" * 16) + ")",
            row,
        )
        database.execute("INSERT INTO body (key, octets) VALUES (7, ?)", (body,))
        for number, state, tried in ((0, "pending", 0), (2, "held", 0), (5, "pending", 3)):
            to = f"r{number}@example.org"
            last = (451, "4.2.0", "later", "hop") if tried else (0, "", "", "")
            database.execute(
                "INSERT INTO recipient (message, number, mailbox, state, attempts, due, last_code, last_enhanced,"
                " last_text, last_host) VALUES (7, ?, ?, ?, ?, 900, ?, ?, ?, ?)",
                (number, to, state, tried, *last),
            )
    return fresh


async def test_a_queue_of_the_first_release_goes_on_with_all_it_holds(released):
    report = released.prepare()
    assert (report.migrated_from, report.messages) == (1, 1)
    assert sql(released, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    store = await released.store()
    (claimed,), _ = await store.claim(10)
    assert (claimed.envelope.id, claimed.envelope.sender) == ("OLD1", "s@example.com")
    assert claimed.envelope.recipients == ("r0@example.org", "r2@example.org", "r5@example.org")
    assert claimed.envelope.terms is PLAIN
    assert claimed.content.memory == b"Subject: old\r\n\r\nhello\r\n"
    assert [(r.number, r.attempts, r.last_code) for r in claimed.recipients] == [(0, 0, 0), (5, 3, 451)]
    assert await store.settle(Settlement(claimed.lease, (0,), (released.deferral(5, 60, 4),)))
    await store.put([released.message("NEW1", leased=False, terms=Terms(ret="FULL"))])
    (new,), _ = await store.claim(10)
    assert (new.envelope.id, new.envelope.terms.ret) == ("NEW1", "FULL")
    assert released.prepare().migrated_from == len(MIGRATIONS)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE message SET terms = 'RET=ALL'",
        "UPDATE message SET terms = x'ff'",
        "UPDATE recipient SET terms = 'NOTIFY=NEVER,DELAY'",
        "UPDATE recipient SET terms = 'ORCPT=rfc822;a+0D+0ABcc:x'",
    ],
)
async def test_what_cannot_have_been_said_sets_the_entry_aside(disk, damage):
    store = await disk.store()
    await store.put([disk.message(leased=False)])
    sql(disk, damage)
    assert (await store.claim(10))[0] == []
    assert "what was said" in disk.asides[0].reason


async def test_a_database_of_a_newer_relay_is_refused(disk):
    sql(disk, "PRAGMA user_version = 99")
    with pytest.raises(QueueError, match="newer relay"):
        disk.prepare()


async def test_a_damaged_database_is_named_and_left_alone(disk):
    database = Layout.of(disk.folder).database
    database.write_bytes(b"garbage" * 5000)
    with pytest.raises(QueueCorrupt, match=r"queue\.db is damaged.*Nothing was deleted"):
        disk.prepare()
    with pytest.raises(QueueCorrupt):
        read_stats(disk.folder)
    assert database.read_bytes() == b"garbage" * 5000


async def test_orphaned_bodies_go_when_they_are_old(disk):
    store = await disk.store()
    content = large(store)
    (lease,) = await store.put([disk.message(content=content, leased=False)])
    orphan = file_name(77)
    (Layout.of(disk.folder).bodies / orphan).write_bytes(b"left by a put that was never committed")
    assert disk.prepare().orphans == 0
    old = Tuning(wal_octets=0, orphan_age_s=-1.0)
    assert disk.prepare(tuning=old).orphans == 1
    assert bodies(disk) == [file_name(lease.key)]
    (Layout.of(disk.folder).bodies / orphan).write_bytes(b"another")
    worker = await disk.store(1, 1, tuning=old)
    worker._sweep()
    await eventually(lambda: bodies(disk) == [file_name(lease.key)])


# --- bodies -----------------------------------------------------------------------------------------------------------
async def test_a_large_body_has_a_file_until_its_last_recipient_is_done(disk):
    store = await disk.store()
    content = large(store)
    assert bodies(disk) == []
    (lease,) = await store.put([disk.message(content=content, to=["a@example.org", "b@example.org"])])
    assert bodies(disk) == [file_name(lease.key)]
    assert os.fstat(content.descriptor).st_nlink == 1
    await store.settle(Settlement(lease, (1,), (), keep=True))
    assert bodies(disk) == [file_name(lease.key)]
    await store.settle(done(lease, 0))
    await eventually(lambda: bodies(disk) == [])
    (again,) = await store.put([disk.message("M2", content=content, leased=False)])
    content.close()
    assert bodies(disk) == [file_name(again.key)], "one that has lost its name is copied"


async def test_a_body_shorter_than_it_says_is_not_taken(disk):
    store = await disk.store()
    content = large(store)
    content.size += 1
    with pytest.raises(QueueError, match="instead of"):
        await store.put([disk.message(content=content)])
    content.close()
    assert bodies(disk) == []
    assert (await store.stats()).messages == 0


# --- damage -----------------------------------------------------------------------------------------------------------
async def damage_body(bench, key):
    sql(bench, "UPDATE body SET octets = zeroblob(length(octets)) WHERE key = ?", key)


async def damage_sender(bench, key):
    sql(bench, "UPDATE message SET sender = CAST(x'ff00fe' AS TEXT) WHERE key = ?", key)


async def damage_mailbox(bench, key):
    sql(bench, "UPDATE recipient SET mailbox = 'a@b' || char(13, 10) || 'DATA' WHERE message = ?", key)


async def lose_recipients(bench, key):
    sql(bench, "DELETE FROM recipient WHERE message = ?", key)


async def lose_body(bench, key):
    sql(bench, "DELETE FROM body WHERE key = ?", key)


@pytest.mark.parametrize("damage", [damage_body, damage_sender, damage_mailbox, lose_recipients, lose_body])
async def test_a_damaged_entry_is_set_aside_and_the_rest_goes_on(disk, damage):
    store = await disk.store()
    bad, _ = await store.put([disk.message(name, leased=False) for name in ("BAD", "GOOD")])
    await damage(disk, bad.key)
    claimed, _ = await store.claim(10)
    assert [each.envelope.id for each in claimed] == ["GOOD"]
    (entry,) = disk.asides
    assert (entry.key, entry.id) == (bad.key, "BAD")
    stats = await store.stats()
    assert (stats.messages, stats.corrupt) == (1, 1)
    disk.now += 100_000
    await disk.close()
    disk.prepare()
    store = await disk.store()
    assert [each.envelope.id for each in (await store.claim(10))[0]] == ["GOOD"]
    aside = find(disk.folder, QueueId("BAD"))
    assert aside is not None
    assert aside.aside == entry.reason != ""
    assert {each.id for each in listing(disk.folder)} == {"BAD", "GOOD"}


async def test_an_entry_without_its_body_file_is_set_aside_and_can_be_mended(disk):
    store = await disk.store()
    content = large(store)
    (lease,) = await store.put([disk.message("M1", content=content, leased=False)])
    path = Layout.of(disk.folder).bodies / file_name(lease.key)
    path.rename(disk.folder / "away")
    assert (await store.claim(1))[0] == []
    assert "missing" in disk.asides[0].reason
    (disk.folder / "away").rename(path)
    assert await store.act(QueueId("M1"), Action.RELEASE) == Acted(1, 1)
    (claimed,), _ = await store.claim(1)
    assert claimed.content.size == content.size
    claimed.content.close()
    content.close()
    assert (await store.stats()).corrupt == 0


async def test_what_another_has_finished_while_this_one_stood_still_is_nobody_s_damage(disk, monkeypatch):
    slow, other = await disk.store(slot=0), await disk.store(slot=1)
    content = large(slow)
    await slow.put([disk.message("M1", content=content, leased=False)])
    content.close()
    stands, goes_on = threading.Event(), threading.Event()
    open_named = Bodies.open_named

    def stand_still(self: Bodies, name: str) -> int:
        if self is slow._bodies:  # the one thing a test cannot do from outside: stop between two system calls
            stands.set()
            assert goes_on.wait(20)
        return open_named(self, name)

    monkeypatch.setattr(Bodies, "open_named", stand_still)
    claim = asyncio.ensure_future(slow.claim(1))
    await asyncio.to_thread(stands.wait, 20)
    disk.now += 100.0  # past the lease
    (claimed,), _ = await other.claim(1)
    claimed.content.close()
    assert await other.settle(done(claimed.lease, 0))
    await eventually(lambda: not bodies(disk))
    goes_on.set()
    assert (await claim)[0] == []
    assert disk.asides == []


async def test_one_operation_at_fault_fails_alone(disk):
    store = await disk.store()
    impossible = disk.message("\udcff", content=Content.of(b"text that has no UTF-8 form"))
    results = await asyncio.gather(
        store.put([disk.message("M1")]),
        store.put([impossible]),
        store.put([disk.message("M2")]),
        return_exceptions=True,
    )
    assert [isinstance(result, QueueError) for result in results] == [False, True, False]
    assert (await store.stats()).messages == 2


# --- disks that are full or stuck ----------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.needs("root")
async def test_a_full_disk_takes_nothing_new_lets_the_old_out_and_recovers(disk, small_disk):
    disk.folder = small_disk
    disk.prepare()
    tuning = Tuning(wal_octets=1 << 20, checkpoint_octets=1 << 19, reserve_octets=2 << 20)
    store = await disk.store(tuning=tuning)
    (lease,) = await store.put([disk.message("M1", leased=False)])
    assert lease.token == 0
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(65536)):
            pass
    await asyncio.sleep(0.11)  # the age an answer about free space may have
    with pytest.raises(QueueFull):
        await store.put([disk.message("M2")])
    with pytest.raises(QueueFull):
        store.open_body()
    (claimed,), _ = await store.claim(1)
    assert await store.settle(Settlement(claimed.lease, (), (disk.deferral(0, 0),)))
    (claimed,), _ = await store.claim(1)
    assert await store.settle(done(claimed.lease, 0))
    filler.unlink()
    await asyncio.sleep(0.11)
    await store.put([disk.message("M3")])
    await store.close()
    disk._stores.clear()


@pytest.mark.needs("root")
async def test_running_out_of_space_inside_a_transaction_fails_it_and_nothing_else(disk, small_disk):
    disk.folder = small_disk
    disk.prepare()
    store = await disk.store(tuning=Tuning(wal_octets=1 << 20, checkpoint_octets=1 << 19, reserve_octets=0))
    body = Content.of(os.urandom(60_000))
    taken = 0
    full = False
    while not full:
        try:
            await store.put([disk.message(f"M{taken}", content=body, leased=False)])
        except QueueFull:
            full = True
        else:
            taken += 1
    assert taken > 20
    assert (await store.stats()).messages == taken
    await store.close()
    disk._stores.clear()


async def test_a_put_that_could_not_begin_in_time_is_refused_and_never_appears(disk):
    store = await disk.store(config=Queue(lease_s=60, write_timeout_s=0.2))
    lock = WriteLock(Layout.of(disk.folder))
    with lock.held(), pytest.raises(QueueError, match="not written within"):
        await store.put([disk.message("LATE")])
    lock.close()
    await store.put([disk.message("M1")])
    assert [each.id for each in listing(disk.folder)] == ["M1"]


async def test_a_put_cancelled_while_it_waits_never_appears(disk):
    store = await disk.store()
    lock = WriteLock(Layout.of(disk.folder))
    content = large(store)
    with lock.held():
        tasks = [
            asyncio.ensure_future(store.put([disk.message("SMALL")])),
            asyncio.ensure_future(store.put([disk.message("LARGE", content=content)])),
        ]
        await eventually(lambda: bodies(disk) != [])
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    lock.close()
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2
    await store.put([disk.message("M1")])
    assert [each.id for each in listing(disk.folder)] == ["M1"]
    await eventually(lambda: bodies(disk) == [])
    content.close()


@pytest.fixture
def stuck(disk):
    """SQLite's own write lock, taken past the flock: a transaction that has begun now waits inside SQLite."""
    with closing(sqlite3.connect(Layout.of(disk.folder).database, isolation_level=None)) as blocker:
        yield blocker


async def test_a_put_cancelled_inside_the_transaction_is_waited_for_and_taken_back(disk, stuck):
    store = await disk.store()
    content = large(store)
    stuck.execute("BEGIN IMMEDIATE")
    put = asyncio.ensure_future(store.put([disk.message("M1", content=content)]))
    await eventually(lambda: store._writer._group)
    put.cancel()
    await asyncio.sleep(0.02)
    put.cancel()  # a second one changes nothing
    await asyncio.sleep(0.02)
    assert not put.done()
    stuck.execute("ROLLBACK")
    with pytest.raises(asyncio.CancelledError):
        await put
    await store.put([disk.message("M2")])
    assert [each.id for each in listing(disk.folder)] == ["M2"]
    await eventually(lambda: bodies(disk) == [])
    content.close()


async def test_a_claim_cancelled_inside_the_transaction_gives_its_messages_back(disk, stuck):
    store = await disk.store()
    await store.put([disk.message("M1", leased=False)])
    store._writer._group = []
    stuck.execute("BEGIN IMMEDIATE")
    claim = asyncio.ensure_future(store.claim(10))
    await eventually(lambda: store._writer._group)
    claim.cancel()
    stuck.execute("ROLLBACK")
    with pytest.raises(asyncio.CancelledError):
        await claim
    (claimed,), _ = await store.claim(10)
    assert (claimed.envelope.id, claimed.lease.token) == ("M1", 3)


# --- looking from outside -----------------------------------------------------------------------------------------------
async def test_the_queue_can_be_looked_at_while_it_runs_and_when_it_is_stopped(disk):
    store = await disk.store(3, 2)
    content = large(store)
    await store.put([disk.message("M1", to=["a@example.org", "b@example.org"])])
    await store.put([disk.message("M2", content=content, leased=False)])
    content.close()
    for _ in range(2):
        first, second = sorted(listing(disk.folder), key=lambda each: each.id)
        assert (first.id, first.sender, first.owner) == ("M1", "sender@example.com", "boot-a:3:2")
        assert [r.mailbox for r in first.recipients] == ["a@example.org", "b@example.org"]
        assert second.owner == ""
        assert abs(second.expires - time.time() - 1000) < 100
        assert find(disk.folder, QueueId("M2")) == second
        assert find(disk.folder, QueueId("M9")) is None
        assert header(disk.folder, QueueId("M1"), 11) == b"Subject: M1"
        assert header(disk.folder, QueueId("M2"), 5) == bytes(5)
        assert header(disk.folder, QueueId("M9"), 5) is None
        stats = read_stats(disk.folder)
        assert (stats.messages, stats.recipients, stats.leased) == (2, 3, 1)
        await disk.close()
    with pytest.raises(QueueError, match="does not exist"):
        read_stats(disk.folder / "nowhere")


async def test_a_long_listing_goes_page_by_page(disk):
    store = await disk.store()
    await store.put([disk.message(f"M{number}") for number in range(1203)])
    assert len(list(listing(disk.folder))) == 1203


# --- several processes ----------------------------------------------------------------------------------------------------
_WRITER = """
import asyncio, sys, time
from pathlib import Path
from relay.config.schema import Queue
from relay.mail.address import Mailbox
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.queue.boot import boot_clock
from relay.queue.layout import Tuning
from relay.queue.sqlite import SqliteStore
from relay.queue.store import NewMessage, Settlement

async def main(spool, slot, seconds):
    tuning = Tuning(wal_octets=512 << 10, checkpoint_octets=256 << 10, reserve_octets=0)
    store = SqliteStore(spool, f"boot:{slot}:1", slot, Queue(), asyncio.get_running_loop(), tuning=tuning)
    await store.take_over_slot()
    print("ready", flush=True)
    sys.stdin.readline()
    done = 0
    end = time.monotonic() + seconds
    async def session():
        nonlocal done
        while time.monotonic() < end:
            envelope = Envelope(QueueId("X"), Mailbox("a@b.example"), (Mailbox("c@d.example"),), False, "mx", "")
            (lease,) = await store.put(
                [NewMessage(envelope, Content.of(bytes(1000)), 0.0, 1e6, boot_clock(), leased=True)]
            )
            assert await store.settle(Settlement(lease, (0,), ()))
            done += 1
    await asyncio.gather(*(session() for _ in range(10)))
    await store.close()
    print(done, flush=True)

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
"""


def start_writer(folder, slot, seconds):
    """Another process that puts and settles; it waits for ``go``."""
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, folder, str(slot), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert writer.stdout.readline() == b"ready\n"
    return writer


def go(writer):
    writer.stdin.write(b"go\n")
    writer.stdin.flush()


async def test_two_processes_write_at_once_none_starves_and_the_log_stays_short(disk):
    writers = [start_writer(disk.folder, slot, 1.5) for slot in (1, 2)]
    for writer in writers:
        go(writer)
    wal = Layout.of(disk.folder).wal
    longest = 0
    while any(writer.poll() is None for writer in writers):
        with suppress(FileNotFoundError):
            longest = max(longest, wal.stat().st_size)
        await asyncio.sleep(0.02)
    counts = [int(writer.communicate()[0]) for writer in writers]
    assert min(counts) > max(counts) / 4, counts
    # Many times the log's length went through it: 12 pages and more a group of 20.
    assert sum(counts) * 4000 > 4 * longest, counts
    assert longest <= 1 << 20, "grown at most by one group behind the checkpoint's mark"
    assert read_stats(disk.folder).messages == 0
    assert sql(disk, "PRAGMA integrity_check") == [("ok",)]


async def test_a_writer_that_is_killed_leaves_what_it_acknowledged_and_no_lock(disk):
    writer = start_writer(disk.folder, 1, 60)
    store = await disk.store(0)
    go(writer)
    await eventually(lambda: any(True for _ in listing(disk.folder)))
    (lease,) = await store.put([disk.message("M1")])
    writer.kill()
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    (second,) = await store.put([disk.message("M2")])
    assert await store.settle(done(lease, 0))
    successor = await disk.store(1, 2)
    await successor.take_over_slot()
    assert {each.id for each in listing(disk.folder) if each.owner == "boot-a:0:1"} == {"M2"}
    assert await store.settle(done(second, 0))
    assert sql(disk, "PRAGMA integrity_check") == [("ok",)]
