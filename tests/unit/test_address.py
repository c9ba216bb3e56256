from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.address import (
    NULL_SENDER,
    PLAIN_MAILBOX,
    AddressFault,
    Mailbox,
    domain_of,
    is_address_literal,
    is_domain,
    is_relay_form,
    parse_mailbox,
    parse_path,
    unquoted,
)

SYNTAX, TOO_LONG = AddressFault.SYNTAX, AddressFault.TOO_LONG
NON_ASCII, SOURCE_ROUTE = AddressFault.NON_ASCII, AddressFault.SOURCE_ROUTE

GOOD = [
    "user@example.com",
    "User.Name+tag@Example.COM",
    "o'brien@example.com",
    "a!#$%&'*+/=?^_`{|}~-b@example.com",
    "1@2.example",
    "user@under_score.example.com",
    "user@localhost",
    '"quoted user"@example.com',
    r'"a\"b\\c"@example.com',
    '""@example.com',
    '"a>b"@example.com',
    "user@[192.0.2.1]",
    "user@[IPv6:2001:db8::1]",
    "postmaster",
    "PostMaster",
    "x" * 64 + "@example.com",
    "user@" + "a" * 63 + ".example",
]

BAD = [
    ("", SYNTAX),
    ("user", SYNTAX),
    ("@example.com", SYNTAX),
    ("user@", SYNTAX),
    ("user@example.com@", SYNTAX),
    ("a@b@example.com", SYNTAX),
    ("a..b@example.com", SYNTAX),
    (".a@example.com", SYNTAX),
    ("a.@example.com", SYNTAX),
    ("a b@example.com", SYNTAX),
    ("a(comment)@example.com", SYNTAX),
    ("a,b@example.com", SYNTAX),
    ("a:b@example.com", SYNTAX),
    ("a;b@example.com", SYNTAX),
    ("<a@example.com", SYNTAX),
    ("a\\@example.com", SYNTAX),
    ('"unclosed@example.com', SYNTAX),
    ('"a"b@example.com', SYNTAX),
    ('"a""b"@example.com', SYNTAX),
    ('"a@evil.example"', SYNTAX),
    ("user@example..com", SYNTAX),
    ("user@.example.com", SYNTAX),
    ("user@example.com.", SYNTAX),
    ("user@-example.com", SYNTAX),
    ("user@example-.com", SYNTAX),
    ("user@exam ple.com", SYNTAX),
    ("user@" + "a" * 64 + ".example", SYNTAX),
    ("user@[192.0.2.999]", SYNTAX),
    ("user@[.......]", SYNTAX),
    ("user@[192.0.2.1", SYNTAX),
    ("user@[IPv6:192.0.2.1]", SYNTAX),
    ("user@[IPv6::::]", SYNTAX),
    ("user@[2001:db8::1]", SYNTAX),
    ("user@[tag:content]", SYNTAX),
    ("user\r\n@example.com", SYNTAX),
    ("user\x00@example.com", SYNTAX),
    ("us\ter@example.com", SYNTAX),
    ("user@example.com\n", SYNTAX),
    ("user\x7f@example.com", SYNTAX),
    ("üser@example.com", NON_ASCII),
    ("user@exämple.com", NON_ASCII),
    ("x" * 65 + "@example.com", TOO_LONG),
    ("user@" + ".".join(["a" * 60] * 5), TOO_LONG),
]


@pytest.mark.parametrize("text", GOOD)
def test_a_lawful_mailbox_is_kept_as_written(text: str) -> None:
    assert parse_mailbox(text) == text
    assert parse_path(f"<{text}>".encode()) == (text, "")


@pytest.mark.parametrize(("text", "fault"), BAD)
def test_a_fault_is_named(text: str, fault: AddressFault) -> None:
    assert parse_mailbox(text) is fault


@pytest.mark.parametrize(
    ("raw", "result", "parameters"),
    [
        (b"<>", NULL_SENDER, ""),
        (b"<> SIZE=1", NULL_SENDER, "SIZE=1"),
        (b"<a@example.com> SIZE=1 BODY=8BITMIME", "a@example.com", "SIZE=1 BODY=8BITMIME"),
        (b"<a@example.com>  X ", "a@example.com", "X"),
        (b'<"a>b"@example.com> X', '"a>b"@example.com', "X"),
        (rb'<"a\">"@example.com>', r'"a\">"@example.com', ""),
        (b"<@relay.example:a@example.com>", SOURCE_ROUTE, ""),
        (b"<@a.example,@b.example:c@example.com> X", SOURCE_ROUTE, "X"),
        (b"", SYNTAX, ""),
        (b"<", SYNTAX, ""),
        (b">", SYNTAX, ""),
        (b"a@example.com", SYNTAX, ""),
        (b"<a@example.com", SYNTAX, ""),
        (b"<<a@example.com>>", SYNTAX, ""),
        (b'<"a@example.com>', SYNTAX, ""),
        (b"<a@example.com>SIZE=1", SYNTAX, ""),
        (b"<a@example.com>\tSIZE=1", SYNTAX, ""),
        (b"<a@example.com> SIZE=1\x00", SYNTAX, ""),
        (b"<a@example.com> X\nRCPT TO:<b@example.com>", SYNTAX, ""),
        (b"< a@example.com>", SYNTAX, ""),
        (b" <a@example.com>", SYNTAX, ""),
        (b"<a@example.com> X=\xfc", NON_ASCII, ""),
        (b"<\xfc@example.com>", NON_ASCII, ""),
    ],
)
def test_a_path_is_told_from_its_parameters(raw: bytes, result: str | AddressFault, parameters: str) -> None:
    path, rest = parse_path(raw)
    assert path == result
    if not isinstance(path, AddressFault):
        assert rest == parameters


