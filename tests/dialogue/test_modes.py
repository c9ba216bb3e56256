"""Rules that are only watched (row O13), refusals made temporary (row O12), a relay without a snapshot; restricted senders."""

from __future__ import annotations

import re

import pytest

from tests.bed.next_hop import Say, Step
from tests.bed.wire import after_trace, letter
from tests.dialogue.sites import TRUSTED, Site

REJECT = "NOQUEUE: reject: RCPT from unknown[127.0.0.1]: "
WARNING = "NOQUEUE: reject_warning: RCPT from unknown[127.0.0.1]: "
RESTRICTED = "554 5.7.1 <restricted@example.com>: Sender address rejected: This account is not allowed to send emails"
UNKNOWN = "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown"
END = " proto=ESMTP helo=<client.example.net>"
STAMP = r"\w{3} [ \d]\d \d\d:\d\d:\d\d mx\.example\.com dmz-relay/smtpd\[\d+\]: "


# --- restricted senders ------------------------------------------------------------------------------------------------


def test_a_restricted_sender_gets_the_reply_of_row_s1_and_the_log_the_line_of_row_s3(usual: Site) -> None:
    with usual.client() as client:
        client.greeting()
        client.ehlo("s3.example.net")
        client.expect("250 2.1.0 Ok", "MAIL FROM:<restricted@example.com>")
        assert str(client.command("RCPT TO:<user@example.com>")) == RESTRICTED
        assert str(client.command("RCPT TO:<nobody@example.com>")) == RESTRICTED
        client.expect("554 5.5.1 No valid recipients", "DATA")
        client.quit()
    lines = usual.relay.wait_for_log("s3.example.net", 2)
    assert re.fullmatch(
        STAMP
        + re.escape(
            f"{REJECT}{RESTRICTED}; from=<restricted@example.com> to=<user@example.com> proto=ESMTP helo=<s3.example.net>"
        ),
        lines[0],
    )
    usual.relay.wait_for_metric("relay_replies_total", 2, code="554", enhanced="5.7.1", reason="sender_restricted")


@pytest.mark.parametrize(
    "spelling",
    ["Restricted@Example.COM", '"restricted"@example.com', '"restr\\icted"@example.com', '"RESTRICTED"@EXAMPLE.com'],
)
def test_no_spelling_of_a_restricted_sender_gets_through(usual: Site, spelling: str) -> None:
    with usual.client() as client:
        client.open()
        client.expect("250", f"MAIL FROM:<{spelling}>")
        client.expect("554 5.7.1", "RCPT TO:<user@example.com>")
        client.quit()


def test_a_restricted_sender_is_refused_to_trusted_clients_too(usual: Site) -> None:
    with usual.client(source=TRUSTED) as client:
        client.open()
        client.expect("250", "MAIL FROM:<restricted@example.com>")
        client.expect(RESTRICTED, "RCPT TO:<someone@elsewhere.example>")
        client.quit()


# --- mode = "log" ------------------------------------------------------------------------------------------------------


def shadows(site: Site, reason: str) -> float:
    return site.relay.metric("relay_shadow_refusals_total", reason=reason)


def test_watched_rules_let_mail_through_log_and_count(watching: Site) -> None:
    said, refused = (len(watching.relay.grep(each)) for each in ("reject_warning", "NOQUEUE: reject:"))
    senders, recipients = shadows(watching, "sender_restricted"), shadows(watching, "unknown_recipient")
    with watching.client() as client:
        client.open()
        reply = client.deliver("restricted@example.com", ["user@example.com", "nobody@example.com"], letter())
        assert reply.code == 250
        client.quit()
    [message] = watching.arrived("restricted@example.com")
    assert message.recipients == ("user@example.com", "nobody@example.com")
    lines = watching.relay.wait_for_log("reject_warning", said + 3)[said:]
    expected = [
        f"{WARNING}{RESTRICTED}; from=<restricted@example.com> to=<user@example.com>{END}",
        f"{WARNING}{RESTRICTED}; from=<restricted@example.com> to=<nobody@example.com>{END}",
        f"{WARNING}{UNKNOWN}; from=<restricted@example.com> to=<nobody@example.com>{END}",
    ]
    assert [line.partition("]: ")[2] for line in lines] == expected
    assert len(watching.relay.grep("NOQUEUE: reject:")) == refused
    watching.relay.wait_for_metric("relay_shadow_refusals_total", senders + 2, reason="sender_restricted")
    watching.relay.wait_for_metric("relay_shadow_refusals_total", recipients + 1, reason="unknown_recipient")
    now = (shadows(watching, "sender_restricted"), shadows(watching, "unknown_recipient"))
    assert now == (senders + 2, recipients + 1)
    assert watching.relay.metric("relay_replies_total", reason="sender_restricted") == 0


def test_a_watched_header_firewall_leaves_the_header_and_says_so(watching: Site) -> None:
    sender = watching.sender()
    message = b"X-MS-Exchange-Organization-SCL: -1\r\nAuthentication-Results: mx.example.com; none\r\n" + letter()
    with watching.client() as client:
        assert client.open().deliver(sender, "user@example.com", message).code == 250
        client.quit()
    [arrived] = watching.arrived(sender)
    assert after_trace(arrived.message) == message
    names = "x-ms-exchange-organization-scl, authentication-results"
    watching.relay.wait_for_log(re.escape(f"header_warning: would be removed: {names} (2)"))
    watching.relay.wait_for_metric("relay_shadow_refusals_total", 2, reason="header_firewall")
    assert watching.relay.metric("relay_headers_removed_total") == 0


