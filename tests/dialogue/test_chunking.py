"""BDAT (RFC 3030): chunks, their order, and that the session stays in step whatever is refused."""

from __future__ import annotations

import pytest

from tests.bed.client import Client
from tests.bed.wire import after_trace, letter
from tests.dialogue.sites import SMALLEST_MESSAGE, Site

MESSAGE = letter(body=b"".join(b"line %d\r\n.dot\r\n..two\r\n.\r\n" % number for number in range(3000)))
RCPT = "RCPT TO:<user@example.com>"


def bdat(octets: bytes, *, last: bool = False) -> bytes:
    return b"BDAT %d%s\r\n" % (len(octets), b" LAST" if last else b"") + octets


def chunks(message: bytes, size: int) -> list[bytes]:
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return [*(bdat(part) for part in parts[:-1]), bdat(parts[-1], last=True)]


def codes(client: Client, count: int) -> list[int]:
    return [client.read().code for _ in range(count)]


@pytest.mark.parametrize("size", [1_000_000, 60_000, 997])
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
def test_a_message_comes_in_chunks_all_in_one_group(usual: Site, size: int, tls: bool) -> None:  # noqa: FBT001
    """RFC 3030 §4.2 with RFC 2920: nothing is waited for."""
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        if tls:
            client.starttls(usual.authority.client())
            client.ehlo()
        parts = chunks(MESSAGE, size)
        client.send(f"MAIL FROM:<{sender}>\r\n{RCPT}\r\n".encode() + b"".join(parts) + b"NOOP\r\n")
        assert codes(client, len(parts) + 3) == [250] * (len(parts) + 3)
        client.quit()
    [message] = usual.arrived(sender)
    assert after_trace(message.message) == MESSAGE


