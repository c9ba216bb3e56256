"""The PROXY protocol: the client that a listed balancer names is the client, and nobody else may name one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bed.client import Client, ConnectionEnded
from tests.bed.ports import free_port
from tests.bed.waiting import wait_for
from tests.bed.wire import letter
from tests.dialogue.sites import Site

V2 = b"\r\n\r\n\x00\r\nQUIT\n"
OUTSIDE = "someone@elsewhere.example"


def v1(client: str, family: str = "TCP4", balancer: str = "127.0.0.1") -> bytes:
    return f"PROXY {family} {client} {balancer} 40000 25\r\n".encode()


def v2(addresses: bytes, kind: bytes = b"\x21\x11", more: bytes = b"") -> bytes:
    return V2 + kind + (len(addresses) + len(more)).to_bytes(2, "big") + addresses + more


IPV4 = bytes([192, 0, 2, 7, 127, 0, 0, 1]) + b"\x9c\x40\x00\x19"
IPV6 = bytes.fromhex("20010db8000000000000000000000007") * 2 + b"\x9c\x40\x00\x19"
TLV = b"\x04\x00\x03abc"

HEADERS = {
    "v1": (v1("192.0.2.7"), "192.0.2.7"),
    "v1 IPv6": (v1("2001:db8::7", "TCP6", "::1"), "2001:db8::7"),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    "v1 unknown with more": (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", "127.0.0.1"),
    "v2": (v2(IPV4), "192.0.2.7"),
    "v2 with more": (v2(IPV4, more=TLV), "192.0.2.7"),
    "v2 IPv6": (v2(IPV6, b"\x21\x21"), "2001:db8::7"),
    "v2 local": (v2(b"", b"\x20\x00"), "127.0.0.1"),
    "v2 local with an address": (v2(IPV4, b"\x20\x11"), "127.0.0.1"),
    "v2 unspecified": (v2(b"", b"\x21\x00"), "127.0.0.1"),
}

MALFORMED = {
    "a command": b"EHLO client.example.net\r\n",
    "nothing but a line end": b"\r\n" * 10,
    "lower case": b"proxy TCP4 192.0.2.7 127.0.0.1 1 25\r\n",
    "no addresses": b"PROXY TCP4\r\n",
    "no address": b"PROXY TCP4 client.example.net 127.0.0.1 1 25\r\n",
    "the wrong family": b"PROXY TCP6 192.0.2.7 127.0.0.1 1 25\r\n",
    "two families": b"PROXY TCP4 192.0.2.7 ::1 1 25\r\n",
    "a port too high": b"PROXY TCP4 192.0.2.7 127.0.0.1 1 65536\r\n",
    "another protocol": b"PROXY UDP4 192.0.2.7 127.0.0.1 1 25\r\n",
    "bare LF": b"PROXY TCP4 192.0.2.7 127.0.0.1 1 25\n" + b"x" * 100,
    "too long": b"PROXY UNKNOWN " + b"x" * 200 + b"\r\n",
    "endless": b"PROXY " + b"x" * 5000,
    "a scope": b"PROXY TCP6 fe80::1%eth0 ::1 1 25\r\n",
    "v2 of version 3": v2(IPV4, b"\x31\x11"),
    "v2 with an unknown command": v2(IPV4, b"\x2f\x11"),
    "v2 by UDP": v2(IPV4, b"\x21\x12"),
    "v2 of a socket file": v2(b"x" * 216, b"\x21\x31"),
    "v2 too short": v2(IPV4[:8]),
    "v2 too long": v2(b"x" * 5000),
}


def behind(site: Site, header: bytes, listener: str = "mx") -> Client:
    client = site.client(listener)
    client.send(header)
    return client


@pytest.mark.parametrize("name", HEADERS)
def test_the_named_client_counts(fronted: Site, name: str) -> None:
    header, address = HEADERS[name]
    sender = fronted.sender()
    with behind(fronted, header) as client:
        client.open().envelope(sender, ["user@example.com"])
        outside = client.command(f"RCPT TO:<{OUTSIDE}>")
        assert outside.code == (250 if address == "192.0.2.7" else 554)  # trusted.networks
        client.expect("250", "RSET")
        assert client.deliver(sender, "user@example.com", letter()).code == 250
        client.quit()
    [message] = fronted.arrived(sender)
    literal = f"IPv6:{address}" if ":" in address else address
    assert f"(unknown [{literal}])".encode() in message.message
    fronted.relay.wait_for_log(rf"client=unknown\[{address}\].*from=<{sender}>")


@pytest.mark.parametrize("name", ["v1", "v2 with more"])
def test_packets_make_no_difference(fronted: Site, name: str) -> None:
    header, address = HEADERS[name]
    with fronted.client() as client:
        for at in range(len(header)):
            client.send(header[at : at + 1])
        client.open()
        client.quit()
    with behind(fronted, header + b"EHLO all-in-one\r\nNOOP\r\nQUIT\r\n") as client:
        assert [client.read().code for _ in range(4)] == [220, 250, 250, 221]
    fronted.relay.wait_for_log(rf"disconnect from unknown\[{address}\]")


@pytest.mark.parametrize("header", [v1("192.0.2.7"), v2(IPV4)], ids=["v1", "v2"])
@pytest.mark.parametrize("listener", ["mx", "submissions"])
def test_the_header_stands_before_tls(fronted: Site, header: bytes, listener: str) -> None:
    with behind(fronted, header, listener) as client:
        if listener == "mx":
            client.open()
            client.starttls(fronted.authority.client())
            client.ehlo()
            client.expect("250", "MAIL FROM:<a@example.net>")
            client.expect("250", f"RCPT TO:<{OUTSIDE}>")
        else:
            client.wrap(fronted.authority.client())
            client.open()
        client.quit()
    fronted.relay.wait_for_log(r"TLS connection established from unknown\[192\.0\.2\.7\]")


def silently_closed(client: Client) -> None:
    with pytest.raises(ConnectionEnded, match=r"unread: b''|reset|broken|Broken|Connection"):
        client.read()
    assert client._buffer == b""


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_header_is_closed_without_a_word(fronted: Site, name: str) -> None:
    with behind(fronted, MALFORMED[name]) as client:
        silently_closed(client)
    fronted.relay.wait_for_log(r"proxy_refused listener=mx peer=127\.0\.0\.1 cause=")


@pytest.mark.parametrize("header", [b"", v1("192.0.2.7"), v2(IPV4)], ids=["none", "v1", "v2"])
def test_nobody_but_the_balancer_may_connect(fronted: Site, header: bytes) -> None:
    with fronted.client(source="127.0.0.9") as client:
        try:
            client.send(header)
        except ConnectionEnded:
            return
        silently_closed(client)
    fronted.relay.wait_for_log(
        r"proxy_refused listener=mx peer=127\.0\.0\.9 cause=.not one of listener\.proxy_protocol"
    )


def test_where_no_balancer_is_listed_the_header_is_an_unknown_command(fronted: Site) -> None:
    with behind(fronted, v1("192.0.2.7"), "open") as client:
        client.greeting()
        client.expect("500 5.5.2")
        client.ehlo()
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.expect("554", f"RCPT TO:<{OUTSIDE}>")
        client.quit()


def test_places_are_counted_by_client_and_not_by_balancer(fronted: Site) -> None:
    clients = [behind(fronted, v1("192.0.2.20")) for _ in range(3)]
    for client in clients:
        client.greeting()
    with behind(fronted, v1("192.0.2.20")) as client:
        client.expect("421 4.7.0")
    with behind(fronted, v1("192.0.2.21")) as client:
        client.greeting()
        client.quit()
    for client in clients:
        client.quit()
        client.close()


def test_tls_is_required_of_some_networks_only(fronted: Site) -> None:
    """RFC 3207 §4."""
    sender = fronted.sender()
    for address, code in (("192.0.2.64", 530), ("192.0.2.127", 530), ("192.0.2.128", 250), ("192.0.2.63", 250)):
        with behind(fronted, v1(address)) as client:
            client.open()
            assert client.command(f"MAIL FROM:<{sender}>").code == code
            client.quit()
    with behind(fronted, v1("192.0.2.64")) as client:
        client.open()
        client.starttls(fronted.authority.client())
        client.ehlo()
        assert client.deliver(sender, "user@example.com", letter()).code == 250
        client.quit()


# --- the real thing ----------------------------------------------------------------------------------------------------


@contextmanager
def haproxy(folder: Path, site: Site) -> Iterator[dict[str, int]]:
    """HAProxy in front of the relay: ports by version of the header."""
    ports = {"send-proxy": free_port(), "send-proxy-v2": free_port()}
    text = (
        "global\n  maxconn 50\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
    )
    for option, port in ports.items():
        text += f"listen {option}\n  bind 127.0.0.1:{port}\n  server relay 127.0.0.1:{site.relay.ports['mx']} {option} check\n"
    config = folder / "haproxy.cfg"
    config.write_text(text)
    process = subprocess.Popen(
        ["haproxy", "-db", "-f", str(config)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        yield ports
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.needs("haproxy")
def test_haproxy_says_who_the_client_is(fronted: Site, tmp_path: Path) -> None:
    sender = fronted.sender()
    with haproxy(tmp_path, fronted) as ports:
        for port in ports.values():

            def connected(port: int = port) -> Client | None:
                try:
                    client = Client(("127.0.0.1", port), source="127.0.0.77")
                    client.greeting()
                except (OSError, ConnectionEnded):
                    time.sleep(0.05)
                    return None
                return client

            with wait_for(connected, lambda: "haproxy to listen") as client:
                client.ehlo()
                client.starttls(fronted.authority.client())
                client.ehlo()
                assert client.deliver(sender, "user@example.com", letter()).code == 250
                client.quit()
    for message in fronted.arrived(sender, len(ports)):
        assert b"(unknown [127.0.0.77])" in message.message
