"""The header firewall (row F10) over the wire: what an untrusted client may not say does not arrive, all else does."""

from __future__ import annotations

import pytest

from tests.bed.wire import END_OF_DATA, after_trace
from tests.dialogue.sites import TRUSTED, Site

FORBIDDEN = (
    b"X-MS-Exchange-Organization-SCL: -1\r\n"
    b"x-ms-exchange-organization-AuthAs:\r\n Internal\r\n"
    b"X-MS-Exchange-Forest-RulesExecuted : x\r\n\ty\r\n"
    b"Authentication-Results: mx.example.com;\r\n spf=pass smtp.mailfrom=boss@example.com\r\n"
    b'AUTHENTICATION-RESULTS: (hello (nested)) "MX.example.com" 1; dkim=pass\r\n'
)
ALLOWED = (
    b"Received: from a\r\n\tby b; Tue, 14 Nov 2023 22:13:20 +0000\r\n"
    b"Authentication-Results: other.example.net; spf=fail\r\n"
    b"X-MS-Exchange-CrossTenant-Id: 1\r\n"
    b"Subject: about X-MS-Exchange-Organization-SCL: -1\r\n X-MS-Exchange-Organization-SCL: 9\r\n"
)
BODY = b"\r\nX-MS-Exchange-Organization-SCL: in the body it is text\r\n"
REMOVED = (
    "x-ms-exchange-organization-scl, x-ms-exchange-organization-authas, x-ms-exchange-forest-rulesexecuted, "
    "authentication-results, authentication-results"
)


def test_forbidden_fields_go_and_the_rest_stays_octet_for_octet(usual: Site) -> None:
    sender = usual.sender()
    before = usual.relay.metric("relay_headers_removed_total")
    with usual.client() as client:
        reply = client.open().deliver(sender, "user@example.com", FORBIDDEN + ALLOWED + FORBIDDEN + BODY)
        client.quit()
    [message] = usual.arrived(sender)
    assert message.message.partition(b"\r\n\t")[2].partition(b"\r\nReceived: from a\r\n")[2]
    assert message.message.endswith(ALLOWED + BODY)
    trace = message.message.removesuffix(ALLOWED + BODY)
    assert trace.startswith(b"Received: from client.example.net")
    assert after_trace(trace + b"\r\n") == b"\r\n"
    usual.relay.wait_for_log(f"{reply.text.split()[-1]}: header removed: {REMOVED}, {REMOVED} \\(10\\)")
    usual.relay.wait_for_metric("relay_headers_removed_total", before + 10)


def test_a_trusted_client_keeps_its_fields(usual: Site) -> None:
    sender = usual.sender()
    message = FORBIDDEN + ALLOWED + BODY
    with usual.client(source=TRUSTED) as client:
        assert client.open().deliver(sender, "user@example.com", message).code == 250
        client.quit()
    [seen] = usual.arrived(sender)
    assert seen.message.endswith(message)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_header_of_many_packets_is_one_header(usual: Site, *, trusted: bool) -> None:
    sender = usual.sender()
    filler = b"".join(b"X-Filler-%d: %s\r\n" % (number, b"x" * 900) for number in range(60))
    message = filler + FORBIDDEN + filler + FORBIDDEN + ALLOWED + filler + BODY
    with usual.client(source=TRUSTED if trusted else "127.0.0.1") as client:
        client.open()
        client.envelope(sender, ["user@example.com"])
        client.expect("354", "DATA")
        for at in range(0, len(message), 1371):
            client.send(message[at : at + 1371])
        client.send(END_OF_DATA)
        assert client.read().code == 250
        client.quit()
    [seen] = usual.arrived(sender)
    expected = message if trusted else filler * 2 + ALLOWED + filler + BODY
    assert after_trace(seen.message) == expected


HIDDEN = {
    "a dot the next hop takes off": b".X-MS-Exchange-Organization-SCL: -1\r\n",
    "a bare LF": b"X-A: b\nX-MS-Exchange-Organization-SCL: -1\r\n",
    "a bare LF and a dot": b"X-A: b\n.X-MS-Exchange-Organization-SCL: -1\r\n",
    "a fold behind a dot": b"X-MS-Exchange-Organization-SCL:\r\n. -1\r\n",
    "a bare CR": b"X-MS-Exchange-Organization-SCL\r: -1\r\n",
}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_no_trick_of_the_wire_hides_a_field_from_the_firewall(usual: Site, hidden: bytes) -> None:
    """What counts is what the next hop reads, so this looks at the message as it unstuffs it."""
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        client.envelope(sender, ["user@example.com"])
        client.expect("354", "DATA")
        client.send(b"Subject: x\r\n" + hidden + b"To: y\r\n\r\nbody\r\n.\r\n")
        assert client.read().code == 250
        client.quit()
    [seen] = usual.arrived(sender)
    header = seen.message.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert [line for line in header if line.startswith(b"x-ms-exchange-organization")] == []
    assert header[-1] == b"to: y"


def test_a_message_that_is_all_header_is_looked_at_as_well(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        reply = client.open().deliver(sender, "user@example.com", b"Subject: x\r\n" + FORBIDDEN)
        assert reply.code == 250
        client.quit()
    [seen] = usual.arrived(sender)
    assert after_trace(seen.message) == b"Subject: x\r\n"
    usual.relay.wait_for_log(f"{reply.text.split()[-1]}: header removed: {REMOVED} \\(5\\)")


INSIDE = (
    b"Received: from mailbox.inside.example ([10.1.2.3]) by\r\n\tEXCHANGE.inside.example with Microsoft SMTP; today\r\n"
    b"X-MS-Exchange-Organization-AuthAs: Internal\r\n"
)
OUR_TRACE = (
    b"received: from exchange.inside.example ([10.1.2.4])\r\n\tby mx.example.com with ESMTP id 1;\r\n\ttoday\r\n"
)
REST = b"X-MS-Exchange-CrossTenant-Id: 1\r\nSubject: out\r\n\r\nReceived: in the body it is text\r\n"


@pytest.mark.parametrize(
    ("source", "recipients", "kept"),
    [
        (TRUSTED, ["a@elsewhere.example", "b@other.example"], OUR_TRACE),
        (TRUSTED, ["a@elsewhere.example", "user@example.com"], INSIDE + OUR_TRACE),
        (TRUSTED, ["user@example.com"], INSIDE + OUR_TRACE),
        ("127.0.0.1", ["user@example.com"], INSIDE.partition(b"X-MS")[0] + OUR_TRACE),
    ],
)
def test_mail_that_leaves_loses_what_is_inside_but_not_the_trace_that_shows_a_loop(
    listed: Site, source: str, recipients: list[str], kept: bytes
) -> None:
    sender = listed.sender()
    with listed.client(source=source) as client:
        assert client.open().deliver(sender, recipients, INSIDE + OUR_TRACE + REST).code == 250
        client.quit()
    domains = {recipient.partition("@")[2] for recipient in recipients} & {"example.com"}
    for seen in listed.arrived(sender, len(recipients) if domains and len(recipients) > 1 else 1):
        assert seen.message.endswith(b"\r\n" + kept + REST)
        assert (b"mailbox.inside" in seen.message) == (b"mailbox.inside" in kept)
        assert (b"AuthAs" in seen.message) == (b"AuthAs" in kept)
