"""The commands about addresses, run as an operator runs them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from relay.cli import judged
from relay.cli.main import main
from relay.inbound import session

CONFIG = """
[server]
hostname = "mx.example.com"
spool = "spool"

[process]
user = ""
hub_user = ""

[[listener]]
name = "mx"
address = "127.0.0.1:25"

[[domain]]
names = ["example.com"]

[[domain]]
names = ["open.example"]
recipients = "any"

[[route]]
domains = ["*"]
next_hops = ["smtp:[127.0.0.1]:26", "smtp:[::1]:26"]

[trusted]
networks = ["10.0.0.0/8"]

[[directory.sources]]
type = "list"
path = "valid"

[[directory.sources]]
type = "restricted"
path = "restricted"
"""


UNKNOWN = "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown"


@dataclass(frozen=True, slots=True)
class Done:
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Relay:
    """The command line in this process: starting an interpreter for each of them would take most of the time."""

    folder: Path
    patch: pytest.MonkeyPatch
    captured: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, code: int = 0, **overrides: str) -> Done:
        with self.patch.context() as patch:
            patch.setattr(sys, "argv", ["relay", *arguments])
            for name, value in {"DMZ_RELAY_CONFIG": str(self.folder / "relay.toml"), **overrides}.items():
                patch.setenv(name, value)
            try:
                ended = main()
            except SystemExit as end:
                ended = end.code
        out, err = self.captured.readouterr()
        assert (ended or 0) == code, (ended, out, err)
        return Done(out, err)


@pytest.fixture
def relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Relay:
    (tmp_path / "relay.toml").write_text(CONFIG)
    (tmp_path / "valid").write_text("user@example.com\nbroken\nuser@elsewhere.example\n")
    (tmp_path / "restricted").write_text("user@example.com Only inside\nscanner@example.org\n")
    return Relay(tmp_path, monkeypatch, capsys)


@pytest.fixture
def built(relay: Relay) -> Relay:
    relay("directory", "build")
    return relay


def test_build_tells_counts_what_was_left_out_and_where(relay: Relay) -> None:
    done = relay("directory", "build")
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["generation", "1"] in lines
    assert ["addresses", "2"] in lines
    assert ["recipients", "1"] in lines
    assert ["restricted", "2"] in lines
    assert "left out    1 × not an address\n" in done.stdout
    assert "left out    1 × not of a domain with recipients = directory\n" in done.stdout
    assert f"{relay.folder}/spool/directory/snapshot" in done.stdout
    assert done.stderr == f"left out: {relay.folder}/valid:2: not an address\n"


def test_a_refused_build_says_why_and_changes_nothing(built: Relay) -> None:
    (built.folder / "valid").write_text("")
    done = built("directory", "build", code=1)
    assert done.stdout == ""
    assert done.stderr.startswith(f"relay: no new snapshot: {built.folder}/valid: has no usable address")
    assert json.loads(built("directory", "status", "--json").stdout)["current"]["generation"] == 1


def test_status_before_the_first_build_says_so_and_fails(relay: Relay) -> None:
    done = relay("directory", "status", code=1)
    assert "current     not usable: there is none" in done.stdout
    assert "there is no key here; relay directory build makes one" in done.stdout


def test_status_tells_both_generations_and_their_sources(built: Relay) -> None:
    built("directory", "build")
    os.utime(built.folder / "valid", (2**31, 2**31))
    status = json.loads(built("directory", "status", "--json").stdout)
    assert (status["current"]["generation"], status["previous"]["generation"]) == (2, 1)
    assert status["current"]["recipients"] == 1
    assert status["current"]["restricted"] == 2
    assert status["current"]["key_id"] == status["key"]["id"]
    assert status["current"]["left_out"] == {"not an address": 1, "not of a domain with recipients = directory": 1}
    assert [source["state"] for source in status["sources"]] == ["changed since the build", "unchanged since the build"]
    text = built("directory", "status").stdout
    assert "generation 2, built" in text
    assert f"source      list {built.folder}/valid: changed since the build" in text


def test_status_of_a_damaged_snapshot_gives_the_reason_and_fails(built: Relay) -> None:
    built("directory", "build")
    os.truncate(built.folder / "spool/directory/snapshot", 200)
    status = json.loads(built("directory", "status", "--json", code=1).stdout)
    assert "truncated: 200 of" in status["current"]["problem"]
    assert status["previous"]["valid"]


@pytest.mark.parametrize(
    ("arguments", "code", "verdict", "reply"),
    [
        (["user@example.com"], 0, "user@example.com: accepted", "250 2.1.5 Ok"),
        (["<USER@Example.Com>"], 0, "USER@Example.Com: accepted", "250 2.1.5 Ok"),
        (
            ["nobody@example.com"],
            1,
            "nobody@example.com: refused at RCPT by recipients.unknown",
            UNKNOWN,
        ),
        (
            ["user@example.com", "--sender", "scanner@example.org"],
            1,
            "user@example.com: refused at RCPT by senders.restricted",
            "554 5.7.1 <scanner@example.org>: Sender address rejected: This account is not allowed to send emails",
        ),
        (["any@open.example"], 0, "any@open.example: accepted", "250 2.1.5 Ok"),
        (
            ["a@elsewhere.example"],
            1,
            "a@elsewhere.example: refused at RCPT by relay",
            "554 5.7.1 <a@elsewhere.example>: Relay access denied",
        ),
        (["a@elsewhere.example", "--client", "10.1.2.3"], 0, "a@elsewhere.example: accepted", "250 2.1.5 Ok"),
        (["postmaster"], 0, "postmaster@example.com: accepted", "250 2.1.5 Ok"),
        (
            ["a%b@example.com"],
            1,
            "a%b@example.com: refused at RCPT by relay",
            "554 5.7.1 Routed addresses are not accepted",
        ),
        (["a b"], 1, "a b: refused at RCPT by syntax", "501 5.1.3 Bad recipient address syntax"),
        (["<>"], 1, "<>: refused at RCPT by syntax", "501 5.1.3 Bad recipient address syntax"),
    ],
)
def test_recipient_gives_verdict_rule_and_the_exact_reply(
    built: Relay, arguments: list[str], code: int, verdict: str, reply: str
) -> None:
    assert built("recipient", *arguments, code=code).stdout.splitlines() == [verdict, reply]


def test_recipient_follows_soft_bounce_and_log_mode(built: Relay) -> None:
    soft = built("recipient", "nobody@example.com", code=1, DMZ_RELAY__SERVER__SOFT_BOUNCE="true")
    assert soft.stdout.splitlines()[1].startswith("450 4.1.1 <nobody@example.com>")
    logged = built("recipient", "nobody@example.com", DMZ_RELAY__RECIPIENTS__UNKNOWN="log")
    assert logged.stdout.splitlines() == [
        "nobody@example.com: accepted",
        "250 2.1.5 Ok",
        f"would be refused if its rule were enforced: {UNKNOWN}",
    ]


def test_recipient_without_a_snapshot_is_refused_for_now(relay: Relay) -> None:
    done = relay("recipient", "user@example.com", "--json", code=1)
    answer = json.loads(done.stdout)
    assert answer["reply"].startswith("451 4.3.0 <user@example.com>")
    assert "run relay directory build" in answer["facts"]["refused"]


def test_recipient_is_judged_by_the_previous_generation_when_the_current_one_is_damaged(built: Relay) -> None:
    built("directory", "build")
    os.truncate(built.folder / "spool/directory/snapshot", 200)
    done = built("recipient", "user@example.com", "-v")
    assert "refused     " in done.stdout
    assert "generation 1" in done.stdout


def test_recipient_shows_the_facts_on_request(built: Relay) -> None:
    facts = built("recipient", "user@example.com", "-v").stdout.splitlines()[2:]
    assert facts[0] == "next hops   127.0.0.1:26, [::1]:26"
    assert facts[1].startswith("snapshot    generation 1, built ")
    assert facts[2] == 'entry       recipient, restricted sender, "Only inside"'


@pytest.mark.parametrize(
    ("address", "code", "verdict", "reply"),
    [
        (
            "User@example.com",
            1,
            "User@example.com: refused at RCPT by senders.restricted",
            "554 5.7.1 <User@example.com>: Sender address rejected: Only inside",
        ),
        ("free@example.com", 0, "free@example.com: accepted", "250 2.1.0 Ok"),
        ("<>", 0, "<>: accepted", "250 2.1.0 Ok"),
        ("a@", 1, "a@: refused at MAIL by syntax", "501 5.1.7 Bad sender address syntax"),
    ],
)
def test_sender_gives_verdict_rule_and_the_exact_reply(
    built: Relay, address: str, code: int, verdict: str, reply: str
) -> None:
    assert built("sender", address, code=code).stdout.splitlines() == [verdict, reply]


def test_sender_follows_the_configured_stage_mode_and_text(built: Relay) -> None:
    early = built("sender", "scanner@example.org", code=1, DMZ_RELAY__SENDERS__STAGE="mail")
    assert early.stdout.startswith("scanner@example.org: refused at MAIL by senders.restricted\n")
    text = built("sender", "scanner@example.org", code=1, DMZ_RELAY__SENDERS__TEXT="Ask us")
    assert text.stdout.endswith("554 5.7.1 <scanner@example.org>: Sender address rejected: Ask us\n")
    logged = built("sender", "scanner@example.org", DMZ_RELAY__SENDERS__RESTRICTED="log")
    assert "would be refused if its rule were enforced: 554 5.7.1 <scanner@example.org>" in logged.stdout


def test_a_wrong_option_says_what_to_write(built: Relay) -> None:
    assert (
        "--client nowhere: not an IP address"
        in built("recipient", "user@example.com", "--client", "nowhere", code=1).stderr
    )
    assert "--sender a@: not an address" in built("recipient", "user@example.com", "--sender", "a@", code=1).stderr


def test_faulty_paths_are_answered_as_in_a_session() -> None:
    assert judged._FAULTS == session._FAULTS


def test_export_prints_what_the_sources_say_as_maps_of_postfix(relay: Relay) -> None:
    assert relay("directory", "export").stdout == "user@example.com OK\n"
    assert relay("directory", "export", "--senders").stdout.splitlines() == [
        "scanner@example.org 554 5.7.1 This account is not allowed to send emails",
        "user@example.com 554 5.7.1 Only inside",
    ]
    (relay.folder / "valid").unlink()
    assert relay("directory", "export", code=1).stderr.startswith(f"relay: {relay.folder}/valid: cannot be read")


def test_the_steps_of_a_look_up_and_the_rules_in_their_order_are_shown_on_request(built: Relay) -> None:
    override = '[{ address = "left@example.com", action = "550 5.1.1 Has left", comment = "ticket 4711" }]'
    arguments = ("recipient", "left@example.com", "-v")
    told = built(*arguments, code=1, DMZ_RELAY__DIRECTORY__OVERRIDES=override).stdout.splitlines()
    assert told[:2] == [
        "left@example.com: refused at RCPT by directory.overrides",
        "550 5.1.1 <left@example.com>: Recipient address rejected: Has left",
    ]
    assert "look-up     left@example.com: override of the configuration (ticket 4711)" in told
    assert [line.split()[1] for line in told if line[0].isdigit() and line[1] == "."][-3:] == [
        "route",
        "postmaster",
        "directory.overrides",
    ]
    found = json.loads(built(*arguments[:2], "--json", code=1, DMZ_RELAY__DIRECTORY__OVERRIDES=override).stdout)
    assert found["asked"][-1]["answer"].startswith("refuses: 550 5.1.1 ")
    assert found["looked_up"] == ["left@example.com: override of the configuration (ticket 4711)"]
