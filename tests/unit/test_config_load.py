"""From a file and the environment to a configuration, or to everything that is wrong with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from relay.config.load import FILE_OCTETS, load, read
from relay.config.origin import ConfigErrors
from relay.config.schema import Config, Mode, Role

ROOT = Path(__file__).parents[2]
BAD = ROOT / "tests/bad_configs"

GOOD = """\
[server]
hostname = "mx.example.com"
spool = "state"

[[listener]]
name = "mx"
address = "127.0.0.1:2525"

[[domain]]
names = ["Example.COM"]

[[route]]
domains = ["*"]
next_hops = ["smtp:[192.0.2.1]"]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "relay.toml"
    path.write_text(GOOD)
    return path


def problems(path, environ=None):
    with pytest.raises(ConfigErrors) as caught:
        load(path, environ or {})
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_a_file_gives_a_configuration_with_defaults_for_the_rest(file):
    config = load(file, {})
    assert config.server.hostname == "mx.example.com"
    assert config.listener[0].role is Role.MX
    assert config.limits.sessions == 2000
    assert config.domain[0].names == ["example.com"]


def test_relative_paths_start_at_the_folder_of_the_file(file, monkeypatch):
    monkeypatch.chdir("/")
    relative = Path(os.path.relpath(file, "/"))
    config = load(relative, {"DMZ_RELAY__LOG__FILE": "../mail.log"})
    assert config.server.spool == file.parent / "state"
    assert config.snapshot_path == file.parent / "state/directory/snapshot"
    assert config.log.file == file.parent.parent / "mail.log"


def test_absolute_paths_stay_as_they_are(file):
    assert load(file, {"DMZ_RELAY__SERVER__SPOOL": "/var/spool/x"}).server.spool == Path("/var/spool/x")


def test_a_configuration_survives_the_way_to_a_child_process_and_back(file):
    config = load(file, {})
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(file):
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load(file, {}).server.hostname == "mx.example.com"


@pytest.mark.parametrize("broken", sorted(BAD.glob("*.toml")), ids=lambda path: path.stem)
def test_a_broken_file_is_told_with_every_problem_its_place_and_its_remedy(broken, monkeypatch):
    monkeypatch.chdir(BAD)
    with pytest.raises(ConfigErrors) as caught:
        load(Path(broken.name), {})
    assert f"{caught.value}\n" == broken.with_suffix(".expect").read_text()


def test_every_broken_file_has_its_expectation_and_every_expectation_its_file():
    assert {p.stem for p in BAD.glob("*.toml")} == {p.stem for p in BAD.glob("*.expect")}