def test_each_chunk_is_answered_with_its_size(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open().envelope(sender, ["user@example.com"])
        client.send(bdat(b"Subject: x\r\n"))
        client.expect("250 2.0.0 12 octets received")
        client.expect("250 2.0.0 0 octets received", "BDAT 0")
        client.send(bdat(b"\r\n.a line without its end"))
        client.expect("250 2.0.0 25 octets received")
        client.expect("250 2.0.0 Ok: delivered as ", "BDAT 0 LAST")
        client.expect("503 5.5.1", "BDAT 0 LAST")
        client.quit()
    [message] = usual.arrived(sender)
    assert after_trace(message.message) == b"Subject: x\r\n\r\n.a line without its end\r\n"


def test_octets_are_no_commands_and_dots_end_nothing(usual: Site) -> None:
    sender = usual.sender()
    inside = (
        b"\r\n.\r\nMAIL FROM:<smuggled@example.net>\r\nRCPT TO:<user@example.com>\r\nDATA\r\nsmuggled\r\n.\r\nQUIT\r\n"
    )
    with usual.client() as client:
        client.open().envelope(sender, ["user@example.com"])
        client.send(bdat(b"Subject: x\r\n" + inside, last=True) + b"NOOP\r\n")
        assert codes(client, 2) == [250, 250]
        client.quit()
    [message] = usual.arrived(sender)
    assert after_trace(message.message) == b"Subject: x\r\n" + inside
    usual.nothing_but(sender)


@pytest.mark.parametrize(
    ("before", "reply"),
    [
        ((), "503 5.5.1 Say EHLO first"),
        (("EHLO a",), "503 5.5.1 MAIL first"),
        (("EHLO a", "MAIL FROM:<a@example.net>"), "503 5.5.1 RCPT first"),
        (("EHLO a", "MAIL FROM:<a@example.net>", "RCPT TO:<nobody@example.com>"), "554 5.5.1 No valid recipients"),
        (("EHLO a", "MAIL FROM:<a@example.net>", RCPT, "RSET"), "503 5.5.1 MAIL first"),
    ],
)
def test_a_refused_chunk_is_read_to_its_end(usual: Site, before: tuple[str, ...], reply: str) -> None:
    octets = b"QUIT\r\nRSET\r\n" * 20_000
    with usual.client() as client:
        client.greeting()
        for command in before:
            client.command(command)
        client.send(bdat(octets) + bdat(b"", last=True) + bdat(b"x", last=True) + b"NOOP\r\n")
        for _ in range(3):
            client.expect(reply)
        client.expect("250 2.0.0 Ok")
        client.quit()


@pytest.mark.parametrize("command", [RCPT, "DATA", "MAIL FROM:<a@example.net>"])
def test_between_chunks_there_is_no_other_way(usual: Site, command: str) -> None:
    """RFC 3030 §2, §3: DATA and BDAT cannot be mixed."""
    sender = usual.sender()
    with usual.client() as client:
        client.open().envelope(sender, ["user@example.com"])
        client.send(bdat(b"Subject: x\r\n\r\n"))
        client.expect("250")
        client.expect("503 5.5.1", command)
        client.expect("250", "NOOP")
        client.send(bdat(b"body", last=True))
        client.expect("250 2.0.0 Ok: delivered")
        client.quit()
    [message] = usual.arrived(sender)
    assert message.recipients == ("user@example.com",)


@pytest.mark.parametrize("command", ["RSET", "EHLO client.example.net"])
def test_what_came_is_dropped_when_the_transaction_is(usual: Site, command: str) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open().envelope(sender, ["user@example.com"])
        client.send(bdat(b"Subject: dropped\r\n\r\n"))
        client.expect("250")
        client.expect("250", command)
        client.send(bdat(b"rest", last=True))
        client.expect("503 5.5.1 MAIL first")
        client.envelope(sender, ["user@example.com"])
        client.send(bdat(b"Subject: kept\r\n\r\n", last=True))
        client.expect("250 2.0.0 Ok: delivered")
        client.quit()
    [message] = usual.arrived(sender)
    assert after_trace(message.message) == b"Subject: kept\r\n\r\n"


def test_data_in_one_transaction_and_chunks_in_the_next(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        for _ in range(2):
            assert client.deliver(sender, "user@example.com", MESSAGE).code == 250
            client.envelope(sender, ["user@example.com"])
            client.send(bdat(MESSAGE, last=True))
            client.expect("250")
        client.quit()
    assert {after_trace(one.message) for one in usual.arrived(sender, 4)} == {MESSAGE}


def test_too_big_in_the_chunk_that_makes_it_so(narrow: Site) -> None:
    """RFC 3030 §2: the refusal comes behind the octets, what is still on its way is read and refused."""
    part = b"x" * 98 + b"\r\n"
    with narrow.client() as client:
        client.open().envelope("a@example.net", ["user@example.com"])
        client.send(
            bdat(b"Subject: x\r\n\r\n") + bdat(part * (SMALLEST_MESSAGE // 100)) + bdat(part) + bdat(part, last=True)
        )
        client.expect("250")
        client.expect("552 5.3.4")
        client.expect("503 5.5.1 MAIL first")
        client.expect("503 5.5.1 MAIL first")
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.quit()
    assert not list((narrow.relay.spool / "queue").glob("**/*.part"))


def test_the_rules_for_header_and_line_ends_hold_in_chunks(narrow: Site, soft: Site, usual: Site) -> None:
    with narrow.client() as client:
        client.open()
        for message, refusal in (
            (b"A: " + b"x" * 3000 + b"\r\n\r\n", "552 5.3.4 Message header"),
            (b"Received: a\r\n" * 3 + b"\r\n", "554 5.4.6"),
        ):
            client.envelope("a@example.net", ["user@example.com"])
            client.send(bdat(message, last=True))
            client.expect(refusal)
        client.quit()
    with soft.client() as client:
        client.open().envelope("a@example.net", ["user@example.com"])
        client.send(bdat(b"Subject: x\r\n\r\none\ntwo\r\n", last=True))
        client.expect("451 4.6.0 Bare CR or LF")
        client.quit()
    sender = usual.sender()
    with usual.client() as client:
        client.open().envelope(sender, ["user@example.com"])
        client.send(bdat(b"X-MS-Exchange-Organization-SCL: -1\r\nSubject: x\r\n\r\none\n.\n.two\rthree\n", last=True))
        client.expect("250")
        client.quit()
    [message] = usual.arrived(sender)
    assert after_trace(message.message) == b"Subject: x\r\n\r\none\r\n.\r\n.two three\r\n"


@pytest.mark.parametrize(
    "command",
    [
        b"BDAT",
        b"BDAT x",
        b"BDAT -5 LAST",
        b"BDAT 5 LAST now",
        b"BDAT 5\tLAST",
        b"BDAT 5\rLAST",
        b"BDAT " + b"9" * 21,
        b"BDAT 5 LAST" + b" " * 3000,
        b"BDAT " + b"5" * 300_000,
    ],
)
def test_a_size_that_cannot_be_told_ends_the_session(usual: Site, command: bytes) -> None:
    """What follows would be taken for commands."""
    with usual.client() as client:
        client.open().envelope("a@example.net", ["user@example.com"])
        client.send(command + b"\r\nMAIL FROM:<smuggled@example.net>\r\n")
        assert client.read().code in (500, 501)
        client.expect("421 4.5.2")
        assert client.has_ended()
    usual.nothing_but()


def test_a_bare_line_end_behind_bdat_ends_the_session(usual: Site) -> None:
    with usual.client() as client:
        client.open().envelope("a@example.net", ["user@example.com"])
        client.send(b"BDAT 6\nQUIT\r\n")
        client.expect("500 5.5.2")
        client.expect("421 4.5.2")
        assert client.has_ended()


def test_a_session_that_ends_amid_chunks_delivers_nothing(usual: Site) -> None:
    sender = usual.sender()
    for end in (b"", bdat(b"Subject: x\r\n\r\n"), b"BDAT 5000 LAST\r\nhalf"):
        with usual.client() as client:
            client.open().envelope(sender, ["user@example.com"])
            client.send(bdat(b"Subject: y\r\n" * 10_000) + end)
            client.read()
    with usual.client() as client:
        client.open().envelope(sender, ["user@example.com"])
        client.send(bdat(b"Subject: z\r\n\r\n"))
        client.expect("250")
        client.quit()
    assert usual.from_(sender) == []


def test_silence_within_a_chunk_ends_the_session(hasty: Site) -> None:
    with hasty.client() as client:
        client.open().envelope("a@example.net", ["user@example.com"])
        client.send(b"BDAT 100 LAST\r\nhalf")
        client.expect("421 4.4.2")
        assert client.has_ended()


def test_limits_and_chunking_are_offered_as_they_are(usual: Site, narrow: Site) -> None:
    """RFC 9422."""
    for site, most in ((usual, 1000), (narrow, 100)):
        with site.client() as client:
            client.open()
            assert client.extensions["LIMITS"] == f"RCPTMAX={most}"
            assert client.extensions["CHUNKING"] == ""
            assert "BINARYMIME" not in client.extensions
            client.quit()
