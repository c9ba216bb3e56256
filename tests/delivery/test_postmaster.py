"""The postmaster is told what went wrong, by class, in few letters; mail that nobody can be told about goes to a mailbox."""

from __future__ import annotations

import email
import email.policy
from email.message import EmailMessage

from tests.bed.next_hop import Say, Step, Transaction
from tests.bed.waiting import wait_for
from tests.bed.wire import letter
from tests.delivery.conftest import Bed, MakeBed

BOX = "postmaster@ops.example.org"
DOUBLES = "bounces@ops.example.org"
DURABLE = {"delivery": {"express": False}}


def sent_to(bed: Bed, mailbox: str) -> list[Transaction]:
    return [one for one in bed.outside.accepted if one.recipients == (mailbox,)]


def letters(bed: Bed, mailbox: str = BOX, count: int = 1) -> list[EmailMessage]:
    found = wait_for(
        lambda: found if len(found := sent_to(bed, mailbox)) >= count else [],
        lambda: f"{count} letters to {mailbox}; {bed.relay.complaints()}",
    )
    assert {one.sender for one in found} == {""}
    return [email.message_from_bytes(one.message, policy=email.policy.default) for one in found]


def test_what_was_returned_and_what_was_refused_stands_in_one_letter(make_bed: MakeBed) -> None:
    bed = make_bed(2, postmaster={"mailbox": BOX, "notify": ["bounce", "policy"]}, **DURABLE)
    spot, other = bed.spot(), bed.spot()
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no such user"))
    with bed.relay.client() as client:
        client.open()
        assert client.command("MAIL FROM:<sender@example.net>").code == 250
        for number in range(10):
            assert client.command(f"RCPT TO:<user{number}@elsewhere.example>").code == 554
    returned = spot.send()
    [told] = letters(bed)
    text = told.get_content()
    assert "policy" in told["Subject"]
    assert told["Auto-Submitted"] == "auto-generated"
    assert "reject: RCPT from" in text
    spot.reports()
    assert bed.relay.stop() == 0  # what is gathered by then goes with the end
    bed.relay.start(build=False)
    both = "".join(one.get_content() for one in letters(bed, count=1 if returned.id in text else 2))
    assert f"{returned.id}: from <{spot.sender}> to <{spot.to()}>: {spot.name}: 550 5.1.1 no such user" in both
    assert other.send().code == 250


def test_a_flood_makes_one_letter_with_a_number(make_bed: MakeBed) -> None:
    bed = make_bed(1, postmaster={"mailbox": BOX, "notify": ["bounce"]}, **DURABLE)
    spot = bed.spot()
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no such user"))
    spot.send(*[spot.to(f"u{number}") for number in range(80)], sender="")
    spot.send(*[spot.to(f"u{number}") for number in range(80)])
    [told] = letters(bed)
    assert told["Subject"] == "mx.example.com: 80 bounce"
    assert told.get_content().count("no such user") == 50
    assert "and 30 more, which are in the log" in told.get_content()


def test_mail_without_sender_that_cannot_be_delivered_goes_to_the_named_mailbox_and_its_loss_is_the_end(
    make_bed: MakeBed,
) -> None:
    bed = make_bed(1, postmaster={"double_bounces": DOUBLES}, **DURABLE)
    spot = bed.spot()
    spot.hop.on(Step.RCPT, Say("550 5.1.1 no such user"))
    large = letter("large report", b"x" * 70 + b"\r\n") + b".. a line\r\n" * 9000
    spot.send(sender="", message=letter("a report of somebody"))
    spot.send(sender="", message=large)
    small, cut = sorted(letters(bed, DOUBLES, 2), key=lambda one: len(one.as_bytes()))
    assert {part.get_content_type() for part in (*small.walk(), *cut.walk())} >= {
        "message/rfc822",
        "text/rfc822-headers",
    }
    for one, subject in ((small, "a report of somebody"), (cut, "large report")):
        assert "550 5.1.1 no such user" in one.get_payload()[0].get_content() or subject in str(one)
    bed.outside.on(Step.RCPT, Say("550 5.1.1 not here either"), only=f"<{DOUBLES}")
    gone = spot.send(sender="", message=letter("another"))
    bed.relay.wait_for_log("double_bounce", 3)
    bed.relay.wait_for_log(f"to=<{DOUBLES}>.*status=bounced")
    bed.wait_until_gone(gone.id)
    wait_for(lambda: not bed.queue(), lambda: f"an empty queue, not {bed.queue()}")
    assert len(bed.relay.grep("double_bounce")) == 3


def test_late_mail_and_a_misconfigured_next_hop_are_told(make_bed: MakeBed) -> None:
    bed = make_bed(
        2,
        postmaster={"mailbox": BOX, "notify": ["delay", "software"]},
        queue={"retry_s": [0.3], "delay_warning_after_s": 0.2},
        **DURABLE,
    )
    late, wrong = bed.spot(), bed.spot()
    late.hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"), times=6)
    wrong.hop.on(Step.MAIL, Say("530 5.7.57 not anonymously"), times=3)
    wrong.send()
    late.send()
    wrong.taken(1)
    late.taken(1)
    late.reports()
    assert bed.relay.stop() == 0
    bed.relay.start(build=False)
    wait_for(
        lambda: all(
            word in "".join(one.get_content() for one in letters(bed)) for word in ("next_hop_misc", "450 4.2.1")
        ),
        lambda: f"both in the letters; {[one.get_content() for one in letters(bed)]}",
    )