@pytest.mark.parametrize(
    "text",
    [
        "user%evil.example@example.com",
        "user%evil.example%more.example@example.com",
        "evil.example!user@example.com",
        '"user@evil.example"@example.com',
        '"@evil.example:user@more.example"@example.com',
        r'"user\@evil.example"@example.com',
        '"user%evil.example"@example.com',
        '"evil.example!user"@example.com',
    ],
)
def test_relaying_hidden_in_the_local_part_is_seen(text: str) -> None:
    mailbox = parse_mailbox(text)
    assert not isinstance(mailbox, AddressFault)
    assert is_relay_form(mailbox)
    assert domain_of(mailbox) == "example.com"


def test_an_ordinary_mailbox_is_no_relaying_form() -> None:
    assert not is_relay_form(Mailbox("user+tag@example.com"))
    assert not is_relay_form(Mailbox("postmaster"))


@pytest.mark.parametrize(
    ("mailbox", "domain"),
    [("a@Example.COM", "example.com"), ("", ""), ("postmaster", ""), ('"a@b"@example.com', "example.com")],
)
def test_the_domain_is_what_follows_the_last_at(mailbox: str, domain: str) -> None:
    assert domain_of(mailbox) == domain


@pytest.mark.parametrize("text", ["[192.0.2.1]", "[ipv6:::1]", "[IPv6:::ffff:192.0.2.1]"])
def test_an_address_literal_has_an_address_in_it(text: str) -> None:
    assert is_address_literal(text)


@pytest.mark.parametrize("text", ["[IPv6:fe80::1%eth0]", "192.0.2.1", "[]", "[IPv6:]", "[192.0.2.01]", "[1.2.3]"])
def test_brackets_alone_make_no_address_literal(text: str) -> None:
    assert not is_address_literal(text)


def test_a_domain_is_at_most_255_octets() -> None:
    assert is_domain(".".join(["a" * 63] * 3 + ["a" * 62]))
    assert not is_domain(".".join(["a" * 63] * 4 + ["a"]))


RAW = st.one_of(
    st.binary(max_size=600),
    st.builds(lambda text: f"<{text}> X".encode("latin-1"), st.text(st.characters(max_codepoint=255), max_size=100)),
    st.text('ab"\\@%!<>[]:,. \r\n\x00', max_size=40).map(lambda text: f"<{text}>".encode()),
    st.text('ab"\\.%!', max_size=20).map(lambda text: f"<{text}@example.com>".encode()),
)


@given(RAW)
def test_parsing_never_raises_and_never_lets_a_control_character_through(raw: bytes) -> None:
    path, parameters = parse_path(raw)
    for text in (parameters,) if isinstance(path, AddressFault) else (path, parameters):
        assert all(" " <= character <= "~" for character in text)


@given(RAW)
def test_what_was_taken_is_taken_again_unchanged(raw: bytes) -> None:
    path, _ = parse_path(raw)
    if not isinstance(path, AddressFault):
        assert parse_path(f"<{path}>".encode("ascii")) == (path, "")
        assert len(path) <= 320


ALMOST_PLAIN = st.builds(
    "{}@{}".format, st.text('ab1.+=_-%!"', max_size=70), st.text("ab1.-_", max_size=300) | st.just("example.com")
)


@given(ALMOST_PLAIN)
def test_the_quick_pattern_takes_what_the_parser_takes_but_for_odd_forms(text: str) -> None:
    mailbox = parse_mailbox(text)
    plain = not isinstance(mailbox, AddressFault) and not is_relay_form(mailbox) and '"' not in text
    assert (re.fullmatch(PLAIN_MAILBOX, text) is not None) == plain


@pytest.mark.parametrize("text", [text for text, _ in BAD] + [text for text in GOOD if re.search(r'[%!"\[]', text)])
def test_the_quick_pattern_leaves_everything_odd_to_the_parser(text: str) -> None:
    assert re.fullmatch(PLAIN_MAILBOX, text) is None


@pytest.mark.parametrize(
    ("mailbox", "plain"),
    [
        ("user@example.com", "user@example.com"),
        ('"user"@example.com', "user@example.com"),
        ('"us\\er"@Example.com', "user@Example.com"),
        ('"a.b"@example.com', "a.b@example.com"),
        ('"a b"@example.com', '"a b"@example.com'),
        ('"a..b"@example.com', '"a..b"@example.com'),
        ('"a@b"@example.com', '"a@b"@example.com'),
        ('"a\\"b"@example.com', '"a\\"b"@example.com'),
        ('""@example.com', '""@example.com'),
        ("postmaster", "postmaster"),
    ],
)
def test_needless_quotes_are_taken_off_for_look_ups(mailbox: str, plain: str) -> None:
    """RFC 5321 §4.1.2: all quoted forms are equivalent."""
    found = parse_mailbox(mailbox)
    assert not isinstance(found, AddressFault)
    assert unquoted(found) == plain
    assert parse_mailbox(unquoted(found)) == plain
