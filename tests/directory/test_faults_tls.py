"""The faults of ``test_faults`` once more behind TLS, from the start and after StartTLS, and those of the handshake itself.

All of them in one test for each way: the old snapshot stays whatever breaks, and one good reading at the end needs no help.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.ldap_faults import FaultProxy, Start, silent
from tests.bed.slapd import Slapd, Truth
from tests.directory.conftest import Site, agrees
from tests.directory.test_faults import ACTS, GREETINGS, greet, reset_at_once

pytestmark = pytest.mark.needs("slapd")


def hello_and(end: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    def do(client: socket.socket) -> None:
        client.recv(1)
        end(client)

    return do


HANDSHAKES: dict[str, tuple[Callable[[socket.socket], None], set[str]]] = {
    "handshake: reset": (hello_and(reset_at_once), {"lost", "tls"}),
    "handshake: close": (hello_and(lambda client: None), {"lost", "tls"}),
    "handshake: hang": (silent, {"slow"}),
    "handshake: another protocol": (greet(b"220 mail.example.com ESMTP\r\n"), {"tls"}),
    "handshake: alert": (greet(b"\x15\x03\x03\x00\x02\x02\x28"), {"tls"}),
}
SLOW = 0.3
SOME = 4
"""After StartTLS the way is the same as from the start: one in so many of the later faults will do."""


@pytest.mark.parametrize("start", ["tls", "starttls"])
def test_no_fault_behind_tls_changes_anything(
    start: Start, ad: tuple[Slapd, Truth], authority: Authority, tmp_path: Path
) -> None:
    server, truth = ad
    proxy = FaultProxy(server.port, authority.server(), start)
    try:
        profile = server.profile(
            servers=[proxy.url], answer_timeout_s=SLOW, page_timeout_s=10.0, connect_timeout_s=2 * SLOW
        )
        site = Site(tmp_path, profile, domains=("corp.test", "office.corp.test"))
        # A busy machine may need longer than that for a good reading: it has all the time.
        site.good_in(30.0)
        generation = site.snapshot.generation
        told: dict[str, str] = {}
        expected: dict[str, set[str]] = {}
        # Behind StartTLS it may come together with the answer in clear, and then it is not believed: nothing comes.
        for name, (handshake, reasons) in HANDSHAKES.items():
            proxy.handshake, expected[name] = handshake, reasons | {"slow"}
            told[name] = site.sync().reason
        proxy.handshake = None
        for name, (greeting, reasons) in GREETINGS.items():
            proxy.greeting, expected[name] = greeting, reasons
            told[name] = site.sync().reason
        proxy.greeting = None
        for number, (name, (act, reasons)) in enumerate(ACTS.items()):
            if start == "starttls" and number % SOME:
                continue
            proxy.act, expected[name] = act, reasons | {"slow"}
            told[name] = site.sync().reason
        proxy.act = None
        assert {name: reason for name, reason in told.items() if reason not in expected[name]} == {}
        assert len(told) >= (40 if start == "tls" else 15)
        assert site.snapshot.generation == generation
        agrees(site.snapshot, truth)
        site.good_in(30.0)
        agrees(site.snapshot, truth)
    finally:
        proxy.close()
