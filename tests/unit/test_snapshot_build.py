"""A build replaces the snapshot as a whole or not at all, and readers never notice the moment."""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.config.schema import Config
from relay.directory.build import build
from relay.directory.key import KEY_OCTETS, address_hasher, read_key
from relay.directory.layout import SnapshotError
from relay.directory.snapshot import ACCEPT, Directory, Snapshot, previous_path


def configuration(folder: Path, **directory: Any) -> Config:
    return Config.model_validate(
        {
            "server": {"hostname": "mx.example.com", "spool": folder / "spool"},
            "process": {"user": "", "hub_user": ""},
            "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
            "domain": [{"names": ["example.com"]}],
            "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
            "directory": {"sources": [{"type": "list", "path": folder / "list"}], **directory},
        }
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "list").write_text("first@example.com\nalways@example.com\n")
    return configuration(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_build_makes_folder_key_and_generation_1(config: Config) -> None:
    built = build(config, 5.0)
    assert built.new_key
    assert (built.snapshot.generation, built.snapshot.created, built.snapshot.addresses) == (1, 5.0, 2)
    assert len(read_key(config.key_path)) == KEY_OCTETS
    assert not previous_path(config.snapshot_path).exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_but_the_owner_reads_the_key_and_nobody_but_the_group_the_snapshot(config: Config, umask: int) -> None:
    before = os.umask(umask)
    try:
        build(config, 5.0)
    finally:
        os.umask(before)
    assert mode(config.key_path) == 0o600
    assert mode(config.snapshot_path) == 0o640
    assert mode(config.snapshot_path.parent) == 0o750


@pytest.mark.needs("root")
def test_built_by_root_it_belongs_to_the_group_of_the_workers(tmp_path: Path, config: Config) -> None:
    config = config.model_copy(update={"process": config.process.model_copy(update={"user": "nobody"})})
    build(config, 5.0)
    nobody = pwd.getpwnam("nobody")
    assert config.snapshot_path.stat().st_gid == config.snapshot_path.parent.stat().st_gid == nobody.pw_gid
    assert config.key_path.stat().st_uid == 0
    assert mode(config.key_path) == 0o600


@pytest.mark.needs("root")
def test_built_by_root_for_a_user_that_is_not_there_it_says_so(config: Config) -> None:
    config = config.model_copy(update={"process": config.process.model_copy(update={"user": "no-such-user"})})
    with pytest.raises(SnapshotError, match=r"process\.user: there is no user 'no-such-user'"):
        build(config, 5.0)


def test_each_build_counts_up_and_keeps_the_one_before(config: Config, tmp_path: Path) -> None:
    build(config, 5.0)
    (tmp_path / "list").write_text("second@example.com\n")
    built = build(config, 6.0)
    assert not built.new_key
    assert built.snapshot.generation == 2
    assert built.snapshot.lookup("first@example.com") == 0
    previous = Snapshot.open(previous_path(config.snapshot_path), read_key(config.key_path))
    assert (previous.generation, previous.lookup("first@example.com")) == (1, ACCEPT)


def test_a_damaged_snapshot_does_not_push_out_the_good_one_before_it(config: Config) -> None:
    build(config, 5.0)
    build(config, 6.0)
    os.truncate(config.snapshot_path, 100)
    assert build(config, 7.0).snapshot.generation == 2
    previous = Snapshot.open(previous_path(config.snapshot_path), read_key(config.key_path))
    assert previous.created == 5.0


def test_a_refused_build_leaves_everything_as_it_was(config: Config, tmp_path: Path) -> None:
    build(config, 5.0)
    folder = config.snapshot_path.parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "list").write_text("")
    with pytest.raises(SnapshotError, match="has no usable address"):
        build(config, 6.0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_a_build_that_died_left_behind_does_not_disturb_the_next(config: Config) -> None:
    build(config, 5.0)
    folder = config.snapshot_path.parent
    (folder / ".snapshot.new").write_bytes(b"half a file")
    # Died between keeping the previous generation and the rename: both names are one file.
    os.link(config.snapshot_path, folder / ".snapshot.previous.new")
    os.link(config.snapshot_path, previous_path(config.snapshot_path))
    assert build(config, 6.0).snapshot.generation == 2
    assert not [path.name for path in folder.iterdir() if "new" in path.name]
    assert Snapshot.open(previous_path(config.snapshot_path), read_key(config.key_path)).generation == 1


def test_a_key_of_the_wrong_length_refuses_the_build(config: Config) -> None:
    build(config, 5.0)
    config.key_path.write_bytes(b"short")
    with pytest.raises(SnapshotError, match="a key has 32 octets"):
        build(config, 6.0)
    assert config.key_path.read_bytes() == b"short"


def test_a_key_that_everybody_may_read_refuses_the_build(config: Config) -> None:
    build(config, 5.0)
    config.key_path.chmod(0o604)
    with pytest.raises(SnapshotError, match=f"open to every user; chmod 600 {config.key_path}"):
        build(config, 6.0)


def test_two_addresses_of_one_hash_get_a_new_key(config: Config) -> None:
    first = build(config, 5.0)
    unlucky = read_key(config.key_path)

    def hasher(key: bytes) -> Callable[[str], int]:
        return (lambda _: 7) if key == unlucky else address_hasher(key)

    built = build(config, 6.0, hasher)
    assert built.new_key
    assert read_key(config.key_path) != unlucky
    assert built.snapshot.key_id != first.snapshot.key_id
    assert built.snapshot.lookup("first@example.com") == built.snapshot.lookup("always@example.com") == ACCEPT


def test_hashes_that_always_collide_end_the_build_and_keep_the_key(config: Config) -> None:
    build(config, 5.0)
    key = read_key(config.key_path)
    with pytest.raises(SnapshotError, match="share a hash under 3 keys"):
        build(config, 6.0, lambda _: lambda _: 7)
    assert read_key(config.key_path) == key
    assert Snapshot.open(config.snapshot_path, key).generation == 1


def test_a_second_build_at_the_same_time_is_refused(config: Config) -> None:
    build(config, 5.0)
    with (config.snapshot_path.parent / ".snapshot.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SnapshotError, match="another build is running"):
            build(config, 6.0)
    assert build(config, 7.0).snapshot.generation == 2


def test_a_folder_that_cannot_be_written_is_named(config: Config) -> None:
    config.server.spool.write_text("a file where the spool should be")
    with pytest.raises(SnapshotError, match="Not a directory; the snapshot stays as it is"):
        build(config, 5.0)


def test_a_full_disk_leaves_the_old_snapshot(config: Config, tmp_path: Path) -> None:
    build(config, 5.0)
    (tmp_path / "list").write_text("".join(f"user{number}@example.com\n" for number in range(5000)))
    # A limit on the size of files fails the write where a full disk would, after part of the file.
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited + BUILD, config.model_dump_json()], capture_output=True, text=True, check=False
    )
    assert "File too large; the snapshot stays as it is" in done.stdout
    assert Snapshot.open(config.snapshot_path, read_key(config.key_path)).generation == 1


