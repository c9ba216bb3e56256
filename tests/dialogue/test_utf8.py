"""SMTPUTF8 (RFC 6531): UTF-8 in addresses, announced and not, as a client meets it."""

from __future__ import annotations

import unicodedata

import pytest

from tests.dialogue.sites import Site

UTF8 = "SMTPUTF8"
NOT_ANNOUNCED = "553 5.6.7 Addresses must be ASCII without SMTPUTF8"


def hop_takes_utf8(site: Site) -> None:
    if "SMTPUTF8" not in site.hop.extensions:
        site.hop.extensions = (*site.hop.extensions, "SMTPUTF8")


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("MAIL FROM:<jörg@example.net>", NOT_ANNOUNCED),
        ("MAIL FROM:<jörg@example.net> SIZE=10", NOT_ANNOUNCED),
        (b"MAIL FROM:<j\xf6rg@example.net> SMTPUTF8", NOT_ANNOUNCED),  # Latin-1 is no UTF-8
        ("MAIL FROM:<jörg@example.net> SMTPUTF8", "250 2.1.0"),
        ("MAIL FROM:<jörg@bücher.example> smtputf8 BODY=8BITMIME RET=HDRS", "250 2.1.0"),
        ("MAIL FROM:<邮箱@例子.测试> SMTPUTF8", "250 2.1.0"),
        ('MAIL FROM:<"jö rg"@example.net> SMTPUTF8', "250 2.1.0"),
        ("MAIL FROM:<a\u202eb@example.net> SMTPUTF8", "501 5.1.7"),  # turns the direction of writing
        ("MAIL FROM:<a\u0085b@example.net> SMTPUTF8", "501 5.1.7"),  # a line end to somebody
        ("MAIL FROM:<a\u2028b@example.net> SMTPUTF8", "501 5.1.7"),
        ("MAIL FROM:<a\u3000b@example.net> SMTPUTF8", "501 5.1.7"),
        ("MAIL FROM:<a@-ü-.example> SMTPUTF8", "501 5.1.7"),
        ("MAIL FROM:<a@ex\u3002ample.ü> SMTPUTF8", "501 5.1.7"),  # another character's dot
        (f"MAIL FROM:<{'ü' * 33}@example.net> SMTPUTF8", "501 5.1.7"),  # 66 octets of local part
        (f"MAIL FROM:<{'ü' * 32}@example.net> SMTPUTF8", "250 2.1.0"),
        (f"MAIL FROM:<a@{'ü' * 60}.example> SMTPUTF8", "501 5.1.7"),  # over 63 as A-label
    ],
    ids=repr,
)
def test_a_sender_in_utf8_has_to_be_announced_and_proper(world: Site, command: str | bytes, reply: str) -> None:
    with world.client() as client:
        client.open()
        assert UTF8 in client.extensions
        client.expect(reply, command)
        client.expect("250", "RSET")


@pytest.mark.parametrize(
    ("recipient", "reply"),
    [
        ("jörg@example.com", "250 2.1.5"),
        ("JÖRG@EXAMPLE.COM", "250 2.1.5"),
        (unicodedata.normalize("NFD", "jörg@example.com"), "250 2.1.5"),  # decomposed
        ("zoë@example.com", "250 2.1.5"),  # the list has it decomposed
        ('"jörg"@example.com', "250 2.1.5"),
        ("user@bücher.example", "250 2.1.5"),
        ("user@BÜCHER.example", "250 2.1.5"),
        ("user@xn--bcher-kva.example", "250 2.1.5"),
        ("jorg@example.com", "550 5.1.1 <jorg@example.com>: "),
        ("jürg@example.com", "550 5.1.1 <jürg@example.com>: Recipient address rejected: User unknown"),
        ("niemand@bücher.example", "550 5.1.1 <niemand@bücher.example>: "),
        ("jörg@elsewhere.example", "554 5.7.1 <jörg@elsewhere.example>: Relay access denied"),
        ("jörg%x@example.com", "554 5.7.1 Routed addresses"),
        ("postmaster@bücher.example", "250 2.1.5"),
    ],
)
def test_recipients_are_the_same_however_their_utf8_is_written(world: Site, recipient: str, reply: str) -> None:
    with world.client() as client:
        client.open()
        client.expect("250", f"MAIL FROM:<{world.sender()}> {UTF8}")
        client.expect(reply, f"RCPT TO:<{recipient}>")


def test_without_the_announcement_the_domain_in_ascii_is_the_way(world: Site) -> None:
    with world.client() as client:
        client.open()
        client.expect("250", f"MAIL FROM:<{world.sender()}>")
        client.expect(NOT_ANNOUNCED, "RCPT TO:<user@bücher.example>")
        client.expect("250 2.1.5", "RCPT TO:<user@xn--bcher-kva.example>")
        client.expect(NOT_ANNOUNCED, "RCPT TO:<user@example.com> ORCPT=utf-8;jörg@example.com")


@pytest.mark.parametrize(
    "sender", ["böse@example.net", "BÖSE@example.net", unicodedata.normalize("NFD", "böse@example.net")]
)
def test_a_restricted_sender_in_utf8_is_restricted_in_every_spelling(world: Site, sender: str) -> None:
    with world.client() as client:
        client.open()
        client.expect("250", f"MAIL FROM:<{sender}> {UTF8}")
        client.expect(f"554 5.7.1 <{sender}>: Sender address rejected: Niemals", "RCPT TO:<user@example.com>")
    world.relay.wait_for_log(
        rf"reject: RCPT from .*: 554 5\.7\.1 <{sender}>: .*; from=<{sender}> to=<user@example\.com>"
    )


@pytest.mark.parametrize(("listener", "protocol"), [("mx", "UTF8SMTP"), ("mx tls", "UTF8SMTPS")])
def test_received_says_so_and_names_the_recipient_in_utf8(world: Site, listener: str, protocol: str) -> None:
    """RFC 6531 §4.3."""
    hop_takes_utf8(world)
    sender = world.sender()
    with world.client() as client:
        client.open()
        if "tls" in listener:
            client.starttls(world.authority.client())
            client.ehlo()
        client.envelope(sender, ["jörg@example.com"], UTF8)
        client.data("Subject: Grüße\r\n\r\nx\r\n".encode())
    [taken] = world.arrived(sender)
    assert f" with {protocol} id ".encode() in taken.message
    assert "\tfor <jörg@example.com>; ".encode() in taken.message
    assert UTF8 in taken.parameters


def test_ascii_mail_of_a_session_that_can_utf8_stays_what_it_is(world: Site) -> None:
    sender = world.sender()
    with world.client() as client:
        client.open().deliver(sender, "user@example.com", b"A: b\r\n\r\n")
    [taken] = world.arrived(sender)
    assert b" with ESMTP id " in taken.message
    assert UTF8 not in taken.parameters


def test_the_commands_that_explain_know_addresses_in_utf8(world: Site) -> None:
    known = world.relay.command("recipient", "JÖRG@example.com")
    assert (known.returncode, "accepted" in known.stdout) == (0, True), known
    unknown = world.relay.command("recipient", "jürg@example.com")
    assert "550 5.1.1 <jürg@example.com>" in unknown.stdout
    restricted = world.relay.command("sender", "böse@example.net")
    assert "Sender address rejected: Niemals" in restricted.stdout
    played = world.relay.command(
        "explain", "--client", "192.0.2.1", "--from", "ä@example.net", "--to", "jörg@example.com"
    )
    assert "SMTPUTF8" in played.stdout
    assert played.returncode == 0, played
