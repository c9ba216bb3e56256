"""Clients that stand in the way: each wait has its end, each budget its answer, and ordinary mail goes on. On a clock that the
tests turn; what needs processes stands in test_abuse_live.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.mail.reply import SHUTTING_DOWN
from tests.dialogue.played import PEER, Dialogue, Stage

TRUSTED = "198.51.100.7"
TIMED_OUT = "421 4.4.2 Timed out waiting for you"
NOBODY = [f"nobody{number}@example.com" for number in range(50)]
SPENT = "450 4.7.1 Too many unknown recipients from your network, try again later"

Make = Callable[..., Stage]


@pytest.fixture
async def stage(tmp_path: Path) -> Make:
    def make(**limits: Any) -> Stage:
        return Stage(tmp_path, limits)

    return make


def in_data(dialogue: Dialogue) -> Dialogue:
    dialogue.say("MAIL FROM:<a@example.net>", "RCPT TO:<user@example.com>", "DATA")
    return dialogue


# --- deadlines ---------------------------------------------------------------------------------------------------------


async def test_a_command_has_its_time_as_a_whole_however_slowly_its_octets_drip(stage: Make) -> None:
    """RFC 5321 §4.5.3.2.7."""
    play = stage(command_timeout_s=300.0)
    client = play.ready()
    client.say("NOOP")
    for _ in range(29):
        client.send(b"X")
        play.passes(10)
    assert client.heard() == []
    client.send(b"X")
    play.passes(11)
    assert client.heard() == [TIMED_OUT]
    assert client.wire.ended


async def test_a_whole_command_gives_the_next_one_its_time(stage: Make) -> None:
    play = stage(command_timeout_s=300.0)
    client = play.ready()
    for _ in range(5):
        play.passes(290)
        assert client.say("NOOP") == ["250 2.0.0 Ok"]


async def test_a_message_that_stops_is_waited_for_as_long_as_for_a_block(stage: Make) -> None:
    play = stage(data_timeout_s=180.0)
    client = in_data(play.ready())
    client.heard()
    client.send(b"Subject: x\r\n")
    play.passes(179)
    assert client.heard() == []
    play.passes(2)
    assert client.heard()[0].startswith("421 4.4.2 ")


async def test_a_message_that_drips_is_ended_although_a_block_comes_every_time(stage: Make) -> None:
    play = stage(data_timeout_s=180.0, data_rate=500)
    client = in_data(play.ready())
    client.heard()
    seconds = 0
    while not client.wire.ended:
        assert seconds < 200
        client.send(b"x")
        play.passes(1)
        seconds += 1
    assert seconds > 179
    assert client.heard() == ["421 4.4.2 Message comes too slowly"]


async def test_a_message_at_the_least_rate_takes_the_time_it_needs(stage: Make) -> None:
    play = stage(data_timeout_s=180.0, data_rate=500)
    client = in_data(play.ready())
    client.heard()
    client.send(b"Subject: x\r\n\r\n")
    for _ in range(100):
        client.send(b"x" * 4998 + b"\r\n")
        play.passes(9.5)
    client.send(b".\r\n")
    assert client.codes() == [250]


async def test_a_fast_beginning_earns_no_endless_pause(stage: Make) -> None:
    """What a client is ahead does not count for later: a megabyte at once buys no half an hour."""
    play = stage(data_timeout_s=20.0, data_rate=500)
    client = in_data(play.ready())
    client.heard()
    client.send(b"Subject: x\r\n\r\n" + (b"x" * 998 + b"\r\n") * 1000)
    for _ in range(22):
        client.send(b"x")
        play.passes(1)
    assert client.heard() == ["421 4.4.2 Message comes too slowly"]


async def test_octets_of_a_refused_message_count_as_well(stage: Make) -> None:
    """A client may not notice that its message is refused before the end."""
    play = stage(data_timeout_s=20.0, data_rate=500, message_octets=1024)
    client = in_data(play.ready())
    client.heard()
    client.send(b"Subject: x\r\n\r\n")
    for _ in range(60):
        client.send(b"x" * 998 + b"\r\n")
        play.passes(1)
    client.send(b".\r\n")
    assert client.codes() == [552]


async def test_a_session_ends_in_its_time_whatever_it_does(stage: Make) -> None:
    play = stage(session_timeout_s=600.0)
    client = play.ready()
    for _ in range(59):
        play.passes(10)
        assert client.say("NOOP") == ["250 2.0.0 Ok"]
    play.passes(11)
    assert client.heard() == ["421 4.4.2 Session took too long"]


async def test_without_that_limit_it_goes_on(stage: Make) -> None:
    play = stage()
    client = play.ready()
    for _ in range(100):
        play.passes(200)
        assert client.say("NOOP") == ["250 2.0.0 Ok"]


async def test_a_last_word_that_is_not_taken_is_waited_for_ten_seconds(stage: Make) -> None:
    play = stage(session_timeout_s=5.0)
    client = play.ready()
    play.passes(6)
    assert client.wire.ended
    play.passes(9)
    assert not client.wire.cut
    play.passes(2)
    assert client.wire.cut


# --- the pause before the greeting -------------------------------------------------------------------------------------


async def test_who_waits_for_the_greeting_is_greeted(stage: Make) -> None:
    play = stage(greet_pause_s=5.0)
    client = play.client()
    play.passes(4)
    assert client.heard() == []
    play.passes(1)
    assert client.codes() == [220]
    assert client.say("EHLO a")[0].startswith("250 ")


async def test_who_talks_first_is_refused(stage: Make) -> None:
    play = stage(greet_pause_s=5.0)
    client = play.client()
    client.send(b"EHLO a\r\nMAIL FROM:<a@example.net>\r\n")
    play.passes(5)
    assert client.heard() == ["554 5.5.0 You talked before you were greeted"]
    assert client.wire.ended
    assert any("CONNECT" in line and "554 5.5.0" in line for line in play.log)


async def test_under_soft_bounce_who_talks_first_may_come_again(tmp_path: Path) -> None:
    play = Stage(tmp_path, {"greet_pause_s": 5.0}, soft_bounce=True)
    client = play.client()
    client.send(b"EHLO a\r\n")
    play.passes(5)
    assert client.heard()[0].startswith("451 4.5.0 ")


async def test_trusted_clients_are_greeted_at_once(stage: Make) -> None:
    assert stage(greet_pause_s=5.0).client(TRUSTED).codes() == [220]


async def test_trusted_clients_wait_as_well_where_they_are_no_exception(stage: Make) -> None:
    assert stage(greet_pause_s=5.0, trusted_exempt=False).client(TRUSTED).codes() == []


# --- the tarpit --------------------------------------------------------------------------------------------------------


async def test_errors_are_answered_late_from_a_number_on(stage: Make) -> None:
    play = stage(tarpit_after=3, tarpit_s=2.0)
    client = play.ready()
    for _ in range(3):
        assert client.say("FOO") == ["500 5.5.2 Command not recognized"]
    assert client.say("FOO") == []
    play.passes(1.5)
    assert client.heard() == []
    play.passes(0.5)
    assert client.codes() == [500]
    assert client.say("NOOP") == ["250 2.0.0 Ok"]


async def test_a_group_of_commands_gets_its_replies_in_order_and_one_delay_for_each_error(stage: Make) -> None:
    play = stage(tarpit_after=1, tarpit_s=2.0, errors=4)
    client = play.ready()
    assert client.say("FOO", "NOOP", "FOO", "RSET", "FOO", "NOOP", "FOO", "NOOP") == []
    play.passes(2)
    assert client.codes() == [500, 250, 500]
    play.passes(2)
    assert client.codes() == [250, 500, 250, 500, 421]
    assert client.wire.ended


async def test_a_session_that_is_shut_down_meanwhile_hears_what_it_is_owed(stage: Make) -> None:
    play = stage(tarpit_after=0, tarpit_s=5.0)
    client = play.ready()
    assert client.say("FOO") == []
    client.session.end(SHUTTING_DOWN)
    assert client.codes() == [500, 421]
    play.passes(6)
    assert client.heard() == []


async def test_a_client_that_leaves_the_tarpit_is_forgotten(stage: Make) -> None:
    play = stage(tarpit_after=0, tarpit_s=5.0)
    client = play.ready()
    client.say("FOO")
    client.session.connection_lost(None)
    play.passes(6)
    assert not play.listener.delayed
    assert not play.listener.sessions


async def test_only_so_many_sessions_are_kept_waiting(stage: Make) -> None:
    play = stage(tarpit_after=0, tarpit_s=5.0, tarpit_sessions=2)
    clients = [play.ready() for _ in range(3)]
    assert [client.say("FOO") for client in clients] == [[], [], ["500 5.5.2 Command not recognized"]]


async def test_trusted_clients_are_never_kept_waiting(stage: Make) -> None:
    client = stage(tarpit_after=0, tarpit_s=5.0).ready(TRUSTED)
    assert client.say("FOO") == ["500 5.5.2 Command not recognized"]


# --- unknown recipients ------------------------------------------------------------------------------------------------


def guess(play: Stage, count: int, address: str = PEER) -> list[str]:
    client = play.ready(address)
    return client.envelope(*NOBODY[:count])[1:]


async def test_who_asks_for_too_many_unknown_recipients_learns_no_more_of_any(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=5, unknown_recipients_per_network=0)
    client = play.ready()
    replies = client.envelope(*NOBODY[:5], "user@example.com", NOBODY[6])
    assert [reply[:9] for reply in replies] == ["250 2.1.0", *["550 5.1.1"] * 5, *["450 4.7.1"] * 2]
    assert replies[6] == replies[7] == SPENT
    assert play.ready().envelope("user@example.com")[1] == SPENT
    assert any("budget_spent" in line and "limits.unknown_recipients_per_client" in line for line in play.log)


async def test_others_are_not_concerned(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=5)
    guess(play, 5)
    assert play.ready("192.0.2.2").envelope("user@example.com")[1].startswith("250 ")
    assert play.ready("2001:db8::1").envelope("user@example.com")[1].startswith("250 ")


@pytest.mark.parametrize(
    ("first", "second", "third", "stranger"),
    [
        ("192.0.2.1", "192.0.2.2", "192.0.2.99", "192.0.3.1"),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:ffff::1", "2001:db8:1::1"),
    ],
)
async def test_a_network_has_a_budget_of_its_own(
    stage: Make, first: str, second: str, third: str, stranger: str
) -> None:
    play = stage(unknown_recipients_per_client=5, unknown_recipients_per_network=8)
    guess(play, 4, first)
    guess(play, 4, second)
    assert play.ready(third).envelope("user@example.com")[1] == SPENT
    assert play.ready(stranger).envelope("user@example.com")[1].startswith("250 ")


async def test_an_ipv6_client_is_its_64(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=5)
    guess(play, 5, "2001:db8::1")
    assert play.ready("2001:db8::ffff").envelope("user@example.com")[1] == SPENT


async def test_the_budget_comes_back_with_time(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=5, unknown_recipients_per_network=0, unknown_recipients_period_s=100.0)
    guess(play, 5)
    play.passes(19)
    assert play.ready().envelope("user@example.com")[1] == SPENT
    play.passes(2)
    assert [reply[:3] for reply in play.ready().envelope("user@example.com", NOBODY[0], "user@example.com")[1:]] == [
        "250", "550", "450",
    ]  # fmt: skip
    play.passes(100)
    assert [reply[:3] for reply in guess(play, 6)] == ["550"] * 5 + ["450"]


async def test_guessing_on_spends_the_error_budget(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=5, errors=10, tarpit_s=0.0)
    replies = [reply[:3] for reply in guess(play, 20)]
    assert replies == ["550"] * 5 + ["450"] * 5 + ["421"]


async def test_a_message_for_recipients_taken_before_still_gets_through(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=5, tarpit_s=0.0)
    client = play.ready()
    client.envelope("user@example.com", *NOBODY[:7])
    assert client.say("DATA")[0].startswith("354")
    client.send(b"Subject: x\r\n\r\n.\r\n")
    assert client.codes() == [250]


async def test_trusted_clients_have_no_such_budget(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=5, tarpit_s=0.0)
    assert [reply[:3] for reply in guess(play, 10, TRUSTED)] == ["550"] * 10


async def test_nor_has_anybody_when_it_is_off(stage: Make) -> None:
    play = stage(unknown_recipients_per_client=0, unknown_recipients_per_network=0, errors=0, tarpit_s=0.0)
    assert [reply[:3] for reply in guess(play, 50)] == ["550"] * 50


async def test_what_another_worker_s_clients_spend_counts_here(stage: Make, tmp_path: Path) -> None:
    play = stage(unknown_recipients_per_client=5, unknown_recipients_per_network=0)
    guess(play, 2)
    changes = list(play.budgets.changes(play.time))
    assert sum(count for budget, _, count in changes if budget == 0) == 2
    for budget, key, count in changes:
        play.budgets.hear(budget, key, count + 1, play.time)
    assert play.ready().envelope("user@example.com")[1] == SPENT
    assert list(play.budgets.changes(play.time)) == []  # what was heard is not told on


# --- rates -------------------------------------------------------------------------------------------------------------


async def test_connections_of_a_client_in_a_minute_are_limited_by_choice(stage: Make) -> None:
    play = stage(connections_per_minute=3)
    assert [play.client().codes() for _ in range(4)] == [[220], [220], [220], [421]]
    assert play.client("192.0.2.2").codes() == [220]
    assert play.client(TRUSTED).codes() == [220]
    play.passes(21)
    assert [play.client().codes() for _ in range(2)] == [[220], [421]]


async def test_messages_of_a_client_in_a_minute_are_limited_by_choice(stage: Make) -> None:
    play = stage(messages_per_minute=2)
    client = play.ready()
    for _ in range(2):
        assert client.say("MAIL FROM:<a@example.net>", "RSET")[0].startswith("250")
    assert client.say("MAIL FROM:<a@example.net>") == ["450 4.7.1 Too many messages from your address, try again later"]
    trusted = play.ready(TRUSTED)
    for _ in range(5):
        assert trusted.say("MAIL FROM:<a@example.net>", "RSET")[0].startswith("250")
    play.passes(31)
    assert client.say("MAIL FROM:<a@example.net>")[0].startswith("250")


# --- stress ------------------------------------------------------------------------------------------------------------


def strain(play: Stage, **given: Any) -> None:
    play.listener.strain(**{"stressed": False, "memory_low": False, "spare": 1 << 40, "room": 1000} | given)


async def test_under_stress_the_silent_make_room_within_seconds(stage: Make) -> None:
    play = stage(command_timeout_s=300.0, stress_timeout_s=10.0)
    silent, talking = play.ready(), play.ready()
    play.passes(100)
    strain(play, stressed=True)
    for _ in range(4):
        assert talking.say("NOOP") == ["250 2.0.0 Ok"]
        play.passes(5)
    assert silent.heard() == [TIMED_OUT]
    assert talking.heard() == []


async def test_under_stress_one_error_is_enough(stage: Make) -> None:
    play = stage(errors=20, stress_errors=1)
    client = play.ready()
    strain(play, stressed=True)
    assert client.say("FOO") == ["500 5.5.2 Command not recognized", "421 4.7.0 Too many errors"]
    strain(play)
    assert play.ready().say("FOO") == ["500 5.5.2 Command not recognized"]


async def test_an_error_budget_that_is_off_stays_off_under_stress(stage: Make) -> None:
    play = stage(errors=0)
    strain(play, stressed=True)
    assert play.ready().say("FOO") == ["500 5.5.2 Command not recognized"]


# --- memory and descriptors --------------------------------------------------------------------------------------------


async def test_when_memory_is_low_mail_is_asked_to_come_again_and_taken_when_there_is_some(stage: Make) -> None:
    play = stage()
    client = play.ready()
    strain(play, memory_low=True, spare=0)
    assert client.say("MAIL FROM:<a@example.net>") == ["452 4.3.1 Insufficient memory, try again later"]
    strain(play)
    assert client.say("MAIL FROM:<a@example.net>")[0].startswith("250")


async def test_a_header_that_no_memory_is_left_for_is_refused_for_now(stage: Make) -> None:
    """Between two looks at the memory, too: what comes in meanwhile is taken off what was left."""
    play = stage()
    first, second = in_data(play.ready()), in_data(play.ready())
    strain(play, spare=100_000)
    for client in (first, second):
        client.heard()
        for _ in range(10):
            client.send(b"X-Long: " + b"x" * 9990 + b"\r\n")
    assert play.listener.held() <= 120_000
    for client in (first, second):
        client.send(b"\r\nbody\r\n.\r\n")
    assert sorted([first.codes(), second.codes()]) == [[250], [452]]


async def test_a_body_that_no_memory_is_left_for_goes_to_the_disk(stage: Make) -> None:
    play = stage()
    client = in_data(play.ready())
    client.heard()
    strain(play, spare=0)
    client.send(b"Subject: x\r\n\r\n")
    for _ in range(5):
        client.send(b"x" * 998 + b"\r\n")
    assert play.listener.held() <= 1000  # its last block
    client.send(b".\r\n")
    assert client.codes() == [250]


async def test_when_descriptors_run_out_new_clients_are_asked_to_come_again(stage: Make) -> None:
    play = stage()
    kept = play.ready()
    strain(play, room=2)
    assert [play.client().codes() for _ in range(4)] == [[220], [220], [421], [421]]
    assert kept.envelope("user@example.com")[1].startswith("250")
    strain(play, room=1000)
    assert play.client().codes() == [220]


async def test_a_thousand_endless_lines_hold_no_memory(stage: Make) -> None:
    play = stage()
    clients = [play.ready() for _ in range(1000)]
    for client in clients:
        for _ in range(8):
            client.send(b"x" * 65536)
        assert len(client.session._waiting) <= 2 * 2048


async def test_a_clock_that_is_set_ends_nobody(stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are on the monotonic clock: the wall clock jumps an hour forward and two back."""
    play = stage(command_timeout_s=300.0, session_timeout_s=600.0)
    client = in_data(play.ready())
    client.heard()
    for wall in (3600.0, -7200.0):
        monkeypatch.setattr("time.time", lambda wall=wall: 1_700_000_000.0 + wall)
        client.send(b"X-A: b\r\n")
        play.passes(5)
    client.send(b"\r\n.\r\n")
    assert client.codes() == [250]
