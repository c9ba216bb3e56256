from __future__ import annotations

import email.policy
from dataclasses import replace
from email import message_from_bytes
from email.message import EmailMessage
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.address import Mailbox
from relay.mail.answer import Answer, Stage
from relay.mail.dsn import ORIGINAL_OCTETS, Cause, Notice, Report, answerable, delivery_report, header_of
from relay.mail.envelope import QueueId
from relay.mail.terms import RecipientTerms, Terms

ORIGINAL = b"From: a@example.net\r\nSubject: hi\r\n\r\nHello\r\n..dot at the start\r\n.. \r\n--frontier\r\nend\r\n"

REPORT = Report(
    hostname="mx.example.com",
    sender=Mailbox("a@example.net"),
    queue_id=QueueId("3Abc9"),
    arrived="Tue, 14 Nov 2023 22:13:20 +0000",
    date="Tue, 14 Nov 2023 22:14:00 +0000",
    message_id="3Abd0@mx.example.com",
    boundary="frontier",
    original=ORIGINAL,
    original_size=len(ORIGINAL),
)
REFUSED = Notice(
    Mailbox("u@example.com"),
    Cause.REFUSED,
    Answer(Stage.RCPT, 550, "5.1.1", "User unknown"),
    "exchange.example.com",
)
EXPIRED = Notice(Mailbox("v@example.com"), Cause.EXPIRED, Answer(Stage.CONNECT, 0, "", "connection refused"), "")
DEFERRED = Notice(
    Mailbox("w@example.com"),
    Cause.EXPIRED,
    Answer(Stage.FINAL, 451, "4.3.0", "later"),
    "exchange.example.com",
)


def unstuffed(wire: bytes) -> bytes:
    lines = wire.split(b"\r\n")
    assert b"." not in lines, "the final dot would come too early"
    return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines)


def parsed(wire: bytes) -> EmailMessage:
    message = cast("EmailMessage", message_from_bytes(unstuffed(wire), policy=email.policy.SMTP))
    assert not message.defects
    return message


def parts(wire: bytes) -> list[EmailMessage]:
    return cast("list[EmailMessage]", list(parsed(wire).iter_parts()))


def test_a_report_has_the_headers_of_rfc_3464_and_3834() -> None:
    message = parsed(delivery_report(REPORT, [REFUSED]))
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "delivery-status"
    assert message["From"] == "Mail Delivery System <MAILER-DAEMON@mx.example.com>"
    assert message["To"] == "a@example.net"
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["MIME-Version"] == "1.0"
    assert message["Message-ID"] == "<3Abd0@mx.example.com>"
    assert message["Date"] == "Tue, 14 Nov 2023 22:14:00 +0000"
    assert [part.get_content_type() for part in message.iter_parts()] == [
        "text/plain",
        "message/delivery-status",
        "message/rfc822",
    ]


def test_the_letter_names_each_recipient_its_next_hop_and_the_answer() -> None:
    text = " ".join(parts(delivery_report(REPORT, [REFUSED, EXPIRED, DEFERRED]))[0].get_content().split())
    assert "<u@example.com> was refused by the server exchange.example.com: 550 5.1.1 User unknown" in text
    assert "<v@example.com> was tried for too long without success; last, the destination could not be used" in text
    assert "connection refused" in text
    assert (
        "<w@example.com> was tried for too long without success; last, the server exchange.example.com answered" in text
    )
    assert "3Abc9" in text


def test_the_status_part_can_be_read_by_programs() -> None:
    status = parts(delivery_report(REPORT, [REFUSED, EXPIRED, DEFERRED]))[1]
    message, *recipients = cast("list[EmailMessage]", status.get_payload())
    assert message["Reporting-MTA"] == "dns; mx.example.com"
    assert message["Arrival-Date"] == REPORT.arrived
    assert [
        [part["Final-Recipient"], part["Action"], part["Status"], part["Remote-MTA"], part["Diagnostic-Code"]]
        for part in recipients
    ] == [
        ["rfc822; u@example.com", "failed", "5.1.1", "dns; exchange.example.com", "smtp; 550 5.1.1 User unknown"],
        ["rfc822; v@example.com", "failed", "4.4.7", None, "x-dmz-relay; connection refused"],
        ["rfc822; w@example.com", "failed", "4.4.7", "dns; exchange.example.com", "smtp; 451 4.3.0 later"],
    ]


@pytest.mark.parametrize(("enhanced", "status"), [("5.2.1", "5.2.1"), ("", "5.0.0"), ("4.2.1", "5.0.0")])
def test_a_refusal_never_has_a_temporary_status(enhanced: str, status: str) -> None:
    failure = replace(REFUSED, answer=Answer(Stage.RCPT, 550, enhanced, "no"))
    assert f"\r\nStatus: {status}\r\n".encode() in delivery_report(REPORT, [failure])


