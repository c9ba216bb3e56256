"""What a directory says of single recipients, as mail sees it: one daemon and one slapd for all of this module."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.client import Reply
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.slapd import BASE, PASSWORD, SERVICE, Slapd, ldif
from tests.bed.waiting import wait_for

pytestmark = [pytest.mark.needs("slapd", "ldapmodify"), pytest.mark.timeout(180)]
STAFF = f"ou=Staff,{BASE['ad']}"
CLOSED = f"cn=closed,{STAFF}"
TRUSTED = "127.0.0.3"
STRANGER = "x@elsewhere.example"
INTERNAL = "550 5.7.1 <board@corp.test>: Recipient address rejected: takes mail from authenticated senders only"
TOO_LARGE = "552 5.2.3 <small@corp.test>: Recipient address rejected: message exceeds the recipient's size limit"
MESSAGE = b"Subject: size\r\n\r\n" + b"0123456789abcdef\r\n" * 150  # 2,717 octets


def person(name: str, **more: str) -> str:
    return ldif(
        f"cn={name},{STAFF}", ["user", "ritMailAccount"], cn=name, proxyAddresses=[f"SMTP:{name}@corp.test"],
        userAccountControl="512", msExchRecipientTypeDetails="1", **more,
    )  # fmt: skip


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
    base = BASE["ad"]
    tree = [
        ldif(base, ["top", "dcObject", "organization"], dc="corp", o="Test"),
        *(ldif(f"ou={name},{base}", ["organizationalUnit"], ou=name) for name in ("Staff", "Service")),
        ldif(
            SERVICE["ad"],
            ["user"],
            cn="svc-relay",
            userPassword=PASSWORD,
            userPrincipalName="svc-relay@corp.test",
            **{"msDS-UserPasswordExpiryTimeComputed": str(int((time.time() + 10 * 86400 + 11_644_473_600) * 10**7))},
        ),
        person("plain"),
        person("leaver"),
        person("trainee"),
        person("nephew"),
        person("quiet"),
        ldif(f"cn=closed,{STAFF}", ["group"], cn="closed", member=[f"cn=quiet,{STAFF}"]),
        person("other"),
        person("board", msExchRequireAuthToSendTo="TRUE"),
        person("small", delivContLength="2"),
        person("tiny", delivContLength="1"),
        person("housed", ritMailHost="127.0.0.1"),
        person("lost", ritMailHost="elsewhere.corp.test"),
        person("tight", delivContLength="1", msExchRequireAuthToSendTo="TRUE"),
    ]
    made = Slapd(place, "ad", tree, authority)
    yield made
    made.close()


@pytest.fixture(scope="module")
def hop() -> Iterator[NextHop]:
    made = NextHop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def second() -> Iterator[NextHop]:
    made = NextHop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def relay(folder: Path, server: Slapd, hop: NextHop, second: NextHop) -> Iterator[RelayRunner]:
    place = folder / "relay"
    place.mkdir()
    config = {
        "domain": [{"names": ["corp.test"], "delimiter": "+"}],
        "trusted": {"networks": [TRUSTED]},
        "route": [{"domains": ["*"], "next_hops": [hop.route]}],
        "directory": {
            "sources": None,
            "ldap": [server.profile(next_hop_attribute="ritMailHost", restriction_groups=[CLOSED])],
            "sync_s": 1.0,
            "next_hops": [second.route],
        },
    }
    made = RelayRunner(place, hop.route, config=config)
    made.start(build=False)
    made.wait_for_log("snapshot_taken")
    yield made
    made.close()


def rcpt(relay: RelayRunner, name: str, size: int = 0, source: str = "127.0.0.1") -> str:
    with relay.client(source=source).open() as client:
        client.expect("250", f"MAIL FROM:<{STRANGER}>" + (f" SIZE={size}" if size else ""))
        return str(client.command(f"RCPT TO:<{name}@corp.test>"))


def send(relay: RelayRunner, *names: str, sender: str = STRANGER) -> Reply:
    with relay.client().open() as client:
        client.envelope(sender, [f"{name}@corp.test" for name in names])
        return client.data(MESSAGE)


def test_a_stranger_may_not_write_to_an_internal_list_and_a_trusted_client_may(relay: RelayRunner) -> None:
    assert rcpt(relay, "board") == INTERNAL
    assert rcpt(relay, "Board+tag").startswith("550 5.7.1 <Board+tag@corp.test>")
    assert rcpt(relay, "board", source=TRUSTED).startswith("250")
    assert rcpt(relay, "plain").startswith("250")
    relay.wait_for_log(
        r"NOQUEUE: reject: RCPT from \S+\[127\.0\.0\.1\]: 550 5\.7\.1 <board@corp\.test>: Recipient address rejected: "
        rf"takes mail from authenticated senders only; from=<{STRANGER}> to=<board@corp\.test> proto=ESMTP helo="
    )
    relay.wait_for_metric("relay_replies_total", 1, reason="internal_only")


def test_a_message_announced_too_large_is_refused_for_the_recipient_alone(relay: RelayRunner) -> None:
    assert rcpt(relay, "small", 2049) == TOO_LARGE
    assert rcpt(relay, "small", 2048).startswith("250")
    assert rcpt(relay, "small", 2049, TRUSTED) == TOO_LARGE
    assert rcpt(relay, "plain", 2049).startswith("250")
    assert rcpt(relay, "tight", 9999, TRUSTED).startswith("552 5.2.3 <tight@corp.test>")


def test_a_message_that_came_out_too_large_for_all_is_refused(relay: RelayRunner, hop: NextHop) -> None:
    before = len(hop.accepted)
    assert str(send(relay, "small")) == TOO_LARGE
    assert str(send(relay, "small", "tiny")) == TOO_LARGE
    assert str(send(relay, "plain")).startswith("250")
    assert len(hop.wait_for_accepted(before + 1)) == before + 1
    relay.wait_for_log(r"reject: END-OF-MESSAGE from .*552 5\.2\.3 <tiny@corp\.test>")


def test_one_too_large_for_some_goes_to_the_others_and_is_reported(relay: RelayRunner, hop: NextHop) -> None:
    before = len(hop.accepted)
    assert str(send(relay, "small", "plain", "tiny", "other", sender="writer@elsewhere.example")).startswith("250")
    got = hop.wait_for_accepted(before + 2)[before:]
    message = next(one for one in got if len(one.recipients) == 2)
    report = next(one for one in got if one is not message)
    assert list(message.recipients) == ["plain@corp.test", "other@corp.test"]
    assert list(report.recipients) == ["writer@elsewhere.example"]
    text = report.message.decode()
    assert "Final-Recipient: rfc822;small@corp.test" in text.replace("rfc822; ", "rfc822;")
    assert "Final-Recipient: rfc822;tiny@corp.test" in text.replace("rfc822; ", "rfc822;")
    assert text.count("Status: 5.2.3") == 2
    assert "plain@corp.test" not in text


def test_the_directory_names_the_host_of_a_recipient_among_those_allowed(
    relay: RelayRunner, hop: NextHop, second: NextHop
) -> None:
    before, there = len(hop.accepted), len(second.accepted)
    assert str(send(relay, "housed")).startswith("250")
    assert second.wait_for_accepted(there + 1)[-1].recipients == ("housed@corp.test",)
    assert str(send(relay, "lost", "Housed+tag", "plain")).startswith("250")
    assert second.wait_for_accepted(there + 2)[-1].recipients == ("Housed+tag@corp.test",)
    assert hop.wait_for_accepted(before + 1)[-1].recipients == ("lost@corp.test", "plain@corp.test")
    relay.wait_for_log(r"directory_next_hop_unlisted why=.*elsewhere\.corp\.test.* addresses=1")


def test_relay_route_shows_what_the_directory_names(relay: RelayRunner, hop: NextHop, second: NextHop) -> None:
    told = relay.command("route", "housed@corp.test").stdout
    assert f"goes to 127.0.0.1:{second.port}" in told
    assert "directory   names the host 127.0.0.1\n" in told
    assert f"{relay.config_file}:" in told
    told = relay.command("route", "lost@corp.test").stdout
    assert f"goes to 127.0.0.1:{hop.port}" in told
    assert "names the host elsewhere.corp.test, which is none of directory.next_hops" in told
    assert f"127.0.0.1:{second.port}" in relay.command("recipient", "housed@corp.test", "-v").stdout


def test_the_end_of_the_accounts_password_is_told_in_time(relay: RelayRunner) -> None:
    relay.wait_for_metric("relay_directory_password_seconds", 9 * 86400, directory="ad")
    assert relay.metric("relay_directory_password_seconds", directory="ad") < 10 * 86400
    assert "the account's password in 10 days" in relay.command("directory", "status").stdout


def test_people_can_ask_why(relay: RelayRunner) -> None:
    told = relay.command("recipient", "board@corp.test", "-v")
    assert told.returncode == 1
    assert INTERNAL in told.stdout
    assert "recipients.internal" in told.stdout
    assert "needs authentication" in told.stdout
    assert "takes at most 2048 octets" in relay.command("recipient", "small@corp.test", "-v").stdout
    played = relay.command("explain", "--client", "127.0.0.1", "--from", STRANGER, "--to", "board@corp.test")
    assert "recipients.internal" in played.stdout
    assert INTERNAL in played.stdout


SAID = "Sender address rejected: This account is not allowed to send emails"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("leaver", f"dn: cn=leaver,{STAFF}\nchangetype: modify\nreplace: smtpdSenderRestrictions\nsmtpdSenderRestrictions: TRUE\n"),
        ("trainee", f"dn: {CLOSED}\nchangetype: modify\nadd: member\nmember: cn=trainee,{STAFF}\n"),
    ],
    ids=["attribute", "group"],
)  # fmt: skip
def test_a_restriction_reaches_open_sessions_and_mail_that_waits(
    relay: RelayRunner, server: Slapd, hop: NextHop, name: str, change: str
) -> None:
    sender = f"{name}@corp.test"
    hop.stop()
    with relay.client(source=TRUSTED).open() as client:
        client.envelope(sender, ["plain@corp.test"])
        queued = client.data(MESSAGE)
        assert queued.text.startswith("2.0.0 Ok: queued as ")
        queue_id = queued.text.rpartition(" ")[2]
        server.modify(change)
        refusal = f"554 5.7.1 <{sender}>: {SAID}"

        def told() -> bool:
            client.expect("250", f"MAIL FROM:<{sender}>")
            answer = str(client.command("RCPT TO:<plain@corp.test>"))
            client.expect("250", "RSET")
            return answer == refusal

        wait_for(told, refusal)
    relay.wait_for_log(
        rf"NOQUEUE: reject: RCPT from \S+\[127\.0\.0\.3\]: 554 5\.7\.1 <{sender}>: {SAID}; "
        rf"from=<{sender}> to=<plain@corp\.test> proto=ESMTP helo="
    )
    relay.wait_for_log(rf"queue_detained sender={sender} messages=1")
    listed = relay.command("queue", "list", "--sender", sender, "--json").stdout
    assert queue_id in listed
    assert f"held: <{sender}>: {SAID}" in listed
    assert '"held"' in listed
    hop.start()
    assert relay.command("queue", "release", queue_id).returncode == 0
    hop.wait_until(lambda there: any(one.sender == sender for one in there.accepted), f"mail of {sender}")


def test_senders_are_listed_by_an_operator_with_reason_and_end(relay: RelayRunner) -> None:
    relay.configure({
        "senders": {
            "rules": [
                {"sender": "nephew@corp.test", "action": "restrict", "text": "Ask your uncle", "comment": "ticket 12"},
                {"sender": "quiet@corp.test", "action": "allow", "comment": "until the audit is over"},
                {"sender": "plain@corp.test", "action": "restrict", "expires": "2001-01-31"},
            ]
        }
    })  # fmt: skip
    assert relay.command("reload").returncode == 0

    def said(name: str) -> str:
        with relay.client(source=TRUSTED).open() as client:
            client.expect("250", f"MAIL FROM:<{name}@corp.test>")
            return str(client.command("RCPT TO:<other@corp.test>"))

    wait_for(lambda: said("nephew").startswith("554"), "the rule")
    assert said("nephew") == "554 5.7.1 <nephew@corp.test>: Sender address rejected: Ask your uncle"
    assert said("nephew+tag").startswith("554 5.7.1")
    assert said("quiet").startswith("250")
    assert said("plain").startswith("250")
    assert (
        "ticket 12"
        in relay.command("sender", "nephew@corp.test").stdout + relay.command("sender", "nephew@corp.test", "-v").stdout
    )
    relay.configure({"senders": {"only_listed": True}})
    assert relay.command("reload").returncode == 0
    wait_for(lambda: said("plain").startswith("554"), "the allow-list")
    assert said("quiet").startswith("250")
    relay.configure({"senders": {"only_listed": False, "rules": []}})
    assert relay.command("reload").returncode == 0
    wait_for(lambda: said("quiet").startswith("554"), "the directory's word")


def test_rules_in_mode_log_say_what_they_would_have_refused(relay: RelayRunner, hop: NextHop) -> None:
    relay.configure({"recipients": {"internal": "log", "size_limit": "log"}})
    assert relay.command("reload").returncode == 0
    wait_for(lambda: rcpt(relay, "board").startswith("250"), "the new mode")
    before = len(hop.accepted)
    assert rcpt(relay, "tight", 9999).startswith("250")
    assert str(send(relay, "small", "plain")).startswith("250")
    assert list(hop.wait_for_accepted(before + 1)[-1].recipients) == ["small@corp.test", "plain@corp.test"]
    relay.wait_for_log(r"warn.*RCPT from .*550 5\.7\.1 <board@corp\.test>")
    relay.wait_for_log(r"warn.*END-OF-MESSAGE from .*552 5\.2\.3 <small@corp\.test>")
