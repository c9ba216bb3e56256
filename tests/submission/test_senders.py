"""Who may send as whom, through real sessions; and strangers who speak in our name."""

from __future__ import annotations

import pytest

from tests.submission.test_login import by_plain
from tests.submission.world import NEWSLETTER, PASSWORD, TRUSTED, Submission

NOT_OWNED = "553 5.7.1 <{}>: Sender address rejected: not owned by the account that logged in"


@pytest.mark.parametrize(
    ("user", "sender", "taken"),
    [
        ("ann", "ann@example.com", True),
        ("ann", "ANN.SMITH@EXAMPLE.COM", True),
        ("ann", "whoever@team.example.com", True),
        ("ann", "bob@example.com", False),
        ("ann", "ann@elsewhere.example", False),
        ("Bob@Example.com", "bob@example.com", True),
        ("nobody", "nobody@example.com", False),
        ("scanner", "whoever@elsewhere.example", True),
        ("robot", "whoever@example.com", True),
        ("robot", "whoever@elsewhere.example", False),
    ],
)
def test_a_login_sends_as_its_own(bed: Submission, user: str, sender: str, *, taken: bool) -> None:
    with bed.client() as client:
        by_plain(client, user, PASSWORD)
        said = client.command(f"MAIL FROM:<{sender}>")
        assert str(said) == ("250 2.1.0 Ok" if taken else NOT_OWNED.format(sender))
        client.expect("550 5.7.1" if not taken else "503 5.5.1", "MAIL FROM:<>")
        client.quit()


def test_a_login_with_a_restricted_address_is_restricted_whatever_it_writes(bed: Submission) -> None:
    with bed.client() as client:
        by_plain(client, "mute", PASSWORD)
        client.expect("250", "MAIL FROM:<mute@example.com>")
        client.expect("554 5.7.1 <mute@example.com>: Sender address rejected: This account", "RCPT TO:<a@far.example>")
        client.quit()


def test_strangers_do_not_speak_in_our_name(bed: Submission) -> None:
    refused = "550 5.7.1 <boss@example.com>: Sender address rejected: our own domain, from outside"
    with bed.relay.client("mx").open() as client:
        client.expect("250", "MAIL FROM:<boss@example.com>")
        client.expect(refused, "RCPT TO:<user@example.com>")
        client.expect("550 5.1.1", "RCPT TO:<invented@example.com>")
        client.expect("554 5.7.1 <a@far.example>: Relay access denied", "RCPT TO:<a@far.example>")
        client.quit()
    bed.relay.wait_for_log(r"reject: RCPT from unknown\[127\.0\.0\.1\]: 550 5\.7\.1 <boss@example\.com>: .* to=<user@")
    told = bed.relay.command("recipient", "user@example.com", "--sender", "boss@example.com").stdout
    assert refused in told


@pytest.mark.parametrize("source", [TRUSTED, NEWSLETTER])
def test_trusted_and_listed_clients_do(bed: Submission, source: str) -> None:
    with bed.relay.client("mx", source=source).open() as client:
        client.envelope("boss@example.com", ["user@example.com"])
        client.quit()


def test_a_user_on_port_25_does_and_relays(bed: Submission) -> None:
    with bed.client("offering") as client:
        client.expect("250", "MAIL FROM:<ann@example.com>")
        client.expect("550 5.7.1", "RCPT TO:<user@example.com>")
        client.expect("250", "RSET")
        by_plain(client, "ann", PASSWORD)
        client.envelope("ann@example.com", ["user@example.com", "a@far.example"])
        client.quit()
