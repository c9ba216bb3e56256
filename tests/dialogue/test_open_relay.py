"""Every known way to ask a server to relay for strangers, and its refusal (RFC 5321 §3.6.1 and App. C, RFC 2505 §2.1,
and the forms that relay testers used to try).

The relay takes mail for example.com and any.example.com. ``any`` is the harder case, since every address in it is valid:
only the form of the address can give the relaying away.
"""

from __future__ import annotations

import pytest

from tests.bed.waiting import wait_for
from tests.bed.wire import letter
from tests.dialogue.sites import TRUSTED, Site

DENIED = "554 5.7.1 <{}>: Relay access denied"
FORM = "554 5.7.1 Routed addresses are not accepted"
SYNTAX = "501 5.1.3 Bad recipient address syntax"
NO_PATH = "501 5.5.4 Syntax error in parameters"
NOT_ASCII = "553 5.6.7 Addresses must be ASCII without SMTPUTF8"

ATTEMPTS = [
    # plainly elsewhere
    ("<victim@elsewhere.example>", DENIED),
    ("<victim@ELSEWHERE.EXAMPLE>", DENIED),
    ('<"victim"@elsewhere.example>', DENIED),
    ("<postmaster@elsewhere.example>", DENIED),
    ("<abuse@elsewhere.example>", DENIED),
    ("<victim@localhost>", DENIED),
    ("<victim@mx.example.com>", DENIED),  # our own host name is no domain of ours
    # domains that look like ours
    ("<victim@sub.example.com>", DENIED),
    ("<victim@sub.any.example.com>", DENIED),
    ("<victim@example.com.elsewhere.example>", DENIED),
    ("<victim@elsewhere.example.example.co>", DENIED),
    ("<victim@notexample.com>", DENIED),
    ("<victim@example.co>", DENIED),
    ("<victim@com>", DENIED),
    ("<victim@example_com>", DENIED),
    ("<victim@xn--example.com>", DENIED),
    ("<victim@elsewhere.example.>", SYNTAX),
    ("<victim@any.example.com.>", SYNTAX),
    ("<victim@.any.example.com>", SYNTAX),
    ("<victim@any..example.com>", SYNTAX),
    ("<victim@any.example.com:25>", SYNTAX),
    # address literals, our own among them
    ("<victim@[192.0.2.1]>", DENIED),
    ("<victim@[127.0.0.1]>", DENIED),
    ("<user@[127.0.0.1]>", DENIED),
    ("<victim@[IPv6:::1]>", DENIED),
    ("<victim@[IPv6:::ffff:127.0.0.1]>", DENIED),
    ("<victim@127.0.0.1>", DENIED),
    ("<victim@2130706433>", DENIED),
    ("<victim@#2130706433>", SYNTAX),
    ("<victim@[127.1]>", SYNTAX),
    ("<victim@[0x7f.0.0.1]>", SYNTAX),
    ("<victim@[any.example.com]>", SYNTAX),
    ("<victim%elsewhere.example@[127.0.0.1]>", FORM),
    ("<elsewhere.example!victim@[127.0.0.1]>", FORM),
    # the percent hack
    ("<victim%elsewhere.example@any.example.com>", FORM),
    ("<victim%elsewhere.example@example.com>", FORM),
    ("<victim%elsewhere.example%any.example.com@any.example.com>", FORM),
    ("<victim%elsewhere.example@elsewhere.example>", FORM),
    ("<victim%any.example.com@elsewhere.example>", FORM),
    ('<"victim%elsewhere.example"@any.example.com>', FORM),
    ('<"victim\\%elsewhere.example"@any.example.com>', FORM),
    ("<victim%elsewhere.example>", SYNTAX),
    ("<%elsewhere.example@any.example.com>", FORM),
    ("<victim%@any.example.com>", FORM),
    ("<user%any.example.com@any.example.com>", FORM),
    # bang paths
    ("<elsewhere.example!victim@any.example.com>", FORM),
    ("<any.example.com!elsewhere.example!victim@any.example.com>", FORM),
    ('<"elsewhere.example!victim"@any.example.com>', FORM),
    ("<elsewhere.example!victim>", SYNTAX),
    ("<any.example.com!elsewhere.example!victim>", SYNTAX),
    # a second @, quoted or not
    ('<"victim@elsewhere.example"@any.example.com>', FORM),
    ('<"victim\\@elsewhere.example"@any.example.com>', FORM),
    ('<"victim@elsewhere.example">', SYNTAX),
    ('<"<victim@elsewhere.example>"@any.example.com>', FORM),
    ("<victim@elsewhere.example@any.example.com>", SYNTAX),
    ("<victim@elsewhere.example%any.example.com>", SYNTAX),
    ("<victim\\@elsewhere.example@any.example.com>", SYNTAX),
    ("<victim@any.example.com@elsewhere.example>", SYNTAX),
    ("<@any.example.com>", FORM),
    # source routes
    ("<@any.example.com:victim@elsewhere.example>", FORM),
    ("<@any.example.com,@elsewhere.example:victim@elsewhere.example>", FORM),
    ("<@elsewhere.example:user@any.example.com>", FORM),
    ("<@[127.0.0.1]:victim@elsewhere.example>", FORM),
    ("<@any.example.com:victim>", FORM),
    ("<@any.example.com:elsewhere.example!victim>", FORM),
    ("<@any.example.com:victim%elsewhere.example@any.example.com>", FORM),
    ("@any.example.com:victim@elsewhere.example", SYNTAX),
    # lists, groups, comments, pipes, files
    ("<user@any.example.com,victim@elsewhere.example>", SYNTAX),
    ("<user@any.example.com> <victim@elsewhere.example>", "501 5.5.4"),
    ("<user@any.example.com>,<victim@elsewhere.example>", SYNTAX),
    ("<user@any.example.com><victim@elsewhere.example>", SYNTAX),
    ("<group:victim@elsewhere.example;>", SYNTAX),
    ("<victim(@elsewhere.example)@any.example.com>", SYNTAX),
    ("<victim@elsewhere.example(@any.example.com)>", SYNTAX),
    ("<victim;elsewhere.example@any.example.com>", SYNTAX),
    # without brackets, without a domain
    ("victim@elsewhere.example", SYNTAX),
    ("<victim>", SYNTAX),
    ("victim", SYNTAX),
    ("<>", SYNTAX),
    ("", NO_PATH),
    # controls and 8-bit, by which a later program might cut the address
    (b"<victim@elsewhere.example\0@any.example.com>", SYNTAX),
    (b"<victim@elsewhere.example\t@any.example.com>", SYNTAX),
    (b"<victim@elsewhere.example \x7f@any.example.com>", SYNTAX),
    (b'<"victim@elsewhere.example\x08"@any.example.com>', SYNTAX),
    ("<victim@elsewhere．example>", NOT_ASCII),
    ("<victim＠elsewhere.example>", NOT_ASCII),
    ("<victim％elsewhere.example@any.example.com>", NOT_ASCII),
]  # fmt: skip