class TestEnvironment:
    def test_values_are_read_as_toml(self, file):
        config = load(
            file,
            {
                "DMZ_RELAY__LIMITS__SESSIONS": "500",
                "DMZ_RELAY__SERVER__SOFT_BOUNCE": "true",
                "DMZ_RELAY__QUEUE__RETRY_S": "[1, 2.5]",
                "DMZ_RELAY__SENDERS__TEXT": '"in quotes"',
            },
        )
        assert (config.limits.sessions, config.server.soft_bounce) == (500, True)
        assert config.queue.retry_s == [1.0, 2.5]
        assert config.senders.text == "in quotes"

    @pytest.mark.parametrize(
        ("variable", "text", "value"),
        [
            ("SERVER__HOSTNAME", "mx2.example.com", lambda config: config.server.hostname),
            ("WEB__LISTEN", "127.0.0.1:9125", lambda config: config.web.listen),
            ("PROCESS__USER", "", lambda config: config.process.user),
            ("RECIPIENTS__UNKNOWN", "log", lambda config: config.recipients.unknown),
            ("SENDERS__TEXT", "2024-01-01", lambda config: config.senders.text),
            ("SENDERS__TEXT", "[see #4711]", lambda config: config.senders.text),
        ],
    )
    def test_what_is_no_toml_value_stands_for_itself(self, file, variable, text, value):
        assert value(load(file, {f"DMZ_RELAY__{variable}": text})) == text

    def test_a_value_cannot_smuggle_in_a_second_key(self, file):
        lines = problems(file, {"DMZ_RELAY__LIMITS__SESSIONS": "1\nerrors = 0"})
        assert lines == [
            (
                'DMZ_RELAY__LIMITS__SESSIONS: limits.sessions: "1\\nerrors = 0" is not a whole number; '
                "write sessions = 2000 (the default)"
            )
        ]

    def test_a_section_that_the_file_lacks_may_come_from_the_environment(self, file):
        assert load(file, {"DMZ_RELAY__RECIPIENTS__UNKNOWN": "log"}).recipients.unknown is Mode.LOG

    def test_all_tables_of_a_kind_are_set_at_once(self, file):
        hops = '[{domains = ["*"], next_hops = ["smtp:[192.0.2.9]"]}]'
        assert load(file, {"DMZ_RELAY__ROUTE": hops}).route[0].next_hops == ["smtp:[192.0.2.9]"]

    def test_other_variables_are_not_looked_at(self, file):
        assert load(file, {"DMZ_RELAY_CONFIG": "x", "HOME": "/", "XDMZ_RELAY__A__B": "1"}) == load(file, {})

    def test_a_good_variable_repairs_a_bad_line(self, file):
        file.write_text(GOOD + '[limits]\nsessions = "many"\n')
        assert load(file, {"DMZ_RELAY__LIMITS__SESSIONS": "7"}).limits.sessions == 7

    def test_a_wrong_value_names_the_variable_and_not_the_file(self, file):
        file.write_text(GOOD + "[limits]\nsessions = 5\nerrors = -1\n")
        assert problems(file, {"DMZ_RELAY__LIMITS__SESSIONS": "many"}) == [
            "relay.toml:17: limits.errors: -1 is too small; write 0 or more",
            (
                'DMZ_RELAY__LIMITS__SESSIONS: limits.sessions: "many" is not a whole number; '
                "write sessions = 2000 (the default)"
            ),
        ]

    def test_a_variable_that_names_nothing_is_an_error_with_the_nearest_name(self, file):
        environ = {
            "DMZ_RELAY__LIMITS__SESSION": "5",
            "DMZ_RELAY__LIMIT__SESSIONS": "5",
            "DMZ_RELAY__SERVER__HOST__NAME": "mx",
            "DMZ_RELAY__LISTENER__ADDRESS": "0.0.0.0:25",
        }
        assert problems(file, environ) == [
            "DMZ_RELAY__LIMITS__SESSION: limits.session: there is no such key; did you mean sessions?",
            "DMZ_RELAY__LIMIT__SESSIONS: limit: there is no such table; did you mean limits?",
            (
                "DMZ_RELAY__LISTENER__ADDRESS: listener: there may be several of these tables; "
                "set the whole list: DMZ_RELAY__LISTENER='[{key = \"value\"}]'"
            ),
            "DMZ_RELAY__SERVER__HOST__NAME: names no key; write DMZ_RELAY__SECTION__KEY=value",
        ]

    def test_a_fault_of_the_whole_names_the_variable_that_made_it(self, file):
        assert problems(file, {"DMZ_RELAY__QUEUE__LEASE_S": "60"}) == [
            (
                "DMZ_RELAY__QUEUE__LEASE_S: queue.lease_s: 60 is not longer than delivery.final_reply_timeout_s (600); "
                "write lease_s = 900"
            )
        ]
        assert problems(file, {"DMZ_RELAY__DELIVERY__FINAL_REPLY_TIMEOUT_S": "1200"}) == [
            (
                "DMZ_RELAY__DELIVERY__FINAL_REPLY_TIMEOUT_S: queue.lease_s: "
                "900 is not longer than delivery.final_reply_timeout_s (1200); write lease_s = 1500"
            )
        ]


class TestUnreadable:
    def test_a_file_that_is_not_there(self, tmp_path):
        assert problems(tmp_path / "none.toml") == [
            "none.toml: cannot be read: No such file or directory; name the file with --config FILE"
        ]

    def test_a_folder(self, tmp_path):
        (tmp_path / "folder").mkdir()
        assert problems(tmp_path / "folder") == [
            "folder: cannot be read: Is a directory; name the file with --config FILE"
        ]

    def test_a_file_that_is_too_large_is_not_read_whole(self, file):
        with file.open("ab") as end:
            end.truncate(FILE_OCTETS + 1)
        assert problems(file) == [
            f"relay.toml: is too large for a configuration; name a file of at most {FILE_OCTETS} octets"
        ]

    @pytest.mark.parametrize("depth", range(100, 1000, 20))
    def test_lists_of_any_depth_are_told_without_a_traceback(self, file, depth):
        file.write_text(GOOD + "[trusted]\nnetworks = " + "[" * depth + "]" * depth)
        (line,) = problems(file)
        assert "nested too deeply" in line or "trusted.networks[0]: a list is not a text" in line

    def test_a_number_of_thousands_of_digits(self, file):
        file.write_text(GOOD + "[limits]\nsessions = " + "9" * 5000)
        (line,) = problems(file)
        assert line.startswith("relay.toml:16: not TOML: ")


