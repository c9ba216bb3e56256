"""Recipients by file: what a running relay says from maps, alias lists, overrides, tags, case and a postmaster's mailbox."""

from __future__ import annotations

import re

import pytest

from tests.bed.wire import letter
from tests.dialogue.sites import Site


def refusal(codes: str, address: str, text: str) -> str:
    return f"{codes} <{address}>: Recipient address rejected: {text}"


@pytest.mark.parametrize(
    ("address", "reply"),
    [
        ("mapped@example.com", "250 2.1.5 Ok"),
        ("MAPPED@EXAMPLE.COM", "250 2.1.5 Ok"),
        ("left@example.com", refusal("550 5.1.1", "left@example.com", "Has left the company")),
        ("proxy@example.com", "250 2.1.5 Ok"),
        ("second@example.com", "250 2.1.5 Ok"),
        ("alias@example.com", refusal("550 5.1.1", "alias@example.com", "User unknown")),
        ("user+news@example.com", "250 2.1.5 Ok"),
        ("nobody+news@example.com", refusal("550 5.1.1", "nobody+news@example.com", "User unknown")),
        ("bob@example.com", refusal("450 4.2.1", "bob@example.com", "On leave")),
        ("bob+x@example.com", refusal("450 4.2.1", "bob+x@example.com", "On leave")),
        ("carol@example.com", "250 2.1.5 Ok"),
        ("whoever@wide.example.com", "250 2.1.5 Ok"),
        ("closed@wide.example.com", refusal("550 5.7.1", "closed@wide.example.com", "Closed")),
        ("Bob@exact.example.com", "250 2.1.5 Ok"),
        ("bob@exact.example.com", refusal("550 5.1.1", "bob@exact.example.com", "User unknown")),
        ("gone@any.example.com", refusal("550 5.1.6", "gone@any.example.com", "Moved")),
        ("postmaster", "250 2.1.5 Ok"),
        ("Postmaster@example.com", "250 2.1.5 Ok"),
        ("postmaster@wide.example.com", "250 2.1.5 Ok"),
    ],
)
def test_each_recipient_gets_its_reply_and_the_command_line_says_the_same(
    listed: Site, address: str, reply: str
) -> None:
    with listed.client() as client:
        client.open()
        client.expect("250", "MAIL FROM:<a@example.net>")
        assert str(client.command(f"RCPT TO:<{address}>")) == reply
    told = listed.relay.command("recipient", address)
    assert told.stdout.splitlines()[1] == reply


def test_mail_goes_to_the_mailbox_of_postmaster_and_to_the_address_without_its_tag(listed: Site) -> None:
    sender = listed.sender()
    with listed.client() as client:
        recipients = ["postmaster", "user+news@example.com", "user+x@tagged.example.com"]
        assert client.open().deliver(sender, recipients, letter()).code == 250
        client.quit()
    arrived = {recipient for message in listed.arrived(sender, 2) for recipient in message.recipients}
    assert arrived == {"hostmaster@example.com", "user+news@example.com", "user@tagged.example.com"}


def test_a_refusal_of_the_operator_is_logged_with_its_rule(listed: Site) -> None:
    with listed.client() as client:
        client.open()
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.expect("550", "RCPT TO:<left@example.com>")
        client.quit()
    listed.relay.wait_for_log(
        re.escape("NOQUEUE: reject: RCPT from unknown[127.0.0.1]: 550 5.1.1 <left@example.com>: ")
        + "Recipient address rejected: Has left the company; from=<a@example.net> to=<left@example.com>"
    )


def test_an_override_of_the_configuration_is_in_force_with_a_reload_and_no_build(listed: Site) -> None:
    def said() -> str:
        with listed.client() as client:
            client.open()
            client.expect("250", "MAIL FROM:<a@example.net>")
            return str(client.command("RCPT TO:<new@any.example.com>"))

    assert said() == "250 2.1.5 Ok"
    overrides = listed.relay.config["directory"]["overrides"]
    overrides.append({"address": "new@any.example.com", "action": "REJECT No such thing"})
    listed.relay.configure({})
    assert listed.relay.command("reload").returncode == 0
    assert said() == refusal("554 5.7.1", "new@any.example.com", "No such thing")
    overrides.pop()
    listed.relay.configure({})
    assert listed.relay.command("reload").returncode == 0
    assert said() == "250 2.1.5 Ok"
