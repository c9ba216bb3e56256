"""The file of accounts while the relay runs: taken when it changes, kept when it is broken, never in a worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.fixtures import MakeRelay
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for
from tests.submission.test_login import by_cram, by_plain, plain

OK = "235 2.7.0 Authentication successful"
FAILED = "535 5.7.8 Authentication credentials invalid"


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text("ann:first:ann@example.com\n")
    return path


@pytest.fixture
def relay(make_relay: MakeRelay, authority: Authority, users: Path, tmp_path: Path) -> RelayRunner:
    return make_relay(
        "smtp:[127.0.0.1]:1",
        start=False,
        listeners={"mx": "mx", "submission": "submission"},
        certificate=authority.files(tmp_path),
        config={
            "auth": {"stores": [{"name": "local", "type": "file", "path": users}], "failure_delay_s": 0.0},
        },
    )


def session(relay: RelayRunner, authority: Authority):
    client = relay.client("submission").open()
    client.starttls(authority.client())
    client.ehlo()
    return client


def login(relay: RelayRunner, authority: Authority, user: str, password: str) -> str:
    with session(relay, authority) as client:
        said = by_plain(client, user, password)
        client.quit()
    return said


def replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


def test_a_store_changes_under_a_running_relay(relay: RelayRunner, authority: Authority, users: Path) -> None:
    relay.start()
    assert login(relay, authority, "ann", "first") == OK
    assert login(relay, authority, "ann", "second") == FAILED
    replace(users, "ann:second:ann@example.com\nbob:{SSHA512}nonsense:\n")
    relay.wait_for_log(r"error: auth_store_refused store=local cause=.*users:2: what follows \{SSHA512\}")
    assert login(relay, authority, "ann", "first") == OK
    replace(users, "ann:second:ann@example.com\nbob:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=:bob@example.com\n")
    relay.wait_for_log("auth_store_taken store=local accounts=2")
    assert login(relay, authority, "ann", "first") == FAILED
    assert login(relay, authority, "ann", "second") == OK, "a password that failed before is right now"
    assert login(relay, authority, "bob", "secret") == OK
    with session(relay, authority) as client:
        assert client.extensions["AUTH"] == "PLAIN LOGIN", "bob's kind of password serves nothing else"
        client.expect("504 5.5.4", "AUTH CRAM-MD5")
        client.quit()


def test_without_the_hub_logins_are_put_off_and_come_back_with_it(relay: RelayRunner, authority: Authority) -> None:
    relay.start()
    hub = relay.hub()
    with session(relay, authority) as client:
        os.kill(hub, signal.SIGSTOP)
        client.send(f"AUTH PLAIN {plain('ann', 'first')}\r\n".encode())
        os.kill(hub, signal.SIGKILL)
        client.expect("454 4.7.0 Temporary authentication failure")
        client.quit()
    wait_for(lambda: login(relay, authority, "ann", "first") == OK, "a new hub")
    assert relay.hub() != hub


def test_a_reload_brings_stores_and_mechanisms(relay: RelayRunner, authority: Authority, users: Path) -> None:
    relay.start()
    relay.configure({"auth": {"mechanisms": ["CRAM-MD5"]}})
    assert relay.command("reload").returncode == 0
    relay.wait_for_log("reloaded")
    with session(relay, authority) as client:
        assert client.extensions["AUTH"] == "CRAM-MD5"
        client.expect("504 5.5.4", f"AUTH PLAIN {plain('ann', 'first')}")
        assert by_cram(client, "ann", "first") == OK
        client.quit()
    # What an account of a changed file cannot use is not taken from the file, because it is asked for by name.
    replace(users, "ann:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=:\n")
    relay.wait_for_log(r"auth_store_refused store=local cause=.CRAM-MD5 cannot be verified by local \(account ann\)")
    refused = relay.command("reload")
    assert "CRAM-MD5 cannot be verified by local (account ann)" in refused.stderr + refused.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ann", "users:1: write NAME:PASSWORD:ADDRESSES"),
        ("# fine\n:x:ann@example.com", "users:2: the name is empty"),
        ("ann:first:ann@", 'users:1: "ann@" is no address'),
        ("ann:first:\nANN:second:", "users:2: this account stands above already"),
        ("ann:{NEW}hunter2:", "users:1: the scheme {NEW} is not known"),
        ("ann::", "users:1: the password is empty"),
        ("ann:{CRYPT}hunter2:", "users:1: this is no $6$"),
        ("ann:{SSHA}hunter2:", "users:1: what follows {SSHA} is not base64"),
    ],
)
def test_a_relay_does_not_start_on_a_broken_store_and_says_where(
    relay: RelayRunner, users: Path, text: str, told: str
) -> None:
    users.write_text(text)
    for command in ("check", "serve"):
        done = relay.command(command)
        assert done.returncode != 0
        assert told in done.stdout + done.stderr
        assert "hunter2" not in done.stdout + done.stderr


def test_mechanisms_a_store_cannot_verify_are_an_error_unless_set_by_hand(
    relay: RelayRunner, authority: Authority, users: Path
) -> None:
    users.write_text("ann:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=:\nbob:x:\n")
    relay.configure({"auth": {"mechanisms": ["CRAM-MD5", "PLAIN"]}})
    done = relay.command("serve")
    assert done.returncode == 2
    assert "auth.mechanisms[0]: CRAM-MD5 cannot be verified by local (account ann)" in done.stderr
    relay.configure({"auth": {"by_hand": True}})
    told = relay.command("check", "--offline").stdout
    assert "CRAM-MD5 is offered by hand, and cannot be verified by local (account ann)" in told
    assert "1 of 2 accounts have a password in clear or for CRAM-MD5" in told
    relay.start()
    with session(relay, authority) as client:
        assert client.extensions["AUTH"] == "CRAM-MD5 PLAIN"
        assert by_cram(client, "bob", "x") == OK
        client.quit()


def test_a_store_that_nobody_wrote_cannot_be_named(relay: RelayRunner) -> None:
    relay.config["listener"][0]["stores"] = ["ldap"]
    relay.configure({})
    done = relay.command("check")
    assert done.returncode == 2
    assert 'there is no store named "ldap"' in done.stderr
