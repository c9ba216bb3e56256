"""Limits of size and number: what is too much is refused by its own code, and what fits gets through."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.bed.client import Client
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace
from tests.dialogue.sites import SMALLEST_MESSAGE, Site

HEADER = b"Subject: x\r\n\r\n"
TOO_BIG = "552 5.3.4 Message exceeds the size limit"
MEGABYTE = 1024 * 1024


def of_size(octets: int) -> bytes:
    """A message of that size, in lines."""
    body = (b"x" * 98 + b"\r\n") * (octets // 100 + 1)
    return HEADER + body[: octets - len(HEADER) - 2] + b"\r\n"


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# --- sizes -------------------------------------------------------------------------------------------------------------


def test_ehlo_announces_the_size(narrow: Site) -> None:
    with narrow.client() as client:
        assert client.open().extensions["SIZE"] == str(SMALLEST_MESSAGE)


def test_a_declared_size_over_the_limit_is_refused_at_mail(narrow: Site) -> None:
    """RFC 1870 §6.1."""
    with narrow.client() as client:
        client.open()
        client.expect(TOO_BIG, f"MAIL FROM:<a@example.net> SIZE={SMALLEST_MESSAGE + 1}")
        client.expect("250", f"MAIL FROM:<a@example.net> SIZE={SMALLEST_MESSAGE}")
        client.quit()


@pytest.mark.parametrize("declared", ["", "SIZE=1000"])
def test_what_comes_counts_not_what_was_said(narrow: Site, declared: str) -> None:
    """RFC 1870 §6.3; RFC 5321 §4.5.3.1.9."""
    sender = narrow.sender()
    with narrow.client() as client:
        client.open()
        reply = client.deliver(sender, "user@example.com", of_size(SMALLEST_MESSAGE + 1), declared)
        assert str(reply) == TOO_BIG
        assert client.deliver(sender, "user@example.com", of_size(SMALLEST_MESSAGE), declared).code == 250
        client.quit()
    [message] = narrow.arrived(sender)
    assert after_trace(message.message) == of_size(SMALLEST_MESSAGE)


@pytest.mark.parametrize(
    "pattern", [b"x" * 998 + b"\r\n", b"x", b"\n", b"\r\n"], ids=["lines", "one line", "LF", "empty lines"]
)
def test_a_message_far_too_big_costs_no_memory(narrow: Site, pattern: bytes) -> None:
    worker = narrow.relay.workers()[0]
    with narrow.client() as client:
        client.open()
        client.envelope(narrow.sender(), ["user@example.com"])
        client.expect("354", "DATA")
        before = resident(worker)
        client.send(HEADER)
        block = (pattern * MEGABYTE)[:MEGABYTE]
        for _ in range(30):
            client.send(block)
        client.send(b"\r\n.\r\n")
        assert str(client.read()) == TOO_BIG
        assert resident(worker) - before < 8 * MEGABYTE
        client.quit()


def test_a_header_over_the_limit_is_refused(narrow: Site) -> None:
    with narrow.client() as client:
        client.open()
        big = b"X-Long: " + b"x" * 1000 + b"\r\n" + b"Y: " + b"y" * 1050 + b"\r\n"
        reply = client.deliver(narrow.sender(), "user@example.com", big + b"\r\nbody\r\n")
        assert str(reply) == "552 5.3.4 Message header exceeds the size limit"
        reply = client.deliver(narrow.sender(), "user@example.com", big * 20)
        assert str(reply) == "552 5.3.4 Message header exceeds the size limit"
        client.quit()


def test_a_message_that_loops_is_refused(narrow: Site) -> None:
    """RFC 5321 §6.3."""
    hop = b"Received: from a\r\n\tby b; Tue, 14 Nov 2023 22:13:20 +0000\r\n"
    sender = narrow.sender()
    with narrow.client() as client:
        client.open()
        assert str(client.deliver(sender, "user@example.com", hop * 3 + HEADER)) == "554 5.4.6 Too many hops"
        assert client.deliver(sender, "user@example.com", hop * 2 + HEADER + hop * 3).code == 250
        client.quit()
    narrow.arrived(sender)


# --- recipients --------------------------------------------------------------------------------------------------------


def test_the_recipient_too_many_is_asked_to_come_again(narrow: Site) -> None:
    """RFC 5321 §4.5.3.1.10: 452, and the message goes to those that were accepted, however many more were tried."""
    sender = narrow.sender()
    with narrow.client() as client:
        client.open()
        client.expect("250", f"MAIL FROM:<{sender}>")
        replies = client.pipeline(*["RCPT TO:<user@example.com>"] * 150)
        assert [reply.code for reply in replies] == [250] * 100 + [452] * 50
        assert str(replies[-1]) == "452 4.5.3 Too many recipients"
        assert client.data(HEADER).code == 250
        assert client.deliver(sender, ["user@example.com"] * 50, HEADER).code == 250
        client.quit()
    assert [len(message.recipients) for message in narrow.arrived(sender, 2)] == [100, 50]


# --- the error budget --------------------------------------------------------------------------------------------------


def test_the_last_error_of_the_budget_ends_the_session(narrow: Site) -> None:
    with narrow.client() as client:
        client.open()
        for command in ("FOO", "MAIL FROM:<a", "RCPT TO:<a@b>", "EHLO"):
            assert client.command(command).code >= 500
        client.expect("503", "DATA")
        client.expect("421 4.7.0 Too many errors")
        assert client.has_ended()


def test_the_budget_is_the_session_s_and_success_does_not_refill_it(narrow: Site) -> None:
    with narrow.client() as client:
        client.open()
        for _ in range(4):
            client.expect("250", "MAIL FROM:<a@example.net>")
            client.expect("550 5.1.1", "RCPT TO:<nobody@example.com>")
            client.expect("250", "RSET")
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.expect("550 5.1.1", "RCPT TO:<nobody@example.com>")
        client.expect("421 4.7.0")
        assert client.has_ended()


def test_nothing_of_a_group_is_done_behind_the_421(narrow: Site) -> None:
    sender = narrow.sender()
    with narrow.client() as client:
        client.open()
        client.send(
            b"FOO\r\n" * 5 + f"MAIL FROM:<{sender}>\r\nRCPT TO:<user@example.com>\r\nDATA\r\n".encode() + b".\r\n"
        )
        assert [client.read().code for _ in range(6)] == [500] * 5 + [421]
        assert client.has_ended()
    assert narrow.from_(sender) == []


def test_mail_body_sent_after_a_refused_data_is_not_taken_for_long(narrow: Site) -> None:
    with narrow.client() as client:
        client.open()
        client.expect("503", "DATA")
        client.send(b"Subject: x\r\nTo: y\r\n\r\nbody\r\nmore\r\n.\r\n")
        assert [client.read().code for _ in range(5)] == [500, 500, 500, 500, 421]
        assert client.has_ended()


# --- sessions ----------------------------------------------------------------------------------------------------------


def refused(narrow: Site, source: str) -> str:
    with narrow.client(source=source) as client:
        reply = client.read()
        assert client.has_ended()
        return str(reply)


def test_sessions_are_limited_for_a_client_and_in_all(narrow: Site) -> None:
    wait_for(lambda: narrow.session_count() == 0, "end of earlier sessions")
    open_sessions: list[Client] = []
    try:
        for source in ["127.0.0.7"] * 4:
            open_sessions.append(narrow.client(source=source))
            open_sessions[-1].greeting()
        assert refused(narrow, "127.0.0.7") == "421 4.7.0 Too many sessions from your address"
        for source in ("127.0.0.8", "127.0.0.9"):
            open_sessions.append(narrow.client(source=source))
            open_sessions[-1].greeting()
        assert refused(narrow, "127.0.0.10") == "421 4.3.2 Too many sessions, try again later"
        open_sessions[0].quit()
        wait_for(lambda: narrow.session_count() == 5, "one session less")
        with narrow.client(source="127.0.0.7") as client:
            client.greeting()
    finally:
        for client in open_sessions:
            client.close()
    lines = [json.loads(line) for line in narrow.relay.wait_for_log('"stage":"CONNECT"', 2)]
    assert [(line["event"], line["client"], line["reason"], line["rule"]) for line in lines] == [
        ("reject", "unknown[127.0.0.7]", "client_busy", "limits.sessions_per_client"),
        ("reject", "unknown[127.0.0.10]", "busy", "limits.sessions"),
    ]


# --- what the log says of it, as JSON ----------------------------------------------------------------------------------


def test_a_restricted_sender_is_one_json_object(narrow: Site) -> None:
    """Row S3, the structured twin."""
    with narrow.client() as client:
        client.open()
        client.expect("250", "MAIL FROM:<Restricted@example.com>")
        client.expect("554 5.7.1", "RCPT TO:<user@example.com>")
        client.quit()
    [line] = narrow.relay.wait_for_log("Restricted@example.com")
    found = json.loads(line)
    assert {key: found.pop(key) for key in ("time", "pid")}
    reply = "554 5.7.1 <Restricted@example.com>: Sender address rejected: This account is not allowed to send emails"
    assert found == {
        "level": "info",
        "event": "reject",
        "host": "mx.example.com",
        "client": "unknown[127.0.0.1]",
        "stage": "RCPT",
        "reply": reply,
        "reason": "sender_restricted",
        "rule": "senders.restricted",
        "sender": "Restricted@example.com",
        "recipient": "user@example.com",
        "proto": "ESMTP",
        "helo": "client.example.net",
        "message": f"NOQUEUE: reject: RCPT from unknown[127.0.0.1]: {reply}; "
        "from=<Restricted@example.com> to=<user@example.com> proto=ESMTP helo=<client.example.net>",
    }


def test_a_refused_message_is_logged_at_its_end(narrow: Site) -> None:
    sender = narrow.sender()
    with narrow.client() as client:
        client.open().deliver(sender, "user@example.com", b"Received: a\r\n" * 3)
    [line] = narrow.relay.wait_for_log(sender)
    found = json.loads(line)
    assert (found["event"], found["stage"], found["reason"]) == ("reject", "END-OF-MESSAGE", "too_many_hops")
