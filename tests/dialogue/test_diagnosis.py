"""``relay sender`` and ``relay recipient`` say what the running relay says, of the addresses where the two might part."""

from __future__ import annotations

import pytest

from tests.dialogue.sites import Site

SENDERS = (
    "user@example.com",
    "restricted@example.com",
    '"restricted"@example.com',
    "postmaster",
    "a@b@c",
    "@a:b@c",
    "",
)
RECIPIENTS = (
    "user@example.com",
    '"user"@example.com',
    "nobody@example.com",
    "postmaster",
    "a%b@any.example.com",
    "a@[127.0.0.1]",
)


@pytest.mark.parametrize("address", SENDERS)
def test_a_sender_is_judged_as_by_the_relay(usual: Site, address: str) -> None:
    with usual.client() as client:
        client.open()
        said = client.command(f"MAIL FROM:<{address}>")
        if said.code == 250:
            rcpt = client.command("RCPT TO:<user@example.com>")
            said = said if rcpt.code == 250 else rcpt
    told = usual.relay.command("sender", f"<{address}>", "--client", "127.0.0.1")
    assert told.stdout.splitlines()[1] == str(said)
    assert told.returncode == (0 if said.code == 250 else 1)


@pytest.mark.parametrize("address", RECIPIENTS)
def test_a_recipient_is_judged_as_by_the_relay(usual: Site, address: str) -> None:
    with usual.client() as client:
        client.open()
        client.expect("250", "MAIL FROM:<a@example.net>")
        said = client.command(f"RCPT TO:<{address}>")
    told = usual.relay.command("recipient", address, "--sender", "a@example.net")
    assert told.stdout.splitlines()[1] == str(said)
    assert told.returncode == (0 if said.code == 250 else 1)
