"""TLS from the start and by STARTTLS: nothing that was said in the clear counts afterwards (RFC 3207 §4.2)."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl

import pytest

from tests.bed.client import Client, ConnectionEnded
from tests.bed.next_hop import Hold, Step
from tests.bed.wire import after_trace, letter, stuffed
from tests.dialogue.sites import Site

BIG = letter(
    body=b"".join(b"%07d a line of a message that needs many records\r\n" % number for number in range(20_000))
)


def context(site: Site) -> ssl.SSLContext:
    return site.authority.client()


def in_tls(site: Site, listener: str = "mx") -> Client:
    """A client behind STARTTLS, EHLO not yet said again."""
    client = site.client(listener).open()
    client.starttls(context(site))
    return client


def test_a_message_comes_in_by_starttls(usual: Site) -> None:
    sender = usual.sender()
    with in_tls(usual) as client:
        assert "STARTTLS" not in client.ehlo()
        assert client.deliver(sender, "user@example.com", BIG).code == 250
        client.quit()
    [message] = usual.arrived(sender)
    assert after_trace(message.message) == BIG
    assert b" with ESMTPS id " in message.message
    usual.relay.wait_for_log(r"TLS connection established from unknown\[127\.0\.0\.1\]: TLSv1\.[23] with cipher \w+")


def test_ehlo_has_to_be_said_again(usual: Site) -> None:
    with in_tls(usual) as client:
        client.expect("503 5.5.1 Say EHLO first", "MAIL FROM:<a@example.net>")
        client.ehlo()
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.quit()


def test_a_transaction_of_before_is_gone(usual: Site) -> None:
    with usual.client() as client:
        client.open()
        client.envelope("a@example.net", ["user@example.com"])
        client.starttls(context(usual))
        client.expect("503 5.5.1 Say EHLO first", "DATA")
        client.ehlo()
        client.expect("503 5.5.1 MAIL first", "DATA")
        client.expect("503 5.5.1 MAIL first", "RCPT TO:<user@example.com>")
        client.quit()


def test_starttls_inside_tls_is_refused(usual: Site) -> None:
    with in_tls(usual) as client:
        client.ehlo()
        client.expect("503 5.5.1 TLS is already active", "STARTTLS")
        client.quit()


@pytest.mark.parametrize(
    "injected",
    [
        b"NOOP\r\n",
        b"EHLO smuggler.example\r\nMAIL FROM:<smuggled@example.net>\r\nRCPT TO:<user@example.com>\r\nDATA\r\n",
        b"EHLO smuggler.example\r\nMAIL FROM:<smuggled@example.net>\r\nRCPT TO:<user@exa",
        b"x" * 100_000 + b"\r\n",
        b"RSET\r\n" * 5_000,
    ],
    ids=["a command", "a transaction", "half a line", "more than is kept", "very many commands"],
)
def test_what_is_sent_with_starttls_is_dropped(usual: Site, injected: bytes) -> None:
    """CVE-2011-0411 and its kin; RFC 3207 §4.2 as clarified by its erratum 4992."""
    with usual.client() as client:
        client.open()
        client.send(b"STARTTLS\r\n" + injected)
        assert client.read().code == 220
        # Had the relay kept or answered any of it, its replies would come first, or MAIL would find an EHLO.
        with contextlib.suppress(ConnectionEnded, ssl.SSLError, ConnectionError):
            client.wrap(context(usual))
            client.expect("503 5.5.1 Say EHLO first", "MAIL FROM:<a@example.net>")
            client.ehlo()
            client.expect("503 5.5.1 MAIL first", "RCPT TO:<user@example.com>")
            client.quit()
    usual.nothing_but()


def test_one_command_injected_with_starttls_leaves_the_handshake_alone(usual: Site) -> None:
    with usual.client() as client:
        client.open()
        client.send(b"STARTTLS\r\nEHLO smuggler.example\r\n")
        assert client.read().code == 220
        client.wrap(context(usual))
        client.expect("503 5.5.1 Say EHLO first", "MAIL FROM:<a@example.net>")
        client.quit()


def test_commands_in_front_of_starttls_in_one_packet_are_answered_in_the_clear(usual: Site) -> None:
    with usual.client() as client:
        client.greeting()
        client.send(b"EHLO a\r\nMAIL FROM:<a@example.net>\r\nSTARTTLS\r\n")
        assert [client.read().code for _ in range(3)] == [250, 250, 220]
        client.wrap(context(usual))
        client.ehlo()
        client.expect("503 5.5.1 MAIL first", "RCPT TO:<user@example.com>")
        client.quit()


def test_nothing_is_done_behind_quit(usual: Site) -> None:
    sender = usual.sender()
    with in_tls(usual) as client:
        client.ehlo()
        transaction = (
            f"MAIL FROM:<{sender}>\r\nRCPT TO:<user@example.com>\r\nDATA\r\n".encode() + stuffed(letter()) + b".\r\n"
        )
        client.send(b"QUIT\r\n" + transaction)
        assert client.read().code == 221
        with contextlib.suppress(ConnectionEnded):
            client.send(transaction)
        assert client.has_ended()
    assert usual.from_(sender) == []


def test_a_client_that_closes_tls_while_the_next_hop_thinks_has_its_message_delivered(usual: Site) -> None:
    sender = usual.sender()
    with in_tls(usual) as client:
        client.ehlo()
        client.envelope(sender, ["user@example.com"])
        client.expect("354", "DATA")
        hold = usual.hop.on(Step.FINAL, Hold()).hold
        client.send(stuffed(letter()) + b".\r\n")
        hold.wait_reached()
    usual.hop.behave()
    usual.arrived(sender)


# --- TLS from the start ------------------------------------------------------------------------------------------------


def test_implicit_tls_speaks_first_inside_tls(usual: Site) -> None:
    """RFC 8314 §3.3."""
    with usual.client("submissions", tls=context(usual)) as client:
        assert client.greeting().lines == ("mx.example.com ESMTP",)
        assert "STARTTLS" not in client.ehlo()
        client.expect("503 5.5.1 TLS is already active", "STARTTLS")
        client.quit()


def test_a_client_hello_that_comes_before_the_hub_s_answer_is_not_lost(usual: Site) -> None:
    """The hub is asked whether there is room; the client's first octets come meanwhile."""
    os.kill(usual.relay.hub(), signal.SIGSTOP)
    try:
        ours = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context(usual).wrap_bio(*ours, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        hello = ours[1].read()
        client = usual.client("submissions")
        client.send(hello)
    finally:
        os.kill(usual.relay.hub(), signal.SIGCONT)
    with client:
        ours[0].write(client._receive())
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                ours[0].write(client._receive())
        client.send(ours[1].read())
        banner = b""
        while not banner.endswith(b"\r\n"):
            try:
                banner += tls.read(4096)
            except ssl.SSLWantReadError:
                ours[0].write(client._receive())
        assert banner == b"220 mx.example.com ESMTP\r\n"


# --- who must use TLS, and who must log in ------------------------------------------------------------------------------

NEED_TLS = "530 5.7.0 Must issue a STARTTLS command first"
NEED_AUTH = "530 5.7.0 Authentication required"


def test_submission_wants_tls_then_a_login(usual: Site) -> None:
    """RFC 3207 §4, RFC 6409 §4.3, RFC 4954 §6."""
    with usual.client("submission") as client:
        client.open()
        client.expect(NEED_TLS, "MAIL FROM:<a@example.net>")
        client.expect("503 5.5.1", "RCPT TO:<user@example.com>")
        client.starttls(context(usual))
        client.ehlo()
        client.expect(NEED_AUTH, "MAIL FROM:<a@example.net>")
        client.expect(NEED_AUTH, "MAIL FROM:<>")
        client.expect("503 5.5.1", "RCPT TO:<user@example.com>")
        client.quit()


def test_submission_by_implicit_tls_wants_a_login(usual: Site) -> None:
    with usual.client("submissions", tls=context(usual)) as client:
        client.open()
        client.expect(NEED_AUTH, "MAIL FROM:<a@example.net>")
        client.quit()


def test_a_trusted_client_has_to_log_in_for_submission_too(usual: Site) -> None:
    with usual.client("submission", source="127.0.0.3") as client:
        client.open()
        client.expect(NEED_TLS, "MAIL FROM:<a@example.net>")
        client.quit()


def test_an_mx_that_requires_tls_takes_mail_behind_starttls_only(usual: Site) -> None:
    sender = usual.sender()
    with usual.client("strict") as client:
        client.open()
        client.expect(NEED_TLS, f"MAIL FROM:<{sender}>")
        client.starttls(context(usual))
        client.ehlo()
        assert client.deliver(sender, "user@example.com", letter()).code == 250
        client.quit()
    usual.arrived(sender)


def test_a_relay_without_a_certificate_neither_offers_nor_does_starttls(narrow: Site) -> None:
    with narrow.client() as client:
        assert "STARTTLS" not in client.open().extensions
        client.expect("454 4.7.0 TLS is not available", "STARTTLS")
        client.quit()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_from_1_2_on(usual: Site, version: ssl.TLSVersion) -> None:
    mine = context(usual)
    mine.minimum_version = mine.maximum_version = version
    with usual.client().open() as client:
        client.starttls(mine)
        assert client.tls_version == {ssl.TLSVersion.TLSv1_2: "TLSv1.2"}.get(version, "TLSv1.3")
        client.ehlo()
        client.quit()
