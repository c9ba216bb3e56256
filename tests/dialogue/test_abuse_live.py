"""The same with processes: two workers, the hub between them, and what the log and the metrics say. ``wary`` has small
budgets; times are tested in test_abuse.py.
"""

from __future__ import annotations

import contextlib
import itertools

from tests.bed.client import Client
from tests.bed.waiting import wait_for
from tests.dialogue.sites import Site

_hosts = itertools.count(100)


def host() -> str:
    """A source address of a test's own."""
    return f"127.0.2.{next(_hosts)}"


def ready(site: Site, source: str) -> Client:
    client = site.client(source=source)
    client.open()
    return client


def ask(site: Site, source: str, recipient: str) -> int:
    with ready(site, source) as client:
        client.expect("250", "MAIL FROM:<a@example.net>")
        return client.command(f"RCPT TO:<{recipient}>").code


def test_a_client_that_guesses_over_all_workers_is_told_nothing_more(wary: Site) -> None:
    source = host()
    wait_for(lambda: ask(wary, source, "nobody@example.com") == 450, "the budget's end")
    # Every worker knows, as far as fresh connections tell, and good recipients hear the same.
    wait_for(lambda: [ask(wary, source, "user@example.com") for _ in range(8)] == [450] * 8, "450 from every worker")
    assert ask(wary, host(), "user@example.com") == 250
    wary.relay.wait_for_log(
        rf"warning: budget_spent client=\"?unknown\[{source}\]\"? rule=limits.unknown_recipients_per_client"
    )


def test_early_talkers_are_refused_and_others_greeted(wary: Site) -> None:
    with wary.client(source=host()) as client:
        client.send(b"EHLO early.example.net\r\n")
        assert str(client.read()) == "554 5.5.0 You talked before you were greeted"
        assert client.has_ended()
    with ready(wary, host()) as client:
        client.quit()


def test_a_group_with_errors_gets_every_reply_in_order_through_the_tarpit(wary: Site) -> None:
    with ready(wary, host()) as client:
        client.send(b"FOO\r\nNOOP\r\n" * 5 + b"QUIT\r\n")
        assert [client.read().code for _ in range(11)] == [500, 250] * 5 + [221]
        assert client.has_ended()


def test_stress_drives_the_silent_out_and_lets_mail_through(wary: Site) -> None:
    sender = wary.sender()
    wait_for(lambda: wary.session_count() == 0, "end of earlier sessions")
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(wary.client(source="127.0.0.66")) for _ in range(12)]
        wary.relay.wait_for_log("warning: short_of what=places ")
        wait_for(lambda: wary.relay.metric("relay_short_of", what="places") >= 1, "stress on the metrics page")
        with ready(wary, host()) as client:
            assert client.deliver(sender, "user@example.com", b"Subject: x\r\n\r\n").code == 250
            client.quit()
        for client in silent:
            assert client.read().code == 220
            assert str(client.read()) == "421 4.4.2 Timed out waiting for you"
            assert client.has_ended()
    wary.arrived(sender)
    wary.relay.wait_for_log("enough_of what=places")
    wait_for(lambda: wary.relay.metric("relay_short_of", what="places") == 0, "the end of stress")


def test_mail_and_sessions_left_half_way_leave_nothing_behind(wary: Site) -> None:
    """Sockets reset before the greeting, in the tarpit, in DATA."""
    for number in range(30):
        client = wary.client(source=host() if number % 10 == 0 else "127.0.0.67")
        if number % 3:
            client.send(b"EHLO a\r\n")
        client.reset()
    wait_for(lambda: wary.session_count() == 0, "end of the sessions")
    with ready(wary, host()) as client:
        client.quit()
