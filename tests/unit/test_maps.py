"""Text of other programs: Postfix maps with comments and continuations, exported alias lists; in and out again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config.schema import Config
from relay.directory.export import recipient_lines, sender_lines
from relay.directory.maps import LOGICAL_OCTETS, alias_lines, map_lines
from relay.directory.snapshot import ACCEPT
from relay.directory.sources import Collection, gather
from relay.mail.ruling import action_of


def entries(text: str | bytes) -> tuple[list[tuple[int, str, str, str, str]], list[tuple[int, str]]]:
    """Line, key, action, last day and comment of every entry; line and reason of every fault."""
    faults: list[tuple[int, str]] = []
    file = io.BytesIO(text.encode() if isinstance(text, str) else text)
    found = [
        (one.number, one.key, action_of(one.ruling), str(one.until or ""), one.comment)
        for one in map_lines(file, lambda number, reason: faults.append((number, reason)))
    ]
    return found, faults


def test_comments_continuations_domains_and_dates_are_read() -> None:
    found, faults = entries(
        "# of nobody\n\n# Ticket 4711\n# asked by HR\r\nleft@example.com\t550 5.1.1\n# in between\n   Has left\n\t the company\r\n"
        "a@example.com   OK\nexample.net x\n@example.org until=2027-01-31 REJECT\n"
        '"john doe"@example.com 450 Moving\nlast@example.com ok'
    )
    assert found == [
        (5, "left@example.com", "550 5.1.1 Has left the company", "", "Ticket 4711 asked by HR"),
        (9, "a@example.com", "OK", "", "in between"),
        (10, "@example.net", "OK", "", ""),
        (11, "@example.org", "554 5.7.1 Access denied", "2027-01-31", ""),
        (12, '"john doe"@example.com', "450 4.7.1 Moving", "", ""),
        (13, "last@example.com", "OK", "", ""),
    ]
    assert faults == []


def test_what_says_nothing_is_told_with_its_line_and_costs_no_other_line() -> None:
    found, faults = entries(
        b"a@example.com FILTER smtp:x\nuser@ OK\nlocalname OK\nb@example.com\nc@example.com until=31.1.2027 OK\n"
        b"\xff@example.com 550 What\n   goes with it\n d@example.com OK\n# \xff in a comment\ne@example.com OK\n"
        b"f@example.com 550 " + b"x" * LOGICAL_OCTETS + b"\ng@example.com OK\n.example.com OK\n"
    )
    assert [key for _, key, *_ in found] == ["e@example.com", "g@example.com"]
    assert sorted(faults) == [
        (1, "neither OK nor a refusal such as 550 TEXT"),
        (2, "neither an address nor a domain"),
        (3, "neither an address nor a domain"),
        (4, "neither OK nor a refusal such as 550 TEXT"),
        (5, "until= is no date such as 2027-01-31"),
        (6, "line is not UTF-8"),
        (11, "line too long"),
        (13, "neither an address nor a domain"),
    ]


def test_an_entry_that_never_ends_is_bounded() -> None:
    found, faults = entries(
        "a@example.com 550 x\n" + " more and more\n" * (LOGICAL_OCTETS // 10) + "b@example.com OK\n"
    )
    assert [key for _, key, *_ in found] == ["b@example.com"]
    assert [reason for _, reason in faults] == ["line too long"]


@given(st.binary(max_size=300))
def test_any_octets_are_read_without_a_fault_of_ours(octets: bytes) -> None:
    entries(octets)
    list(alias_lines(io.BytesIO(octets), lambda number, reason: None))


ALIASES = """\
# export of Monday
jdoe: SMTP:John.Doe@example.com, smtp:jdoe@example.com; X400:c=US;a= ;p=Example;o=Exchange;s=Doe;g=John;
Info Desk: smtp:info@example.com
\tSmtp:desk@example.com sip:desk@example.com X500:/o=Example/ou=Admin (FYDIBOHF23SPDLT)/cn=Recipients/cn=desk
plain: plain@example.com
SMTP:alone@example.com
tabbed\tSMTP:tabbed@example.com EUM:123;phone-context=example.example.com
foreign: SMTP:x@elsewhere.example
broken: SMTP:not an address
nothing:
"""


def configuration(folder: Path, kind: str, text: str) -> Config:
    (folder / "source").write_text(text)
    return Config.model_validate(
        {
            "server": {"hostname": "mx.example.com"},
            "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
            "domain": [{"names": ["example.com"]}, {"names": ["example.net"]}],
            "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
            "directory": {"sources": [{"type": kind, "path": folder / "source"}]},
        }
    )


def test_an_exported_alias_list_gives_its_smtp_addresses_in_any_case_and_counts_the_rest(tmp_path: Path) -> None:
    collection, tally = gather(configuration(tmp_path, "aliases", ALIASES))
    assert sorted(collection.addresses) == [
        f"{name}@example.com" for name in ("alone", "desk", "info", "jdoe", "john.doe", "plain", "tabbed")
    ]
    assert collection.count(ACCEPT) == 7
    assert dict(tally.skipped) == {
        "not an SMTP address (X400, X500, SIP)": 4,
        "not of a domain with recipients = directory": 1,
        "not an address": 1,
        "neither an address nor a domain": 1,
    }
    assert tally.examples == [
        f"{tmp_path}/source:9: not an address",
        f"{tmp_path}/source:10: neither an address nor a domain",
    ]


MAP = """\
# until 2027-01-31: on leave
a@example.com 450 4.2.1 On leave
b@example.com 550 5.1.1 Has left
c@example.com OK
@example.net OK
d@example.net 550 5.7.1 Not here
"""


def exported(collection: Collection) -> list[str]:
    said = {key: collection.records[number] for key, number in sorted(collection.addresses.items())}
    return list(recipient_lines(said))


def test_what_is_exported_reads_back_as_the_same(tmp_path: Path) -> None:
    source = MAP.replace("# until 2027-01-31: on leave\na@example.com ", "# on leave\na@example.com until=2027-01-31 ")
    lines = exported(gather(configuration(tmp_path, "map", source))[0])
    assert sorted(lines) == sorted(MAP.splitlines())
    again, tally = gather(configuration(tmp_path, "map", "\n".join(lines)))
    assert not tally.skipped
    assert [line for line in exported(again) if line[0] != "#"] == [line for line in lines if line[0] != "#"]


def test_restricted_senders_are_exported_as_an_access_map(tmp_path: Path) -> None:
    config = configuration(tmp_path, "restricted", "a@example.com Only inside\nb@example.org\n")
    other = configuration(tmp_path / "..", "list", "x@example.com\n").directory.sources
    assert other
    (tmp_path / "list").write_text("c@example.com\n")
    directory = config.directory.model_copy(
        update={"sources": [*config.directory.sources, other[0].model_copy(update={"path": tmp_path / "list"})]}
    )
    collection, _ = gather(config.model_copy(update={"directory": directory}))
    said = {key: collection.records[number] for key, number in collection.addresses.items()}
    assert list(sender_lines(said, "Not allowed")) == [
        "a@example.com 554 5.7.1 Only inside",
        "b@example.org 554 5.7.1 Not allowed",
    ]


@pytest.mark.parametrize("kind", ["map", "aliases"])
def test_a_source_without_a_usable_address_refuses_the_build(tmp_path: Path, kind: str) -> None:
    from relay.directory.layout import SnapshotError

    with pytest.raises(SnapshotError, match="has no usable address"):
        gather(configuration(tmp_path, kind, "# empty\n"))
