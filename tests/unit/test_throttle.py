"""Guessing: budgets per account, client and network, without shutting out who is known. Time is handed in."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.auth.throttle import REMEMBER_S, Throttle, client_of, network_of
from relay.config.auth import Auth
from relay.directory.lockout import Lockout

RULES = Auth(account_failures=9, client_failures=20, network_failures=40, window_s=900.0)
HOME, AWAY = "192.0.2.1", "198.51.100.7"


def guess(throttle: Throttle, account: str, client: str, now: float) -> bool:
    """One wrong guess; False when it was not let through."""
    if throttle.client_blocked(client, now) or throttle.account_full(account, client, now):
        return False
    throttle.begin(account)
    throttle.end(account)
    throttle.failed(account, client, b"", now)
    return True


def test_strangers_get_two_thirds_of_an_account_s_budget_and_the_owner_the_rest() -> None:
    throttle = Throttle(RULES)
    throttle.succeeded("ann", HOME, 0.0)
    assert [guess(throttle, "ann", f"198.51.100.{number}", 1.0) for number in range(1, 9)] == [True] * 6 + [False] * 2
    assert not throttle.account_full("ann", HOME, 1.0)
    assert [guess(throttle, "ann", HOME, 2.0) for _ in range(5)] == [True] * 3 + [False] * 2
    [block] = throttle.blocks(2.0)
    assert (block.what, block.name, block.failures) == ("account", "ann", 9)


def test_failures_of_an_account_are_forgotten_when_a_window_passed_without_one() -> None:
    throttle = Throttle(RULES)
    for number in range(6):
        assert guess(throttle, "ann", AWAY, 100.0 * number)
    assert not guess(throttle, "ann", AWAY, 901.0), "Active Directory still counts the first one"
    [block] = throttle.blocks(1000.0)
    assert block.left_s == 400.0
    assert guess(throttle, "ann", AWAY, 1400.0)


def test_the_directory_s_threshold_counts_where_it_is_lower() -> None:
    throttle = Throttle(RULES)
    throttle.succeeded("ann", HOME, 0.0)
    throttle.obey(Lockout(5, 1800.0))
    assert [guess(throttle, "ann", AWAY, 1.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [guess(throttle, "ann", HOME, 1.0) for _ in range(3)] == [True] + [False] * 2
    assert not guess(throttle, "ann", AWAY, 1000.0), "the directory's window is the longer one"
    assert guess(throttle, "ann", AWAY, 1801.0)
    throttle.configure(Auth(account_failures=3))
    assert [guess(throttle, "bob", AWAY, 1.0) for _ in range(4)] == [True] * 2 + [False] * 2
    throttle.obey(Lockout(1, 60.0))
    assert [guess(throttle, "carl", AWAY, 1.0) for _ in range(3)] == [True] + [False] * 2


def test_a_client_and_its_network_have_their_own_budgets() -> None:
    throttle = Throttle(RULES)
    tried = [guess(throttle, f"user{number}", AWAY, 1.0) for number in range(25)]
    assert tried.count(True) == 20
    assert throttle.client_blocked(AWAY, 1.0)
    neighbours = [guess(throttle, f"other{number}", f"198.51.100.{number}", 1.0) for number in range(100, 150)]
    assert neighbours.count(True) == 20
    assert throttle.client_blocked("198.51.100.250", 1.0)
    assert not throttle.client_blocked(HOME, 1.0)
    assert {block.what for block in throttle.blocks(1.0)} == {"client", "network"}


def test_an_operator_releases_by_name() -> None:
    throttle = Throttle(RULES)
    for _ in range(6):
        guess(throttle, "ann", AWAY, 1.0)
    assert throttle.release("ann")
    assert not throttle.account_full("ann", HOME, 1.0)
    assert not throttle.release("ann")


def test_checks_under_way_count_as_failures_until_they_are_over() -> None:
    throttle = Throttle(RULES)
    for _ in range(6):
        assert not throttle.account_full("ann", AWAY, 1.0)
        throttle.begin("ann")
    assert throttle.account_full("ann", AWAY, 1.0)
    throttle.end("ann")
    assert not throttle.account_full("ann", AWAY, 1.0)


def test_a_password_that_just_failed_is_known_for_a_while() -> None:
    throttle = Throttle(RULES)
    throttle.failed("ann", AWAY, b"mark", 0.0)
    assert throttle.just_failed(b"mark", REMEMBER_S - 1)
    assert not throttle.just_failed(b"mark", REMEMBER_S + 1)
    assert not throttle.just_failed(b"other", 0.0)


def test_clients_and_networks_of_both_families() -> None:
    assert (client_of("192.0.2.1"), network_of("192.0.2.1")) == ("192.0.2.1", "192.0.2.0/24")
    assert client_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert (client_of("2001:db8:1:2::9"), network_of("2001:db8:1:2::9")) == ("2001:db8:1:2::/64", "2001:db8:1::/48")
    assert client_of("fe80::1%eth0") == "fe80::/64"


@given(
    st.lists(
        st.tuples(st.floats(min_value=0, max_value=300), st.sampled_from([HOME, AWAY, "203.0.113.9"]), st.booleans()),
        max_size=80,
    )
)
@settings(deadline=None, max_examples=150)
def test_no_window_ever_holds_more_wrong_guesses_than_the_budget(steps: list[tuple[float, str, bool]]) -> None:
    """What keeps an account from being locked in the directory."""
    throttle = Throttle(RULES)
    now, let_through = 0.0, []
    for wait, client, right in steps:
        now += wait
        if right:
            throttle.succeeded("ann", client, now)
        elif guess(throttle, "ann", client, now):
            let_through.append(now)
    for start in let_through:
        assert sum(start <= at < start + RULES.window_s for at in let_through) <= RULES.account_failures
