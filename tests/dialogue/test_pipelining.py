"""Groups of commands, whatever packets they come in (RFC 2920); clients that go away, or send and never read."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bed.client import Client, ConnectionEnded
from tests.bed.next_hop import Hold, Step
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter, stuffed
from tests.dialogue.sites import Site

LETTER = stuffed(letter()) + b".\r\n"
MEGABYTE = 1024 * 1024


def codes(client: Client, count: int) -> list[int]:
    return [client.read().code for _ in range(count)]


def transaction(sender: str, *recipients: str) -> bytes:
    lines = [f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{one}>" for one in recipients or ("user@example.com",)), "DATA", ""]
    return "\r\n".join(lines).encode()


def resident(pid: int) -> int:
    """Resident octets of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def fill(client: Client, octets: bytes, limit: int) -> int:
    """Send copies of ``octets`` for two seconds, or until the relay takes no more for one; how many octets that were."""
    raw = client._socket
    raw.settimeout(1.0)
    sent = 0
    until = time.monotonic() + 2
    with contextlib.suppress(TimeoutError, ConnectionError):
        while sent < limit and time.monotonic() < until:
            sent += raw.send(octets)
    raw.settimeout(20.0)
    return sent


def read_to_the_end(client: Client) -> None:
    while True:
        client._receive()


# --- groups ------------------------------------------------------------------------------------------------------------