SENDERS = (
    "<stranger@elsewhere.example>",
    "<>",  # a forged bounce
    "<user@example.com>",  # a forged sender of ours: no right to relay
    "<user@any.example.com>",
    "<spoofed@[127.0.0.1]>",
    "<postmaster@example.com>",
)


@pytest.mark.parametrize("path", SENDERS)
def test_no_form_of_a_recipient_is_relayed(usual: Site, path: str) -> None:
    for start in range(0, len(ATTEMPTS), 18):  # each is an error, and a session has twenty
        with usual.client() as client:
            client.open()
            client.expect("250", f"MAIL FROM:{path}")
            for attempt, expected in ATTEMPTS[start : start + 18]:
                said = attempt if isinstance(attempt, bytes) else attempt.encode()
                reply = client.command(b"RCPT TO:" + said)
                wanted = expected.format(str(attempt)[1:-1])
                assert f"{reply.code} {reply.text}".startswith(wanted), (attempt, str(reply))
            client.expect("554 5.5.1 No valid recipients", "DATA")
            client.quit()


def test_a_refused_form_leaves_no_recipient_in_the_message(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        client.expect("250", f"MAIL FROM:<{sender}>")
        client.expect("554", "RCPT TO:<victim%elsewhere.example@any.example.com>")
        client.expect("250", "RCPT TO:<someone@any.example.com>")
        client.expect("554", "RCPT TO:<victim@elsewhere.example>")
        assert client.data(letter()).code == 250
        client.quit()
    [message] = usual.arrived(sender)
    assert message.recipients == ("someone@any.example.com",)


@pytest.mark.parametrize(
    "path",
    ["<@elsewhere.example:a@example.net>", "<@any.example.com,@elsewhere.example:a@example.net>"],
)
def test_a_sender_with_a_route_is_refused(usual: Site, path: str) -> None:
    with usual.client() as client:
        client.open()
        client.expect(FORM, f"MAIL FROM:{path}")
        client.quit()


def test_neither_helo_nor_header_nor_tls_give_a_right_to_relay(usual: Site) -> None:
    with usual.client() as client:
        client.greeting()
        for name in ("mx.example.com", "localhost", "[127.0.0.3]", "example.com"):
            client.ehlo(name)
            client.expect("250", "MAIL FROM:<user@example.com>")
            client.expect("554 5.7.1", "RCPT TO:<victim@elsewhere.example>")
        client.starttls(usual.authority.client())
        client.ehlo()
        client.expect("250", "MAIL FROM:<user@example.com>")
        client.expect("554 5.7.1", "RCPT TO:<victim@elsewhere.example>")
        client.quit()


def test_a_trusted_client_may_relay(usual: Site) -> None:
    sender = usual.sender()
    recipients = ["victim@elsewhere.example", "a%b@elsewhere.example", "user@example.com"]
    with usual.client(source=TRUSTED) as client:
        client.open()
        assert client.deliver(sender, recipients, letter()).code == 250
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.expect(FORM, "RCPT TO:<@elsewhere.example:victim@elsewhere.example>")
        client.expect("550 5.1.1", "RCPT TO:<nobody@example.com>")
        client.quit()
    wait_for(
        lambda: {one for message in usual.from_(sender) for one in message.recipients} == set(recipients),
        "a message to every recipient",
    )


def test_the_neighbour_of_a_trusted_client_may_not(usual: Site) -> None:
    for source in ("127.0.0.2", "127.0.0.4", "127.0.0.30"):
        with usual.client(source=source) as client:
            client.open()
            client.expect("250", "MAIL FROM:<a@example.net>")
            client.expect("554 5.7.1", "RCPT TO:<victim@elsewhere.example>")
            client.quit()
