"""Lists and LDIF files are read for what they say; what is left out is counted, what is doubtful refuses the build."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from relay.config.schema import Config
from relay.directory.layout import SnapshotError
from relay.directory.ldif import ENTRY_VALUES, VALUE_OCTETS
from relay.directory.lines import LINE_OCTETS
from relay.directory.snapshot import ACCEPT, RESTRICTED, Entry
from relay.directory.sources import EXAMPLES, Collection, Tally, gather
from relay.mail.reply import operator_text

BOTH = ACCEPT | RESTRICTED


def configuration(*sources: tuple[str, Path], **directory: Any) -> Config:
    return Config.model_validate(
        {
            "server": {"hostname": "mx.example.com"},
            "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
            "domain": [{"names": ["example.com", "example.net"]}, {"names": ["open.example"], "recipients": "any"}],
            "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
            "directory": {"sources": [{"type": kind, "path": path} for kind, path in sources], **directory},
        }
    )


def read(tmp_path: Path, kind: str, text: str | bytes, **directory: Any) -> tuple[dict[str, Entry], Tally]:
    """What one source of this kind and content says, beside a list with one address."""
    path, anchor = tmp_path / "source", tmp_path / "anchor"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    anchor.write_text("anchor@example.com\n")
    collection, tally = gather(configuration((kind, path), ("list", anchor), **directory))
    return {address: entry for address, entry in flat(collection).items() if address != "anchor@example.com"}, tally


def flat(collection: Collection) -> dict[str, Entry]:
    return {address: collection.records[number] for address, number in collection.addresses.items()}


def test_a_list_takes_an_address_a_line_with_comments_blank_lines_and_any_line_end(tmp_path: Path) -> None:
    found, tally = read(
        tmp_path,
        "list",
        b"\xef\xbb\xbfa@example.com\r\n# all of us\n\n  B@Example.NET\t# the boss\nodd#name@example.com\nlast@example.com",
    )
    assert set(found) == {"a@example.com", "b@example.net", "odd#name@example.com", "last@example.com"}
    assert set(found.values()) == {Entry(ACCEPT)}
    assert not tally.skipped


def test_addresses_of_other_domains_are_counted_and_left_out(tmp_path: Path) -> None:
    found, tally = read(tmp_path, "list", "a@example.com\na@example.org\na@sub.example.com\na@open.example\n")
    assert set(found) == {"a@example.com"}
    assert dict(tally.skipped) == {"not of a domain with recipients = directory": 3}
    assert not tally.examples


def test_bad_lines_are_reported_by_file_and_line(tmp_path: Path) -> None:
    bad = b"nobody\na b@example.com\na@example.com OK\n\xff@example.com\n<a@example.com>\npostmaster\n"
    found, tally = read(tmp_path, "list", b"good@example.com\n" + bad)
    assert set(found) == {"good@example.com"}
    assert [example.rpartition(":")[0] for example in tally.examples] == [f"{tmp_path}/source:{n}" for n in range(2, 8)]
    assert dict(tally.skipped) == {"not an address": 5, "line is not UTF-8": 1}


def test_many_bad_lines_are_counted_and_only_the_first_are_reported(tmp_path: Path) -> None:
    _, tally = read(tmp_path, "list", "good@example.com\n" + "bad\n" * 1000)
    assert tally.skipped["not an address"] == 1000
    assert len(tally.examples) == EXAMPLES


def test_a_line_without_end_costs_one_line(tmp_path: Path) -> None:
    found, tally = read(tmp_path, "list", b"a@example.com\n" + b"x" * (3 * LINE_OCTETS) + b"\nb@example.com\n")
    assert set(found) == {"a@example.com", "b@example.com"}
    assert tally.examples == [f"{tmp_path}/source:2: line too long"]


def test_restricted_senders_may_be_of_any_domain_and_bring_their_text(tmp_path: Path) -> None:
    found, _ = read(
        tmp_path,
        "restricted",
        "plain@example.com\nScanner@Example.org\tAsk #7  \nodd@example.com Gr\u00fc\u00dfe \x07\n# none@example.com\n",
    )
    assert found == {
        "plain@example.com": Entry(RESTRICTED),
        "scanner@example.org": Entry(RESTRICTED, operator_text("Ask #7")),
        "odd@example.com": Entry(RESTRICTED, operator_text("Gr??e ?")),
    }


def test_an_empty_list_of_restrictions_is_fine(tmp_path: Path) -> None:
    assert read(tmp_path, "restricted", "") == ({}, Tally())


def test_what_several_sources_say_of_one_address_adds_up(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("list", "restricted", "ldif"))
    first.write_text("a@example.com\nb@example.com\n")
    second.write_text("A@example.com Not you\n")
    third.write_text("dn: cn=a\nmail: a@example.com\nsmtpdSenderRestrictions: TRUE\n")
    collection, _ = gather(configuration(("list", first), ("restricted", second), ("ldif", third)))
    assert flat(collection) == {
        "a@example.com": Entry(BOTH, operator_text("Not you")),
        "b@example.com": Entry(ACCEPT),
    }


# --- LDIF (RFC 2849) -------------------------------------------------------------------------------------------


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_ldif_entries_give_mail_and_smtp_proxy_addresses(tmp_path: Path) -> None:
    found, tally = read(
        tmp_path,
        "ldif",
        "version: 1\n\n# an entry\ndn: cn=Ann,dc=example\nobjectClass: user\nmail: Ann@example.com\n"
        "proxyAddresses: SMTP:ann@example.com\nproxyaddresses: smtp:a.nn@example.net\n"
        "proxyAddresses: X400:c=DE;a= ;p=Org;s=Ann;\nproxyAddresses: SIP:ann@example.com\n"
        "PROXYADDRESSES: x500:/o=Org/cn=Ann\nproxyAddresses: sMtP:nn@example.org\n\n\n"
        "dn: cn=Bob,dc=example\nMail;lang-en:bob@example.com\n",
    )
    assert found == dict.fromkeys(["ann@example.com", "a.nn@example.net", "bob@example.com"], Entry(ACCEPT))
    assert dict(tally.skipped) == {
        "not an SMTP address (X400, X500, SIP)": 3,
        "not of a domain with recipients = directory": 1,
    }


def test_ldif_values_may_be_folded_anywhere_and_in_base64(tmp_path: Path) -> None:
    folded = encoded("smtp:b@example.com")
    found, tally = read(
        tmp_path,
        "ldif",
        f"dn: cn=a\nma\n il:\n  a@exam\n ple.com\n# a comment\n  that goes on: mail: no@example.com\nproxyAddresses:: {folded[:5]}\n"
        f" {folded[5:]}\nphoto:: {encoded('x' * 200)}\n mail: hidden@example.com\n\r\ndn: cn=c\r\nmail: c@exam\r\n ple.com\r\n",
    )
    assert set(found) == {"a@example.com", "b@example.com", "c@example.com"}
    assert not tally.skipped


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (": TRUE", Entry(BOTH)),
        (": true", Entry(BOTH)),
        (f":: {encoded('TRUE')}", Entry(BOTH)),
        (": FALSE", Entry(ACCEPT)),
        (": false ", Entry(ACCEPT)),
        (":", Entry(ACCEPT)),
        (": Only the press office sends", Entry(BOTH, operator_text("Only the press office sends"))),
        # What cannot be read restricts, too.
        (":< file:///etc/passwd", Entry(BOTH)),
        (":: not*base64", Entry(BOTH)),
        (f":: {base64.b64encode(bytes([255, 254])).decode()}", Entry(BOTH)),
        (": " + "x" * (VALUE_OCTETS + 10), Entry(BOTH)),
        (": x\n " + "\n ".join(["y" * 1000] * 70), Entry(BOTH)),
    ],
)
def test_the_restriction_attribute_restricts_all_addresses_of_its_entry(
    tmp_path: Path, value: str, entry: Entry
) -> None:
    found, _ = read(
        tmp_path,
        "ldif",
        f"dn: cn=a\nmail: a@example.com\nDenySend{value}\nproxyAddresses: smtp:b@example.net\n\n"
        "dn: cn=free\nmail: free@example.com\n",
        restriction_attribute="denySend",
    )
    assert found == {"a@example.com": entry, "b@example.net": entry, "free@example.com": Entry(ACCEPT)}


def test_a_restricted_entry_of_another_domain_is_restricted_and_no_recipient(tmp_path: Path) -> None:
    found, _ = read(
        tmp_path,
        "ldif",
        "dn: cn=a\nmail: a@example.org\nsmtpdSenderRestrictions: TRUE\n\ndn: cn=b\nmail: b@example.com\n",
    )
    assert found == {"a@example.org": Entry(RESTRICTED), "b@example.com": Entry(ACCEPT)}


def test_ldif_oddities_are_reported_by_line_and_cost_only_themselves(tmp_path: Path) -> None:
    found, tally = read(
        tmp_path,
        "ldif",
        "dn: cn=a\nno colon here\nmail: a@example.com\nmail:< file:///etc/passwd\nmail:: ***\n\n"
        " continues nothing\ndn: cn=b\nchangetype: modify\nadd: mail\nmail: gone@example.com\n-\n\n"
        "dn: cn=c\nchangetype: add\nmail: c@example.com\nmail: no address\n",
    )
    assert set(found) == {"a@example.com", "c@example.com"}
    source = f"{tmp_path}/source"
    assert tally.examples == [
        f"{source}:2: not a line of LDIF",
        f"{source}:4: value by URL is not fetched",
        f"{source}:5: broken base64",
        f"{source}:7: not a line of LDIF",
        f"{source}:9: change record, only content records count",
        f"{source}:17: not an address",
    ]


def test_an_entry_without_end_is_bounded(tmp_path: Path) -> None:
    values = "".join(f"proxyAddresses: smtp:u{number}@example.com\n" for number in range(ENTRY_VALUES + 5))
    found, tally = read(tmp_path, "ldif", f"dn: cn=a\n{values}smtpdSenderRestrictions: TRUE\n")
    assert len(found) == ENTRY_VALUES
    assert tally.skipped["entry has too many values"] == 6
    assert set(found.values()) == {Entry(BOTH)}


def test_a_long_value_that_nobody_wants_is_passed_over(tmp_path: Path) -> None:
    found, tally = read(
        tmp_path,
        "ldif",
        "dn: cn=a\nmail: a@example.com\nphoto:: " + "A" * (2 * LINE_OCTETS) + "\nmail: b@example.com\n",
    )
    assert set(found) == {"a@example.com", "b@example.com"}
    assert not tally.examples


# --- what refuses a build --------------------------------------------------------------------------------------


def refusal(*sources: tuple[str, Path]) -> str:
    with pytest.raises(SnapshotError) as refused:
        gather(configuration(*sources))
    return str(refused.value)


def test_a_source_that_cannot_be_read_refuses_the_build(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_text("a@example.com\n")
    message = refusal(("list", good), ("list", tmp_path / "absent"))
    assert message == f"{tmp_path}/absent: cannot be read: No such file or directory; the snapshot stays as it is"
    assert "Is a directory" in refusal(("list", good), ("ldif", tmp_path))


@pytest.mark.parametrize(
    ("kind", "text"), [("list", ""), ("list", "# none\n"), ("ldif", ""), ("ldif", "a@example.com\n")]
)
def test_a_source_of_recipients_that_brings_none_refuses_the_build(tmp_path: Path, kind: str, text: str) -> None:
    good, empty = tmp_path / "good", tmp_path / "empty"
    good.write_text("a@example.com\n")
    empty.write_text(text)
    assert refusal(("list", good), (kind, empty)).startswith(f"{empty}: has no usable address")


def test_restrictions_alone_refuse_the_build(tmp_path: Path) -> None:
    path = tmp_path / "restricted"
    path.write_text("a@example.com\n")
    assert "no recipient at all" in refusal(("restricted", path))


def test_no_source_refuses_the_build() -> None:
    assert "no source is configured" in refusal()


def test_more_kinds_of_entries_than_the_index_can_name_refuse_the_build(tmp_path: Path) -> None:
    path = tmp_path / "restricted"
    path.write_text("".join(f"u{number}@example.com {number}\n" for number in range(70_000)))
    assert "different sets of attributes" in refusal(("restricted", path))
