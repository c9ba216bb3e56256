"""What aiosmtpd's own SMTP class does where ``inbound.wire`` and ``inbound.session`` replace it (docs/decisions.md), beside
what the relay does. When a new release mends one of these, its test fails and the reason for replacing can be looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as LibrarySession

from relay.inbound.session import Session
from tests.bed.certificates import Authority
from tests.bed.client import Client, ConnectionEnded
from tests.bed.waiting import wait_for
from tests.dialogue.sites import Site

MEGABYTE = 1024 * 1024


class Handler:
    """Takes everything and remembers it."""

    def __init__(self) -> None:
        self.senders: list[str] = []
        self.contents: list[bytes] = []
        self.begun = 0
        self.finished = 0
        self.pause: asyncio.Event | None = None

    async def handle_MAIL(  # noqa: N802 - the library's name for it
        self, server: SMTP, session: LibrarySession, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address == "fault@example.net":
            raise KeyError("an inner secret")
        self.senders.append(address)
        envelope.mail_from = address
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: LibrarySession, envelope: Envelope) -> str:  # noqa: N802
        self.begun += 1
        if self.pause is not None:
            await self.pause.wait()
        assert isinstance(envelope.content, bytes)
        self.contents.append(envelope.content)
        self.finished += 1
        return "250 OK"


class Stock:
    """The library's server as it comes, in a thread of its own."""

    def __init__(self, **options: Any) -> None:
        self.handler = Handler()
        self.loop = asyncio.new_event_loop()
        self._options = {"hostname": "mx.example.com", **options}
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(lambda *_: None)
        self._server = self.loop.run_until_complete(
            self.loop.create_server(lambda: SMTP(self.handler, loop=self.loop, **self._options), "127.0.0.1", 0)
        )
        self._ready.set()
        self.loop.run_forever()
        self._server.close()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    def client(self) -> Client:
        return Client(self._server.sockets[0].getsockname())

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)


