"""The parameters behind MAIL's path, and the patterns of the two commands that nearly every client sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.inbound.parameters import (
    MAIL_PREFIX,
    PLAIN_MAIL,
    PLAIN_RCPT,
    RCPT_PREFIX,
    MailParameters,
    mail_parameters,
    rcpt_parameters,
)
from relay.mail.address import is_relay_form, parse_path
from relay.mail.reply import BAD_ARGUMENTS, BAD_PARAMETER, BAD_SIZE, Kind
from relay.mail.terms import RecipientTerms, Terms

TWENTY = "9" * 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", MailParameters(0, body_8bit=False)),
        ("SIZE=0", MailParameters(0, body_8bit=False)),
        ("SIZE=1000", MailParameters(1000, body_8bit=False)),
        ("size=1000", MailParameters(1000, body_8bit=False)),
        ("SIZE=00000000000000000001", MailParameters(1, body_8bit=False)),
        (f"SIZE={TWENTY}", MailParameters(int(TWENTY), body_8bit=False)),
        ("BODY=7BIT", MailParameters(0, body_8bit=False)),
        ("BODY=8BITMIME", MailParameters(0, body_8bit=True)),
        ("body=8bitmime size=5", MailParameters(5, body_8bit=True)),
        ("SIZE=5  BODY=7BIT", MailParameters(5, body_8bit=False)),
        ("smtputf8", MailParameters(0, False, Terms(utf8=True))),
        ("RET=full", MailParameters(0, False, Terms(ret="FULL"))),
        ("ENVID=Ab+2Bc ret=HDRS SIZE=7", MailParameters(7, False, Terms(ret="HDRS", envid="Ab+2Bc"))),
    ],
)
def test_what_ehlo_offers_is_understood(text: str, expected: MailParameters) -> None:
    assert mail_parameters(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # RFC 1870 §4: size-value is 1*20DIGIT
        ("SIZE", BAD_SIZE),
        ("SIZE=-1", BAD_SIZE),
        ("SIZE=+1", BAD_SIZE),
        ("SIZE=1.5", BAD_SIZE),
        ("SIZE=1e3", BAD_SIZE),
        ("SIZE=0x10", BAD_SIZE),
        ("SIZE=1_000", BAD_SIZE),
        ("SIZE=1,000", BAD_SIZE),
        (f"SIZE={TWENTY}0", BAD_SIZE),
        # RFC 5321 §4.1.2: esmtp-value is printable ASCII without "="
        ("SIZE=", BAD_ARGUMENTS),
        ("SIZE=\u0661\u0662", BAD_SIZE),
        ("SIZE=1=2", BAD_ARGUMENTS),
        ("SIZE=1\x00", BAD_ARGUMENTS),
        ("=1", BAD_ARGUMENTS),
        ("-X=1", BAD_ARGUMENTS),
        ("SIZE=1 SIZE=1", BAD_ARGUMENTS),
        ("SIZE=1 size=2", BAD_ARGUMENTS),
        ("BODY", BAD_ARGUMENTS),
        ("BODY=", BAD_ARGUMENTS),
        ("BODY=BINARYMIME", BAD_ARGUMENTS),
        # RFC 3461 §4.3 to §4.5
        ("RET", BAD_ARGUMENTS),
        ("RET=", BAD_ARGUMENTS),
        ("RET=BODY", BAD_ARGUMENTS),
        ("RET=FULL RET=FULL", BAD_ARGUMENTS),
        ("ENVID", BAD_ARGUMENTS),
        ("ENVID=+", BAD_ARGUMENTS),
        ("ENVID=a+0Ab", BAD_ARGUMENTS),
        ("ENVID=x ENVID=y", BAD_ARGUMENTS),
        (f"ENVID={'x' * 101}", BAD_ARGUMENTS),
        ("NOTIFY=NEVER", BAD_PARAMETER),
        ("SMTPUTF8=", BAD_ARGUMENTS),
        ("SMTPUTF8=yes", BAD_ARGUMENTS),  # RFC 6531 §3.1: it takes no value
        # what was not offered (RFC 5321 §4.1.1.11)
        ("AUTH=", BAD_ARGUMENTS),
        ("AUTH=a+4", BAD_ARGUMENTS),
        ("AUTH=<> AUTH=<>", BAD_ARGUMENTS),
        ("REQUIRETLS", BAD_PARAMETER),
        ("X-OTHER=1", BAD_PARAMETER),
        ("SIZE=1 X-OTHER=1", BAD_PARAMETER),
    ],
)
def test_anything_else_is_refused_by_its_reason(text: str, expected: Kind) -> None:
    assert mail_parameters(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NOTIFY=NEVER", RecipientTerms("NEVER")),
        ("notify=success,Delay", RecipientTerms("SUCCESS,DELAY")),
        ("ORCPT=rfc822;Bob+40x", RecipientTerms(original="rfc822;Bob+40x")),
        ("ORCPT=rfc822;b@x NOTIFY=FAILURE", RecipientTerms("FAILURE", "rfc822;b@x")),
        ("", RecipientTerms()),
        ("NOTIFY", BAD_ARGUMENTS),
        ("NOTIFY=", BAD_ARGUMENTS),
        ("NOTIFY=NEVER,DELAY", BAD_ARGUMENTS),
        ("NOTIFY=NEVER NOTIFY=NEVER", BAD_ARGUMENTS),
        ("ORCPT=bob", BAD_ARGUMENTS),
        ("ORCPT=rfc822;a ORCPT=rfc822;a", BAD_ARGUMENTS),
        (f"ORCPT=rfc822;{'a' * 494}", BAD_ARGUMENTS),
        ("RET=FULL", BAD_PARAMETER),
        ("SIZE=1", BAD_PARAMETER),
        ("X", BAD_PARAMETER),
    ],
)
def test_the_parameters_of_a_recipient_are_notify_and_orcpt(text: str, expected: RecipientTerms | Kind) -> None:
    assert rcpt_parameters(text) == expected


@given(st.text(max_size=40))
def test_no_text_breaks_it(text: str) -> None:
    assert isinstance(mail_parameters(text), MailParameters | Kind)
    assert isinstance(rcpt_parameters(text), RecipientTerms | Kind)
    for word in ("ENVID", "RET", "NOTIFY", "ORCPT"):
        assert isinstance(mail_parameters(f"{word}={text}"), MailParameters | Kind)
        assert isinstance(rcpt_parameters(f"{word}={text}"), RecipientTerms | Kind)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"MAIL FROM:<a@b>", b"a@b"),
        (b"mail from:<a.b-c+d@E.example>", b"a.b-c+d@E.example"),
        (b"MAIL FROM:<>", None),
    ],
)
def test_the_plain_sender_is_recognized(line: bytes, path: bytes | None) -> None:
    found = PLAIN_MAIL(line)
    assert found is not None
    assert found[1] == path


NOT_PLAIN = (
    *(b"<a%b@c>", b"<a!b@c>", b'<"a"@b>', b"<@a:b@c>", b"<a@b", b"a@b", b"< a@b>", b"<a@b >", b"<a@b.>", b"<a..b@c>"),
    *(
        b"<a@b>\x00",
        b"<a@b> SIZE=1",
        b"<\xe4@b>",
        b"<postmaster>",
        b"<a@[127.0.0.1]>",
        b" <a@b>",
        b"<%b@b>" % (b"a" * 65),
    ),
)


@pytest.mark.parametrize("path", NOT_PLAIN)
def test_what_is_not_plain_goes_through_the_parser(path: bytes) -> None:
    assert PLAIN_MAIL(b"MAIL FROM:" + path) is None
    assert PLAIN_RCPT(b"RCPT TO:" + path) is None


def test_a_recipient_is_never_the_null_sender() -> None:
    assert PLAIN_RCPT(b"RCPT TO:<>") is None


PATHS = st.text(st.sampled_from('ab.@<>%!"\\:[]1- '), max_size=12).map(lambda text: f"<{text}>".encode())


@given(PATHS)
def test_what_is_plain_the_parser_takes_as_it_is(path: bytes) -> None:
    found = PLAIN_RCPT(b"RCPT TO:" + path)
    if found is not None:
        mailbox, rest = parse_path(path)
        assert (mailbox, rest) == (found[1].decode(), "")
        assert not is_relay_form(mailbox)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"MAIL FROM:<a@b>", b"<a@b>"),
        (b"mail from: <a@b>", b"<a@b>"),  # a space too many is common, and harmless
        (b"MAIL FROM:a", b"a"),
        (b"MAIL FROM:  <a@b>", None),
        (b"MAIL FROM:", None),
        (b"MAIL FROM: ", None),
        (b"MAIL FROM <a@b>", None),
        (b"MAIL  FROM:<a@b>", None),
        (b"MAIL\tFROM:<a@b>", None),
        (b"MAIL FROM :<a@b>", None),
        (b"MAILFROM:<a@b>", None),
    ],
)
def test_the_keyword_is_taken_with_at_most_one_space_behind_it(line: bytes, path: bytes | None) -> None:
    recipient = line.replace(b"MAIL", b"RCPT").replace(b"mail", b"rcpt").replace(b"FROM", b"TO").replace(b"from", b"to")
    for prefix, command in ((MAIL_PREFIX, line), (RCPT_PREFIX, recipient)):
        found = prefix(command)
        assert (found and command[found.end() :]) == path
