"""The command line and the configuration, as an operator runs them."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from tests.bed.certificates import Authority
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).parents[2]
BAD = ROOT / "tests/bad_configs"

GOOD = """\
[server]
hostname = "mx.example.com"
spool = "spool"

[process]
user = ""
hub_user = ""

[[listener]]
name = "mx"
address = "127.0.0.1:2525"

[[route]]
domains = ["*"]
next_hops = ["smtp:[192.0.2.1]"]

[web]
listen = "127.0.0.1:9125"
"""


@pytest.fixture
def relay_command(tmp_path):
    """``relay ARGUMENTS`` in a folder of its own, without the environment's own overrides."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("DMZ_RELAY")}
        return subprocess.run(
            [sys.executable, "-m", "relay", *arguments],
            cwd=tmp_path,
            env={**environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **variables},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S * 3,
            check=False,
        )

    return run


def grades(done):
    """What `relay check --json` found, by grade and topic."""
    found: dict[str, dict[str, list[str]]] = {"ok": {}, "warning": {}, "error": {}}
    for finding in json.loads(done.stdout)["findings"]:
        found[finding["grade"]].setdefault(finding["topic"], []).append(finding["text"])
    return found


class TestBrokenConfigurations:
    @pytest.mark.parametrize("broken", sorted(BAD.glob("*.toml")), ids=lambda path: path.stem)
    def test_check_tells_every_problem_and_ends_with_2(self, broken, relay_command, tmp_path):
        for file in (broken, BAD / "transport_file.table"):
            shutil.copy(file, tmp_path)
        done = relay_command("check", "--config", broken.name)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == broken.with_suffix(".expect").read_text()

    @pytest.mark.parametrize("name", ["everything_at_once", "text_without_quotes"])
    @pytest.mark.parametrize(
        "command", [("serve", "--pidfile", "pid"), ("reload",), ("directory", "build"), ("queue", "list")]
    )
    def test_every_command_refuses_in_the_same_words_and_leaves_nothing_behind(
        self, name, command, relay_command, tmp_path
    ):
        shutil.copy(BAD / f"{name}.toml", tmp_path)
        done = relay_command(*command, "--config", f"{name}.toml")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (BAD / f"{name}.expect").read_text()
        assert [path.name for path in tmp_path.iterdir()] == [f"{name}.toml"]

    def test_check_tells_the_same_as_json(self, relay_command, tmp_path):
        shutil.copy(BAD / "no_route.toml", tmp_path)
        done = relay_command("check", "--config", "no_route.toml", "--json")
        assert (done.returncode, done.stderr) == (2, "")
        assert json.loads(done.stdout) == {
            "grade": "error",
            "mark": "F",
            "problems": [
                {
                    "file": "no_route.toml",
                    "line": 10,
                    "key": "domain[0].names[1]",
                    "what": '"example.net" has no route',
                    "hint": 'add a [[route]] table with domains = ["example.net"]',
                }
            ],
        }

    def test_a_wrong_variable_is_told_by_its_name(self, relay_command, tmp_path):
        (tmp_path / "relay.toml").write_text(GOOD)
        done = relay_command("serve", "--config", "relay.toml", DMZ_RELAY__SERVER__WORKERS="two")
        assert done.returncode == 2
        assert done.stderr == (
            'DMZ_RELAY__SERVER__WORKERS: server.workers: "two" is not a whole number; write workers = 0 (the default)\n'
        )

    def test_what_the_machine_does_not_allow_keeps_serve_from_starting(self, relay_command, tmp_path):
        (tmp_path / "relay.toml").write_text(GOOD + '[tls]\ncertificate = "c.pem"\nkey = "k.pem"\n')
        done = relay_command("serve", "--config", "relay.toml", "--pidfile", "pid", DMZ_RELAY__LOG__FILE="none/log")
        assert done.returncode == 2
        assert done.stderr.replace(f"{tmp_path}/", "").splitlines() == [
            (
                "DMZ_RELAY__LOG__FILE: log.file: none: No such file or directory; "
                "make the folder none and let the relay write to it"
            ),
            "relay.toml:20: tls.certificate: c.pem: No such file or directory; write the path of the certificate (PEM)",
            "relay.toml:21: tls.key: k.pem: No such file or directory; write the path of the private key (PEM)",
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["relay.toml"]


class TestCommandLine:
    def test_the_configuration_may_be_named_by_the_environment(self, relay_command, tmp_path):
        (tmp_path / "other.toml").write_text(GOOD)
        done = relay_command("check", DMZ_RELAY_CONFIG="other.toml")
        assert "other.toml: 0 errors" in done.stdout

    def test_without_a_name_it_is_the_file_in_etc(self, relay_command):
        if Path("/etc/dmz-relay/relay.toml").exists():
            pytest.skip("this machine has a configuration of its own")
        done = relay_command("serve")
        assert (done.returncode, done.stderr) == (
            2,
            "/etc/dmz-relay/relay.toml: cannot be read: No such file or directory; name the file with --config FILE\n",
        )

    def test_version(self, relay_command):
        done = relay_command("version")
        assert done.returncode == 0
        assert done.stdout.startswith("dmz-relay 0.")

    def test_a_wrong_command_is_a_usage_error_with_the_nearest_one(self, relay_command):
        done = relay_command("chek")
        assert (done.returncode, done.stdout) == (2, "")
        assert "'check'" in done.stderr

    def test_help_names_every_command_with_a_sentence(self, relay_command):
        done = relay_command("--help")
        assert done.returncode == 0
        for command in (
            "serve",
            "check",
            "reload",
            "directory",
            "recipient",
            "sender",
            "explain",
            "firewall",
            "queue",
            "version",
        ):
            assert f" {command} " in done.stdout

    def test_a_command_imports_only_its_own_module(self, tmp_path):
        """`relay serve` has a second to its first greeting; tables and the other commands are no part of it."""
        (tmp_path / "relay.toml").write_text(GOOD)
        script = """
import sys
from relay.cli.main import main
sys.argv = ["relay", "check", "--config", "relay.toml", "--json"]
try:
    main()
except SystemExit:
    pass
print(*(name for name in ("rich.table", "relay.cli.queue", "relay.supervisor.tree", "aiosmtpd") if name in sys.modules),
      file=sys.stderr)
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr.strip() == ""


class TestCheck:
    @pytest.fixture
    def check(self, relay_command, tmp_path):
        (tmp_path / "relay.toml").write_text(GOOD)

        def run(more="", **variables):
            (tmp_path / "relay.toml").write_text(GOOD + more)
            environ = {f"DMZ_RELAY__{key}": value for key, value in variables.items()}
            return relay_command("check", "--offline", "--config", "relay.toml", "--json", **environ)

        return run

    @pytest.fixture
    def tls(self, tmp_path):
        authority = Authority()
        certificate, key = authority.files(tmp_path, "mx.example.com")
        key.chmod(0o600)
        return f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n'

    def test_nothing_wrong_is_exit_code_0_and_changes_nothing(self, check, tls, tmp_path):
        before = sorted(path.name for path in tmp_path.iterdir())
        done = check(tls + '[[domain]]\nnames = ["example.com"]\nrecipients = "any"\n')
        assert done.returncode == 0
        found = grades(done)
        assert found["error"] == {}
        # The test runs as one user, with a certificate of its own authority, on a machine whose clock may be nobody's care.
        assert set(found["warning"]) - {"clock"} == {"process", "tls trust"}
        assert json.loads(done.stdout)["mark"] in "BC"
        assert found["ok"]["routes"] == ["all others to smtp:[192.0.2.1]"]
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    def test_for_people_it_prints_a_line_each_and_a_sum(self, relay_command, tmp_path):
        (tmp_path / "relay.toml").write_text(GOOD)
        done = relay_command("check", "--offline", "-c", "relay.toml")
        lines = done.stdout.splitlines()
        assert lines[-1].startswith("relay.toml: 0 errors, ")
        assert any(line.split() == ["ok", "listener", "mx", "127.0.0.1:2525,", "mx"] for line in lines)
        assert any(line.startswith("warning") and line.endswith("set certificate and key in [tls]") for line in lines)

    def test_a_domain_without_snapshot_is_an_error(self, check):
        done = check('[[domain]]\nnames = ["example.com"]\n')
        assert done.returncode == 1
        (text,) = grades(done)["error"]["snapshot"]
        assert text.endswith("is not there: recipients get 451 until it is")

    def test_a_snapshot_is_counted_and_a_damaged_one_is_an_error(self, check, relay_command, tmp_path):
        domain = '[[domain]]\nnames = ["example.com"]\n[directory]\nsources = [{ type = "list", path = "list" }]\n'
        (tmp_path / "list").write_text("a@example.com\nb@example.com\n")
        check(domain)
        assert relay_command("directory", "build", "-c", "relay.toml").returncode == 0
        done = check(domain)
        assert done.returncode == 0
        assert grades(done)["ok"]["snapshot"] == ["2 recipients, 0 restricted senders"]
        snapshot = tmp_path / "spool/directory/snapshot"
        snapshot.write_bytes(snapshot.read_bytes()[:-1])
        done = check(domain)
        assert done.returncode == 1
        assert "snapshot" in grades(done)["error"]

    def test_switches_that_open_the_relay_are_warned_of(self, check):
        found = grades(
            check(
                '[trusted]\nnetworks = ["10.0.0.0/8", "192.0.2.7"]\n',
                SERVER__SOFT_BOUNCE="true",
                RECIPIENTS__UNKNOWN="log",
                SENDERS__RESTRICTED="off",
                WEB__LISTEN="0.0.0.0:9125",
                DELIVERY__TLS="off",
                DELIVERY__CONCURRENCY="50",
            )
        )
        assert found["ok"]["trusted"] == ["192.0.2.7 may send to everyone"]
        assert found["warning"]["trusted"] == ["10.0.0.0/8 is wide: every host in it may send to everyone"]
        assert found["warning"]["rules"] == [
            "soft_bounce: nothing is refused for good, senders keep trying for days",
            "senders.restricted is not looked at",
            "recipients.unknown is only logged",
        ]
        assert found["warning"]["web"] == ["metrics are open to who reaches 0.0.0.0:9125"]
        assert found["warning"]["routes"] == [
            "delivery.concurrency is 50, Exchange takes 20 from one source",
            "delivery.tls is off: mail goes on readable",
        ]

    def test_a_next_hop_that_is_the_relay_itself_is_an_error(self, check):
        done = check(ROUTE='[{domains = ["*"], next_hops = ["smtp:[127.0.0.1]:2525"]}]')
        assert done.returncode == 1
        assert grades(done)["error"]["routes"] == [
            "smtp:[127.0.0.1]:2525 is this relay: mail would go round in circles"
        ]

    def test_listeners_that_do_not_do_what_their_role_says_are_warned_of(self, check, tls):
        listeners = (
            '[{name = "mx", address = "127.0.0.1:2525", require_tls = true},'
            ' {name = "submission", address = "127.0.0.1:2587", role = "submission", require_tls = true}]'
        )
        found = grades(check(tls, LISTENER=listeners))["warning"]
        assert found["listener mx"] == ["refuses senders without TLS, which a public server must not"]
        assert found["listener submission"] == ["require_tls means nothing here"]
        without_tls = '[{name = "submission", address = "127.0.0.1:2587", role = "submission"}]'
        assert grades(check(LISTENER=without_tls))["warning"]["listener submission"] == [
            "nobody can log in: submission needs STARTTLS"
        ]

    def test_more_workers_than_connections_and_a_postmaster_without_route_are_warned_of(self, check):
        route = '[{domains = ["example.com"], next_hops = ["smtp:[192.0.2.1]"]}]'
        found = grades(
            check(ROUTE=route, SERVER__WORKERS="8", DELIVERY__CONCURRENCY="4", POSTMASTER__MAILBOX="pm@ops.example")
        )["warning"]
        assert "delivery.concurrency is 4, and each of 8 workers keeps a connection" in found["routes"]
        assert found["postmaster"] == ["postmaster.mailbox: no route leads to pm@ops.example, letters will wait"]

    def test_no_route_to_the_outside_is_warned_of(self, check):
        route = '[{domains = ["example.com"], next_hops = ["smtp:[192.0.2.1]"]}]'
        assert grades(check(ROUTE=route))["warning"]["routes"] == [
            "no default route: reports to senders outside cannot leave"
        ]

    def test_a_certificate_for_another_name_and_an_open_key_are_warned_of(self, check, tls, tmp_path):
        (key,) = (path for path in tmp_path.iterdir() if stat.S_IMODE(path.stat().st_mode) == 0o600)
        key.chmod(0o644)
        warnings = grades(check(tls, SERVER__HOSTNAME="mail.example.org"))["warning"]["tls"]
        assert warnings == [
            "the certificate is for mx.example.com, not for mail.example.org",
            f"{key} can be read by others than its owner",
        ]

    @pytest.mark.parametrize(
        ("days", "grade", "text"),
        [(-1, "error", "certificate has expired"), (5, "warning", "ends in 5 days"), (90, "ok", "is good until")],
    )
    def test_the_end_of_a_certificate_is_graded(self, check, tmp_path, days, grade, text):
        now = dt.datetime.now(dt.UTC)
        leaf = trustme.CA().issue_cert(
            "*.example.com", not_before=now - dt.timedelta(days=30), not_after=now + dt.timedelta(days=days, minutes=5)
        )
        leaf.cert_chain_pems[0].write_to_path(tmp_path / "c")
        leaf.private_key_pem.write_to_path(tmp_path / "k")
        (tmp_path / "k").chmod(0o600)
        found = grades(check('[tls]\ncertificate = "c"\nkey = "k"\n'))
        (told,) = [one for one in found[grade]["tls"] if text in one]
        assert len(found["ok"].get("tls", []) + found["warning"].get("tls", []) + found["error"].get("tls", [])) == 1, (
            told
        )


@pytest.mark.needs("root")
@pytest.mark.parametrize("command", [["queue", "list"], ["directory", "status"], ["recipient", "a@example.com"]])
def test_a_user_who_may_not_look_is_told_so_without_a_traceback(command, bed_folder):
    """Imports come first: the interpreter itself may be out of that user's reach."""
    (bed_folder / "relay.toml").write_text(GOOD)
    spool = bed_folder / "spool"
    for folder in ("queue", "directory"):
        (spool / folder).mkdir(parents=True)
        (spool / folder).chmod(0o700)
    script = f"""
import os, sys
from relay.cli import directory, main, queue, recipient
import rich.console, rich.table
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.argv = ["relay", *{command!r}, "--config", "relay.toml"]
sys.exit(main.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=bed_folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"relay: {spool}/")
    assert done.stderr.endswith("Permission denied; run this as root or as the relay's user\n")


class TestRunning:
    def test_reload_takes_up_a_change_and_refuses_a_broken_one(self, relay: RelayRunner):
        with relay.client() as client:
            assert "mx.example.com" in client.greeting().text
        relay.configure({"server": {"hostname": "mx2.example.com"}})
        done = relay.command("reload")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"(pid {relay.supervisor})" in done.stdout

        def renamed() -> bool:
            with relay.client() as client:
                return "mx2.example.com" in client.greeting().text

        wait_for(renamed, "the new name in the greeting")
        relay.configure({"server": {"hostname": "not a name"}})
        done = relay.command("reload")
        assert (done.returncode, done.stdout) == (2, "")
        assert 'server.hostname: "not a name" is not a host name' in done.stderr
        assert renamed()

    def test_reload_of_a_relay_that_does_not_run_says_so(self, make_relay: MakeRelay, next_hop: NextHop):
        relay = make_relay(next_hop, start=False)
        done = relay.command("reload")
        assert done.returncode == 1
        assert done.stderr == (
            f"relay: no relay runs on the spool {relay.spool}; start it with relay serve, or name it with --pid\n"
        )

    def test_a_stale_pid_in_the_lock_is_not_signalled(self, relay: RelayRunner):
        relay.stop()
        assert (relay.spool / "lock").read_text().strip().isdigit()
        assert relay.command("reload").returncode == 1