def test_no_fault_is_built_upon_another_one(file):
    """A misspelt key in a route must not also be told as a domain without a route."""
    file.write_text(GOOD.replace('domains = ["*"]', 'domain = ["*"]'))
    assert problems(file) == [
        'relay.toml:12: route[0].domains: is missing; write domains = ["*"]',
        "relay.toml:13: route[0].domain: there is no such key; did you mean domains?",
    ]


def test_the_origin_tells_later_problems_with_their_lines(file):
    origin = read(file, {"DMZ_RELAY__PROCESS__USER": "nobody"}).origin
    assert origin.problem(("server", "spool"), "x", "y").line == 3
    assert origin.problem(("server", "workers"), "x", "y").line == 1
    assert origin.problem(("process", "user"), "x", "y").file == "DMZ_RELAY__PROCESS__USER"
    assert origin.problem(("log", "file"), "x", "y").line == 0


class TestShippedFiles:
    """config/relay.toml shows every key, and every key that it comments out with its default."""

    TEXT = (ROOT / "config/relay.toml").read_text()
    SHOWN = "\n".join(line[1:] if line[:1] == "#" and line[1:2].isalpha() else line for line in TEXT.splitlines())

    def test_both_files_load(self):
        for name in ("relay.toml", "demo.toml"):
            assert load(ROOT / "config" / name, {}).listener

    def test_every_key_is_shown(self):
        shown = tomllib.loads(self.SHOWN)
        for name, section in shown.items():
            known = Config.model_fields[name].annotation
            model = known.__args__[0] if isinstance(section, list) else known
            keys = {key for table in section for key in table} if isinstance(section, list) else set(section)
            assert keys == set(model.model_fields), name
        assert set(shown) == set(Config.model_fields)

    def test_every_key_that_is_commented_out_shows_its_default(self, tmp_path):
        # Files that would have to be there, or to go with others.
        files = r'(?m)^(transport|authorities|password_file|certificate = "/etc/dmz-relay/client|key = "/etc/dmz-relay/client).*'
        without_file = re.sub(files, "", self.SHOWN)
        plain, shown = (load(self.file(tmp_path, text), {}).model_dump() for text in (self.TEXT, without_file))
        # These have no default of their own: what is shown is where the default leads, or an example.
        assert shown["directory"].pop("snapshot") == load(ROOT / "config/relay.toml", {}).snapshot_path
        assert shown["directory"].pop("key_file") == load(ROOT / "config/relay.toml", {}).key_path
        assert shown["log"].pop("file")
        assert shown["domain"][0].pop("postmaster") == "postmaster@example.com"
        assert plain["domain"][0].pop("postmaster") is None
        assert {shown["postmaster"].pop(key) for key in ("mailbox", "double_bounces")} == {"postmaster@example.com"}
        for section, key in (
            ("directory", "snapshot"), ("directory", "key_file"), ("log", "file"), ("postmaster", "mailbox"),
            ("postmaster", "double_bounces"),
        ):  # fmt: skip
            assert plain[section].pop(key) is None
        assert shown == plain

    @staticmethod
    def file(folder, text):
        path = folder / "relay.toml"
        path.write_text(text)
        return path


def test_the_reference_of_all_keys_is_what_the_schema_says():
    """If not: .venv/bin/python tools/configuration_reference.py"""
    tool = ROOT / "tools/configuration_reference.py"
    done = subprocess.run([sys.executable, tool, "--check"], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0


def test_a_directory_for_logins_alone_makes_no_snapshot_stale(file):
    directory = (
        '[[directory.ldap]]\nname = "ad"\npreset = "exchange"\nservers = ["ldaps://dc1.example.com"]\nrecipients = {}\n'
    )
    file.write_text(GOOD + directory.format("true"))
    assert load(file, {}).snapshot_max_age_s is not None
    file.write_text(GOOD + directory.format("false"))
    assert load(file, {}).snapshot_max_age_s is None