def test_relaying_is_no_rule_that_could_be_only_watched(watching: Site) -> None:
    with watching.client() as client:
        client.open()
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.expect("554 5.7.1", "RCPT TO:<someone@elsewhere.example>")
        client.quit()


# --- soft_bounce -------------------------------------------------------------------------------------------------------

SOFTENED = [
    ("FOO", "450 4.5.2 Command not recognized"),
    ("EHLO", "450 4.5.4 Your host name"),
    ("EXPN a", "450 4.5.1"),
    ("RCPT TO:<a@b>", "450 4.5.1 MAIL first"),
    ("MAIL FROM:<a@b", "450 4.1.7 Bad sender address syntax"),
    ("MAIL FROM:<a@b> X=1", "451 4.5.4"),
    ("MAIL FROM:<a@b> SIZE=99999999", "452 4.3.4 Message exceeds the size limit"),
    (
        "MAIL FROM:<restricted@example.com>",
        "451 4.7.1 <restricted@example.com>: Sender address rejected: Ask postmaster",
    ),
    ("MAIL FROM:<a@example.net>", "250"),
    ("RCPT TO:<nobody@example.com>", "450 4.1.1 <nobody@example.com>: Recipient address rejected: User unknown"),
    ("RCPT TO:<a@elsewhere.example>", "451 4.7.1 <a@elsewhere.example>: Relay access denied"),
    ("DATA", "451 4.5.1 No valid recipients"),
    ("MAIL FROM:<a@example.net>", "450 4.5.1 A transaction is already open"),
]


def test_every_refusal_is_temporary(soft: Site) -> None:
    with soft.client() as client:
        client.open()
        for command, expected in SOFTENED:
            client.expect(expected, command)
        client.quit()
    assert soft.relay.wait_for_log(
        re.escape("NOQUEUE: reject: RCPT from unknown[127.0.0.1]: 450 4.1.1 <nobody@example.com>")
    )


def test_the_refusals_still_spend_the_budget(soft: Site) -> None:
    with soft.client() as client:
        client.open()
        for _ in range(20):
            client.expect("450", "FOO")
        client.expect("421 4.7.0 Too many errors")
        assert client.has_ended()


def test_what_a_next_hop_refuses_is_tried_again(soft: Site) -> None:
    sender = soft.sender()
    rule = soft.hop.on(Step.FINAL, Say("554 5.7.1 we do not like it"), times=1)
    with soft.client() as client:
        reply = client.open().deliver(sender, "user@example.com", letter())
        assert reply.text.startswith("2.0.0 Ok: queued as")
        client.quit()
    soft.arrived(sender)
    assert rule.used == 1


def test_a_sender_can_be_refused_at_mail_and_is_then_logged_without_a_recipient(soft: Site) -> None:
    with soft.client() as client:
        client.greeting()
        client.ehlo("at-mail.example.net")
        client.expect("451 4.7.1 <restricted@example.com>", "MAIL FROM:<restricted@example.com>")
        client.expect("450 4.5.1 MAIL first", "RCPT TO:<user@example.com>")
        client.quit()
    [line] = soft.relay.wait_for_log("at-mail.example.net")
    assert line.endswith(
        "NOQUEUE: reject: MAIL from unknown[127.0.0.1]: 451 4.7.1 <restricted@example.com>: Sender address rejected: "
        "Ask postmaster; from=<restricted@example.com> proto=ESMTP helo=<at-mail.example.net>"
    )


# --- no snapshot -------------------------------------------------------------------------------------------------------


def test_without_a_snapshot_nobody_is_unknown(blind: Site) -> None:
    with blind.client() as client:
        client.open()
        client.expect("250", "MAIL FROM:<a@example.net>")
        for name in ("user", "nobody"):
            client.expect(
                f"451 4.3.0 <{name}@example.com>: Recipient cannot be verified now, try again later",
                f"RCPT TO:<{name}@example.com>",
            )
        client.expect("554 5.7.1", "RCPT TO:<user@elsewhere.example>")
        client.expect("554 5.5.1", "DATA")
        client.quit()


def test_without_a_snapshot_a_client_may_try_all_its_recipients(blind: Site) -> None:
    """What is our trouble does not spend the client's budget of five errors."""
    sender = blind.sender()
    with blind.client() as client:
        client.open()
        client.expect("250", f"MAIL FROM:<{sender}>")
        replies = client.pipeline(*[f"RCPT TO:<user{number}@example.com>" for number in range(50)])
        assert {reply.code for reply in replies} == {451}
        client.expect("250", "RCPT TO:<whoever@any.example.com>")
        client.expect("250", "RCPT TO:<postmaster>")
        assert client.data(letter()).code == 250
        client.quit()
    [message] = blind.arrived(sender)
    assert message.recipients == ("whoever@any.example.com", "postmaster@example.com")
