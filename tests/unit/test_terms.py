"""The terms of a message: RFC 3461 §4 and RFC 6533 §3, value by value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.terms import (
    PLAIN,
    PLAIN_RECIPIENT,
    RecipientTerms,
    Terms,
    decode_xtext,
    parse_envid,
    parse_notify,
    parse_original,
    parse_ret,
    some,
)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("NEVER", "NEVER"),
        ("never", "NEVER"),
        ("Success", "SUCCESS"),
        ("FAILURE,DELAY,SUCCESS", "FAILURE,DELAY,SUCCESS"),
        ("DELAY,delay", "DELAY"),
        ("NEVER,FAILURE", None),
        ("FAILURE,NEVER", None),
        ("", None),
        (",", None),
        ("SUCCESS,", None),
        ("ALWAYS", None),
        ("SUCCESS FAILURE", None),
    ],
)
def test_notify_is_never_alone_or_a_list(value, kept):
    assert parse_notify(value) == kept


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("QQ314159", True),
        ("a" * 100, True),
        ("a" * 101, False),
        ("", False),
        ("with+20space", True),
        ("plus+2B+3D", True),
        ("lower+2b", False),
        ("half+2", False),
        ("bare+", False),
        ("a=b", False),
        ("a b", False),
        ("line+0D+0AX-Forged:+20yes", False),
        ("nul+00", False),
        ("eight+E4bit", False),
        ("ä", False),
    ],
)
def test_an_envelope_identifier_is_xtext_for_printable_ascii(value, taken):
    assert parse_envid(value) == (value if taken else None)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("rfc822;user@example.com", ("rfc822", "user@example.com")),
        ("RFC822;User+2Btag@example.com", ("RFC822", "User+tag@example.com")),
        ("x400;/c=de", None),
        ("x400;/c+3Dde;x", ("x400", "/c=de;x")),
        ("rfc822;", ("rfc822", "")),
        ("rfc822", None),
        (";user@example.com", None),
        ("rfc 822;u@example.com", None),
        ("rfc822;a+0D+0ABcc:+20x", None),
        ("rfc822;jörg@example.com", None),
        ("utf-8;jörg@example.com", ("utf-8", "jörg@example.com")),
        (r"utf-8;j\x{F6}rg@example.com", ("utf-8", "jörg@example.com")),
        (r"utf-8;a\x{2B}b@example.com", ("utf-8", "a+b@example.com")),
        ("utf-8;a+2Bb@example.com", ("utf-8", "a+b@example.com")),
        (r"utf-8;a\x{0A}Bcc:x", None),
        (r"utf-8;a\x{2028}x", None),
        (r"utf-8;a\x{202E}x", None),
        (r"utf-8;a\x{D800}x", None),
        (r"utf-8;a\x{110000}x", None),
        ("rfc822;" + "a" * 493, ("rfc822", "a" * 493)),
        ("rfc822;" + "a" * 494, None),
    ],
)
def test_an_original_recipient_is_a_type_and_xtext(value, meaning):
    assert parse_original(value) == (value if meaning else None)
    if meaning:
        assert RecipientTerms(original=value).original_address == meaning


def test_ret_is_one_of_two_words():
    assert [parse_ret(value) for value in ("full", "HDRS", "", "ALL")] == ["FULL", "HDRS", None, None]


@pytest.mark.parametrize(
    ("notify", "success", "failure", "delay"),
    [
        ("", False, True, True),  # RFC 3461 §4.1: absent is FAILURE or FAILURE,DELAY
        ("NEVER", False, False, False),
        ("SUCCESS", True, False, False),
        ("FAILURE", False, True, False),
        ("DELAY", False, False, True),
        ("SUCCESS,FAILURE,DELAY", True, True, True),
    ],
)
def test_notify_says_which_reports_may_go(notify, success, failure, delay):
    terms = RecipientTerms(notify)
    assert (terms.wants_success, terms.wants_failure, terms.wants_delay) == (success, failure, delay)


def test_terms_of_some_recipients_are_theirs():
    a, b = RecipientTerms("NEVER"), RecipientTerms(original="rfc822;b")
    terms = Terms(envid="x", recipients=(a, PLAIN_RECIPIENT, b))
    assert terms.only([2, 0]).recipients == (b, a)
    assert terms.only([1]) == Terms(envid="x")
    assert Terms().of(7) is PLAIN_RECIPIENT
    assert some([PLAIN_RECIPIENT, RecipientTerms()]) == ()


_XTEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=30).map(
    lambda text: "".join(c if c not in "+= " else f"+{ord(c):02X}" for c in text)
)
_NOTIFY = st.lists(st.sampled_from(["SUCCESS", "FAILURE", "DELAY"]), unique=True).map(",".join) | st.just("NEVER")
_RECIPIENT = st.builds(RecipientTerms, _NOTIFY, st.just("") | _XTEXT.map(lambda text: f"rfc822;{text}"))


@given(_RECIPIENT, st.booleans(), st.sampled_from(["", "FULL", "HDRS"]), st.just("") | _XTEXT)
def test_what_was_said_is_read_back_from_its_words(recipient, utf8, ret, envid):
    assert RecipientTerms.read(recipient.words) == recipient
    terms = Terms(utf8, ret, envid)
    assert Terms.read(terms.words) == terms
    assert terms.words.isprintable()


@given(st.text(max_size=40))
def test_no_text_is_taken_that_would_not_be_one_printable_line_in_a_report(text):
    for kept in (parse_envid(text), parse_original(text), parse_original(f"utf-8;{text}")):
        assert kept is None or not any(c in kept for c in "\r\n\0 ")
    plain = decode_xtext(text)
    assert plain is None or (plain.isascii() and "\r" not in plain and "\n" not in plain)
    assert RecipientTerms.read(text) is None or RecipientTerms.read(text).words == text
    assert Terms.read(text) is None or text == "" or Terms.read(text) != PLAIN
