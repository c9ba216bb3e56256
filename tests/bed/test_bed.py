"""The test bed against itself: what a test leans on must hold before the relay comes into it."""

from __future__ import annotations

import smtplib
import ssl
import threading
import tomllib
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.client import Client, ConnectionEnded
from tests.bed.fixtures import MakeNextHop
from tests.bed.next_hop import Drop, Hold, NextHop, Say, Step
from tests.bed.relay import toml
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter, stuffed, unstuffed

AWKWARD = letter(body=b".\r\n..\r\n.x\r\n\r\n. \r\n" + b"\xe4\xf6" * 3000 + b"\r\n.\r\nend\r\n")


@pytest.fixture
def client(next_hop: NextHop):
    with Client(next_hop.address) as client:
        yield client.open()


def test_a_message_is_recorded_octet_for_octet(client: Client, next_hop: NextHop) -> None:
    reply = client.deliver("a@example.net", ["u@example.com", "v@example.com"], AWKWARD, "BODY=8BITMIME SIZE=6000")
    assert reply.code == 250
    client.quit()
    [seen] = next_hop.accepted
    assert (seen.sender, seen.recipients, seen.parameters) == (
        "a@example.net",
        ("u@example.com", "v@example.com"),
        "BODY=8BITMIME SIZE=6000",
    )
    assert seen.message == AWKWARD
    assert seen.wire == stuffed(AWKWARD)


def test_stuffing_is_undone_by_unstuffing() -> None:
    assert unstuffed(stuffed(AWKWARD)) == AWKWARD
    assert stuffed(b".") == b"..\r\n"


def test_trace_lines_on_top_are_told_from_the_message() -> None:
    assert after_trace(b"Received: from a\r\n\tby b; c\r\nReceived: x\r\n" + AWKWARD) == AWKWARD


def test_python_s_own_client_gets_through(next_hop: NextHop) -> None:
    with smtplib.SMTP(*next_hop.address, timeout=10) as client:
        client.sendmail("a@example.net", ["u@example.com"], letter())
    assert next_hop.accepted[0].message == letter()


def test_a_whole_transaction_can_be_pipelined(client: Client, next_hop: NextHop) -> None:
    assert [reply.code for reply in client.pipeline("MAIL FROM:<>", "RCPT TO:<u@example.com>", "DATA")] == [
        250,
        250,
        354,
    ]
    client.send(b".\r\nQUIT\r\n")
    assert (client.read().code, client.read().code) == (250, 221)
    assert next_hop.accepted[0].wire == b""


def test_a_rule_counts_and_chooses(client: Client, next_hop: NextHop) -> None:
    rule = next_hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="bob@", times=1)
    client.expect("250", "MAIL FROM:<a@example.net>")
    client.expect("250", "RCPT TO:<user@example.com>")
    client.expect("450 4.2.1", "RCPT TO:<bob@example.com>")
    client.expect("250", "RCPT TO:<bob@example.com>")
    assert rule.used == 1
    client.data(letter())
    assert next_hop.transactions[0].recipients == ("user@example.com", "bob@example.com")
    assert next_hop.transactions[0].refused == ("bob@example.com",)


@pytest.mark.parametrize(
    ("step", "command"),
    [(Step.MAIL, "MAIL FROM:<a@example.net>"), (Step.NOOP, "NOOP"), (Step.EHLO, "EHLO x"), (Step.QUIT, "QUIT")],
)
@pytest.mark.parametrize("reset", ["", "reset"])
def test_a_connection_is_dropped_where_it_is_told(
    client: Client, next_hop: NextHop, step: Step, command: str, reset: str
) -> None:
    next_hop.on(step, Drop(reset=bool(reset)))
    with pytest.raises(ConnectionEnded):
        client.command(command)


def test_it_can_say_something_and_then_drop(client: Client, next_hop: NextHop) -> None:
    next_hop.on(Step.MAIL, Say("421 4.3.2 going down"), Drop())
    client.expect("421", "MAIL FROM:<a@example.net>")
    assert client.has_ended()


def test_a_drop_behind_the_final_dot_leaves_a_message_without_an_answer(client: Client, next_hop: NextHop) -> None:
    next_hop.on(Step.FINAL, Drop())
    client.envelope("a@example.net", ["u@example.com"])
    with pytest.raises(ConnectionEnded):
        client.data(letter())
    wait_for(lambda: next_hop.transactions, "transaction")
    assert next_hop.transactions[0].message == letter()
    assert next_hop.accepted == []


def test_a_drop_in_the_body_leaves_nothing(client: Client, next_hop: NextHop) -> None:
    next_hop.on(Step.BODY, Drop())
    client.envelope("a@example.net", ["u@example.com"])
    with pytest.raises(ConnectionEnded):
        client.data(letter())
    assert next_hop.transactions == []


def test_a_client_is_held_until_released(client: Client, next_hop: NextHop) -> None:
    hold = next_hop.on(Step.FINAL, Hold()).hold
    client.envelope("a@example.net", ["u@example.com"])
    client.expect("354", "DATA")
    client.send(stuffed(letter()) + b".\r\n")
    hold.wait_reached()
    assert next_hop.transactions == []
    hold.release()
    assert client.read().code == 250
    assert len(next_hop.wait_for_accepted()) == 1


