"""8-bit content towards a next hop without 8BITMIME: as it is, converted, or refused, by choice (RFC 6152 §3)."""

from __future__ import annotations

import email.policy
from collections.abc import Callable
from email import message_from_bytes
from email.message import EmailMessage

import pytest

from tests.bed.next_hop import Transaction
from tests.bed.wire import after_trace, letter
from tests.delivery.conftest import Bed, MakeBed, Spot

SPOTS = 1
SEVEN = ("PIPELINING", "ENHANCEDSTATUSCODES", "SIZE 52428800")
TEXT = "Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
SIGNED = (
    "Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: multipart/signed; protocol=x; micalg=x; boundary=b\r\n\r\n"
    "--b\r\n\r\nä\r\n--b\r\nContent-Type: application/pgp-signature\r\n\r\nx\r\n--b--\r\n"
).encode()


@pytest.fixture(scope="module")
def chosen(_module_beds: MakeBed) -> Callable[[str, str], Bed]:
    made: dict[tuple[str, str], Bed] = {}

    def get(policy: str, way: str) -> Bed:
        if (policy, way) not in made:
            made[policy, way] = _module_beds(8, delivery={"eight_bit": policy, "express": way == "express"})
        return made[policy, way]

    return get


def spot_of(bed: Bed) -> Spot:
    spot = bed.spot()
    spot.hop.extensions = SEVEN
    return spot


def content(taken: Transaction) -> EmailMessage:
    assert taken.message.isascii()
    message = message_from_bytes(taken.message, policy=email.policy.SMTP)
    assert isinstance(message, EmailMessage)
    return message


@pytest.mark.parametrize("way", ["express", "durable"])
def test_converted_text_reads_the_same(chosen: Callable[[str, str], Bed], way: str) -> None:
    spot = spot_of(chosen("convert", way))
    sent = spot.send(message=(TEXT + ".Grüße\r\n" + "ö" * 300 + "\r\n").encode(), parameters="BODY=8BITMIME")
    assert sent.code == 250
    [taken] = spot.taken()
    assert "BODY" not in taken.parameters
    assert content(taken)["Content-Transfer-Encoding"] == "quoted-printable"
    assert content(taken).get_content() == ".Grüße\r\n" + "ö" * 300 + "\r\n"


def test_a_large_attachment_is_converted_on_its_way(chosen: Callable[[str, str], Bed]) -> None:
    spot = spot_of(chosen("convert", "express"))
    block = bytes(octet for octet in range(256) if octet not in b"\r\n") + b"\r\n"
    whole = block * 8000  # some 2 MB: a file of the spool
    head = b"MIME-Version: 1.0\r\nContent-Type: application/x\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
    assert spot.send(message=head + whole).delivered
    [taken] = spot.taken()
    assert content(taken).get_content() == whole
    declared = int(taken.parameters.partition("SIZE=")[2].split()[0])
    assert declared == len(taken.wire)


@pytest.mark.parametrize("policy", ["convert", "refuse"])
def test_ascii_is_left_alone(chosen: Callable[[str, str], Bed], policy: str) -> None:
    spot = spot_of(chosen(policy, "express" if policy == "convert" else "durable"))
    for message in (letter(body=b"..plain\r\n"), letter(body=b"large and plain\r\n" * 10_000)):
        assert spot.send(message=message, parameters="BODY=8BITMIME").code == 250
    assert [after_trace(one.message) for one in spot.taken(2)] == [
        letter(body=b"..plain\r\n"),
        letter(body=b"large and plain\r\n" * 10_000),
    ]


@pytest.mark.parametrize("message", [SIGNED, "Subject: Grüße\r\n\r\nx\r\n".encode()], ids=["signed", "header"])
def test_what_must_not_be_converted_is_refused(chosen: Callable[[str, str], Bed], message: bytes) -> None:
    spot = spot_of(chosen("convert", "express"))
    sent = spot.send(message=message)
    assert (sent.code, sent.text[:5]) == (554, "5.6.3")
    assert spot.hop.said("MAIL") == []
    assert spot.send().delivered


@pytest.mark.parametrize("octets", [100, 200_000])
def test_refused_content_is_reported(chosen: Callable[[str, str], Bed], octets: int) -> None:
    spot = spot_of(chosen("refuse", "durable"))
    sent = spot.send(message=TEXT.encode() + b"\xe4" * 70 + b"\r\n" + b"x" * 98 + b"\r\n" * (octets // 2))
    assert sent.queued
    [report] = spot.reports()
    assert b"Action: failed\r\nStatus: 5.6.3\r\n" in report.message
    spot.bed.wait_until_gone(sent.id)
    assert spot.hop.said("MAIL") == []


def test_a_next_hop_with_8bitmime_gets_it_as_it_is_whatever_was_chosen(chosen: Callable[[str, str], Bed]) -> None:
    spot = chosen("refuse", "durable").spot()
    message = (TEXT + "ä\r\n").encode()
    spot.send(message=message, parameters="BODY=8BITMIME")
    assert [after_trace(one.message) for one in spot.taken()] == [message]
