"""What senders hear: reports as RFC 3464 has them, and the mail that is never answered."""

from __future__ import annotations

import email.policy
from email import message_from_bytes
from email.message import EmailMessage, Message
from typing import cast

import pytest

from tests.bed.next_hop import Say, Step, Transaction
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter
from tests.delivery.conftest import Bed, MakeBed, Spot

SPOTS = 20


def read(report: Transaction) -> EmailMessage:
    message = cast("EmailMessage", message_from_bytes(report.message, policy=email.policy.SMTP))
    assert not message.defects
    return message


def parts(report: Transaction) -> tuple[EmailMessage, list[Message], EmailMessage]:
    """Letter, status groups, original."""
    letter_, status, original = read(report).iter_parts()
    assert status.get_content_type() == "message/delivery-status"
    return cast("EmailMessage", letter_), cast("list[Message]", status.get_payload()), cast("EmailMessage", original)


@pytest.fixture
def durable(shared: object) -> Bed:
    return shared("durable")  # type: ignore[operator, no-any-return]


@pytest.fixture
def own(durable: Bed) -> Spot:
    """A next hop behind the queue: express mail is answered to the client."""
    return durable.spot()


def test_a_report_has_a_letter_a_part_for_programs_and_the_message(own: Spot) -> None:
    own.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"), only="gone@")
    original = letter(body=b"..dots\r\n.\r\nand \xe4\xf6\r\n")
    sent = own.send(own.to("gone"), message=original, parameters="BODY=8BITMIME")
    [report] = own.reports()
    assert (report.sender, report.recipients) == ("", (own.sender,))
    assert "BODY=8BITMIME" in report.parameters
    message = read(report)
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "delivery-status"
    assert (message["Auto-Submitted"], message["To"]) == ("auto-replied", own.sender)
    assert message["From"].addresses[0].addr_spec == "MAILER-DAEMON@mx.example.com"
    words, [about, about_recipient], returned = parts(report)
    text = " ".join(words.get_content().split())
    assert f"<{own.to('gone')}> was refused by the server" in text
    assert "550 5.1.1 User unknown" in text
    assert sent.id in text
    assert about["Reporting-MTA"] == "dns; mx.example.com"
    assert about_recipient["Final-Recipient"] == f"rfc822; {own.to('gone')}"
    assert (about_recipient["Action"], about_recipient["Status"]) == ("failed", "5.1.1")
    assert about_recipient["Diagnostic-Code"] == "smtp; 550 5.1.1 User unknown"
    assert returned.get_content_type() == "message/rfc822"
    assert original in report.message
    own.relay.wait_for_log(rf"{sent.id}: sender non-delivery notification: [0-9A-F]+, to=<{own.sender}>")


def test_one_report_names_all_who_were_refused_in_one_attempt(own: Spot) -> None:
    for name, answer in (("a", "550 5.1.1 no a"), ("b", "554 5.7.1 no b")):
        own.hop.on(Step.RCPT, Say(answer), only=f"{name}@")
    own.send(own.to("a"), own.to("good"), own.to("b"))
    _, [_, *recipients], _ = parts(own.reports()[0])
    assert [(one["Final-Recipient"], one["Status"]) for one in recipients] == [
        (f"rfc822; {own.to('a')}", "5.1.1"),
        (f"rfc822; {own.to('b')}", "5.7.1"),
    ]
    assert [one.recipients for one in own.hop.wait_for_accepted()] == [(own.to("good"),)]


def test_of_a_large_message_the_header_is_returned(own: Spot) -> None:
    own.hop.on(Step.FINAL, Say("554 5.6.0 no"))
    own.send(message=letter(body=b"secret line\r\n" * 20_000))
    [report] = own.reports()
    _, _, returned = parts(report)
    assert returned.get_content_type() == "text/rfc822-headers"
    assert b"Subject: hello" in report.message
    assert b"secret" not in report.message


AUTOMATIC = [
    ("", b""),
    ("MAILER-DAEMON@example.net", b""),
    ("owner-list@example.net", b""),
    ("", b"Auto-Submitted: auto-replied\r\n"),
    (None, b"Auto-Submitted: auto-generated\r\n"),
    (None, b"Precedence: bulk\r\n"),
    (None, b"Precedence: list\r\n"),
    (None, b"List-Id: <x.example.net>\r\n"),
    (None, b"X-Auto-Response-Suppress: NDR\r\n"),
]


