"""The relay with a directory behind it, as mail sees it: one daemon and one slapd for all of this module."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.slapd import BASE, Slapd, openldap_tree
from tests.bed.waiting import wait_for

pytestmark = [pytest.mark.needs("slapd", "ldapmodify"), pytest.mark.timeout(180)]
PEOPLE = f"ou=People,{BASE['openldap']}"
UNKNOWN = "550 5.1.1 <nobody@example.org>: Recipient address rejected: User unknown"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def server(folder: Path, authority: Authority) -> Iterator[Slapd]:
    place = folder / "slapd"
    place.mkdir()
    made = Slapd(place, "openldap", openldap_tree(1200)[0], authority)
    yield made
    made.close()


@pytest.fixture(scope="module")
def relay(folder: Path, server: Slapd) -> Iterator[RelayRunner]:
    hop = NextHop()
    place = folder / "relay"
    place.mkdir()
    config = {
        "domain": [{"names": ["example.org", "example.net"]}],
        "route": [{"domains": ["*"], "next_hops": [hop.route]}],
        "directory": {"sources": None, "ldap": [server.profile(answer_timeout_s=2.0)], "sync_s": 1.0},
        "server": {"workers": 2},
        "senders": {"own_domains": "off"},  # the senders here are our own, from outside
        # As root, with users that may enter neither the interpreter's folders nor each other's files.
        "process": {"user": "daemon", "hub_user": "nobody"} if os.geteuid() == 0 else {},
    }
    made = RelayRunner(place, hop.route, config=config)
    made.start(build=False)
    made.wait_for_log("snapshot_taken", 2)
    yield made
    made.close()
    hop.close()


def said_of(relay: RelayRunner, recipient: str, sender: str = "<x@elsewhere.example>") -> str:
    with relay.client().open() as client:
        client.command(f"MAIL FROM:{sender}")
        return str(client.command(f"RCPT TO:<{recipient}>"))


def until(relay: RelayRunner, recipient: str, start: str, sender: str = "<x@elsewhere.example>") -> str:
    """Both workers answer so: three times in a row, whoever is asked."""

    def same() -> str:
        answers = [said_of(relay, recipient, sender) for _ in range(4)]
        return answers[0] if all(one.startswith(start) for one in answers) else ""

    return wait_for(same, f"{start} for {recipient}")


def user(relay: RelayRunner, number: int) -> str:
    return next(
        a for a in (f"user{number}@example.org", f"user{number}@example.net") if said_of(relay, a).startswith("250")
    )


def test_the_first_reading_needs_no_command(relay: RelayRunner) -> None:
    assert until(relay, "nobody@example.org", "550") == UNKNOWN
    assert user(relay, 77)


def test_a_new_account_gets_mail_and_one_that_is_deleted_none(relay: RelayRunner, server: Slapd) -> None:
    server.modify(
        f"dn: uid=fresh,{PEOPLE}\nchangetype: add\nobjectClass: inetOrgPerson\nuid: fresh\ncn: Fresh\nsn: x\n"
        "mail: Fresh@example.org\n"
    )
    until(relay, "fresh@example.org", "250")
    server.modify(f"dn: uid=fresh,{PEOPLE}\nchangetype: delete\n")
    until(relay, "fresh@example.org", "550 5.1.1")


def test_a_restriction_takes_effect_in_a_session_that_is_open(relay: RelayRunner, server: Slapd) -> None:
    sender, recipient = user(relay, 90), user(relay, 91)
    with relay.client().open() as client:
        client.expect("250", f"MAIL FROM:<{sender}>")
        client.expect("250", f"RCPT TO:<{recipient}>")
        client.expect("250", "RSET")
        server.modify(
            f"dn: uid=user90,{PEOPLE}\nchangetype: modify\nreplace: smtpdSenderRestrictions\nsmtpdSenderRestrictions: TRUE\n"
        )
        refusal = f"554 5.7.1 <{sender}>: Sender address rejected: This account is not allowed to send emails"
        until(relay, recipient, refusal, f"<{sender}>")

        def told() -> bool:
            """By the worker of this session, which may be the last one to look for a snapshot."""
            client.expect("250", f"MAIL FROM:<{sender}>")
            answer = str(client.command(f"RCPT TO:<{recipient}>"))
            client.expect("250", "RSET")
            return answer == refusal

        wait_for(told, f"{refusal} in the session that was open before")
    relay.wait_for_log(
        rf"NOQUEUE: reject: RCPT from \S+\[127\.0\.0\.1\]: 554 5\.7\.1 <{sender}>: Sender address rejected: "
        rf"This account is not allowed to send emails; from=<{sender}> to=<{recipient}> proto=ESMTP helo="
    )


def test_a_dictionary_attack_asks_the_directory_nothing(relay: RelayRunner, server: Slapd, folder: Path) -> None:
    relay.configure({"directory": {"sync_s": 3600.0}, "limits": {"errors": 1_000_000}})
    assert relay.command("reload").returncode == 0
    readings = len(relay.grep("directory_read"))
    relay.wait_for_log("reloaded", 2)
    wait_for(lambda: len(relay.grep("directory_read")) >= readings, "the last reading")
    before = settled(server)
    with relay.client().open() as client:
        client.expect("250", "MAIL FROM:<x@elsewhere.example>")
        for start in range(0, 100_000, 1000):
            said = client.pipeline(*(f"RCPT TO:<guess{n}@example.org>" for n in range(start, start + 1000)))
            assert {str(one)[:9] for one in said} == {"550 5.1.1"}
            client.transcript.clear()
    assert server.searches() == before


def settled(server: Slapd) -> int:
    """Searches, when there are no more of them."""
    count = server.searches()
    while True:
        time.sleep(1.5)  # longer than the old interval: the question is whether anything still comes
        if server.searches() == count:
            return count
        count = server.searches()


def test_what_a_command_reads_is_in_use_although_the_schedule_sleeps(relay: RelayRunner, server: Slapd) -> None:
    """The schedule is an hour from here on; ``relay directory sync`` is root's, and the hub goes on with what it built."""
    server.modify(
        f"dn: uid=asked,{PEOPLE}\nchangetype: add\nobjectClass: inetOrgPerson\nuid: asked\ncn: Asked\nsn: x\n"
        "mail: asked@example.org\n"
    )
    done = relay.command("directory", "sync")
    assert done.returncode == 0, done.stderr
    until(relay, "asked@example.org", "250")
    assert len(list((relay.spool / "directory" / "history").iterdir())) <= 5


