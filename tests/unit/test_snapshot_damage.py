"""Whatever happens to a snapshot file, it is refused with its reason and never answers wrongly."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from relay.directory.encode import encode
from relay.directory.key import KEY_OCTETS, key_id
from relay.directory.layout import Need, Section, SnapshotError, pack, read
from relay.directory.snapshot import ACCEPT, KNOWN, RESTRICTED, Entry, Snapshot, inspect
from relay.mail.reply import operator_text

KEY = os.urandom(KEY_OCTETS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot"
    records = [Entry(ACCEPT), Entry(ACCEPT | RESTRICTED, operator_text("Ask us"))]
    numbers = {f"user{number}@example.com": number % 2 for number in range(5)}
    path.write_bytes(b"".join(encode(numbers, records, KEY, 3, 99.0, {"sources": []})))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SnapshotError) as refused:
        Snapshot.open(path, KEY)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    return message


def rewritten(path: Path, change: Callable[[dict[str, Section]], None]) -> None:
    """The same file with other sections and right checksums: what a faulty writer could make."""
    image = read(path, KNOWN)
    sections = {name: replace(section, data=bytes(section.data)) for name, section in image.sections.items()}
    change(sections)
    path.write_bytes(b"".join(pack(image.header, list(sections.values()))))


def test_no_single_bit_can_change_unnoticed(path: Path) -> None:
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(SnapshotError):
                Snapshot.open(path, KEY)


def test_every_truncation_is_refused_as_one(path: Path) -> None:
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert "truncated" in refusal(path)


def test_octets_behind_the_end_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert "too long" in refusal(path)


@pytest.mark.parametrize(
    ("position", "octets", "reason"),
    [
        (0, b"SQLite f", "is not a snapshot"),
        (8, struct.pack("=I", 2), "has format version 2, this relay reads version 1"),
        (8, struct.pack(">I", 1), "has format version 16777216"),
        (16, struct.pack("=Q", 4), "checksum of the header"),
        (12, struct.pack("=I", 65), "65 sections cannot be"),
        (-8, b"\1", "checksum of section 'origin'"),
    ],
)
def test_each_kind_of_damage_has_its_name(path: Path, position: int, octets: bytes, reason: str) -> None:
    bad = bytearray(path.read_bytes())
    position %= len(bad)
    bad[position : position + len(octets)] = octets
    path.write_bytes(bad)
    assert reason in refusal(path)


def test_damage_in_a_table_names_the_table(path: Path) -> None:
    bad = bytearray(path.read_bytes())
    image = read(path, KNOWN)
    first = bad.index(bytes(image.sections["hashes"].data))
    bad[first + 5] ^= 16
    path.write_bytes(bad)
    assert "checksum of section 'hashes'" in refusal(path)


def test_another_key_is_named_with_both_ids(path: Path) -> None:
    other = os.urandom(KEY_OCTETS)
    with pytest.raises(SnapshotError, match=f"was made with key {key_id(KEY)}.*in use is {key_id(other)}"):
        Snapshot.open(path, other)


def test_an_unknown_required_section_is_refused_by_name(path: Path) -> None:
    rewritten(path, lambda sections: sections.update(accounts=Section("accounts", Need.REQUIRED, 4, b"1234")))
    assert "needs section 'accounts', which this relay does not know" in refusal(path)


def test_an_unknown_optional_section_is_passed_over(path: Path) -> None:
    rewritten(path, lambda sections: sections.update(names=Section("names", Need.OPTIONAL, 4, b"1234")))
    assert Snapshot.open(path, KEY).lookup("user0@example.com") == ACCEPT


@pytest.mark.parametrize("name", ["hashes", "fanout", "index", "records", "strings"])
def test_a_missing_section_is_refused_by_name(path: Path, name: str) -> None:
    rewritten(path, lambda sections: sections.pop(name) and None)
    assert f"no section '{name}'" in refusal(path)


@pytest.mark.parametrize(
    ("name", "item", "data", "reason"),
    [
        ("hashes", 8, array("Q", range(4)).tobytes(), "count differently"),
        ("hashes", 4, array("Q", range(5)).tobytes(), "another width"),
        ("fanout", 4, array("I", [0, 5, 5, 5]).tobytes(), "fan-out does not fit"),
        ("fanout", 4, array("I", [0, 9, 5]).tobytes(), "fan-out does not fit"),
        ("fanout", 4, array("I", [0]).tobytes(), "fan-out does not fit"),
        ("fanout", 4, b"", "fan-out does not fit"),
        ("index", 1, bytes([0, 1, 0, 1, 2]), "names a record that is not there"),
        ("index", 4, bytes(20), "another width"),
        ("records", 20, struct.pack("=IIIQ", 1, 900, 0, 0) * 2, "names a text that is not there"),
        ("strings", 1, b"\xff\xff", "names a text that is not there"),
    ],
)
def test_tables_that_contradict_each_other_are_refused_although_their_checksums_are_right(
    path: Path, name: str, item: int, data: bytes, reason: str
) -> None:
    rewritten(path, lambda sections: sections.update({name: Section(name, Need.REQUIRED, item, data)}))
    assert reason in refusal(path)


def test_what_is_not_a_file_is_refused_and_hangs_nobody(tmp_path: Path) -> None:
    assert "there is no snapshot here; run relay directory build" in refusal(tmp_path / "absent")
    assert "is not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "is not a regular file" in refusal(tmp_path / "fifo")


def test_a_file_beyond_all_measure_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.touch()
    os.truncate(path, 2**40)
    assert "more than a snapshot can have" in refusal(path)


def test_the_header_is_readable_without_the_key(path: Path) -> None:
    header = inspect(path)
    assert (header.generation, header.addresses, header.recipients, header.restricted) == (3, 5, 5, 2)
    assert header.key_id == key_id(KEY)
