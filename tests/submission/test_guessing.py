"""Guessing against a running relay: two workers, one budget; owners get in, the file is asked no more than allowed."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.fixtures import MakeRelay
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for
from tests.submission.test_login import by_cram, by_plain, by_scram

OK = "235 2.7.0 Authentication successful"
FAILED = "535 5.7.8 Authentication credentials invalid"
BLOCKED = "454 4.7.0 Too many failed logins, try again later"
PASSWORD = "right"
BUDGET = 6


@pytest.fixture
def relay(make_relay: MakeRelay, authority: Authority, tmp_path: Path) -> RelayRunner:
    users = tmp_path / "users"
    users.write_text("".join(f"user{number}:{PASSWORD}:\n" for number in range(4)))
    return make_relay(
        "smtp:[127.0.0.1]:1",
        listeners={"mx": "mx", "submission": "submission"},
        certificate=authority.files(tmp_path),
        config={
            "server": {"workers": 2},
            "auth": {
                "stores": [{"name": "local", "type": "file", "path": users}],
                "account_failures": BUDGET,
                "client_failures": 12,
                "network_failures": 1000,
                "failure_delay_s": 0.0,
            },
        },
    )


def attempt(relay: RelayRunner, authority: Authority, client: str, user: str, password: str, way=by_plain) -> str:
    with relay.client("submission", source=client) as session:
        session.open()
        session.starttls(authority.client())
        session.ehlo()
        said = way(session, user, password)
        session.quit()
    return said


def test_an_account_is_guessed_at_no_more_than_its_budget_and_its_owner_gets_in(
    relay: RelayRunner, authority: Authority
) -> None:
    home = "127.0.0.2"
    assert attempt(relay, authority, home, "user0", PASSWORD) == OK
    ways = [by_plain, by_cram, by_scram]
    said = [
        attempt(relay, authority, f"127.0.1.{number + 1}", "user0", secrets.token_hex(4), ways[number % 3])
        for number in range(10)
    ]
    assert said == [FAILED] * 4 + [BLOCKED] * 6, "a third is kept for clients that the account knows"
    assert attempt(relay, authority, "127.0.1.99", "user0", PASSWORD) == BLOCKED, "nobody learns that it is right"
    assert attempt(relay, authority, home, "user0", PASSWORD) == OK
    assert attempt(relay, authority, "127.0.1.99", "user1", PASSWORD) == OK, "other accounts are not touched"
    [block] = json.loads(relay.command("auth", "blocks", "--json").stdout)
    assert (block["what"], block["name"], block["failures"]) == ("account", "user0", 4)
    assert "account  user0: 4 failures" in relay.command("auth", "blocks").stdout
    assert relay.command("auth", "blocks", "--release", "user0").stdout == "user0: released\n"
    relay.wait_for_log("auth_released name=user0")
    assert attempt(relay, authority, "127.0.1.99", "user0", PASSWORD) == OK
    assert relay.command("auth", "blocks", "--release", "user0").returncode == 1
    assert relay.command("auth", "blocks").stdout == "nobody is blocked\n"


def test_a_client_that_guesses_at_many_accounts_is_put_off(relay: RelayRunner, authority: Authority) -> None:
    said = [attempt(relay, authority, "127.0.2.1", f"invented{number}", "x") for number in range(14)]
    assert said == [FAILED] * 12 + [BLOCKED] * 2
    assert attempt(relay, authority, "127.0.2.2", "user1", PASSWORD) == OK
    relay.wait_for_log(
        r"warning: unknown\[127\.0\.2\.1\]: SASL PLAIN authentication failed: no such account, sasl_username=invented0$"
    )
    wait_for(lambda: relay.metric("relay_logins_total", mechanism="PLAIN", result="blocked") == 2, "the metric")
    assert relay.metric("relay_logins_total", mechanism="PLAIN", result="refused") == 12


def test_a_phone_with_an_old_password_blocks_nobody(relay: RelayRunner, authority: Authority) -> None:
    said = [attempt(relay, authority, "127.0.3.1", "user2", "last year's") for _ in range(12)]
    assert said == [FAILED] * 12
    assert attempt(relay, authority, "127.0.3.2", "user2", PASSWORD) == OK
    assert relay.command("auth", "blocks").stdout == "nobody is blocked\n"
    assert relay.grep("this password failed a moment ago, sasl_username=user2")
