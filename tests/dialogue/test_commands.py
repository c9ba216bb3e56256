"""Commands out of order, out of form and out of size: each dialogue with the replies it must get, and where that is
written. Every one of them ends with QUIT: the session has gone on.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.dialogue.sites import Site

EHLO = ("EHLO client.example.net", "250 ")
HELO = ("HELO client.example.net", "250 mx.example.com")
MAIL = ("MAIL FROM:<sender@example.net>", "250 2.1.0 Ok")
RCPT = ("RCPT TO:<user@example.com>", "250 2.1.5 Ok")
DATA = ("DATA", "354 ")
RSET = ("RSET", "250 2.0.0 Ok")

UNKNOWN = "500 5.5.2 Command not recognized"
ARGUMENTS = "501 5.5.4 Syntax error in parameters"
SENDER = "501 5.1.7 Bad sender address syntax"
RECIPIENT = "501 5.1.3 Bad recipient address syntax"
TOO_LONG = "500 5.5.2 Line too long"
BARE = "500 5.5.2 Lines end with CR LF"

Step = tuple[str | bytes, str]
"""What is sent (text gets its CR LF, octets go as they are), and how the reply begins; "" when there is none."""


class Dialogue(NamedTuple):
    """One row."""

    name: str
    source: str
    steps: tuple[Step, ...]


def row(name: str, source: str, *steps: Step) -> Dialogue:
    return Dialogue(name, source, steps)


def mail(path: str, reply: str, name: str = "") -> Dialogue:
    return row(name or f"MAIL FROM:{path}", "RFC 5321 §4.1.2", EHLO, (f"MAIL FROM:{path}", reply))


def rcpt(path: str, reply: str, name: str = "") -> Dialogue:
    return row(name or f"RCPT TO:{path}", "RFC 5321 §4.1.2", EHLO, MAIL, (f"RCPT TO:{path}", reply))


LOCAL_64 = "l" * 64
LABEL_63 = "d" * 63
DOMAIN_255 = f"{LABEL_63}.{LABEL_63}.{LABEL_63}.{LABEL_63}"

ORDER = (
    row("MAIL before EHLO", "RFC 5321 §4.1.4", ("MAIL FROM:<a@example.net>", "503 5.5.1 Say EHLO first")),
    row("RCPT before EHLO", "RFC 5321 §4.1.4", ("RCPT TO:<user@example.com>", "503 5.5.1 Say EHLO first")),
    row("DATA before EHLO", "RFC 5321 §4.1.4", ("DATA", "503 5.5.1 Say EHLO first")),
    row("STARTTLS before EHLO", "RFC 3207 §4", ("STARTTLS", "503 5.5.1 Say EHLO first")),
    row("RCPT before MAIL", "RFC 5321 §4.1.4", EHLO, ("RCPT TO:<user@example.com>", "503 5.5.1 MAIL first")),
    row("DATA before MAIL", "RFC 5321 §3.3", EHLO, ("DATA", "503 5.5.1 MAIL first")),
    row("DATA before RCPT", "RFC 5321 §3.3", EHLO, MAIL, ("DATA", "503 5.5.1 RCPT first"), RCPT, DATA, (b".\r\n", "250")),
    row(
        "DATA after every RCPT was refused", "RFC 5321 §3.3", EHLO, MAIL,
        ("RCPT TO:<nobody@example.com>", "550 5.1.1"), ("DATA", "554 5.5.1 No valid recipients"), RCPT, RSET,
    ),
    row("MAIL twice", "RFC 5321 §4.1.4", EHLO, MAIL, (MAIL[0], "503 5.5.1 A transaction is already open"), RCPT),
    row("MAIL again after RSET", "RFC 5321 §4.1.1.5", EHLO, MAIL, RCPT, RSET, MAIL, ("DATA", "503 5.5.1 RCPT first")),
    row("RSET at any time", "RFC 5321 §4.1.1.5", RSET, EHLO, RSET, MAIL, RSET, RSET, ("DATA", "503 5.5.1 MAIL first")),
    row("EHLO acts like RSET", "RFC 5321 §4.1.4", EHLO, MAIL, RCPT, EHLO, ("DATA", "503 5.5.1 MAIL first")),
    row("HELO acts like RSET", "RFC 5321 §4.1.4", EHLO, MAIL, RCPT, HELO, ("DATA", "503 5.5.1 MAIL first")),
    row("EHLO refused leaves the transaction", "RFC 5321 §4.1.4", EHLO, MAIL, RCPT, ("EHLO", "501 5.5.4"), DATA, (b".\r\n", "250")),
    row("a transaction ends with its message", "RFC 5321 §4.1.1.4", EHLO, MAIL, RCPT, DATA, (b".\r\n", "250"), ("RCPT TO:<user@example.com>", "503 5.5.1")),
    row("after a message the next", "RFC 5321 §3.3", EHLO, MAIL, RCPT, DATA, (b".\r\n", "250"), MAIL, RCPT, DATA, (b".\r\n", "250")),
    row("a sender can be mended", "RFC 5321 §4.1.4", EHLO, ("MAIL FROM:<a@>", SENDER), MAIL, RCPT),
)  # fmt: skip

GREETINGS = (
    row("EHLO", "RFC 5321 §4.1.1.1", EHLO),
    row("HELO", "RFC 5321 §4.1.1.1", HELO, MAIL, RCPT, DATA, (b".\r\n", "250")),
    row("lower case", "RFC 5321 §2.4", ("ehlo client.example.net", "250 "), ("mail from:<a@example.net>", "250"), ("rcpt to:<user@example.com>", "250"), ("data", "354"), (b".\r\n", "250")),
    row("mixed case", "RFC 5321 §2.4", ("EhLo client.example.net", "250 "), ("MaIl FrOm:<a@example.net>", "250"), ("RcPt tO:<user@example.com>", "250"), ("dAtA", "354"), (b".\r\n", "250")),
    row("EHLO without a name", "RFC 5321 §4.1.1.1", ("EHLO", "501 5.5.4 Your host name"), ("EHLO ", "501 5.5.4"), EHLO),
    row("HELO without a name", "RFC 5321 §4.1.1.1", ("HELO", "501 5.5.4 Your host name")),
    row("EHLO with an address", "RFC 5321 §4.1.3", ("EHLO [192.0.2.1]", "250 "), MAIL),
    row("EHLO with an IPv6 address", "RFC 5321 §4.1.3", ("EHLO [IPv6:2001:db8::1]", "250 "), MAIL),
    row("EHLO with what is no name: not verified", "RFC 5321 §4.1.4", ("EHLO under_score", "250 "), ("EHLO *?!", "250 "), MAIL),
    row("EHLO with our own name", "RFC 5321 §4.1.4", ("EHLO mx.example.com", "250 "), MAIL),
    row("EHLO with 8-bit", "RFC 5321 §2.4", (b"EHLO \xe4.example\r\n", "501 5.5.4"), (b"EHLO a\x00b\r\n", "501 5.5.4"), (b"EHLO a\tb\r\n", "501 5.5.4")),
    row("EHLO with a name too long", "RFC 5321 §4.5.3.1.2", (f"EHLO {'a' * 255}", "250 "), (f"EHLO {'a' * 256}", "501 5.5.4")),
    row("spaces at the end are tolerated", "RFC 5321 §4.1.1", ("EHLO client.example.net  ", "250 "), ("MAIL FROM:<a@example.net>  ", "250"), ("RCPT TO:<user@example.com> ", "250"), ("DATA ", "354"), (b".\r\n", "250"), ("RSET ", "250")),
)  # fmt: skip

OTHERS = (
    row("NOOP", "RFC 5321 §4.1.1.9", ("NOOP", "250 2.0.0 Ok"), ("NOOP with some text", "250 2.0.0"), EHLO, MAIL, ("NOOP", "250"), RCPT),
    row("VRFY tells nothing", "RFC 5321 §3.5.3", ("VRFY user@example.com", "252 2.5.0"), ("VRFY nobody@example.com", "252 2.5.0"), ("VRFY", ARGUMENTS)),
    row("EXPN is not there", "RFC 5321 §3.5.2", ("EXPN staff", "502 5.5.1"), ("EXPN", "502 5.5.1")),
    row("HELP", "RFC 5321 §4.1.1.8", ("HELP", "214 2.0.0"), ("HELP MAIL", "214 2.0.0")),
    row("RSET takes nothing", "RFC 5321 §4.1.1.5", EHLO, MAIL, RCPT, ("RSET now", ARGUMENTS), DATA, (b".\r\n", "250")),
    row("QUIT takes nothing", "RFC 5321 §4.1.1.10", ("QUIT now", ARGUMENTS)),
    row("DATA takes nothing", "RFC 5321 §4.1.1.4", EHLO, MAIL, RCPT, ("DATA now", ARGUMENTS), DATA, (b".\r\n", "250")),
    row("STARTTLS takes nothing", "RFC 3207 §4", EHLO, ("STARTTLS now", ARGUMENTS)),
    row("unknown", "RFC 5321 §4.2.4", ("FOO", UNKNOWN), ("FOO bar", UNKNOWN), ("", UNKNOWN), (" ", UNKNOWN), (" NOOP", UNKNOWN), ("NOOP:", UNKNOWN)),
    row("what looks like a command", "RFC 5321 §4.2.4", ("DATAX", UNKNOWN), ("EHLOX a", UNKNOWN), ("QUIT\tnow", UNKNOWN)),
    row("commands of extensions that were not offered", "RFC 5321 §4.2.4", EHLO, ("ETRN example.com", UNKNOWN), ("XCLIENT ADDR=10.0.0.1", UNKNOWN), ("XFORWARD ADDR=10.0.0.1", UNKNOWN)),
    row("commands that are no longer", "RFC 5321 App. F", EHLO, ("TURN", UNKNOWN), ("SEND FROM:<a@example.net>", UNKNOWN), ("SOML FROM:<a@example.net>", UNKNOWN)),
    row("other protocols", "RFC 5321 §4.2.4", ("GET / HTTP/1.1", UNKNOWN), ("Host: mx.example.com", UNKNOWN), ("PROXY TCP4 10.0.0.1 10.0.0.2 1 25", UNKNOWN)),
    row("8-bit verbs", "RFC 5321 §2.4", (b"\xff\xfe\r\n", UNKNOWN), (b"\x00\r\n", UNKNOWN), (b"NOOP\x00\r\n", UNKNOWN)),
)  # fmt: skip

LINES = (
    row("bare LF", "RFC 5321 §2.3.8", (b"EHLO client.example.net\n", BARE), (MAIL[0], "503 5.5.1")),
    row("bare CR", "RFC 5321 §2.3.8", (b"EHLO\rclient.example.net\r\n", BARE), (MAIL[0], "503 5.5.1")),
    row("CR CR LF", "RFC 5321 §2.3.8", (b"NOOP\r\r\n", BARE), (b"\r\r\n", BARE)),
    row("LF CR", "RFC 5321 §2.3.8", (b"NOOP\n\r\n", BARE), (b"", UNKNOWN)),
    row("bare LF is not executed", "RFC 5321 §2.3.8", EHLO, MAIL, (b"RCPT TO:<user@example.com>\n", BARE), ("DATA", "503 5.5.1")),
    row("bare CR hides nothing", "RFC 5321 §2.3.8", EHLO, (b"MAIL FROM:<a@example.net>\rRCPT TO:<user@example.com>\r\n", BARE), ("DATA", "503 5.5.1 MAIL first")),
    row("512 octets", "RFC 5321 §4.5.3.1.4", ("NOOP " + "x" * 505, "250 2.0.0")),
    row("2,048 octets, as extensions may add", "RFC 5321 §4.5.3.1.4", ("NOOP " + "x" * 2041, "250 2.0.0")),
    row("2,049 octets", "RFC 5321 §4.5.3.1.4", ("NOOP " + "x" * 2042, TOO_LONG), EHLO),
    row("a megabyte is one line", "RFC 5321 §4.5.3.1.4", ("NOOP " + "x" * 1_000_000, TOO_LONG), EHLO),
    row("too long and bare", "RFC 5321 §2.3.8", (b"x" * 5000 + b"\n", TOO_LONG), (b"x" * 3000 + b"\r" + b"y" * 3000 + b"\r\n", TOO_LONG), EHLO),
    row("too long is not executed", "RFC 5321 §4.5.3.1.4", EHLO, MAIL, ("RCPT TO:<user@example.com>" + " " * 3000, TOO_LONG), ("DATA", "503 5.5.1")),
)  # fmt: skip

SENDERS = (
    mail("<>", "250 2.1.0", "the null sender"),
    mail(" <a@example.net>", "250 2.1.0", "a space too many"),
    mail("<a.b+c-d=e_f@example.net>", "250 2.1.0"),
    mail("<#!$%&'*+/=?^_`{|}~-@example.net>", "250 2.1.0"),
    mail('<"quoted local"@example.net>', "250 2.1.0"),
    mail('<"with \\" and \\\\ and > in it"@example.net>', "250 2.1.0"),
    mail('<""@example.net>', "250 2.1.0"),
    mail("<a@[192.0.2.1]>", "250 2.1.0"),
    mail("<a@[IPv6:2001:db8::1]>", "250 2.1.0"),
    mail("<a@localhost>", "250 2.1.0"),
    mail("<a@xn--mller-kva.example>", "250 2.1.0"),
    mail(f"<{LOCAL_64}@example.net>", "250 2.1.0", "a local part of 64"),
    mail(f"<a@{DOMAIN_255}>", "250 2.1.0", "a domain of 255"),
    mail("", ARGUMENTS, "nothing"),
    mail(" ", ARGUMENTS, "a space"),
    mail("  <a@example.net>", ARGUMENTS, "two spaces"),
    mail("a@example.net", SENDER),
    mail("<a@example.net", SENDER),
    mail("a@example.net>", SENDER),
    mail("<<a@example.net>>", SENDER),
    mail("<a@example.net>x", SENDER),
    mail("<a@example.net>SIZE=1", SENDER),
    mail("< a@example.net>", SENDER),
    mail("<a@example.net >", SENDER),
    mail("< >", SENDER),
    mail("<a>", SENDER),
    mail("<postmaster>", SENDER),
    mail("<@example.net>", "554 5.7.1"),
    mail("<a@>", SENDER),
    mail("<a@b@example.net>", SENDER),
    mail("<a..b@example.net>", SENDER),
    mail("<.a@example.net>", SENDER),
    mail("<a.@example.net>", SENDER),
    mail("<a b@example.net>", SENDER),
    mail("<a(comment)@example.net>", SENDER),
    mail("<a,b@example.net>", SENDER),
    mail("<a:b@example.net>", SENDER),
    mail('<"a@example.net>', SENDER),
    mail('<a"b"@example.net>', SENDER),
    mail("<a@example..net>", SENDER),
    mail("<a@example.net.>", SENDER),
    mail("<a@.example.net>", SENDER),
    mail("<a@-example.net>", SENDER),
    mail("<a@exa mple.net>", SENDER),
    mail("<a@[192.0.2.256]>", SENDER),
    mail("<a@[192.0.2.1>", SENDER),
    mail("<a@[IPv6:xyz]>", SENDER),
    mail("<a@[any:thing]>", SENDER),
    mail(f"<l{LOCAL_64}@example.net>", SENDER, "a local part of 65"),
    mail(f"<a@d.{DOMAIN_255}>", SENDER, "a domain of 257"),
    mail(f"<a@d{LABEL_63}.net>", SENDER, "a label of 64"),
    row("NUL in a sender", "RFC 5321 §4.1.2", EHLO, (b"MAIL FROM:<a\x00@example.net>\r\n", SENDER)),
    row("a tab in a sender", "RFC 5321 §4.1.2", EHLO, (b"MAIL FROM:<a\t@example.net>\r\n", SENDER)),
    row("a control in a quoted sender", "RFC 5321 §4.1.2", EHLO, (b'MAIL FROM:<"a\x07"@example.net>\r\n', SENDER)),
    row("DEL in a sender", "RFC 5321 §4.1.2", EHLO, (b"MAIL FROM:<a\x7f@example.net>\r\n", SENDER)),
    row("UTF-8 in a sender", "RFC 6531 §3.5", EHLO, ("MAIL FROM:<mü@example.net>\r\n".encode(), "553 5.6.7")),
    row("Latin-1 in a sender", "RFC 6531 §3.5", EHLO, (b"MAIL FROM:<m\xfc@example.net>\r\n", "553 5.6.7")),
    row("no colon", "RFC 5321 §4.1.1.2", EHLO, ("MAIL FROM <a@example.net>", ARGUMENTS), ("MAIL", ARGUMENTS), ("MAIL TO:<a@b>", ARGUMENTS)),
    row("spaces inside the keyword", "RFC 5321 §4.1.1.2", EHLO, ("MAIL  FROM:<a@example.net>", ARGUMENTS), ("MAIL FROM :<a@example.net>", ARGUMENTS)),
)  # fmt: skip

PARAMETERS = (
    mail("<a@example.net> SIZE=1000", "250 2.1.0"),
    mail("<a@example.net> SIZE=1000 BODY=8BITMIME", "250 2.1.0"),
    mail("<a@example.net> BODY=7BIT", "250 2.1.0"),
    mail("<a@example.net> body=8bitmime size=1", "250 2.1.0"),
    mail("<> SIZE=10", "250 2.1.0"),
    mail("<a@example.net> SIZE=", ARGUMENTS),
    mail("<a@example.net> SIZE", "501 5.5.4 SIZE is a number of octets"),
    mail("<a@example.net> SIZE=-1", "501 5.5.4 SIZE is a number of octets"),
    mail("<a@example.net> SIZE=1k", "501 5.5.4 SIZE is a number of octets"),
    mail(f"<a@example.net> SIZE={'9' * 20}", "552 5.3.4", "SIZE of 20 digits"),
    mail(f"<a@example.net> SIZE={'9' * 21}", "501 5.5.4", "SIZE of 21 digits"),
    mail("<a@example.net> SIZE=52428800", "250 2.1.0"),
    mail("<a@example.net> SIZE=52428801", "552 5.3.4 Message exceeds the size limit"),
    row(
        "SIZE in Arabic digits",
        "RFC 1870 §4",
        EHLO,
        ("MAIL FROM:<a@example.net> SIZE=١٢\r\n".encode(), "501 5.5.4 SIZE"),
    ),
    mail("<a@example.net> BODY=BINARYMIME", ARGUMENTS),
    mail("<a@example.net> BODY", ARGUMENTS),
    mail("<a@example.net> SIZE=1 SIZE=1", ARGUMENTS),
    mail("<a@example.net> =", ARGUMENTS),
    mail("<a@example.net> SMTPUTF8", "250 2.1.0"),
    mail("<> SMTPUTF8 BODY=8BITMIME", "250 2.1.0"),
    mail("<a@example.net> SMTPUTF8=1", ARGUMENTS),
    mail("<a@example.net> RET=FULL ENVID=x+2B SIZE=9", "250 2.1.0"),
    mail("<> ENVID=x RET=HDRS BODY=8BITMIME", "250 2.1.0"),
    mail("<a@example.net> RET=ALL", ARGUMENTS),
    mail("<a@example.net> RET=FULL RET=FULL", ARGUMENTS),
    mail("<a@example.net> ENVID=a+0D+0AX:+20y", ARGUMENTS),
    mail(f"<a@example.net> ENVID={'x' * 101}", ARGUMENTS, "ENVID of 101"),
    mail(f"<a@example.net> ENVID={'x' * 100}", "250 2.1.0", "ENVID of 100"),
    mail("<a@example.net> NOTIFY=NEVER", "555 5.5.4"),
    mail("<a@example.net> AUTH=<>", "555 5.5.4"),
    mail("<a@example.net> X-OTHER", "555 5.5.4"),
    rcpt("<user@example.com> NOTIFY=NEVER", "250 2.1.5"),
    rcpt("<user@example.com> notify=Success,FAILURE,delay", "250 2.1.5"),
    rcpt("<user@example.com> NOTIFY=NEVER,SUCCESS", ARGUMENTS),
    rcpt("<user@example.com> NOTIFY", ARGUMENTS),
    rcpt("<user@example.com> ORCPT=rfc822;user@example.com NOTIFY=DELAY", "250 2.1.5"),
    rcpt("<user@example.com> ORCPT=user@example.com", ARGUMENTS),
    rcpt("<user@example.com> ORCPT=rfc822;a+0Ab", ARGUMENTS),
    rcpt(f"<user@example.com> ORCPT=rfc822;{'a' * 493}", "250 2.1.5", "ORCPT of 500"),
    rcpt(f"<user@example.com> ORCPT=rfc822;{'a' * 494}", ARGUMENTS, "ORCPT of 501"),
    rcpt("<nobody@example.com> NOTIFY=SUCCESS", "550 5.1.1"),
    rcpt("<user@example.com> SIZE=1", "555 5.5.4"),
    rcpt("<user@example.com> X", "555 5.5.4"),
)

RECIPIENTS = (
    rcpt("<user@example.com>", "250 2.1.5"),
    rcpt(" <user@example.com>", "250 2.1.5", "a space too many"),
    rcpt("<USER@EXAMPLE.COM>", "250 2.1.5"),
    rcpt('<"user"@example.com>', "250 2.1.5"),
    rcpt('<"us\\er"@example.com>', "250 2.1.5"),
    rcpt("<postmaster@example.com>", "250 2.1.5"),
    rcpt("<PostMaster@Example.Com>", "250 2.1.5"),
    rcpt("<postmaster>", "250 2.1.5"),
    rcpt("<POSTMASTER>", "250 2.1.5"),
    rcpt('<"postmaster"@example.com>', "250 2.1.5"),
    rcpt("<postmaster@any.example.com>", "250 2.1.5"),
    rcpt("<whoever@any.example.com>", "250 2.1.5"),
    rcpt("<nobody@example.com>", "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown"),
    rcpt("<restricted@example.com>", "550 5.1.1"),
    rcpt("<user+tag@example.com>", "550 5.1.1"),
    rcpt("<>", RECIPIENT),
    rcpt("<user>", RECIPIENT),
    rcpt("user@example.com", RECIPIENT),
    rcpt("<user@example.com", RECIPIENT),
    rcpt("<user@example.com.>", RECIPIENT),
    rcpt("<user @example.com>", RECIPIENT),
    rcpt("<user@example.com><bob@example.com>", RECIPIENT),
    rcpt("<user@example.com>,<bob@example.com>", RECIPIENT),
    rcpt("<user@example.com,bob@example.com>", RECIPIENT),
    rcpt("", ARGUMENTS, "nothing"),
    row("no colon in RCPT", "RFC 5321 §4.1.1.3", EHLO, MAIL, ("RCPT TO <user@example.com>", ARGUMENTS), ("RCPT", ARGUMENTS), ("RCPT FROM:<user@example.com>", ARGUMENTS)),
    row("NUL in a recipient", "RFC 5321 §4.1.2", EHLO, MAIL, (b"RCPT TO:<user\x00@example.com>\r\n", RECIPIENT)),
    row("8-bit in a recipient", "RFC 6531 §3.5", EHLO, MAIL, (b"RCPT TO:<us\xe9r@example.com>\r\n", "553 5.6.7")),
    row("one recipient twice", "RFC 5321 §4.1.1.3", EHLO, MAIL, RCPT, RCPT),
    row("a refused recipient leaves the others", "RFC 5321 §3.3", EHLO, MAIL, RCPT, ("RCPT TO:<nobody@example.com>", "550 5.1.1"), DATA, (b".\r\n", "250")),
)  # fmt: skip

TABLES = {
    "order": ORDER,
    "greetings": GREETINGS,
    "others": OTHERS,
    "lines": LINES,
    "senders": SENDERS,
    "parameters": PARAMETERS,
    "recipients": RECIPIENTS,
}


@pytest.mark.parametrize(
    "dialogue",
    [pytest.param(one, id=f"{table}: {one.name}") for table, rows in TABLES.items() for one in rows],
)
def test_the_dialogue_goes_as_written(dialogue: Dialogue, usual: Site) -> None:
    with usual.client() as client:
        client.greeting()
        for said, expected in dialogue.steps:
            client.send(said if isinstance(said, bytes) else said.encode("ascii") + b"\r\n")
            if expected:
                reply = client.read()
                assert f"{reply.code} {reply.text}".startswith(expected), f"{said!r}: {reply} ({dialogue.source})"
        client.quit()


def test_every_refusal_carries_an_enhanced_code(usual: Site) -> None:
    """RFC 2034 §4: all replies but those to EHLO, and 354."""
    with usual.client() as client:
        client.greeting()
        for command in (
            "FOO",
            "MAIL FROM:<a>",
            "EHLO",
            "HELO",
            "RCPT",
            "DATA",
            "RSET x",
            "VRFY",
            "EXPN",
            "QUIT x",
            "VRFY a",
        ):
            reply = client.command(command)
            assert reply.enhanced.startswith(f"{reply.code // 100}."), str(reply)
        client.quit()


def test_ehlo_offers_what_works_and_helo_nothing(usual: Site) -> None:
    with usual.client() as client:
        client.greeting()
        assert client.command("HELO client.example.net").lines == ("mx.example.com",)
        offered = client.ehlo()
        assert offered == {
            "PIPELINING": "",
            "SIZE": "52428800",
            "8BITMIME": "",
            "ENHANCEDSTATUSCODES": "",
            "DSN": "",
            "SMTPUTF8": "",
            "CHUNKING": "",
            "LIMITS": "RCPTMAX=1000",
            "STARTTLS": "",
        }
        client.quit()


def test_the_banner_tells_neither_program_nor_version(usual: Site) -> None:
    with usual.client() as client:
        assert client.greeting().lines == ("mx.example.com ESMTP",)


def test_the_trace_header_holds_no_words_of_the_client_that_are_no_name(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.greeting()
        client.expect("250", 'EHLO a (by evil) with; X"<b>')
        assert client.deliver(sender, "user@example.com", b"A: b\r\n\r\n").code == 250
    [message] = usual.arrived(sender)
    assert message.message.startswith(
        b"Received: from a??by?evil??with??X??b? (unknown [127.0.0.1])\r\n\tby mx.example.com"
    )


def test_the_postmaster_without_a_domain_is_the_one_of_our_first_domain(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        assert client.open().deliver(sender, "Postmaster", b"A: b\r\n\r\n").code == 250
    [message] = usual.arrived(sender)
    assert message.recipients == ("postmaster@example.com",)


@pytest.mark.parametrize(("greeting", "protocol"), [("EHLO", b"with ESMTP "), ("HELO", b"with SMTP ")])
def test_received_names_the_protocol(usual: Site, greeting: str, protocol: bytes) -> None:
    """RFC 5321 §4.4, RFC 3848."""
    sender = usual.sender()
    with usual.client() as client:
        client.greeting()
        client.expect("250", f"{greeting} client.example.net")
        client.deliver(sender, "user@example.com", b"A: b\r\n\r\n")
    [message] = usual.arrived(sender)
    assert protocol in message.message