def test_it_can_go_down_and_come_back_on_its_port(client: Client, next_hop: NextHop) -> None:
    next_hop.stop()
    assert client.has_ended()
    with pytest.raises(ConnectionRefusedError):
        Client(next_hop.address)
    next_hop.start()
    with Client(next_hop.address) as again:
        again.open()


def test_clients_at_once_are_counted(next_hop: NextHop) -> None:
    with Client(next_hop.address) as one, Client(next_hop.address) as two:
        one.open()
        two.open()
        assert next_hop.most_at_once == 2
    assert next_hop.sessions == 2


@pytest.mark.parametrize(
    ("octets", "violation"),
    [
        (b"MAIL FROM:<a@b>\r\nNOOP\r\n", "pipelined"),
        (b"NOOP\n", "CR LF"),
        (b"MAIL FROM:a@b\r\n", "path"),
        (b"MAIL FROM:<a@b> BODY=8BITMIME\r\n", "not offered"),
        (b"NONSENSE\r\n", "unknown command"),
    ],
)
def test_a_client_that_breaks_the_rules_is_noted(octets: bytes, violation: str) -> None:
    hop = NextHop(extensions=())
    try:
        with Client(hop.address) as client:
            client.open()
            client.send(octets)
            client.read()
        assert any(violation in noted for noted in hop.violations)
    finally:
        hop.close()


def test_a_size_limit_is_kept(make_next_hop: MakeNextHop) -> None:
    hop = make_next_hop(extensions=("SIZE 1000",))
    with Client(hop.address) as client:
        assert client.open().extensions == {"SIZE": "1000"}
        client.expect("552 5.3.4", "MAIL FROM:<a@example.net> SIZE=1001")
        assert client.deliver("a@example.net", "u@example.com", letter(body=b"x" * 1001)).code == 552


def test_tls_is_good_where_it_should_be(make_next_hop: MakeNextHop, authority: Authority) -> None:
    hop = make_next_hop(certificate=authority.server())
    with Client(hop.address) as client:
        assert "STARTTLS" in client.open().extensions
        client.starttls(authority.client())
        assert "STARTTLS" not in client.ehlo()
        client.deliver("a@example.net", "u@example.com", letter())
        client.quit()
    assert hop.accepted[0].tls


@pytest.mark.parametrize("server", [Authority.server_expired, Authority.server_of_a_stranger])
def test_tls_is_bad_where_it_should_be(make_next_hop: MakeNextHop, authority: Authority, server) -> None:
    hop = make_next_hop(certificate=server(authority))
    with Client(hop.address) as client:
        client.open()
        with pytest.raises(ssl.SSLCertVerificationError):
            client.starttls(authority.client())


def test_a_certificate_for_another_name_is_refused(make_next_hop: MakeNextHop, authority: Authority) -> None:
    hop = make_next_hop(certificate=authority.server("other.example.com"))
    with Client(hop.address) as client:
        client.open()
        with pytest.raises(ssl.SSLCertVerificationError):
            client.starttls(authority.client())


def test_certificate_files_can_be_used(authority: Authority, tmp_path: Path) -> None:
    chain, key = authority.files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    ssl.create_default_context(cafile=authority.bundle(tmp_path))


def test_many_threads_may_talk_at_once(next_hop: NextHop) -> None:
    def talk(number: int) -> None:
        with Client(next_hop.address) as client:
            client.open().deliver(f"s{number}@example.net", "u@example.com", letter())

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.sender for one in next_hop.wait_for_accepted(10)} == {f"s{number}@example.net" for number in range(10)}


def test_a_configuration_is_written_as_toml(tmp_path: Path) -> None:
    table = {
        "server": {"hostname": 'a"b', "spool": tmp_path, "soft_bounce": False, "n": 1, "f": 0.5},
        "listener": [{"name": "a"}, {"name": "b"}],
        "directory": {"sources": [{"type": "list", "path": tmp_path}]},
    }
    read = tomllib.loads(toml(table))
    assert read["server"] == {"hostname": 'a"b', "spool": str(tmp_path), "soft_bounce": False, "n": 1, "f": 0.5}
    assert read["listener"] == table["listener"]
    assert read["directory"]["sources"] == [{"type": "list", "path": str(tmp_path)}]


@pytest.mark.needs("smtp-sink")
def test_smtp_sink_keeps_what_it_takes(make_sink) -> None:
    sink = make_sink()
    with Client(("127.0.0.1", sink.port)) as client:
        client.open().deliver("a@example.net", "u@example.com", AWKWARD)
        client.quit()
    assert sink.messages() == [AWKWARD]


@pytest.mark.needs("postfix", "root")
def test_postfix_keeps_what_it_takes(make_postfix) -> None:
    postfix = make_postfix()
    with Client(postfix.address) as client:
        client.open().deliver("a@example.net", "u@example.com", AWKWARD)
        client.quit()
    [message] = postfix.wait_for_messages()
    assert message.endswith(AWKWARD)


@pytest.mark.needs("postfix", "root")
def test_postfix_sends_through_its_relayhost(make_postfix, next_hop: NextHop) -> None:
    postfix = make_postfix(domain="", relayhost=f"[127.0.0.1]:{next_hop.port}")
    with Client(postfix.address) as client:
        client.open().deliver("a@example.net", "u@example.com", AWKWARD)
        client.quit()
    [transaction] = next_hop.wait_for_accepted()
    assert after_trace(transaction.message) == AWKWARD
