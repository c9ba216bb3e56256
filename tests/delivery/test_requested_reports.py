"""DSN end to end (RFC 3461): what the client asked for reaches the next hop, or the relay does it itself."""

from __future__ import annotations

import email.policy
import re
from email import message_from_bytes
from email.message import EmailMessage, Message
from typing import cast

import pytest

from tests.bed.next_hop import Hold, Say, Step, Transaction
from tests.bed.wire import letter
from tests.delivery.conftest import Bed, MakeBed, Spot

SPOTS = 20
DSN = ("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES", "SIZE 52428800", "DSN")
ASKED = "RET=HDRS ENVID=QQ+2B314159"
SUCCESS = "NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;Old.Name+40example.org"


def groups(report: Transaction) -> list[Message]:
    """The groups of the part for programs: the message's, then one for each recipient."""
    message = cast("EmailMessage", message_from_bytes(report.message, policy=email.policy.SMTP))
    assert not message.defects
    status = list(message.iter_parts())[1]
    assert status.get_content_type() == "message/delivery-status"
    return cast("list[Message]", status.get_payload())


def told(report: Transaction) -> list[tuple[str, str]]:
    return [(one["Final-Recipient"].split("; ")[1], one["Action"]) for one in groups(report)[1:]]


def no_more_reports(spot: Spot, sent_id: str, count: int = 0) -> None:
    """The log says of each report when it is made, which is before the message is gone from the queue."""
    if count:
        spot.relay.wait_for_log(rf"{sent_id}: sender .* notification: ")
    assert len(spot.relay.grep(rf"{sent_id}: sender .* notification: ")) == count


def test_a_next_hop_with_dsn_gets_it_as_it_was_sent_and_reports_itself(spot: Spot) -> None:
    spot.hop.extensions = DSN
    sent = spot.send((spot.to("a"), SUCCESS), spot.to("b"), (spot.to("c"), "NOTIFY=never"), parameters=ASKED)
    [taken] = spot.taken()
    assert taken.parameters.endswith(" RET=HDRS ENVID=QQ+2B314159")
    assert spot.hop.said("RCPT") == [
        f"RCPT TO:<{spot.to('a')}> {SUCCESS}",
        f"RCPT TO:<{spot.to('b')}>",
        f"RCPT TO:<{spot.to('c')}> NOTIFY=NEVER",
    ]
    spot.delivered(sent.id, spot.to("c"))
    no_more_reports(spot, sent.id)


def test_a_next_hop_without_dsn_gets_none_of_it_and_the_relay_reports_that_it_passed_the_message_on(
    spot: Spot, way: str
) -> None:
    message = letter(body=b"this body is not in the report\r\n")
    sent = spot.send(
        (spot.to("a"), SUCCESS), spot.to("b"), (spot.to("c"), "NOTIFY=DELAY"), message=message,
        parameters="RET=FULL ENVID=QQ+2B314159",
    )  # fmt: skip
    assert sent.delivered == (way == "express")
    [report] = spot.reports()
    assert (report.sender, report.recipients) == ("", (spot.sender,))
    about, one = groups(report)
    assert about["Original-Envelope-Id"] == "QQ+314159"
    assert one["Original-Recipient"] == "rfc822; Old.Name@example.org"
    assert one["Final-Recipient"] == f"rfc822; {spot.to('a')}"
    assert (one["Action"], one["Status"]) == ("relayed", "2.0.0")
    assert one["Remote-MTA"] == f"dns; {spot.name}"
    assert one["Diagnostic-Code"].startswith("smtp; 250 2.0.0 Ok")
    assert b"Subject: Your message was passed on" in report.message
    assert b"Subject: hello" in report.message
    assert b"this body is not" not in report.message  # RFC 3461 §4.3: RET is about failures
    assert len(spot.taken()) == 1
    spot.relay.wait_for_log(rf"{sent.id}: sender delivery status notification: [0-9A-F]+, to=<{spot.sender}>")


def test_notify_decides_about_reports_of_failure_recipient_by_recipient(spot: Spot) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"), only="no")
    sent = spot.send(
        spot.to("ok"),
        spot.to("no-word"),
        (spot.to("no-never"), "NOTIFY=NEVER"),
        (spot.to("no-success"), "NOTIFY=SUCCESS,DELAY"),
        (spot.to("no-failure"), "NOTIFY=FAILURE ORCPT=utf-8;no+2Bsuch@example.org"),
        parameters="ENVID=x",
    )
    [report] = spot.reports()
    assert told(report) == [(spot.to("no-word"), "failed"), (spot.to("no-failure"), "failed")]
    about, _, last = groups(report)
    assert about["Original-Envelope-Id"] == "x"
    assert last["Original-Recipient"] == "utf-8; no+such@example.org"
    spot.bed.wait_until_gone(sent.id)
    no_more_reports(spot, sent.id, 1)
    spot.relay.wait_for_log(rf"report_suppressed id={sent.id} ")


