"""Random command lines and bodies: no traceback, no hang, a reply for each line, each message as the rule says.

The bulk, a minute of it, is held with the relay's own sessions in memory, the rest with a running relay; ``make fuzz`` plays
more of both.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.bed.client import Client, ConnectionEnded
from tests.bed.wire import after_trace
from tests.dialogue.sites import Site
from tests.fuzz.noise import CLEAN, PIECES, body, command, is_clean, normalized, packets
from tests.fuzz.run import bodies, commands

GROUPS = int(os.environ.get("FUZZ_GROUPS", "150"))
"""Groups of commands, and bodies, that go over real sockets."""


@pytest.mark.parametrize("seed", range(2))
async def test_no_command_line_makes_the_session_stumble(seed: int) -> None:
    assert await commands(1_000_000, seed) > 1000


@pytest.mark.parametrize("seed", range(2))
async def test_bodies_arrive_octet_for_octet_or_by_the_rule(seed: int) -> None:
    assert 1000 < await bodies(90_000, seed) < 90_000


def test_over_sockets_nothing_hangs_and_the_relay_serves_on(usual: Site) -> None:
    rng = random.Random(GROUPS)
    for _ in range(GROUPS):
        with usual.client() as client:
            try:
                client.send(b"".join(command(rng) for _ in range(rng.randrange(1, 40))))
                client.half_close()
                while not client.has_ended():
                    client._buffer = b""
            except (ConnectionEnded, OSError):
                continue
    with usual.client() as client:
        assert client.open().deliver(usual.sender(), "user@example.com", b"A: b\r\n\r\n").code == 250
        client.quit()
    assert usual.relay.grep("session_fault|Traceback") == []


def test_over_sockets_bodies_arrive_as_the_rule_says(usual: Site) -> None:
    rng = random.Random(GROUPS)
    sender = usual.sender()
    sent: list[bytes] = []
    with usual.client() as client:
        client.open()
        for number in range(GROUPS):
            text = b"Subject: %d\r\n\r\n" % number + body(rng, rng.choice((CLEAN, PIECES)))
            _send(client, sender, text, rng)
            sent.append(text if is_clean(text) else normalized(text))
        client.quit()
    assert [after_trace(one.wire) for one in usual.arrived(sender, GROUPS)] == sent


def _send(client: Client, sender: str, text: bytes, rng: random.Random) -> None:
    client.envelope(sender, ["user@example.com"])
    client.expect("354", "DATA")
    for packet in packets(rng, text + b".\r\n"):
        client.send(packet)
    client.expect("250")
