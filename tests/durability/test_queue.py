"""The queue syncs before it speaks, survives any power cut, and never takes a failed sync for a success."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relay.queue.prepare import prepare
from tests.durability.driver import TUNING, body_of
from tests.durability.power import Disk, dice, reopened
from tests.durability.proof import Acknowledgement, acknowledgements, unproved
from tests.durability.trace import SYNCS, read, strace

pytestmark = pytest.mark.needs("strace")

ROOT = Path(__file__).parents[2]
MESSAGES = 120
CUTS = 200
TORN_CUTS = 60


def drive(
    spool: Path, trace: Path, *, count: int = MESSAGES, inject: str = "", soon: bool = False
) -> list[tuple[str, str]]:
    """Run the driver under strace; the lines it wrote, as pairs."""
    program = [
        sys.executable,
        ROOT / "tests" / "durability" / "driver.py",
        spool,
        count,
        0,
        *(["soon"] if soon else []),
    ]
    run = subprocess.run(
        strace(trace, program, inject=inject),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    return [tuple(line.split()) for line in run.stdout.decode().splitlines()]


def messages_in(spool: Path, boot: str) -> dict[str, bytes]:
    """Every message of the queue with its content."""
    return {name: found.octets for name, found in reopened(spool, boot, TUNING).items()}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """One run of the driver: the spool before it, its calls, what it said."""
    folder = tmp_path_factory.mktemp("traced")
    spool = folder / "spool"
    prepare(spool, tuning=TUNING)
    shutil.copytree(spool, folder / "before")
    said = drive(spool, folder / "trace")
    return spool, folder / "before", read(folder / "trace"), said


def test_every_acknowledgement_comes_after_the_syncs_it_stands_on(traced):
    spool, _, calls, said = traced
    told = list(acknowledgements(calls, rb"ACK (\w+)"))
    assert len(told) == sum(word == "ACK" for word, _ in said) == MESSAGES
    assert unproved(calls, spool, told) == []


def test_the_proof_sees_each_sync_that_is_missing(traced):
    spool, _, calls, _ = traced
    told = list(acknowledgements(calls, rb"ACK (\w+)"))

    def without(part: str) -> set[str]:
        kept = [c for c in calls if not (c.name in SYNCS and c.path.endswith(part))]
        return {problem.partition(": ")[2] for problem in unproved(kept, spool, told)}

    assert without("-wal") == {"the log was not synced between its frame and the acknowledgement"}
    assert all("folder was not synced" in problem for problem in without("/bodies"))
    assert len(without("/bodies")) == MESSAGES // 6
    assert all("was not synced between its last octet" in problem for problem in without("(deleted)"))
    assert len(without("(deleted)")) == MESSAGES // 6
    frames = [call for call in calls if call.name == "pwrite64" and call.path.endswith("-wal")]
    at_the_frame = [Acknowledgement(next(f.end for f in frames if each.id in f.data) + 1, each.id) for each in told]
    assert len(unproved(calls, spool, at_the_frame)) == MESSAGES


def test_the_run_that_is_cut_goes_round_the_log_several_times(traced):
    _, _, calls, _ = traced
    headers = [c for c in calls if c.name == "pwrite64" and c.path.endswith("-wal") and c.number == 0]
    assert len(headers) >= 4


@pytest.mark.parametrize(("cuts", "torn"), [(CUTS, False), (TORN_CUTS, True)], ids=["synced-only", "torn"])
def test_after_a_power_cut_every_acknowledged_message_is_there_whole(traced, fast_folder, cuts, torn):
    spool, before, calls, _ = traced
    chance = dice()
    acked = {each.line: each.id.decode() for each in acknowledgements(calls, rb"ACK (\w+)")}
    gone = {each.line: each.id.decode() for each in acknowledgements(calls, rb"GONE (\w+)")}
    moments = list(Disk.of(spool, before).watch(calls))
    first = moments.index(min(acked))
    wanted = set(chance.sample(range(first, len(moments)), cuts))
    disk = Disk.of(spool, before)
    for moment, line in enumerate(disk.watch(calls)):
        if moment in wanted:
            _check_cut(disk, fast_folder / str(moment), chance if torn else None, line, acked, gone)


def _check_cut(disk, folder, chance, cut, acked, gone):
    disk.write_to(folder, chance)
    found = messages_in(folder, "after-the-cut")
    shutil.rmtree(folder)
    for name, content in found.items():
        assert content == body_of(name), f"cut after line {cut + 1}: {name} is not whole"
    finishing = {name for line, name in gone.items() if line <= cut}
    missing = {name for line, name in acked.items() if line <= cut} - finishing - set(found)
    assert not missing, f"cut after line {cut + 1}"


def test_the_model_does_lose_what_was_not_synced(traced, fast_folder):
    """Without the syncs of the log nothing of it survives: the test above would notice."""
    spool, before, calls, _ = traced
    disk = Disk.of(spool, before)
    for _ in disk.watch([call for call in calls if not (call.name in SYNCS and "queue.db" in call.path)]):
        pass
    disk.write_to(fast_folder)
    assert messages_in(fast_folder, "after-the-cut") == {}


@pytest.mark.parametrize(
    "inject",
    [
        "fdatasync:error=EIO:when=4",  # of the log, in the writer's thread
        "fdatasync:error=EIO:when=9..11",  # the attempts to recover as well
        "fdatasync:error=EIO:when=9..12",
        "fsync:error=EIO:when=5",  # of a body file or its folder
        "pwrite64:error=EIO:when=60",  # of a frame
        "pwrite64:error=ENOSPC:when=71",
        "soon fdatasync:error=EIO:when=8",  # of the intake log, mostly
        "soon fdatasync:error=EIO:when=14..17",
        "soon pwrite64:error=EIO:when=50",
    ],
)
def test_a_failing_disk_fails_the_put_and_loses_nothing(tmp_path, inject):
    spool = tmp_path / "spool"
    prepare(spool, tuning=TUNING)
    soon, inject = inject.startswith("soon "), inject.removeprefix("soon ")
    said = drive(spool, tmp_path / "trace", count=60, inject=inject, soon=soon)
    assert "INJECTED" in (tmp_path / "trace").read_text("ascii")
    acked = [name for word, name in said if word == "ACK"]
    failed = [name for word, name in said if word == "FAIL"]
    finishing = {name for word, name in said if word == "GONE"}
    assert len(acked) + len(failed) == 60
    assert acked[-1] > "M00050", "it recovered"
    calls = read(tmp_path / "trace")
    assert unproved(calls, spool, acknowledgements(calls, rb"ACK (\w+)")) == []
    found = messages_in(spool, "after-the-failure")
    assert set(acked) - finishing <= set(found)
    finished = {name for word, name in said if word == "OK"}
    assert not finished & set(found)
    assert not set(failed) & set(found), "whoever was told no has nothing in the queue"
    for name, content in found.items():
        assert content == body_of(name)


def test_a_body_whose_sync_failed_is_never_taken_again(tmp_path):
    program = f"""
import os
from pathlib import Path
from relay.queue.bodies import Bodies
bodies = Bodies(Path({str(tmp_path)!r}), 0)
descriptor = bodies.open_new()
os.write(descriptor, b"body")
for attempt in range(2):
    try:
        bodies.place(descriptor, 4, "0000000000000001.body")
    except Exception as error:
        print(type(error).__name__)
print(os.listdir({str(tmp_path)!r}))
"""
    command = strace(Path(os.devnull), [sys.executable, "-c", program], inject="fsync:error=EIO:when=1")
    run = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True)
    assert run.stdout.decode().split() == ["OSError", "QueueError", "[]"]