def test_success_and_failure_are_reported_apart(spot: Spot) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"), only="no@")
    spot.send((spot.to("yes"), "NOTIFY=SUCCESS,FAILURE"), (spot.to("no"), "NOTIFY=SUCCESS,FAILURE"))
    assert sorted(told(report)[0] for report in spot.reports(2)) == [
        (spot.to("no"), "failed"),
        (spot.to("yes"), "relayed"),
    ]


@pytest.mark.parametrize(("ret", "kind"), [("", "rfc822"), ("RET=FULL", "rfc822"), ("RET=HDRS", "rfc822-headers")])
def test_ret_says_whether_a_report_of_failure_brings_the_message_back(spot: Spot, ret: str, kind: str) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"), only="no@")
    spot.send(spot.to("yes"), spot.to("no"), message=letter(body=b"the whole of it\r\n"), parameters=ret)
    [report] = spot.reports()
    assert (b"the whole of it" in report.message) == (kind == "rfc822")
    assert f"/{kind}\r\n".encode() in report.message


def test_who_asks_is_told_even_of_list_mail_and_who_did_not_is_not(spot: Spot) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"), only="no")
    spot.send(
        spot.to("yes"), spot.to("no-word"), (spot.to("no-asked"), "NOTIFY=FAILURE"),
        message=b"List-Id: <x.example.net>\r\n" + letter(),
    )  # fmt: skip
    [report] = spot.reports()
    assert told(report) == [(spot.to("no-asked"), "failed")]


def test_the_null_sender_hears_nothing_whatever_it_asked_for(spot: Spot) -> None:
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"), only="no@")
    everything = "NOTIFY=SUCCESS,FAILURE,DELAY"
    sent = spot.send(
        (spot.to("yes"), everything), (spot.to("no"), everything), sender="", parameters="RET=FULL ENVID=x"
    )
    assert sent.code == 250
    spot.wait_for_result(sent.id, "bounced", spot.to("no"))
    spot.bed.wait_until_gone(sent.id)
    no_more_reports(spot, sent.id)
    [taken] = spot.taken()
    assert taken.sender == ""


def test_what_was_asked_for_outlives_a_failed_attempt(spot: Spot) -> None:
    spot.hop.extensions = DSN
    spot.hop.on(Step.RCPT, Say("450 4.2.1 later"), only="later", times=2)
    sent = spot.send(
        spot.to("now"), (spot.to("later-a"), "NOTIFY=NEVER"), (spot.to("later-b"), SUCCESS), parameters=ASKED
    )
    spot.delivered(sent.id, spot.to("later-b"))
    first, second = spot.taken(2)
    assert first.recipients == (spot.to("now"),)
    assert second.parameters.endswith(" RET=HDRS ENVID=QQ+2B314159")
    assert spot.hop.said("RCPT")[-2:] == [
        f"RCPT TO:<{spot.to('later-a')}> NOTIFY=NEVER",
        f"RCPT TO:<{spot.to('later-b')}> {SUCCESS}",
    ]


def test_an_answer_later_than_the_express_deadline_leads_to_the_same_report(make_bed: MakeBed) -> None:
    bed = make_bed(1, delivery={"express_deadline_s": 0.3})
    spot = bed.spot()
    rule = spot.hop.on(Step.FINAL, Hold(), times=1)
    sent = spot.send((spot.to(), "NOTIFY=SUCCESS"), parameters="ENVID=late")
    assert sent.queued
    rule.hold.release()
    [report] = spot.reports()
    assert told(report) == [(spot.to(), "relayed")]
    assert groups(report)[0]["Original-Envelope-Id"] == "late"
    bed.wait_until_gone(sent.id)
    assert len(spot.taken()) == 1


def test_what_expires_is_not_reported_to_who_said_never(make_bed: MakeBed) -> None:
    bed: Bed = make_bed(1, queue={"expire_after_s": 1.0, "retry_s": [0.4]})
    spot = bed.spot()
    spot.hop.on(Step.RCPT, Say("450 4.2.1 never"))
    sent = spot.send((spot.to("a"), "NOTIFY=NEVER"), (spot.to("b"), "NOTIFY=FAILURE"), parameters="RET=HDRS")
    [report] = spot.reports()
    assert told(report) == [(spot.to("b"), "failed")]
    assert not re.search(rb"Content-Type: message/rfc822", report.message)
    bed.wait_until_gone(sent.id)
    no_more_reports(spot, sent.id, 1)
