"""One message through the real relay: express straight to the next hop, and by way of the queue."""

from __future__ import annotations

import pytest

from tests.bed.fixtures import MakeNextHop, MakeRelay
from tests.bed.next_hop import Drop, Hold, NextHop, Say, Step
from tests.bed.relay import RelayRunner
from tests.bed.wire import after_trace, letter, stuffed

AWKWARD = letter(body=b".\r\n..\r\n.x\r\n\r\n. \r\n" + b"\xe4\xf6" * 3000 + b"\r\n.\r\nend\r\n")
BIG = letter(body=b"".join(b".%07d a line of a body that lies in a file\r\n" % number for number in range(20_000)))


@pytest.fixture(params=["express", "queue"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def relay(make_relay: MakeRelay, next_hop: NextHop, way: str) -> RelayRunner:
    return make_relay(next_hop, config={"delivery": {"express": way == "express"}})


def test_a_message_reaches_the_next_hop_behind_one_trace_header(
    relay: RelayRunner, next_hop: NextHop, way: str
) -> None:
    with relay.client() as client:
        client.open("client.example.net")
        reply = client.deliver("sender@example.net", "user@example.com", AWKWARD, "BODY=8BITMIME")
        client.quit()
    assert reply.code == 250
    assert reply.text.startswith("2.0.0 Ok: delivered as" if way == "express" else "2.0.0 Ok: queued as")
    [transaction] = next_hop.wait_for_accepted()
    assert (transaction.sender, transaction.recipients) == ("sender@example.net", ("user@example.com",))
    assert "BODY=8BITMIME" in transaction.parameters
    assert after_trace(transaction.message) == AWKWARD
    trace = transaction.message.removesuffix(AWKWARD).decode()
    queue_id = reply.text.split()[-1]
    assert trace.startswith("Received: from client.example.net (")
    assert "[127.0.0.1])\r\n\tby mx.example.com with ESMTP" in trace
    assert f" id {queue_id}" in trace
    assert "for <user@example.com>" in trace
    assert trace.count("Received:") == 1


def test_a_body_that_lies_in_a_file_arrives_unchanged(relay: RelayRunner, next_hop: NextHop) -> None:
    with relay.client() as client:
        assert client.open().deliver("sender@example.net", "user@example.com", BIG).code == 250
    [transaction] = next_hop.wait_for_accepted()
    assert after_trace(transaction.message) == BIG
    assert transaction.wire.endswith(stuffed(BIG))


def test_several_recipients_share_one_transaction_and_are_not_told_of_each_other(
    relay: RelayRunner, next_hop: NextHop
) -> None:
    with relay.client() as client:
        assert client.open().deliver("", ["user@example.com", "bob@example.com"], letter()).code == 250
    [transaction] = next_hop.wait_for_accepted()
    assert (transaction.sender, sorted(transaction.recipients)) == ("", ["bob@example.com", "user@example.com"])
    assert b"for <" not in transaction.message


def test_unknown_and_restricted_are_refused_and_the_rest_of_the_session_goes_on(
    relay: RelayRunner, next_hop: NextHop
) -> None:
    with relay.client() as client:
        client.open()
        client.expect("250", "MAIL FROM:<sender@example.net>")
        client.expect(
            "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown", "RCPT TO:<nobody@example.com>"
        )
        client.expect("554 5.7.1 <user@example.org>: Relay access denied", "RCPT TO:<user@example.org>")
        client.expect("250", "RSET")
        client.expect("250", "MAIL FROM:<restricted@example.com>")
        client.expect(
            "554 5.7.1 <restricted@example.com>: Sender address rejected: This account is not allowed to send emails",
            "RCPT TO:<user@example.com>",
        )
        client.expect("250", "RSET")
        assert client.deliver("sender@example.net", "user@example.com", letter()).code == 250
    assert len(next_hop.wait_for_accepted()) == 1
    relay.wait_for_log(
        r"NOQUEUE: reject: RCPT from \S+\[127\.0\.0\.1\]: 554 5\.7\.1 <restricted@example\.com>: "
        r"Sender address rejected: This account is not allowed to send emails; "
        r"from=<restricted@example\.com> to=<user@example\.com> proto=ESMTP helo=<client\.example\.net>"
    )


def test_mail_for_a_next_hop_that_is_down_is_queued_and_delivered_when_it_is_back(
    relay: RelayRunner, next_hop: NextHop
) -> None:
    next_hop.stop()
    with relay.client() as client:
        assert (
            client.open()
            .deliver("sender@example.net", "user@example.com", letter())
            .text.startswith("2.0.0 Ok: queued as")
        )
    next_hop.start()
    [transaction] = next_hop.wait_for_accepted()
    assert after_trace(transaction.message) == letter()


def test_queued_mail_outlives_a_restart(relay: RelayRunner, next_hop: NextHop) -> None:
    next_hop.stop()
    with relay.client() as client:
        assert client.open().deliver("sender@example.net", "user@example.com", BIG).code == 250
    assert relay.stop() == 0
    next_hop.start()
    relay.start(build=False)
    [transaction] = next_hop.wait_for_accepted()
    assert after_trace(transaction.message) == BIG


def test_queued_mail_outlives_the_death_of_the_whole_tree(relay: RelayRunner, next_hop: NextHop) -> None:
    next_hop.stop()
    with relay.client() as client:
        assert client.open().deliver("sender@example.net", "user@example.com", letter()).code == 250
    relay.kill_tree()
    next_hop.start()
    relay.start(build=False)
    [transaction] = next_hop.wait_for_accepted()
    assert after_trace(transaction.message) == letter()


def test_a_refusal_of_the_next_hop_reaches_the_client_or_the_sender(
    make_relay: MakeRelay, next_hop: NextHop, make_next_hop: MakeNextHop, way: str
) -> None:
    outside = make_next_hop()
    relay = make_relay(next_hop, default_next_hop=outside, config={"delivery": {"express": way == "express"}})
    next_hop.on(Step.FINAL, Say("554 5.7.1 we do not like it"))
    with relay.client() as client:
        reply = client.open().deliver("sender@example.net", "user@example.com", letter())
    if way == "express":
        assert str(reply).startswith("554 5.7.1 The destination server refused the message")
        assert outside.sessions == 0
        return
    assert reply.code == 250
    [report] = outside.wait_for_accepted()
    assert (report.sender, report.recipients) == ("", ("sender@example.net",))
    assert b"Final-Recipient: rfc822; user@example.com\r\n" in report.message
    assert b"Diagnostic-Code: smtp; 554 5.7.1 we do not like it\r\n" in report.message
    assert letter() in report.message


def test_a_missing_right_on_the_connector_never_costs_a_message(relay: RelayRunner, next_hop: NextHop) -> None:
    next_hop.on(Step.MAIL, Say("530 5.7.57 Client not authenticated to send mail"), times=1)
    with relay.client() as client:
        assert client.open().deliver("sender@example.net", "user@example.com", letter()).code == 250
    [transaction] = next_hop.wait_for_accepted()
    assert after_trace(transaction.message) == letter()
    relay.wait_for_log("AnonymousUsers")


def test_greylisting_one_of_two_recipients_delivers_each_once(relay: RelayRunner, next_hop: NextHop) -> None:
    next_hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="bob@", times=1)
    with relay.client() as client:
        assert client.open().deliver("s@example.net", ["user@example.com", "bob@example.com"], letter()).code == 250
    first, second = next_hop.wait_for_accepted(2)
    assert (first.recipients, second.recipients) == (("user@example.com",), ("bob@example.com",))


def test_a_drop_behind_the_final_dot_is_tried_again(relay: RelayRunner, next_hop: NextHop) -> None:
    next_hop.on(Step.FINAL, Drop(), times=1)
    with relay.client() as client:
        assert client.open().deliver("sender@example.net", "user@example.com", letter()).code == 250
    [transaction] = next_hop.wait_for_accepted()
    assert after_trace(transaction.message) == letter()
    assert len(next_hop.transactions) == 2


def test_a_late_answer_is_awaited_and_nothing_is_sent_twice(make_relay: MakeRelay, next_hop: NextHop, way: str) -> None:
    relay = make_relay(next_hop, config={"delivery": {"express": way == "express", "express_deadline_s": 0.2}})
    hold = next_hop.on(Step.FINAL, Hold()).hold
    with relay.client() as client:
        reply = client.open().deliver("sender@example.net", "user@example.com", letter())
        assert reply.text.startswith("2.0.0 Ok: queued as")
        hold.wait_reached()
        hold.release()
        next_hop.wait_for_accepted()
        relay.wait_for_log(rf"{reply.text.split()[-1]}: to=<user@example\.com>.*status=sent")
    assert relay.stop() == 0
    assert len(next_hop.transactions) == 1


@pytest.mark.parametrize("early", ["452 4.3.1 disk full", "250 2.0.0 Ok"])
@pytest.mark.parametrize("bye", [[], [Drop()]], ids=["stays", "drops"])
def test_an_answer_before_the_final_dot_neither_delivers_nor_spoils_the_connection(
    relay: RelayRunner, next_hop: NextHop, early: str, bye: list[Drop]
) -> None:
    next_hop.on(Step.BODY, Say(early), *bye, times=1)
    huge = BIG * 8  # more than socket buffers take, so that the answer comes before the body is out
    with relay.client() as client:
        client.open()
        assert client.deliver("sender@example.net", "user@example.com", huge).code == 250
        assert client.deliver("sender@example.net", "bob@example.com", letter()).code == 250
    accepted = next_hop.wait_for_accepted(2)
    relay.wait_for_log("status=sent", 2)
    assert {(one.recipients, after_trace(one.message)) for one in accepted} == {
        (("user@example.com",), huge),
        (("bob@example.com",), letter()),
    }


def test_a_refusal_of_mail_counts_though_pipelined_rcpts_get_a_503(
    make_relay: MakeRelay, next_hop: NextHop, make_next_hop: MakeNextHop, way: str
) -> None:
    outside = make_next_hop()
    relay = make_relay(next_hop, default_next_hop=outside, config={"delivery": {"express": way == "express"}})
    next_hop.on(Step.MAIL, Say("552 5.3.4 too big for us"))
    with relay.client() as client:
        reply = client.open().deliver("sender@example.net", "user@example.com", letter())
    if way == "express":
        assert str(reply).startswith("552 5.3.4 ")
    else:
        [report] = outside.wait_for_accepted()
        assert b"Diagnostic-Code: smtp; 552 5.3.4 too big for us\r\n" in report.message
