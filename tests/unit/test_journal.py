"""The journal of final dots outlives its process, and only its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from relay.queue.journal import CELLS, Journal
from relay.queue.store import QueueError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal-0"


def test_what_was_marked_and_not_cleared_is_inherited(path):
    first = Journal(path, "boot-a")
    first.mark(1 << 62)
    first.clear(first.mark(8))
    first.mark(9)
    first.close()
    second = Journal(path, "boot-a")
    assert sorted(second.inherited) == [9, 1 << 62]
    second.mark(10)
    second.forget_inherited()
    assert second.inherited == ()
    second.close()
    third = Journal(path, "boot-a")
    assert third.inherited == (10,)
    third.close()


def test_marks_survive_the_kill_of_their_process(path):
    program = f"""
import os, signal
from pathlib import Path
from relay.queue.journal import Journal
journal = Journal(Path({str(path)!r}), "boot-a")
journal.mark(7)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False)
    journal = Journal(path, "boot-a")
    assert journal.inherited == (7,)
    journal.close()


def test_marks_of_another_boot_or_form_count_for_nothing(path):
    journal = Journal(path, "boot-a")
    journal.mark(7)
    journal.close()
    other = Journal(path, "boot-b")
    assert other.inherited == ()
    other.close()
    again = Journal(path, "boot-a")
    assert again.inherited == (), "emptied, not only ignored"
    again.close()
    path.write_bytes(b"something else")
    fresh = Journal(path, "boot-a")
    assert fresh.inherited == ()
    fresh.close()


def test_a_full_journal_says_so_and_a_cleared_cell_is_used_again(path):
    journal = Journal(path, "boot-a")
    cells = [journal.mark(number + 1) for number in range(CELLS)]
    assert len(set(cells)) == CELLS
    with pytest.raises(QueueError, match="under way already"):
        journal.mark(99)
    journal.clear(cells[17])
    assert journal.mark(99) == cells[17]
    journal.close()
