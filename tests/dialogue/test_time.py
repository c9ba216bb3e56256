"""Clients that are slow, silent or stuck: every wait has its end, and its place is free for another afterwards."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.bed.client import Client, ConnectionEnded
from tests.bed.waiting import wait_for
from tests.dialogue.sites import Site

TIMED_OUT = "421 4.4.2 Timed out waiting for you"


def ended_by_time(client: Client) -> None:
    assert str(client.read()) == TIMED_OUT
    assert client.has_ended()


@pytest.mark.parametrize(
    "said",
    [
        (),
        ("EHLO a",),
        ("EHLO a", "MAIL FROM:<a@example.net>"),
        ("EHLO a", "MAIL FROM:<a@example.net>", "RCPT TO:<user@example.com>"),
        ("EHLO a", "MAIL FROM:<a@example.net>", "RCPT TO:<user@example.com>", "DATA"),
    ],
    ids=["banner", "EHLO", "MAIL", "RCPT", "DATA"],
)
def test_silence_ends_the_session(hasty: Site, said: tuple[str, ...]) -> None:
    """RFC 5321 §4.5.3.2.7."""
    with hasty.client() as client:
        client.greeting()
        for command in said:
            assert client.command(command).code < 400
        ended_by_time(client)


def test_silence_within_a_message_ends_the_session_and_delivers_nothing(hasty: Site) -> None:
    sender = hasty.sender()
    with hasty.client() as client:
        client.open()
        client.envelope(sender, ["user@example.com"])
        client.expect("354", "DATA")
        client.send(b"Subject: x\r\n\r\nhalf a message\r\n.")
        ended_by_time(client)
    assert hasty.from_(sender) == []


def test_a_command_that_never_ends_does_not_keep_the_session(hasty: Site) -> None:
    """An octet now and then is no sign of life: the deadline is the command's."""
    with hasty.client() as client:
        client.open()
        client._socket.settimeout(0.2)
        said = b""
        with contextlib.suppress(ConnectionEnded):
            for _ in range(100):
                client.send(b"X")
                with contextlib.suppress(TimeoutError):
                    said += client._receive()
        assert said == f"{TIMED_OUT}\r\n".encode()


def test_commands_keep_the_session(hasty: Site) -> None:
    with hasty.client() as client:
        client.open()
        client._socket.settimeout(0.4)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                client._receive()
            client.expect("250", "NOOP")
        client._socket.settimeout(20)
        client.quit()


# --- TLS handshakes: three sessions are all that this client may have, so each lost place would show ------------------------


def all_places_are_free(site: Site) -> None:
    """The client gets all its sessions: places are given back as the hub hears of them."""

    def place() -> Client | None:
        client = site.client()
        if client.read().code == 220:
            return client
        client.close()
        return None

    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = wait_for(place, "a free place")
            stack.enter_context(client)


def test_a_client_that_connects_for_tls_and_says_nothing_is_dropped(hasty: Site) -> None:
    for _ in range(2):
        clients = [hasty.client("submissions") for _ in range(3)]
        for client in clients:
            assert client.has_ended()
            client.close()
        all_places_are_free(hasty)


@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
def test_a_client_that_leaves_its_handshake_gives_its_place_back(hasty: Site, how: str) -> None:
    for _ in range(6):
        client = wait_for(lambda: hasty.client("submissions"), "connection")
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03half a ClientHello")
        match how:
            case "reset":
                client.reset()
            case "close":
                client.close()
            case _:
                client.half_close()
                assert client.has_ended()
                client.close()
    all_places_are_free(hasty)
    wait_for(lambda: hasty.session_count("submissions") == 0, "end of the sessions")


def test_a_client_that_resets_after_starttls_gives_its_place_back(hasty: Site) -> None:
    for _ in range(6):
        client = hasty.client()
        if client.read().code == 220:  # the place of the one before may still be taken
            client.ehlo()
            client.expect("220", "STARTTLS")
            client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03half a ClientHello")
        client.reset()
    all_places_are_free(hasty)


def test_a_handshake_begun_by_starttls_has_its_time_too(hasty: Site) -> None:
    with hasty.client() as client:
        client.open()
        client.expect("220", "STARTTLS")
        assert client.has_ended()
    all_places_are_free(hasty)


def test_plain_speech_on_the_tls_port_gets_no_plain_word(hasty: Site) -> None:
    with socket.create_connection(hasty.relay.address("submissions"), 20) as raw:
        raw.sendall(b"EHLO client.example.net\r\n")
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while octets := raw.recv(4096):
                heard += octets
    assert b"220" not in heard
    assert b"250" not in heard
    hasty.relay.wait_for_log(r"warning: TLS handshake failed with unknown\[127\.0\.0\.1\]: ")