def whole(original: bytes) -> Report:
    return replace(REPORT, original=original, original_size=len(original))


def returned(wire: bytes, kind: bytes) -> bytes:
    """The last part's content as it came, by cutting at its own boundary: no parser that might mend it."""
    body = unstuffed(wire)
    boundary = body.split(b'boundary="', 1)[1].split(b'"', 1)[0]
    last = body.split(b"\r\n--" + boundary)[-2]
    head, _, content = last.partition(b"\r\n\r\n")
    assert b"Content-Type: " + kind in head
    return content


@pytest.mark.parametrize(
    "original",
    [
        ORIGINAL,
        b"A: b\r\n",
        b"A: b\r\n\r\n",
        b"\r\nno header\r\n",
        b"A: b\r\n\r\n\xe4\xf6\xfc\r\n",
        b"A: b\r\n\r\n" + b"x" * 5000 + b"\r\n",
        b"A: b\r\n\r\n--frontier--\r\n--frontier=\r\n",
        b"A: b\r\n\r\nends with empty lines\r\n\r\n\r\n",
    ],
)
def test_a_small_original_is_returned_octet_for_octet(original: bytes) -> None:
    assert returned(delivery_report(whole(original), [REFUSED]), b"message/rfc822") == unstuffed(original)


LINES = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\r", b"").replace(b"\n", b"")), max_size=20)


@given(LINES)
def test_any_small_original_is_returned_octet_for_octet(lines: list[bytes]) -> None:
    original = b"".join(line + b"\r\n" for line in [b"A: b", b"", *lines])
    stuffed = b"".join((b"." + line if line.startswith(b".") else line) + b"\r\n" for line in [b"A: b", b"", *lines])
    assert returned(delivery_report(whole(stuffed), [REFUSED]), b"message/rfc822") == original


@pytest.mark.parametrize("octet", [b"", b"\xfc"])
def test_of_a_large_original_the_header_is_returned(octet: bytes) -> None:
    header = b"From: a@example.net\r\nSubject: x" + octet + b"\r\n"
    message = header + b"\r\n" + b"secret\r\n" * 20_000
    wire = delivery_report(replace(REPORT, original=message[:ORIGINAL_OCTETS], original_size=len(message)), [REFUSED])
    assert returned(wire, b"text/rfc822-headers") == header
    assert b"secret" not in wire
    assert parsed(wire)["Content-Transfer-Encoding"] == ("8bit" if octet else "7bit")


def test_a_header_that_was_cut_ends_with_a_whole_line() -> None:
    assert header_of(b"A: b\r\nC: d\r\nE: f") == b"A: b\r\nC: d\r\n"
    assert header_of(b"A: b") == b""
    assert header_of(b"\r\nbody\r\n\r\n") == b""


@pytest.mark.parametrize(("original", "encoding"), [(ORIGINAL, "7bit"), (b"A: b\r\n\r\n\xe4\r\n", "8bit")])
def test_the_encoding_is_that_of_the_original(original: bytes, encoding: str) -> None:
    wire = delivery_report(whole(original), [REFUSED])
    assert parsed(wire)["Content-Transfer-Encoding"] == encoding
    assert wire.isascii() == (encoding == "7bit")


def test_long_answers_and_addresses_keep_lines_within_998_octets() -> None:
    failure = Notice(
        Mailbox("x" * 64 + "@" + ".".join(["d" * 63] * 3)),
        Cause.REFUSED,
        Answer(Stage.FINAL, 554, "5.7.1", "." * 200),
        "h" * 255,
    )
    wire = delivery_report(REPORT, [failure])
    assert max(map(len, wire.split(b"\r\n"))) <= 998
    assert not parsed(wire).defects


def test_nobody_to_report_on_or_to_is_an_error() -> None:
    with pytest.raises(ValueError, match="recipients"):
        delivery_report(REPORT, [])
    with pytest.raises(ValueError, match="sender"):
        delivery_report(replace(REPORT, sender=Mailbox("")), [REFUSED])


@pytest.mark.parametrize(
    ("sender", "header"),
    [
        ("", b""),
        ("MAILER-DAEMON@example.net", b""),
        ("mailer-daemon@example.net", b""),
        ("double-bounce@example.net", b""),
        ("owner-list@example.net", b""),
        ("a@example.net", b"Auto-Submitted: auto-replied"),
        ("a@example.net", b'auto-submitted: auto-generated; owner-email="x@y"'),
        ("a@example.net", b"Auto-Submitted:\r\n auto-generated"),
        ("a@example.net", b"Auto-Submitted:"),
        ("a@example.net", b"Precedence: bulk"),
        ("a@example.net", b"PRECEDENCE: List"),
        ("a@example.net", b"Precedence: junk "),
        ("a@example.net", b"List-Id: <x.example.net>"),
        ("a@example.net", b"List-Unsubscribe: <mailto:x@example.net>"),
        ("a@example.net", b"X-Auto-Response-Suppress: All"),
        ("a@example.net", b"X-Auto-Response-Suppress: DR, NDR, RN"),
        ("a@example.net", b"Content-Type: multipart/report; report-type=delivery-status"),
        ("a@example.net", b"Content-Type: Multipart/Report;\r\n\treport-type=disposition-notification"),
    ],
)
def test_automatic_mail_is_never_answered(sender: str, header: bytes) -> None:
    assert not answerable(sender, b"Received: x\r\n" + header + b"\r\nSubject: y\r\n\r\nbody\r\n")