def test_a_group_is_answered_in_order_the_refused_among_them(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        client.send(transaction(sender, "user@example.com", "nobody@example.com", "bob@example.com", "<>"))
        assert codes(client, 6) == [250, 250, 550, 250, 501, 354]
        client.send(LETTER)
        assert client.read().code == 250
        client.quit()
    [message] = usual.arrived(sender)
    assert message.recipients == ("user@example.com", "bob@example.com")


def test_a_group_whose_recipients_are_all_refused_gets_no_354(usual: Site) -> None:
    """RFC 2920 §3.1: the client has to look at the reply to DATA."""
    with usual.client() as client:
        client.open()
        client.send(transaction(usual.sender(), "nobody@example.com"))
        assert codes(client, 3) == [250, 550, 554]
        client.expect("250", "RSET")
        client.quit()


def test_commands_that_should_end_a_group_may_stand_inside_one(usual: Site) -> None:
    with usual.client() as client:
        client.greeting()
        client.send(b"EHLO a\r\nNOOP\r\nVRFY a\r\nEXPN a\r\nHELP\r\nRSET\r\nFOO\r\nQUIT\r\nNOOP\r\nNOOP\r\n")
        assert codes(client, 8) == [250, 250, 252, 502, 214, 250, 500, 221]
        assert client.has_ended()


def dialogue(sender: str, count: int = 1) -> bytes:
    """A whole session whose client waits for nothing."""
    return b"EHLO a\r\n" + (transaction(sender) + LETTER) * count + b"QUIT\r\n"


def expected(count: int) -> list[int]:
    return [220, 250, *[250, 250, 354, 250] * count, 221]


@pytest.mark.parametrize("count", [1, 20])
def test_a_client_that_waits_for_nothing_is_served_all_the_same(usual: Site, count: int) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.send(dialogue(sender, count))
        assert codes(client, len(expected(count))) == expected(count)
        assert client.has_ended()
    for message in usual.arrived(sender, count):
        assert after_trace(message.message) == letter()


def test_the_packets_make_no_difference(usual: Site) -> None:
    """Cut into octets, and at every place into two."""
    sender = usual.sender()
    whole = dialogue(sender)
    places = range(1, len(whole), 7)
    cuts = [list(range(len(whole) + 1)), *([0, place, len(whole)] for place in places)]
    for places_of_one in cuts:
        with usual.client() as client:
            for start, end in pairwise(places_of_one):
                client.send(whole[start:end])
            assert codes(client, len(expected(1))) == expected(1)
    usual.arrived(sender, len(cuts))


def test_a_long_group_gets_all_its_replies(usual: Site) -> None:
    with usual.client() as client:
        client.open()
        client.send(b"NOOP\r\n" * 5000 + b"QUIT\r\n")
        assert codes(client, 5001) == [250] * 5000 + [221]
        assert client.has_ended()


# --- half-closes -------------------------------------------------------------------------------------------------------


def test_what_came_before_a_half_close_is_finished_and_answered(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.send(dialogue(sender, 3).removesuffix(b"QUIT\r\n"))
        client.half_close()
        assert codes(client, 14) == expected(3)[:-1]
        assert client.has_ended()
    usual.arrived(sender, 3)


def test_a_client_that_said_all_before_it_was_let_in_is_served(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        with stopped(usual.relay.hub()):
            client.send(dialogue(sender, 2).removesuffix(b"QUIT\r\n"))
            client.half_close()
        assert codes(client, 10) == expected(2)[:-1]
        assert client.has_ended()
    usual.arrived(sender, 2)


def test_a_half_close_while_the_next_hop_thinks_still_gets_its_reply(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        client.send(transaction(sender))
        assert codes(client, 3) == [250, 250, 354]
        hold = usual.hop.on(Step.FINAL, Hold()).hold
        client.send(LETTER)
        hold.wait_reached()
        client.half_close()
        usual.hop.behave()
        assert client.read().code == 250
        assert client.has_ended()
    usual.arrived(sender)


@pytest.mark.parametrize("said", [b"", b"EHLO a\r\n", b"EHLO a\r\nMAIL FROM:<a@example.net>\r\nRCPT", b"EHLO"])
def test_a_half_close_between_commands_ends_the_session(usual: Site, said: bytes) -> None:
    with usual.client() as client:
        client.greeting()
        client.send(said)
        client.half_close()
        codes(client, said.count(b"\r\n"))
        assert client.has_ended()


def test_a_half_close_within_a_message_delivers_nothing(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        client.send(transaction(sender))
        assert codes(client, 3) == [250, 250, 354]
        client.send(LETTER[:-3])
        client.half_close()
        assert client.has_ended()
    wait_for(lambda: usual.session_count() == 0, "end of the session")
    assert usual.from_(sender) == []


# --- clients that vanish -----------------------------------------------------------------------------------------------

STAGES = (
    b"",
    b"EHLO a\r\n",
    b"MAIL FROM:<{}>\r\n",
    b"RCPT TO:<user@example.com>\r\n",
    b"DATA\r\n",
    b"Subject: x\r\n\r\nhalf",
)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_vanishes_leaves_nothing_behind(usual: Site, how: str) -> None:
    sender = usual.sender()
    for stage in range(len(STAGES)):
        client = usual.client()
        client.greeting()
        for said in STAGES[: stage + 1]:
            if said:
                client.send(said.replace(b"{}", sender.encode()))
                if not said.startswith(b"Subject"):
                    client.read()
        client.send(b"x" * 200_000 if stage == len(STAGES) - 1 else b"NO")
        client.reset() if how == "reset" else client.close()
    wait_for(lambda: usual.session_count() == 0, "end of the sessions")
    assert usual.from_(sender) == []
    worker = usual.relay.workers()[0]
    bodies = [link for link in Path(f"/proc/{worker}/fd").iterdir() if "deleted" in os.readlink(link)]
    assert bodies == [], "a body of a broken message is still open"


def test_a_message_whose_client_vanished_behind_its_dot_goes_its_way(usual: Site) -> None:
    sender = usual.sender()
    client = usual.client()
    client.open()
    client.send(transaction(sender))
    assert codes(client, 3) == [250, 250, 354]
    hold = usual.hop.on(Step.FINAL, Hold()).hold
    client.send(LETTER)
    hold.wait_reached()
    client.reset()
    usual.hop.behave()
    usual.arrived(sender)


# --- clients that send and do not read, or send ahead ----------------------------------------------------------------------


def narrow_socket(client: Client) -> None:
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


def test_a_client_that_reads_no_replies_is_not_read_either(usual: Site) -> None:
    worker = usual.relay.workers()[0]
    with usual.client() as client:
        narrow_socket(client)
        client.open()
        before = resident(worker)
        sent = fill(client, b"EHLO a\r\n" * 8192, 64 * MEGABYTE)  # the reply is fifteen times as long
        assert sent < 12 * MEGABYTE
        assert resident(worker) - before < 8 * MEGABYTE
        read = 0
        while read < 100_000:  # it is served on once it reads
            read += len(client._receive())
        client.reset()


def test_a_client_that_sends_ahead_is_read_no_faster_than_it_is_served(usual: Site) -> None:
    """Sockets hold some megabytes, and in two seconds some hundred messages are served; the rest has to wait outside."""
    sender = usual.sender()
    worker = usual.relay.workers()[0]
    with usual.client() as client:
        client.open()
        before = resident(worker)
        sent = fill(client, (transaction(sender) + LETTER) * 500, 256 * MEGABYTE)
        assert sent < 12 * MEGABYTE
        assert resident(worker) - before < 8 * MEGABYTE
        client.reset()
    wait_for(lambda: usual.session_count() == 0, "end of the session")


def test_a_client_that_never_takes_its_last_reply_is_cut_off(hasty: Site) -> None:
    with hasty.client() as client:
        narrow_socket(client)
        client.open()
        fill(client, b"EHLO a\r\n" * 8192, 64 * MEGABYTE)
        wait_for(lambda: hasty.session_count() == 0, "end of the session")
        with pytest.raises(ConnectionEnded):
            read_to_the_end(client)
