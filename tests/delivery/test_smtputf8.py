"""SMTPUTF8 towards next hops that offer it and that do not (RFC 6531), and reports with UTF-8 in them (RFC 6533)."""

from __future__ import annotations

import pytest

from tests.bed.next_hop import Say, Step
from tests.bed.wire import letter
from tests.delivery.conftest import Spot

SPOTS = 20
UTF8 = ("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES", "SIZE 52428800", "SMTPUTF8")
NEEDED = "SMTPUTF8 is needed, and the next hop does not offer it"


def test_a_next_hop_with_smtputf8_gets_addresses_and_header_as_they_are(spot: Spot) -> None:
    spot.hop.extensions = UTF8
    message = "Subject: Grüße\r\nTo: Jörg <jörg@x>\r\n\r\nä\r\n".encode()
    spot.send(
        spot.to("jörg"),
        spot.to("plain"),
        message=message,
        sender="böse@bücher.example",
        parameters="SMTPUTF8 BODY=8BITMIME",
    )
    [taken] = spot.taken()
    assert (taken.sender, taken.recipients) == ("böse@bücher.example", (spot.to("jörg"), spot.to("plain")))
    assert taken.parameters.endswith(" BODY=8BITMIME SMTPUTF8")
    assert taken.message.endswith(message)


def test_what_needs_no_utf8_goes_to_any_next_hop_without_the_word(spot: Spot) -> None:
    spot.send(spot.to(), parameters="SMTPUTF8")
    [taken] = spot.taken()
    assert "SMTPUTF8" not in taken.parameters


@pytest.mark.parametrize(
    ("sender", "local", "header"),
    [("jörg@example.net", "user", b""), (None, "jörg", b""), (None, "user", "Subject: Grüße\r\n".encode())],
    ids=["sender", "recipient", "header"],
)
def test_what_needs_utf8_is_refused_where_it_cannot_go(
    spot: Spot, way: str, sender: str | None, local: str, header: bytes
) -> None:
    who = (sender or spot.sender).replace("@", f"{spot.domain}@") if sender else spot.sender
    with spot.relay.client() as client:
        client.open().envelope(who, [spot.to(local)], "SMTPUTF8")
        reply = client.data(header + letter())
    assert (reply.code, reply.text[:5]) == ((553, "5.6.7") if way == "express" else (250, "2.0.0"))
    spot.relay.wait_for_log(
        rf"to=<{spot.to(local)}>, relay={spot.name}, .*dsn=5\.6\.7, status=bounced \(553 5\.6\.7 {NEEDED}\)"
    )
    assert spot.hop.said("MAIL") == []
    assert spot.send().code == 250  # the connection is still good


def test_of_several_recipients_those_go_that_can(spot: Spot) -> None:
    sent = spot.send(spot.to("a"), spot.to("jörg"), spot.to("b"), parameters="SMTPUTF8 ENVID=x")
    assert sent.code == 250
    assert [one.recipients for one in spot.taken()] == [(spot.to("a"), spot.to("b"))]
    [report] = spot.reports()
    text = report.message.decode()
    assert f"Final-Recipient: utf-8; {spot.to('jörg')}\r\nAction: failed\r\nStatus: 5.6.7\r\n" in text
    assert "Content-Type: message/global-delivery-status\r\n" in text
    assert "Content-Type: text/plain; charset=utf-8\r\n" in text
    assert f"<{spot.to('jörg')}>\r\n    was refused by" in text
    assert "BODY=8BITMIME" in report.parameters
    assert "SMTPUTF8" not in report.parameters  # neither its envelope nor its header needs it


def test_a_domain_in_its_own_script_has_a_form_that_every_next_hop_takes(spot: Spot) -> None:
    spot.send(spot.to(), sender="user@bücher.example", parameters="SMTPUTF8")
    [taken] = spot.taken()
    assert taken.sender == "user@xn--bcher-kva.example"


def test_an_original_recipient_in_utf8_is_passed_on_in_the_form_the_next_hop_can_read(spot: Spot) -> None:
    """RFC 6533 §3."""
    for extensions, said in ((UTF8, "utf-8;jörg@example.org"), (UTF8[:-1], r"utf-8;j\x{F6}rg@example.org")):
        spot.hop.extensions = (*extensions, "DSN")
        with spot.relay.client() as client:
            client.open().envelope(spot.sender, [(spot.to(), "ORCPT=utf-8;jörg@example.org")], "SMTPUTF8")
            assert client.data(letter()).code == 250
        spot.relay.wait_for_log(rf"to=<{spot.to()}>.*status=sent")
        spot.hop.wait_until(lambda hop, said=said: hop.said(f"RCPT TO:<{spot.to()}> ORCPT={said}"), f"ORCPT={said}")
        spot.hop.stop()  # the next one meets another EHLO
        spot.hop.start()


def test_a_report_to_a_sender_in_utf8_goes_by_smtputf8(spot: Spot) -> None:
    outside = spot.bed.outside
    outside.extensions = UTF8
    outside.stop()  # whoever is connected met another EHLO
    outside.start()
    spot.hop.extensions = UTF8
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no"), only="no@")
    sender = f"jörg.{spot.domain}@bücher.example"
    spot.send(
        spot.to(), spot.to("no"), sender=sender, message="Subject: Grüße\r\n\r\nx\r\n".encode(), parameters="SMTPUTF8"
    )
    outside.wait_until(lambda hop: any(one.recipients == (sender,) for one in hop.accepted), "the report")
    [report] = [one for one in outside.accepted if one.recipients == (sender,)]
    assert (report.sender, "SMTPUTF8" in report.parameters) == ("", True)
    text = report.message.decode()
    assert f"To: <{sender}>\r\n" in text
    assert "Content-Type: message/global\r\n" in text
    assert "Subject: Grüße\r\n" in text