@pytest.mark.parametrize(
    "header",
    [
        b"Subject: Precedence: bulk",
        b"Auto-Submitted: no",
        b"Auto-Submitted: No (really); x=y",
        b"Precedence: first-class",
        b"X-Auto-Response-Suppress: None",
        b"X-Auto-Response-Suppress: OOF, AutoReply",
        b"Content-Type: multipart/mixed",
        b"X-List-Id: x",
        b"Subject: folded\r\n Precedence: bulk",
        b"X: y\r\n\r\nPrecedence: bulk\r\nAuto-Submitted: auto-replied\r\nList-Id: in the body",
    ],
)
def test_a_person_is_told(header: bytes) -> None:
    assert answerable("a@example.net", b"Received: x\r\n" + header + b"\r\n\r\nbody\r\n")


def test_our_own_report_is_not_answered_even_if_someone_gives_it_a_sender() -> None:
    assert not answerable("a@example.net", delivery_report(REPORT, [REFUSED]))


def test_what_the_sender_said_of_its_message_comes_back_decoded() -> None:
    """RFC 3464 §2.2.1, §2.3.1; RFC 3461 §6.3: xtext is decoded."""
    terms = RecipientTerms("FAILURE", "rfc822;Old+2BName@example.org")
    wire = delivery_report(replace(REPORT, terms=Terms(envid="a+20b+2B")), [replace(REFUSED, terms=terms)])
    message, recipient = cast("list[EmailMessage]", parts(wire)[1].get_payload())
    assert message["Original-Envelope-Id"] == "a b+"
    assert recipient["Original-Recipient"] == "rfc822; Old+Name@example.org"
    assert recipient["Final-Recipient"] == "rfc822; u@example.com"
    plain = delivery_report(REPORT, [REFUSED])
    assert b"Original-" not in plain  # RFC 3461 §6.3 (a), (d): not without the parameter


SERVED = Answer(Stage.FINAL, 250, "2.6.0", "Queued mail for delivery")
LATER = Answer(Stage.RCPT, 450, "4.2.1", "later")


@pytest.mark.parametrize(
    ("cause", "answer", "action", "status", "subject"),
    [
        (Cause.RELAYED, SERVED, "relayed", "2.6.0", "Your message was passed on"),
        (Cause.RELAYED, replace(SERVED, enhanced=""), "relayed", "2.0.0", "Your message was passed on"),
        (Cause.DELIVERED, SERVED, "delivered", "2.6.0", "Your message was delivered"),
        (Cause.DELAYED, LATER, "delayed", "4.2.1", "Your message is delayed"),
        (Cause.DELAYED, replace(LATER, code=0, enhanced=""), "delayed", "4.0.0", "Your message is delayed"),
    ],
)
def test_good_news_and_delays_bring_the_header_only(
    cause: Cause, answer: Answer, action: str, status: str, subject: str
) -> None:
    report = replace(REPORT, terms=Terms(ret="FULL"), until="Sun, 19 Nov 2023 22:13:20 +0000")
    wire = delivery_report(report, [replace(REFUSED, cause=cause, answer=answer)])
    _, status_part, original = parts(wire)
    _, recipient = cast("list[EmailMessage]", status_part.get_payload())
    assert parsed(wire)["Subject"] == subject
    assert (recipient["Action"], recipient["Status"]) == (action, status)
    assert recipient["Will-Retry-Until"] == (report.until if action == "delayed" else None)
    assert original.get_content_type() == "text/rfc822-headers"


@pytest.mark.parametrize(
    ("cause", "notify", "wanted"),
    [
        (Cause.REFUSED, "", True),
        (Cause.REFUSED, "NEVER", False),
        (Cause.EXPIRED, "SUCCESS,DELAY", False),
        (Cause.EXPIRED, "FAILURE", True),
        (Cause.DELAYED, "", True),
        (Cause.DELAYED, "FAILURE", False),
        (Cause.DELAYED, "DELAY", True),
        (Cause.RELAYED, "", False),
        (Cause.DELIVERED, "SUCCESS", True),
    ],
)
def test_a_notice_knows_whether_the_sender_wants_it(cause: Cause, notify: str, wanted: bool) -> None:  # noqa: FBT001
    assert replace(REFUSED, cause=cause, terms=RecipientTerms(notify)).is_wanted is wanted
