from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.telemetry import logs
from relay.telemetry.logs import BACKLOG_OCTETS, BATCH_OCTETS, LogWriter
from tests.bed.waiting import wait_for


async def until(true: Callable[[], bool], what: str) -> None:
    """Wait in a thread: the loop has to turn for the writer's timer."""
    await asyncio.to_thread(wait_for, true, what)


def test_before_its_start_a_writer_writes_each_line_at_once(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    writer.write("first")
    assert (tmp_path / "log").read_text() == "first\n"
    writer.close()


async def test_lines_reach_the_file_in_order_without_anyone_flushing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path)
    writer.start(asyncio.get_running_loop())
    for number in range(1000):
        writer.write(f"line {number}")
    await until(lambda: path.stat().st_size == sum(len(f"line {n}\n") for n in range(1000)), "lines in the file")
    assert path.read_text().splitlines() == [f"line {number}" for number in range(1000)]
    writer.close()


async def test_under_load_a_full_batch_goes_out_before_the_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FLUSH_S", 3600.0)
    path = tmp_path / "log"
    writer = LogWriter(path)
    writer.start(asyncio.get_running_loop())
    writer.write("x" * BATCH_OCTETS)
    await until(lambda: path.stat().st_size == BATCH_OCTETS + 1, "batch in the file")
    writer.close()


async def test_closing_writes_what_waits(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    writer.start(asyncio.get_running_loop())
    writer.write("last words")
    writer.close()
    assert (tmp_path / "log").read_text() == "last words\n"
    assert "log" not in {thread.name for thread in threading.enumerate()}


async def test_after_reopening_lines_go_to_the_new_file(tmp_path: Path) -> None:
    path, rotated = tmp_path / "log", tmp_path / "log.1"
    writer = LogWriter(path)
    writer.start(asyncio.get_running_loop())
    writer.write("old")
    writer.flush()
    path.rename(rotated)
    writer.reopen()
    await until(path.exists, "new file")
    writer.write("new")
    writer.close()
    assert (rotated.read_text(), path.read_text()) == ("old\n", "new\n")


def test_a_supervisor_reopens_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path)
    path.rename(tmp_path / "log.1")
    writer.reopen()
    assert path.exists()
    writer.close()


def test_when_reopening_fails_the_old_file_is_kept_and_the_new_one_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "log"
    writer = LogWriter(path)
    moved = folder.rename(tmp_path / "moved")
    writer.reopen()
    assert "No such file" in writer.problem
    writer.write("kept")
    assert (moved / "log").read_text() == "kept\n"
    folder.mkdir()
    writer.write("moved on")
    assert path.read_text() == "moved on\n"
    assert (writer.problem, writer.lost) == ("", 0)
    writer.close()


def test_a_file_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LogWriter(tmp_path / "nowhere" / "log")


async def test_lines_lost_on_a_full_disk_are_counted_and_writing_goes_on_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    reports: list[int] = []
    writer = LogWriter(path)
    writer.start(asyncio.get_running_loop(), reports.append)
    for _ in range(3):
        writer.write("lost")
    await until(lambda: sum(reports) == 3, "report of lost lines")
    assert "No space left" in writer.problem

    path.unlink()  # room again
    writer.write("here again")
    await until(path.exists, "new file")
    writer.close()
    assert path.read_text() == "here again\n"
    assert sum(reports) == writer.lost == 3


TORN = """
import resource, signal, sys
from pathlib import Path
from relay.telemetry.logs import LogWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
writer = LogWriter(path)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1]))  # a disk with room for 10 octets
writer.write("12345")
writer.write("abcdefgh")
assert writer.lost == 1, writer.lost
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
writer.write("whole")
writer.close()
"""


def test_a_line_cut_off_by_a_full_disk_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", TORN, str(path)], check=True)
    assert path.read_text() == "12345\nabcd\nwhole\n"


async def test_a_producer_too_fast_for_its_disk_waits_and_loses_nothing(tmp_path: Path) -> None:
    """The disk is a FIFO that nobody reads until as much waits as may."""
    path = tmp_path / "log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = LogWriter(path)
    writer.start(asyncio.get_running_loop())
    line = "x" * 999
    count = BACKLOG_OCTETS // 1000 + 1000
    lines = 0

    def read_all() -> None:
        nonlocal lines
        wait_for(lambda: writer._handed > BACKLOG_OCTETS, "full backlog")
        os.set_blocking(reader, True)
        while piece := os.read(reader, 1 << 20):
            lines += piece.count(b"\n")

    consumer = threading.Thread(target=read_all)
    consumer.start()
    most = 0
    for _ in range(count):
        writer.write(line)
        most = max(most, writer._handed - writer._written)
    writer.close()
    await asyncio.to_thread(consumer.join)
    os.close(reader)
    assert (lines, writer.lost) == (count, 0)
    assert most <= BACKLOG_OCTETS


SHARED = """
import sys
from relay.telemetry.logs import LogWriter
writer = LogWriter(None)
writer._lines = [f"{sys.argv[1]}{number:05}" * 40 for number in range(2000)]
writer.flush()
"""


def test_processes_that_share_a_pipe_do_not_mix_their_lines() -> None:
    reader, end = os.pipe()
    writers = [subprocess.Popen([sys.executable, "-c", SHARED, name], stderr=end) for name in "ab"]
    os.close(end)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    assert [writer.wait() for writer in writers] == [0, 0]
    for name in "ab":
        assert [line for line in lines if line.startswith(name)] == [
            f"{name}{number:05}" * 40 for number in range(2000)
        ]
    assert len(lines) == 4000


def test_a_parent_that_made_standard_error_non_blocking_costs_no_lines() -> None:
    reader, end = os.pipe()
    os.set_blocking(end, False)
    writer = subprocess.Popen([sys.executable, "-c", SHARED, "a"], stderr=end)
    os.close(end)
    with os.fdopen(reader) as pipe:
        assert len(pipe.read().splitlines()) == 2000
    assert writer.wait() == 0
