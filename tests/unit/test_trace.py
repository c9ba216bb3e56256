from __future__ import annotations

import email.policy
from datetime import UTC, datetime
from email import message_from_bytes
from email.utils import parsedate_to_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.address import Mailbox
from relay.mail.envelope import QueueId
from relay.mail.trace import date, helo_text, literal, origin, received

ID = QueueId("3Abc9")
DATE = "Thu, 01 Jan 1970 00:00:00 +0000"


def test_received_has_the_clauses_of_rfc_5321() -> None:
    header = received(
        origin("mail.example.net", "mail.example.net", "192.0.2.1"),
        "mx.example.com",
        "ESMTPS",
        ID,
        Mailbox("user@example.com"),
        DATE,
    )
    assert header == (
        b"Received: from mail.example.net (mail.example.net [192.0.2.1])\r\n"
        b"\tby mx.example.com with ESMTPS id 3Abc9\r\n"
        b"\tfor <user@example.com>; Thu, 01 Jan 1970 00:00:00 +0000\r\n"
    )


def test_recipients_are_not_told_about_each_other() -> None:
    header = received(origin("h", "", "192.0.2.1"), "mx.example.com", "ESMTP", ID, None, DATE)
    assert b" for " not in header
    assert header.endswith(b" id 3Abc9;\r\n\t" + DATE.encode() + b"\r\n")


@pytest.mark.parametrize(
    ("helo", "shown"),
    [
        ("mail.example.net", "mail.example.net"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("[IPv6:2001:db8::1]", "[IPv6:2001:db8::1]"),
        ("under_score.example.net", "under_score.example.net"),
        ("", "unknown"),
        ("a b", "a?b"),
        ("x (evil) by mx.example.com", "x??evil??by?mx.example.com"),
        ("a\r\nSubject: x", "a??Subject??x"),
        ("[192.0.2.999]", "?192.0.2.999?"),
        ("h\x00\xfft", "h??t"),
        ("a" * 400, "a" * 255),
    ],
)
def test_helo_is_shown_as_said_only_when_it_is_harmless(helo: str, shown: str) -> None:
    assert helo_text(helo) == shown


@pytest.mark.parametrize(
    ("name", "address", "end"),
    [
        ("", "192.0.2.1", "(unknown [192.0.2.1])"),
        ("not a name", "192.0.2.1", "(unknown [192.0.2.1])"),
        ("h.example.net", "2001:db8::1", "(h.example.net [IPv6:2001:db8::1])"),
        ("", "fe80::1%eth0", "(unknown [IPv6:fe80::1])"),
    ],
)
def test_the_client_is_named_by_verified_name_and_address(name: str, address: str, end: str) -> None:
    assert origin("h", name, address).endswith(end)


def test_addresses_become_literals() -> None:
    assert literal("192.0.2.1") == "[192.0.2.1]"
    assert literal("2001:db8::1") == "[IPv6:2001:db8::1]"


@given(st.text(max_size=600), st.text(max_size=300))
def test_no_client_can_write_a_second_header_or_a_line_too_long(helo: str, name: str) -> None:
    header = received(origin(helo, name, "192.0.2.1"), "mx.example.com", "ESMTP", ID, Mailbox("u@example.com"), DATE)
    lines = header.split(b"\r\n")
    assert len(lines) == 4
    assert all(len(line) <= 998 and b"\n" not in line and b"\r" not in line for line in lines)
    parsed = message_from_bytes(header + b"\r\n", policy=email.policy.SMTP)
    assert parsed.keys() == ["Received"]
    assert not parsed.defects


@given(st.floats(0, 4e9), st.sampled_from([0, 3600, 7200, -12600, 20700]))
def test_dates_are_read_back_to_the_second(now: float, offset: int) -> None:
    text = date(now, offset)
    read = parsedate_to_datetime(text)
    assert read.astimezone(UTC) == datetime.fromtimestamp(int(now), UTC)
    assert read.utcoffset() is not None
    assert read.utcoffset().total_seconds() == offset


def test_date_has_the_form_of_rfc_5322() -> None:
    assert date(1_700_000_000.9) == "Tue, 14 Nov 2023 22:13:20 +0000"
    assert date(1_700_000_000, -12600) == "Tue, 14 Nov 2023 18:43:20 -0330"
