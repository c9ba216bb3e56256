"""A new snapshot is on the disk before it takes the place of the old one; a power cut leaves one of the two, whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relay.directory.key import read_key
from relay.directory.snapshot import Snapshot
from tests.bed.fixtures import MakeRelay
from tests.bed.relay import RelayRunner
from tests.durability.power import Disk, dice
from tests.durability.proof import unsafe_renames
from tests.durability.trace import SYNCS, read, strace

pytestmark = pytest.mark.needs("strace")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def unbuilt(make_relay: MakeRelay) -> RelayRunner:
    """A relay that is not started and has no snapshot yet."""
    return make_relay("smtp:[127.0.0.1]:9", start=False)


def build(relay: RelayRunner, trace: Path):
    """``relay directory build`` under strace; its calls."""
    command = [sys.executable, "-m", "relay", "directory", "build", "--config", relay.config_file]
    subprocess.run(strace(trace, command), cwd=ROOT, capture_output=True, check=True)
    return read(trace)


def test_key_and_snapshot_are_synced_then_renamed_then_their_folder_is_synced(unbuilt, tmp_path):
    calls = build(unbuilt, tmp_path / "trace")
    folder = unbuilt.spool / "directory"
    assert unsafe_renames(calls, folder) == (["key", "snapshot"], [])

    def without(sync):
        return unsafe_renames([c for c in calls if not (c.name in SYNCS and sync(c.path))], folder)[1]

    file_less = [f"{folder}/{name}: not synced between its last octet and its new name" for name in ("key", "snapshot")]
    assert without(lambda path: path.endswith(".new")) == file_less
    folder_less = [f"{folder}/{name}: the folder was not synced after the rename" for name in ("key", "snapshot")]
    assert without(lambda path: path == str(folder)) == folder_less


def test_at_every_moment_of_a_build_a_power_cut_leaves_a_whole_snapshot(unbuilt, tmp_path):
    unbuilt.build_directory()
    key = read_key(unbuilt.spool / "directory" / "key")
    shutil.copytree(unbuilt.spool, tmp_path / "before")
    unbuilt.recipients_file.write_text("".join(f"user{number}@example.com\n" for number in range(3000)))
    calls = build(unbuilt, tmp_path / "trace")
    first = next(c.begin for c in calls if c.path.endswith("/.snapshot.new"))
    chance = dice()
    disk = Disk.of(unbuilt.spool, tmp_path / "before")
    seen = []
    for line in disk.watch(calls):
        if line >= first:
            for torn in (None, chance):
                disk.write_to(tmp_path / "cut", torn)
                seen.append(Snapshot.open(tmp_path / "cut" / "directory" / "snapshot", key).generation)
                shutil.rmtree(tmp_path / "cut")
    assert set(seen) == {1, 2}
    assert seen[0] == 1
    assert seen[-2:] == [2, 2], "the end of the build means: it is on the disk"