BUILD = """
import sys
from relay.config.schema import Config
from relay.directory.build import build
from relay.directory.layout import SnapshotError
try:
    build(Config.model_validate_json(sys.argv[1]), 6.0)
except SnapshotError as refused:
    print(refused)
"""


def test_a_build_killed_half_way_leaves_the_old_snapshot_and_the_next_one_works(config: Config, tmp_path: Path) -> None:
    build(config, 5.0)
    os.mkfifo(tmp_path / "slow")
    slow = configuration(tmp_path, sources=[{"type": "list", "path": tmp_path / "slow"}])
    process = subprocess.Popen([sys.executable, "-c", BUILD, slow.model_dump_json()])
    with (tmp_path / "slow").open("w") as source:  # opens when the build reads
        source.write("half@example.com\n" * 10_000)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Snapshot.open(config.snapshot_path, read_key(config.key_path)).generation == 1
    assert build(config, 7.0).snapshot.generation == 2


READER = """
import sys, threading
from pathlib import Path
from relay.directory.key import read_key
from relay.directory.snapshot import ACCEPT, Directory
directory = Directory(Path(sys.argv[1]), read_key(Path(sys.argv[2])))
seen, wrong, ended = set(), 0, threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print("reading", flush=True)
while not ended.is_set() or directory.changed():
    directory.refresh()
    seen.add(directory.snapshot.generation)
    wrong += directory.snapshot.lookup("always@example.com") != ACCEPT or directory.refused != ""
    wrong += directory.snapshot.lookup("never@example.com") != 0
print(len(seen), max(seen), wrong)
"""


def test_a_reader_in_a_loop_sees_new_generations_and_never_a_wrong_answer(config: Config) -> None:
    build(config, 0.0)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(config.snapshot_path), str(config.key_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "reading\n"
    for generation in range(30):
        build(config, float(generation))
    output, _ = reader.communicate("")
    seen, newest, wrong = map(int, output.split())
    assert (newest, wrong) == (31, 0)
    assert seen > 1


def test_a_directory_takes_the_new_generation_when_told_to_look(config: Config, tmp_path: Path) -> None:
    build(config, 5.0)
    directory = Directory(config.snapshot_path, read_key(config.key_path))
    assert not directory.changed()
    assert not directory.refresh()
    (tmp_path / "list").write_text("second@example.com\n")
    build(config, 6.0)
    assert directory.changed()
    assert directory.refresh()
    assert directory.snapshot is not None
    assert directory.snapshot.lookup("second@example.com") == ACCEPT
    assert not directory.refresh()