@contextlib.contextmanager
def stock(**options: Any) -> Iterator[Stock]:
    server = Stock(**options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def library() -> Iterator[Stock]:
    with stock() as server:
        yield server


def replies(client: Client, *said: bytes) -> list[str]:
    """What is answered to octets, one reply for each."""
    with client:
        client.greeting()
        found = []
        for octets in said:
            client.send(octets)
            found.append(str(client.read()))
        return found


EHLO, MAIL, RCPT = b"EHLO a\r\n", b"MAIL FROM:<a@example.net>\r\n", b"RCPT TO:<user@example.com>\r\n"


@pytest.mark.parametrize(
    ("said", "library_says", "relay_says"),
    [
        pytest.param((b"NOOP\r\n",), "250 OK", "250 2.0.0 Ok", id="push: no enhanced codes"),
        pytest.param((b"NOOP\n",), "250 OK", "500 5.5.2", id="_handle_client: a bare LF ends a command"),
        pytest.param((b"HELP\r\n",), "250 Supported commands: AUTH DATA EHLO", "214 2.0.0 See RFC", id="smtp_HELP: tells all"),
        pytest.param((EHLO, b"VRFY user@example.com\r\n"), "252 Cannot VRFY", "252 2.5.0", id="smtp_VRFY"),
        pytest.param((EHLO, b"DATA\r\n"), "503 Error: need RCPT", "503 5.5.1 MAIL first", id="smtp_DATA: order"),
        pytest.param((EHLO, b"MAIL FROM:a@example.net\r\n"), "250 OK", "501 5.1.7", id="_getaddr: no brackets"),
        pytest.param((EHLO, b"MAIL FROM:<a..b@example.net>\r\n"), "250 OK", "501 5.1.7", id="_getaddr: two dots"),
        pytest.param((EHLO, b"MAIL FROM:<a(c)@example.net>\r\n"), "250 OK", "501 5.1.7", id="_getaddr: a comment"),
        pytest.param((EHLO, b"MAIL FROM:<a@example.net\r\n"), "250 OK", "501 5.1.7", id="_getaddr: half a bracket"),
        pytest.param((EHLO, b"MAIL FROM:<a\0b@example.net>\r\n"), "250 OK", "501 5.1.7", id="_getaddr: NUL"),
        pytest.param((EHLO, b"MAIL FROM:<\r\n"), "500 Error: (IndexError) string", "501 5.1.7", id="_getaddr: raises"),
        pytest.param((EHLO, MAIL, b"RCPT TO:<@b.example:u@c.example>\r\n"), "250 OK", "554 5.7.1", id="_getaddr: source route"),
        pytest.param((EHLO, MAIL, b"RCPT TO:<u%c.example@b.example>\r\n"), "250 OK", "554 5.7.1", id="smtp_RCPT: percent hack"),
        pytest.param((EHLO, b"MAIL FROM:<a@example.net> SIZE=\r\n"), "501 Syntax", "501 5.5.4", id="smtp_MAIL: SIZE"),
    ],
)  # fmt: skip
def test_a_dialogue_with_the_library_and_with_the_relay(
    library: Stock, usual: Site, said: tuple[bytes, ...], library_says: str, relay_says: str
) -> None:
    assert replies(library.client(), *said)[-1].startswith(library_says)
    assert replies(usual.client(), *said)[-1].startswith(relay_says)


def test_size_in_arabic_digits() -> None:
    """``smtp_MAIL``: str.isdigit takes any script's digits."""
    with stock(data_size_limit=1000, enable_SMTPUTF8=True) as server:
        assert replies(server.client(), EHLO, "MAIL FROM:<a@example.net> SIZE=١٢\r\n".encode())[-1] == "250 OK"


def test_the_banner_names_the_program_and_its_version(library: Stock) -> None:
    """``_handle_client``; the relay's is in test_commands."""
    with library.client() as client:
        assert "Python SMTP 1." in str(client.greeting())


def test_pipelining_and_enhanced_codes_are_not_offered(library: Stock) -> None:
    """``smtp_EHLO``."""
    with library.client() as client:
        assert {"PIPELINING", "ENHANCEDSTATUSCODES"}.isdisjoint(client.open().extensions)


def test_the_null_sender_reaches_the_program_with_its_brackets(library: Stock) -> None:
    """``smtp_MAIL``: '<>' where every other sender comes without them."""
    replies(library.client(), EHLO, b"MAIL FROM:<>\r\n")
    assert library.handler.senders[-1] == "<>"


def test_a_fault_is_told_to_the_client_as_permanent(library: Stock) -> None:
    """``handle_exception``."""
    said = replies(library.client(), EHLO, b"MAIL FROM:<fault@example.net>\r\n")[-1]
    assert said == "500 Error: (KeyError) 'an inner secret'"


def test_any_number_of_recipients_and_of_errors_is_taken(library: Stock) -> None:
    """``smtp_RCPT``, ``_handle_client``: nothing is counted but unknown verbs."""
    said = replies(library.client(), EHLO, MAIL, *[RCPT] * 300, *[b"RCPT TO:\r\n"] * 100)
    assert {line[:3] for line in said[-100:]} == {"501"}
    assert {line[:3] for line in said[:-100]} == {"250"}


def message(client: Client, octets: bytes) -> str:
    """The reply to a message of these wire octets."""
    with client:
        client.open()
        client.envelope("a@example.net", ["user@example.com"])
        client.expect("354", "DATA")
        client.send(octets + b"\r\n.\r\n")
        return str(client.read())


def test_a_long_line_refuses_the_message(library: Stock, usual: Site) -> None:
    """``smtp_DATA``: real mail has longer lines (aiosmtpd issue 285)."""
    assert message(library.client(), b"x" * 5000) == "500 Line too long (see RFC5321 4.5.3.1.6)"
    assert message(usual.client(), b"x" * 5000).startswith("250 2.0.0")


def test_bare_line_ends_stay_in_the_message(library: Stock) -> None:
    """``smtp_DATA``: what the next server takes for a line or an end is its own affair; the relay mends them."""
    message(library.client(), b"a\nb\rc\n.\nd")
    assert library.handler.contents[-1] == b"a\nb\rc\n.\nd\r\n"


def test_a_line_that_does_not_end_is_kept_whatever_the_size_limit_says() -> None:
    """``smtp_DATA``; the relay's bound is measured in test_limits."""
    with stock(data_size_limit=1000) as server, server.client() as client:
        client.open()
        client.envelope("a@example.net", ["user@example.com"])
        client.expect("354", "DATA")
        tracemalloc.start()
        try:
            for _ in range(20):
                client.send(b"x" * MEGABYTE)
            wait_for(lambda: tracemalloc.get_traced_memory()[0] > 15 * MEGABYTE, "memory taken by the message")
        finally:
            tracemalloc.stop()


def test_a_half_close_cancels_the_program_in_the_middle_of_its_work() -> None:
    """``eof_received``; the relay finishes and answers (test_pipelining)."""
    with stock() as server:
        server.handler.pause = asyncio.Event()
        with server.client() as client:
            client.open()
            client.envelope("a@example.net", ["user@example.com"])
            client.expect("354", "DATA")
            client.send(b".\r\n")
            wait_for(lambda: server.handler.begun, "begin of the work")
            client.half_close()
            assert client.has_ended()
        server.loop.call_soon_threadsafe(server.handler.pause.set)
        with server.client() as client:
            client.open()
        assert (server.handler.begun, server.handler.finished) == (1, 0)


def go_on(client: Client) -> None:
    for _ in range(200):
        client.send(b"a line\r\n")
        with contextlib.suppress(TimeoutError):
            client._receive()


def test_a_slow_message_is_cut_although_it_goes_on() -> None:
    """``_reset_timeout``: the timer runs from the last command, through the message and the program's own work."""
    with stock(timeout=0.5) as server, server.client() as client:
        client.open()
        client.envelope("a@example.net", ["user@example.com"])
        client.expect("354", "DATA")
        client._socket.settimeout(0.1)
        with pytest.raises(ConnectionEnded):
            go_on(client)


def test_starttls_is_begun_again_inside_tls(authority: Authority) -> None:
    """``smtp_STARTTLS``; the relay says 503 (test_tls)."""
    with stock(tls_context=authority.server()) as server, server.client() as client:
        client.open()
        client.starttls(authority.client())
        client.ehlo()
        assert str(client.command("STARTTLS")) == "220 Ready to start TLS"


def test_every_session_changes_the_command_limits_of_all_sessions() -> None:
    """``__init__`` and ``smtp_EHLO``: ``command_size_limits`` belongs to the class."""
    with stock(data_size_limit=1000) as server, server.client() as one, server.client() as two:
        one.open()
        two.open()
        grown = SMTP.command_size_limits["MAIL"]
        one.ehlo()
        assert SMTP.command_size_limits["MAIL"] == grown + 26
        with server.client() as three:
            three.greeting()
            assert SMTP.command_size_limits["MAIL"] < grown


# --- what is left of the library ---------------------------------------------------------------------------------------

CALLED_BY_THE_LOOP = (
    *("connection_made", "data_received", "eof_received", "connection_lost", "pause_writing", "resume_writing"),
    *("__init__", "__del__"),
)


@pytest.mark.parametrize("name", CALLED_BY_THE_LOOP)
def test_nothing_that_an_event_loop_calls_is_the_library_s(name: str) -> None:
    """So none of the above can be reached: its commands are called by its own ``_handle_client`` alone."""
    assert getattr(Session, name) is not getattr(SMTP, name, None)


def test_a_loop_calls_nothing_else() -> None:
    public = {name for name in dir(asyncio.Protocol) if not name.startswith("_")}
    assert public <= set(CALLED_BY_THE_LOOP)


def test_a_session_is_the_library_s_smtp_by_type() -> None:
    assert issubclass(Session, SMTP)
    assert issubclass(SMTP, asyncio.Protocol)
