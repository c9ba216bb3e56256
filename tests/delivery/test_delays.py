"""Senders are warned once when mail is late, if the operator wants that, and nobody is who must not be."""

from __future__ import annotations

import email
import email.policy

import pytest

from tests.bed.next_hop import Say, Step
from tests.bed.wire import letter
from tests.delivery.conftest import Bed, MakeBed

LATE = {"queue": {"retry_s": [0.3], "delay_warning_after_s": 0.5, "expire_after_s": 86400}}


@pytest.fixture
def bed(make_bed: MakeBed) -> Bed:
    return make_bed(6, **LATE)


def test_a_late_message_is_reported_once_as_delayed_and_goes_on_being_tried(bed: Bed) -> None:
    busy, quiet, never, asked = bed.spot(), bed.spot(), bed.spot(), bed.spot()
    for spot in (busy, quiet, never, asked):
        spot.hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"), only="<user")
    sent = busy.send(busy.to(), busy.to("other"))
    assert sent.queued
    bulk = letter("bulk").replace(b"Subject:", b"Precedence: bulk\r\nSubject:", 1)
    for spot, sender, message, parameters in (
        (quiet, "", letter("null"), ""),
        (quiet, quiet.sender, bulk, ""),
        (never, never.sender, letter("never"), "NOTIFY=FAILURE"),
        (asked, asked.sender, letter("asked"), "NOTIFY=DELAY ORCPT=rfc822;first@example.org"),
    ):
        with bed.relay.client() as client:
            client.open()
            assert client.command(f"MAIL FROM:<{sender}>").code == 250
            assert client.command(f"RCPT TO:<{spot.to()}> {parameters}".rstrip()).code == 250
            assert client.data(message).code == 250
    [report] = busy.reports()
    message = email.message_from_bytes(report.message, policy=email.policy.default)
    assert message["Auto-Submitted"] == "auto-replied"
    assert report.sender == ""
    status = message.get_payload()[1].get_payload()
    assert [str(part["Final-Recipient"]) for part in status[1:]] == [f"rfc822; {busy.to()}"]
    assert str(status[1]["Action"]) == "delayed"
    assert str(status[1]["Status"]).startswith("4.")
    assert status[1]["Will-Retry-Until"] is not None
    [other] = asked.reports()
    assert b"Original-Recipient: rfc822;first@example.org" in other.message.replace(b"rfc822; ", b"rfc822;")
    attempts = busy.bed.queued(sent.id)["recipients"][0]["attempts"]
    busy.bed.wait_for_queued(sent.id, lambda found: found["recipients"][0]["attempts"] >= attempts + 3)
    assert [len(spot._reports()) for spot in (busy, quiet, never, asked)] == [1, 0, 0, 1]
    assert bed.relay.stop() == 0
    bed.relay.start(build=False)
    busy.bed.wait_for_queued(sent.id, lambda found: found["recipients"][0]["attempts"] >= attempts + 5)
    assert len(busy._reports()) == 1, "not again by the next process either"
    for spot in (busy, quiet, never, asked):
        spot.hop.behave()
    busy.delivered(sent.id)
