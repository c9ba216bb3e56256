"""What strangers find who look at the relay with their usual programs: no open relay, no users, no weak TLS."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed.relay import RelayRunner
from tests.external import look

USERS = ("root", "admin", "administrator", "postmaster2", "user", "bob", "nobody")


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayRunner]:
    made, hop = look.make(tmp_path_factory.mktemp("look"))
    made.start()
    yield made
    made.stop()
    assert hop.transactions == []
    hop.close()


@pytest.mark.needs("nmap")
@pytest.mark.parametrize("listener", ["mx", "submission"])
def test_nmap_finds_no_open_relay_and_no_user(relay: RelayRunner, listener: str, tmp_path: Path) -> None:
    said = look.nmap(tmp_path, relay.ports[listener], *look.SMTP_SCRIPTS)
    assert re.search(r"smtp-open-relay: Server (?:doesn't seem to be|isn't) an open relay", said), said
    assert re.search(r"Couldn't find any accounts|Couldn't perform user enumeration", said), said
    assert "PIPELINING" in said  # it did speak with the relay
    assert "smtp-ntlm-info" not in said
    assert "dmz" not in said.lower()  # nor does it learn what program this is


@pytest.mark.needs("nmap")
def test_nmap_grades_the_ciphers_a_and_finds_no_hole(relay: RelayRunner, tmp_path: Path) -> None:
    said = look.nmap(tmp_path, relay.ports["submissions"], *look.TLS_SCRIPTS)
    assert "least strength: A" in said
    assert set(re.findall(r"^\|   (\S+): $", said, re.MULTILINE)) == {"TLSv1.2", "TLSv1.3"}
    assert "VULNERABLE" not in said
    assert "CBC" not in said


@pytest.mark.needs("sslscan")
@pytest.mark.parametrize(("listener", "options"), [("mx", ["--starttls-smtp"]), ("submissions", [])])
def test_sslscan_finds_new_versions_and_good_ciphers_only(
    relay: RelayRunner, listener: str, options: list[str], tmp_path: Path
) -> None:
    said = look.sslscan(tmp_path, relay.ports[listener], *options)
    enabled = dict(re.findall(r"^((?:SSLv|TLSv)[\d.]+)\s+(enabled|disabled)$", said, re.MULTILINE))
    assert {version for version, state in enabled.items() if state == "enabled"} == {"TLSv1.2", "TLSv1.3"}
    ciphers = re.findall(r"^(?:Preferred|Accepted)\s+TLSv1\.[23]\s+(\d+) bits\s+(\S+)", said, re.MULTILINE)
    assert len(ciphers) >= 5
    assert all(int(bits) >= 128 and re.search("GCM|CHACHA20", name) for bits, name in ciphers)
    assert "Session renegotiation not supported" in said
    assert said.count("not vulnerable to heartbleed") == 2


@pytest.mark.needs("testssl")
def test_testssl_names_no_weakness(relay: RelayRunner, tmp_path: Path) -> None:
    checks = ("-p", "--lucky13", "--sweet32", "--drown", "--poodle")  # a few of them: all take minutes (make look)
    said = look.testssl(tmp_path, relay.ports["mx"], "-t", "smtp", *checks)
    assert len(re.findall(r"TLS 1\.[23]\s+offered \(OK\)", said)) == 2, said
    assert len(re.findall(r"not vulnerable|No fallback possible", said)) >= 4, said
    assert look.weaknesses(said) == []


@pytest.mark.needs("swaks")
def test_swaks_hears_the_same_of_every_user_by_vrfy_and_expn_and_cannot_relay(
    relay: RelayRunner, tmp_path: Path
) -> None:
    server = ("--server", f"127.0.0.1:{relay.ports['mx']}", "--helo", "look.example")
    told = {
        re.sub(user, "USER", line)
        for user in USERS
        for line in look.run(
            tmp_path, "swaks", *server, "--quit-after", "RCPT", "--from", "a@stranger.example",
            "--to", f"{user}@elsewhere.example",
        ).splitlines()
        if line.startswith("<**")
    }  # fmt: skip
    assert len(told) == 1, told
    assert "554 5.7.1" in told.pop()
    with relay.client() as client:
        client.open()
        for verb in ("VRFY", "EXPN"):
            assert len({str(client.command(f"{verb} {user}")) for user in USERS}) == 1