@pytest.mark.parametrize(("sender", "header"), AUTOMATIC, ids=repr)
def test_automatic_mail_is_dropped_without_an_answer_and_the_log_says_so(
    durable: Bed, sender: str | None, header: bytes
) -> None:
    spot = Spot(durable, 0, durable.hops[0])  # all of them at one next hop
    spot.hop.behave()
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"))
    who = "robot@example.net" if sender is None else sender
    sent = spot.send(message=header + letter(), sender=who)
    assert sent.queued
    spot.wait_for_result(sent.id, "bounced")
    durable.wait_until_gone(sent.id)
    spot.relay.wait_for_log(rf"report_suppressed id={sent.id} ")
    assert not spot.relay.grep(rf"{sent.id}: sender non-delivery notification")
    assert not [one for one in durable.outside.transactions if one.sender == "" and one.recipients == (who,)]


def test_a_report_that_cannot_be_delivered_is_not_answered(own: Spot) -> None:
    own.hop.on(Step.FINAL, Say("554 5.6.0 no"))
    rule = own.bed.outside.on(Step.RCPT, Say("550 5.1.1 unknown here too"), only=own.sender)
    sent = own.send()
    [line] = own.relay.wait_for_log(rf"{sent.id}: sender non-delivery notification: [0-9A-F]+")
    report = line.partition("notification: ")[2].partition(",")[0]
    own.relay.wait_for_log(rf"{report}: to=<{own.sender}>.*status=bounced \(550 5\.1\.1 unknown here too\)")
    own.relay.wait_for_log(rf"report_suppressed id={report} ")
    own.bed.wait_until_gone(report)
    assert rule.used == 1


def test_a_report_waits_in_the_queue_like_other_mail(own: Spot) -> None:
    own.hop.on(Step.FINAL, Say("554 5.6.0 no"))
    rule = own.bed.outside.on(Step.MAIL, Say("450 4.3.2 not now"), only="MAIL FROM:<>", times=1)
    own.send()
    assert len(own.reports()) == 1
    assert rule.used == 1


def test_what_expires_is_reported_with_its_last_answer(make_bed: MakeBed) -> None:
    bed = make_bed(3, queue={"expire_after_s": 1.5, "retry_s": [0.4]})
    refused, down, mixed = bed.spot(), bed.spot(), bed.spot()
    refused.hop.on(Step.RCPT, Say("450 4.2.1 never"))
    down.hop.stop()
    mixed.hop.on(Step.RCPT, Say("450 4.2.1 never"), only="slow@")
    for spot, recipients in ((refused, ["user"]), (down, ["user"]), (mixed, ["slow", "quick"])):
        assert spot.send(*(spot.to(name) for name in recipients)).queued
    for spot, name, said in (
        (refused, "user", "smtp; 450 4.2.1 never"),
        (down, "user", "x-dmz-relay; Connection refused"),
        (mixed, "slow", "smtp; 450 4.2.1 never"),
    ):
        _, [_, *recipients], returned = parts(spot.reports()[0])
        assert [
            (one["Final-Recipient"], one["Action"], one["Status"], one["Diagnostic-Code"]) for one in recipients
        ] == [(f"rfc822; {spot.to(name)}", "failed", "4.4.7", said)]
        assert returned.get_content_type() == "message/rfc822"
        assert len(spot.relay.wait_for_log(rf"to=<{spot.to(name)}>.*status=expired")) == 1
        assert spot.relay.grep(rf"to=<{spot.to(name)}>.*status=deferred")
    assert [one.recipients for one in mixed.taken()] == [(mixed.to("quick"),)]
    wait_for(lambda: not bed.queue(), lambda: f"an empty queue; {bed.queue()}")


def test_with_soft_bounce_a_refusal_of_the_next_hop_is_tried_again(make_bed: MakeBed, way: str) -> None:
    bed = make_bed(1, server={"soft_bounce": True}, delivery={"express": way == "express"})
    spot = bed.spot()
    spot.hop.on(Step.RCPT, Say("550 5.1.1 User unknown"), times=2)
    sent = spot.send()
    assert sent.queued
    spot.delivered(sent.id)
    assert len(spot.relay.grep(rf"{sent.id}: to=.*status=deferred \(550 5\.1\.1 User unknown\)")) == 2
    assert [after_trace(one.message) for one in spot.taken()] == [letter()]
    assert bed.outside.transactions == []


def test_without_a_route_mail_waits_and_the_queue_says_what_to_do(make_bed: MakeBed) -> None:
    """A report to a sender outside needs a route; without one it waits, and the operator can read why."""
    bed = make_bed(1, default=False)
    spot = bed.spot()
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"), only="gone@")
    sent = spot.send(spot.to("gone"), spot.to())
    [line] = bed.relay.wait_for_log(rf"{sent.id}: sender non-delivery notification: ")
    report = line.partition("notification: ")[2].partition(",")[0]
    waiting = bed.wait_for_queued(report, lambda message: message["recipients"][0]["attempts"])
    [recipient] = waiting["recipients"]
    assert (recipient["last_code"], recipient["last_enhanced"]) == (451, "4.4.4")
    assert "add a [[route]] for it or for *" in recipient["last_text"]
