"""A snapshot answers exactly what was put into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.directory.encode import encode
from relay.directory.key import KEY_OCTETS
from relay.directory.layout import SnapshotError, read
from relay.directory.snapshot import ACCEPT, KNOWN, NEEDS_AUTH, PARTICULAR, PLACED, RESTRICTED, RULED, Entry, Snapshot
from relay.mail.reply import operator_text
from relay.mail.ruling import parse_ruling

KEY = os.urandom(KEY_OCTETS)

local_parts = st.text("abcdefghijklmnopqrstuvwxyz0123456789.+-_'", min_size=1, max_size=64)
addresses = st.builds("{}@{}.example".format, local_parts, st.sampled_from(["a", "b", "long-name"]))
entries = st.builds(
    Entry,
    flags=st.integers(1, 7),
    text=st.text(max_size=250).map(operator_text),
    next_hop=st.sampled_from(["", "smtp:[192.0.2.1]:25"]),
    size_limit=st.sampled_from([0, 1, 2**40]),
)


def make(folder: Path, known: dict[str, Entry]) -> Snapshot:
    records = list(dict.fromkeys(known.values()))
    numbers = {address: records.index(entry) for address, entry in known.items()}
    path = folder / "snapshot"
    path.write_bytes(b"".join(encode(numbers, records, KEY, 7, 1234.5, {"sources": []})))
    return Snapshot.open(path, KEY)


@given(known=st.dictionaries(addresses, entries, max_size=40), asked=st.lists(addresses, max_size=20))
def test_it_answers_like_a_plain_dictionary(tmp_path_factory, known: dict[str, Entry], asked: list[str]) -> None:
    snapshot = make(tmp_path_factory.mktemp("snapshot"), known)
    for address in [*asked, *known]:
        assert snapshot.entry(address) == known.get(address)
        entry = known.get(address, Entry(0))
        particular = PARTICULAR if entry.size_limit or entry.flags & NEEDS_AUTH else 0
        assert snapshot.lookup(address) == entry.flags | particular | (PLACED if entry.next_hop else 0)
    assert snapshot.addresses == len(known)
    assert snapshot.recipients == sum(bool(entry.flags & ACCEPT) for entry in known.values())
    assert snapshot.restricted == sum(bool(entry.flags & RESTRICTED) for entry in known.values())


def test_case_does_not_matter(tmp_path: Path) -> None:
    snapshot = make(tmp_path, {"first.last@example.com": Entry(ACCEPT)})
    assert snapshot.lookup("First.LAST@Example.COM") == ACCEPT
    assert snapshot.entry("FIRST.LAST@EXAMPLE.COM") == Entry(ACCEPT)


def test_an_empty_snapshot_knows_nobody(tmp_path: Path) -> None:
    snapshot = make(tmp_path, {})
    assert snapshot.lookup("a@example.com") == 0
    assert snapshot.entry("a@example.com") is None


def test_ten_thousand_addresses_with_hundreds_of_records_are_told_apart(tmp_path: Path) -> None:
    texts = [operator_text(f"Reason {number}") for number in range(600)]
    known = {f"user{n}@example.com": Entry(RESTRICTED | NEEDS_AUTH, texts[n % 600]) for n in range(10_000)}
    snapshot = make(tmp_path, known)
    assert all(snapshot.entry(address) == entry for address, entry in known.items())
    assert not any(snapshot.lookup(f"other{address}") for address in known)


def test_the_header_tells_generation_time_and_size(tmp_path: Path) -> None:
    snapshot = make(tmp_path, {"a@example.com": Entry(ACCEPT)})
    assert (snapshot.generation, snapshot.created) == (7, 1234.5)
    assert snapshot.size == (tmp_path / "snapshot").stat().st_size


def test_the_file_holds_no_readable_address_and_under_another_key_other_hashes(tmp_path: Path) -> None:
    make(tmp_path, {"secret.name@example.com": Entry(ACCEPT)})
    (tmp_path / "other").write_bytes(
        b"".join(encode({"secret.name@example.com": 0}, [Entry(ACCEPT)], os.urandom(KEY_OCTETS), 7, 1234.5, {}))
    )
    first, second = (read(tmp_path / name, KNOWN).sections["hashes"].data for name in ("snapshot", "other"))
    assert bytes(first) != bytes(second)
    assert b"secret" not in (tmp_path / "snapshot").read_bytes()


def test_rulings_are_a_section_that_is_there_only_where_there_are_any(tmp_path: Path) -> None:
    """So a relay that does not know them refuses the file instead of overlooking them, and reads every other."""
    ruling = parse_ruling("550 5.1.1 Has left")
    assert ruling is not None
    entry = Entry(ACCEPT | RULED, ruling=ruling, until=1_800_000_000, comment="ticket 4711")
    snapshot = make(tmp_path, {"a@example.com": entry, "b@example.com": Entry(ACCEPT)})
    assert snapshot.entry("A@example.com") == entry
    assert snapshot.lookup("a@example.com") == ACCEPT | RULED
    assert (snapshot.ruled, snapshot.wide) == (True, False)
    older = KNOWN - {"rulings"}
    with pytest.raises(SnapshotError, match=r"needs section 'rulings', which this relay does not know"):
        read(tmp_path / "snapshot", older)
    assert not make(tmp_path, {"b@example.com": Entry(ACCEPT)}).ruled
    assert "rulings" not in read(tmp_path / "snapshot", older).sections


def test_a_flag_without_its_ruling_is_refused_when_the_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="the rulings do not fit the records"):
        make(tmp_path, {"a@example.com": Entry(ACCEPT | RULED)})
