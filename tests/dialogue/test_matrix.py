"""The matrix of dialogues (``matrix.md``): every command in every order, form and size gets a reply that the RFCs allow."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

import pytest

from tests.bed.client import Client, Reply
from tests.bed.wire import letter
from tests.dialogue.matrix import FORM, LISTENERS, ORDER, VERDICTS, Row, Verdict
from tests.dialogue.sites import Site, Sites

EHLO = "EHLO client.example.net"
MAIL = "MAIL FROM:<matrix@example.net>"
RCPT = "RCPT TO:<user@example.com>"

SETUP = {
    "new": (),
    "helo": ("HELO client.example.net",),
    "ehlo": (EHLO,),
    "mail": (EHLO, MAIL),
    "rcpt": (EHLO, MAIL, RCPT),
    "reset": (EHLO, MAIL, RCPT, "RSET"),
    "done": (EHLO, MAIL, RCPT, "DATA", "."),
    "tls": (EHLO,),
}


def begin(site: Site, row: Row) -> Client:
    """A session in the state of the row."""
    client = site.client(row.listener, tls=site.authority.client() if row.listener == "submissions" else None)
    client.greeting()
    for command in SETUP.get(row.state, (EHLO, MAIL)):
        reply = client.command(command)
        assert reply.code in (250, 354), f"{command}: {reply}"
    if row.state == "refused":
        client.expect("550", "RCPT TO:<nobody@example.com>")
    if row.state == "tls":
        client.starttls(site.authority.client())
    return client


def judge(reply: Reply, codes: tuple[int, ...], sent: bytes, section: str) -> None:
    """The code is allowed, and the enhanced code fits (RFC 2034 §4)."""
    assert reply.code in codes, f"{sent[:80]!r}: {reply}, allowed by {section}: {codes}"
    if reply.code not in (334, 354) and sent[:4].upper() not in (b"EHLO", b"HELO"):
        assert reply.enhanced.startswith(f"{reply.code // 100}."), str(reply)
    elif reply.code >= 400:
        assert reply.enhanced, str(reply)


def play(site: Site, row: Row) -> None:
    """One row, and that the session is in step behind it."""
    with begin(site, row) as client:
        client.send(row.sent)
        reply = client.read()
        judge(reply, row.codes, row.sent, row.section)
        match reply.code:
            case 221:
                assert client.has_ended()
                return
            case 220:
                client.wrap(site.authority.client())
            case 354:
                client.send(letter() + b".\r\n")
                client.expect("250")
        client.expect("250", "NOOP")
        client.quit()


ROWS = (*ORDER, *FORM, *LISTENERS)
BY_COMMAND = [list(rows) for _, rows in groupby(ORDER, attrgetter("sent"))]


def test_the_matrix_is_as_large_as_it_claims_to_be() -> None:
    names = [*(row.name for row in ROWS), *(row.name for row in VERDICTS)]
    assert len(names) >= 400
    assert all(row.section.startswith("RFC ") for row in (*ROWS, *VERDICTS))


@pytest.mark.parametrize("rows", [pytest.param(rows, id=repr(rows[0].sent[:40])) for rows in BY_COMMAND])
def test_in_every_order_a_command_gets_a_reply_that_is_allowed(usual: Site, rows: list[Row]) -> None:
    for row in rows:
        play(usual, row)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in (*FORM, *LISTENERS)])
def test_in_every_form_and_size_a_command_gets_a_reply_that_is_allowed(usual: Site, row: Row) -> None:
    play(usual, row)


@pytest.mark.parametrize("verdict", [pytest.param(verdict, id=verdict.name) for verdict in VERDICTS])
def test_the_facts_lead_to_the_verdict(sites: Sites, verdict: Verdict) -> None:
    site = sites.get(verdict.site)
    context = site.authority.client() if verdict.tls else None
    implicit = verdict.listener == "submissions"
    with site.client(verdict.listener, source=verdict.client, tls=context if implicit else None) as client:
        client.open(verdict.helo)
        if context is not None and not implicit:
            client.starttls(context)
            client.ehlo(verdict.helo)
        mail, *recipients = verdict.commands()
        reply, sent = client.command(mail), mail
        if reply.code == 250:
            for sent in recipients:
                reply = client.command(sent)
        judge(reply, verdict.codes, sent.encode(), verdict.section)
        client.expect("250", "RSET")
        client.quit()
