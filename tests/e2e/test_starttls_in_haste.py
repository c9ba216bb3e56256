"""Clients that begin the handshake the moment they read 220 to STARTTLS, many at once."""

from __future__ import annotations

import smtplib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bed.certificates import Authority
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import NextHop

CLIENTS = 16
SESSIONS = 10
HANDSHAKE_S = 20.0


def test_no_handshake_is_lost_however_soon_it_follows_the_reply(
    make_relay: MakeRelay, next_hop: NextHop, authority: Authority, bed_folder: Path
) -> None:
    """What arrives between the reply and the TLS layer's start belongs to TLS; dropped, the client waits for ever."""
    relay = make_relay(next_hop, certificate=authority.files(bed_folder, "localhost", "127.0.0.1"))

    context = authority.client()

    def client(_: int) -> int:
        done = 0
        for _ in range(SESSIONS):
            with smtplib.SMTP(*relay.address(), local_hostname="client.example.net", timeout=HANDSHAKE_S) as smtp:
                smtp.starttls(context=context)
                done += smtp.noop()[0] == 250
        return done

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(client, range(CLIENTS))) == [SESSIONS] * CLIENTS
