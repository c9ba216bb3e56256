"""Mailboxes in UTF-8 (RFC 6531 §3.3) and the forms they are compared and passed on in."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.address import (
    UNFIT,
    AddressFault,
    Mailbox,
    ascii_form,
    domain_of,
    parse_mailbox,
    parse_path,
    parse_utf8_mailbox,
    parse_utf8_path,
    unquoted,
)
from relay.mail.domain import ascii_domain


@pytest.mark.parametrize(
    ("domain", "found"),
    [
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.Example", "xn--bcher-kva.example"),
        (unicodedata.normalize("NFD", "bücher.example"), "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),  # IDNA 2008: ß is a letter of its own
        ("例子.测试", "xn--fsqu00a.xn--0zwm56d"),
        ("plain.example", "plain.example"),
        ("under_score.ü.example", "under_score.xn--tda.example"),
        ("☃.example", None),  # a symbol, no letter
        ("-ü.example", None),
        ("ü..example", "xn--tda..example"),  # the shape of the whole is the parser's business
        ("ü" * 64, None),
        ("a\u3002ü", None),
        ("\u202eü.example", None),
    ],
)
def test_a_domain_has_one_form_in_ascii(domain: str, found: str | None) -> None:
    assert ascii_domain(domain) == found


@pytest.mark.parametrize(
    ("text", "key", "plain"),
    [
        ("jörg@example.com", "jörg@example.com", None),
        (unicodedata.normalize("NFD", "jörg@example.com"), "jörg@example.com", None),
        ('"jörg"@example.com', "jörg@example.com", None),
        ('"jö rg"@example.com', '"jö rg"@example.com', None),
        ("user@bücher.example", "user@xn--bcher-kva.example", "user@xn--bcher-kva.example"),
        ("jörg@BÜCHER.example", "jörg@xn--bcher-kva.example", None),
        ("user@example.com", "user@example.com", "user@example.com"),
    ],
)
def test_a_mailbox_has_a_form_to_be_looked_up_and_perhaps_one_in_ascii(text: str, key: str, plain: str | None) -> None:
    mailbox = parse_utf8_mailbox(text)
    assert mailbox == text, "kept as it was written"
    assert unquoted(Mailbox(text)) == key
    assert ascii_form(Mailbox(text)) == plain


@pytest.mark.parametrize(
    "text",
    [
        "ü", "ü@", "@ü", "a@ü.", "a@.ü", "a@ü..b", "a..ü@b", ".ü@b", "ü b@c", "ü\n@b", "ü\u2029@b", "a@[ü]", "ü@[127.0.0.1",
        "ü\u200b@b", "\ufeffü@b", "ü\ud800@b", '"ü"x"@b', "ü<@b",
    ],
)  # fmt: skip
def test_what_is_no_mailbox_is_none_in_utf8_either(text: str) -> None:
    assert parse_utf8_mailbox(text) in set(AddressFault)


def test_words_that_some_scripts_need_joiners_for_are_taken() -> None:
    assert parse_utf8_mailbox("نامه\u200cای@example.com") == "نامه\u200cای@example.com"


@given(st.text(max_size=30))
def test_no_text_breaks_the_parsers_and_nothing_unfit_gets_through(text: str) -> None:
    for form in (text, f"{text}@example.com", f"ü@{text}", f'"{text}"@ü.example'):
        mailbox = parse_utf8_mailbox(form)
        if isinstance(mailbox, AddressFault):
            continue
        assert mailbox == form
        assert not UNFIT.search(mailbox)
        assert "\r" not in mailbox
        assert "\n" not in mailbox
        assert domain_of(mailbox).isascii()
        plain = ascii_form(mailbox)
        assert plain is None or isinstance(parse_mailbox(plain), str | AddressFault)
        key = unquoted(mailbox)
        assert unquoted(key) == key
    if text.isascii():
        assert parse_utf8_mailbox(text) == parse_mailbox(text)


@given(st.binary(max_size=40))
def test_no_octets_break_the_path_parsers(raw: bytes) -> None:
    for line in (raw, b"<" + raw + b">", b"<\xc3\xbc@b> " + raw):
        for parse in (parse_path, parse_utf8_path):
            path, rest = parse(line)
            assert isinstance(path, AddressFault) or not UNFIT.search(path + rest)
