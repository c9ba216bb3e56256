"""A process goes on with what it has, whatever becomes of the files, and says why it did not take the newest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relay.directory.encode import encode
from relay.directory.key import KEY_OCTETS
from relay.directory.snapshot import ACCEPT, Directory, Entry, previous_path

KEY = os.urandom(KEY_OCTETS)


def put(path: Path, generation: int, address: str, key: bytes = KEY) -> None:
    """As a build does: beside, then renamed."""
    beside = path.with_name("beside")
    beside.write_bytes(b"".join(encode({address: 0}, [Entry(ACCEPT)], key, generation, float(generation), {})))
    beside.rename(path)


def knows(directory: Directory, address: str) -> bool:
    assert directory.snapshot is not None
    return bool(directory.snapshot.lookup(address))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot"
    put(previous_path(path), 1, "one@example.com")
    put(path, 2, "two@example.com")
    return path


def test_the_current_generation_is_taken_at_the_start(path: Path) -> None:
    directory = Directory(path, KEY)
    assert knows(directory, "two@example.com")
    assert directory.refused == ""


@pytest.mark.parametrize("octets", [b"", b"x" * 5000])
def test_the_previous_generation_serves_when_the_current_one_is_damaged_at_the_start(path: Path, octets: bytes) -> None:
    path.write_bytes(octets)
    directory = Directory(path, KEY)
    assert knows(directory, "one@example.com")
    assert directory.refused.startswith(f"{path}: ")
    assert not directory.refresh()


def test_the_previous_generation_serves_when_the_current_one_is_gone_at_the_start(path: Path) -> None:
    path.unlink()
    directory = Directory(path, KEY)
    assert knows(directory, "one@example.com")
    assert "there is no snapshot here" in directory.refused


def test_without_any_there_is_none_until_one_comes(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    directory = Directory(path, KEY)
    assert directory.snapshot is None
    assert "run relay directory build" in directory.refused
    assert not directory.refresh()
    put(path, 1, "one@example.com")
    assert directory.refresh()
    assert knows(directory, "one@example.com")
    assert directory.refused == ""


def test_a_previous_generation_that_comes_later_is_better_than_none(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"damaged")
    directory = Directory(path, KEY)
    assert directory.snapshot is None
    put(previous_path(path), 1, "one@example.com")
    assert directory.refresh()
    assert knows(directory, "one@example.com")


def test_truncation_in_place_hurts_nobody_who_reads(path: Path) -> None:
    directory = Directory(path, KEY)
    os.truncate(path, 0)
    assert knows(directory, "two@example.com")
    assert not directory.refresh()
    assert knows(directory, "two@example.com")
    assert "truncated" in directory.refused


def test_a_damaged_file_is_tried_once_and_again_when_it_changes(path: Path) -> None:
    directory = Directory(path, KEY)
    path.write_bytes(b"damaged")
    assert directory.changed()
    assert not directory.refresh()
    assert not directory.changed()
    put(path, 3, "three@example.com")
    assert directory.changed()
    assert directory.refresh()
    assert directory.refused == ""
    assert knows(directory, "three@example.com")


def test_a_vanished_file_leaves_the_snapshot_in_use(path: Path) -> None:
    directory = Directory(path, KEY)
    path.unlink()
    assert not directory.refresh()
    assert "there is no snapshot here" in directory.refused
    assert knows(directory, "two@example.com")


def test_the_same_generation_under_a_new_inode_is_no_news(path: Path) -> None:
    directory = Directory(path, KEY)
    put(path, 2, "two@example.com")
    assert directory.changed()
    assert not directory.refresh()
    assert not directory.changed()


def test_a_snapshot_of_another_key_waits_until_the_key_comes(path: Path) -> None:
    directory = Directory(path, KEY)
    other = os.urandom(KEY_OCTETS)
    put(path, 3, "three@example.com", other)
    assert not directory.refresh()
    assert "was made with key" in directory.refused
    assert knows(directory, "two@example.com")
    directory.rekey(other)
    assert directory.changed()
    assert directory.refresh()
    assert knows(directory, "three@example.com")


def test_without_a_key_nothing_is_taken(path: Path) -> None:
    directory = Directory(path, b"")
    assert directory.snapshot is None
    assert "was made with key" in directory.refused