def test_a_restart_with_the_directory_down_serves_from_disk_and_later_never_says_unknown(
    relay: RelayRunner, server: Slapd
) -> None:
    known = user(relay, 77)
    server.stop()
    assert relay.stop() == 0
    relay.configure({"directory": {"sync_s": 1.0}})
    relay.start(build=False)
    assert said_of(relay, known).startswith("250")
    assert said_of(relay, "nobody@example.org") == UNKNOWN
    relay.wait_for_log("directory_not_read reason=refused")
    relay.configure({"directory": {"max_age_s": 1.0}})
    assert relay.command("reload").returncode == 0
    until(relay, "nobody@example.org", "451 4.3.0")
    assert said_of(relay, known).startswith("250")
    relay.wait_for_log("snapshot_stale")
    relay.configure({"directory": {"stale": "serve"}})
    assert relay.command("reload").returncode == 0
    until(relay, "nobody@example.org", "550 5.1.1")


def test_a_directory_that_is_back_is_read_without_help(relay: RelayRunner, server: Slapd) -> None:
    server.start()
    before = len(relay.grep("directory_read "))
    relay.wait_for_log("directory_read ", before + 1, 60)


def test_metrics_say_how_readings_go_and_the_check_what_is_weak(relay: RelayRunner) -> None:
    relay.wait_for_metric("relay_directory_readings_total", 1, kind="full")
    relay.wait_for_metric("relay_directory_readings_total", 1, kind="incremental")
    assert relay.metric("relay_directory_read_seconds", kind="incremental") > 0
    assert relay.metric("relay_directory_refused_readings_total", reason="refused") >= 1
    assert relay.metric("relay_directory_insecure", directory="openldap") == 0
    assert relay.metric("relay_directory_certificate_seconds", directory="openldap") > 86400
    assert relay.metric("relay_directory_success_age_seconds") < 3600
    relay.configure(
        {"directory": {"ldap": [{**relay.config["directory"]["ldap"][0], "ca_file": None, "verify": False}]}}
    )
    relay.config["directory"]["ldap"][0].pop("ca_file")
    relay.configure({})
    checked = relay.command("check")
    assert "any certificate is taken" in checked.stdout + checked.stderr
