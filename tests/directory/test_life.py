"""The life of a snapshot read from a directory: guards, accept, dry run, history, rollback, and the commands about them."""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.cli.main import main
from relay.directory.sync import Purpose
from tests.bed.certificates import Authority
from tests.bed.relay import toml
from tests.bed.slapd import BASE, PASSWORD, SERVICE, Slapd, ldif, openldap_tree
from tests.directory.conftest import Site

pytestmark = pytest.mark.needs("slapd", "ldapmodify")
PEOPLE = f"ou=People,{BASE['openldap']}"
DOMAINS = ("example.org", "example.net")


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[Slapd]:
    place = tmp_path / "slapd"
    place.mkdir()
    made = Slapd(place, "openldap", openldap_tree(100)[0], authority)
    yield made
    made.close()


def site_of(tmp_path: Path, server: Slapd, **directory: Any) -> Site:
    return Site(tmp_path / "site", server.profile(), domains=DOMAINS, **directory)


def delete(server: Slapd, numbers: range) -> None:
    server.modify("".join(f"dn: uid=user{n},{PEOPLE}\nchangetype: delete\n\n" for n in numbers))


def test_a_reading_that_would_remove_too_many_is_held_back_until_accepted(tmp_path: Path, server: Slapd) -> None:
    site = site_of(tmp_path, server)
    site.good()
    before = site.snapshot
    delete(server, range(10, 60))
    outcome = site.sync()
    assert outcome.reason == "shrunk"
    assert "recipients would go" in outcome.why
    assert "of example.net would go" in outcome.why
    assert site.snapshot.generation == before.generation
    # More than what the operator was told is not what the operator accepts.
    delete(server, range(60, 85))
    assert site.sync(Purpose.ACCEPT).reason == "shrunk"
    assert site.sync(Purpose.ACCEPT).reason == ""
    assert site.snapshot.recipients < before.recipients / 2


def test_a_few_may_go_without_a_question(tmp_path: Path, server: Slapd) -> None:
    site = site_of(tmp_path, server)
    site.good()
    delete(server, range(10, 14))
    outcome = site.good()
    assert outcome.difference["removed"] >= 4


def test_restrictions_that_vanish_together_are_held_back(tmp_path: Path, server: Slapd) -> None:
    """An account that lost the right to read the attribute would open what it closed."""
    site = site_of(tmp_path, server, shrink_floor=2)
    site.good()
    assert site.snapshot.restricted > 2
    for uid in ("quote\\22x", "user35", "user66", "user97"):
        server.modify(f"dn: uid={uid},{PEOPLE}\nchangetype: modify\ndelete: smtpdSenderRestrictions\n")
    outcome = site.sync()
    assert outcome.reason == "shrunk"
    assert "restricted senders would go" in outcome.why


def test_canaries_must_be_there(tmp_path: Path, server: Slapd) -> None:
    site = site_of(tmp_path, server, canaries=["Nobody@example.org"], restricted_canaries=["user50@example.org"])
    outcome = site.sync()
    assert outcome.reason == "canary"
    assert "nobody@example.org is missing" in outcome.why
    assert not site.config.snapshot_path.exists()


def test_a_dry_run_says_what_would_change_and_changes_nothing(tmp_path: Path, server: Slapd) -> None:
    site = site_of(tmp_path, server)
    site.good()
    generation = site.snapshot.generation
    delete(server, range(10, 13))
    server.modify(f"dn: uid=user20,{PEOPLE}\nchangetype: modify\nadd: mailAlternateAddress\nmailAlternateAddress: x@example.org\n"
                  f"\ndn: uid=user21,{PEOPLE}\nchangetype: modify\nreplace: smtpdSenderRestrictions\nsmtpdSenderRestrictions: TRUE\n")  # fmt: skip
    found = site.sync(Purpose.DRY_RUN).difference
    assert found["added_names"] == ["x@example.org"]
    assert found["removed"] >= 3
    assert any(name.startswith("user21@") for name in found["changed_names"])
    assert site.snapshot.generation == generation


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[int, str, str]]:
    """``relay ARGUMENTS`` in this process, with ``profile`` as its directory."""

    def run(profile: dict[str, Any], *arguments: str, **directory: Any) -> tuple[int, str, str]:
        site = Site(tmp_path / "site", domains=DOMAINS)
        whole = site.config.model_dump(mode="json", include={"server", "process", "listener", "domain", "route"})
        tables = {"directory": {"ldap": [profile], **directory}, **json.loads(json.dumps(whole))}
        for domain in tables["domain"]:
            domain.pop("postmaster", None)
        config = tmp_path / "relay.toml"
        config.write_text(toml({k: v for k, v in tables.items() if v}))
        monkeypatch.setattr(sys, "argv", ["relay", *arguments, "--config", str(config)])
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_a_rollback_holds_the_schedule_until_the_next_sync_by_hand(
    tmp_path: Path, server: Slapd, command: Callable[..., tuple[int, str, str]]
) -> None:
    profile = server.profile()
    assert command(profile, "directory", "sync")[0] == 0
    site = site_of(tmp_path, server)
    first = site.snapshot
    delete(server, range(10, 13))
    assert command(profile, "directory", "sync")[0] == 0
    assert f"{first.generation} " in command(profile, "directory", "history")[1]
    code, _, err = command(profile, "directory", "rollback")
    assert (code, err) == (0, "")
    assert site.snapshot.recipients == first.recipients
    assert site.snapshot.generation == first.generation + 2
    held = site.sync(Purpose.SCHEDULED)
    assert "rolled back" in held.held
    assert site.snapshot.recipients == first.recipients
    assert command(profile, "directory", "status")[1].count("held") == 1
    assert command(profile, "directory", "sync")[0] == 0
    assert site.snapshot.recipients < first.recipients
    assert not site.sync(Purpose.SCHEDULED).held
    assert command(profile, "directory", "rollback", "99")[0] == 1


def test_exit_codes_tell_scripts_what_happened(server: Slapd, command: Callable[..., tuple[int, str, str]]) -> None:
    profile = server.profile()
    assert command(profile, "directory", "accept")[0] == 1
    assert command(profile, "directory", "sync")[0] == 0
    assert command({**profile, "base": "dc=nowhere"}, "directory", "sync")[0] == 1
    code, _, err = command(profile, "directory", "sync", canaries=["nobody@example.org"])
    assert code == 3
    assert "nobody@example.org is missing" in err
    code, out, _ = command(profile, "directory", "status", "--json")
    assert (code, json.loads(out)["directories"]["reason"]) == (0, "canary")
    assert command(profile, "directory", "accept", canaries=["nobody@example.org"])[0] == 0


@pytest.fixture
def impostors(tmp_path: Path, server: Slapd, authority: Authority) -> Iterator[dict[str, str]]:
    """Servers with certificates that must be refused, in front of nothing."""
    import socket
    import threading

    sockets = {}
    contexts = {
        "expired": authority.server_expired(),
        "stranger": authority.server_of_a_stranger(),
        "other name": authority.server("elsewhere.example"),
    }

    def serve(listening: socket.socket, context: ssl.SSLContext) -> None:
        while True:
            try:
                client, _ = listening.accept()
                with context.wrap_socket(client, server_side=True) as wrapped:
                    wrapped.recv(1)
            except ssl.SSLError:
                continue
            except OSError:
                return

    for name, context in contexts.items():
        sockets[name] = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=serve, args=(sockets[name], context), daemon=True).start()
    yield {name: f"ldaps://127.0.0.1:{one.getsockname()[1]}" for name, one in sockets.items()}
    for one in sockets.values():
        one.close()


BROKEN = {
    "no such name": ({"servers": ["ldaps://dc1.invalid"]}, "DNS", "dns"),
    "nothing listens": ({"servers": ["ldaps://127.0.0.1:1"]}, "TCP", "refused"),
    "expired certificate": ({"servers": "expired"}, "TLS", "certificate"),
    "certificate of a stranger": ({"servers": "stranger"}, "TLS", "certificate"),
    "certificate of another name": ({"servers": "other name"}, "TLS", "certificate"),
    "a pin of another key": ({"ca_file": None, "pin": ["sha256:" + "A" * 43 + "="]}, "TLS", "certificate"),
    "TLS on the clear port": ({"servers": "clear as ldaps"}, "TLS", "tls"),
    "wrong password": ({"password": "wrong"}, "login", "credentials"),
    "no such account": ({"bind": "cn=nobody,dc=example,dc=org"}, "login", "credentials"),
    "as nobody": ({"bind": None, "password_file": None}, "search", "rights"),
    "wrong base": ({"base": "ou=Nowhere,dc=example,dc=org"}, "search", "base"),
    "a base that is no name": ({"base": "ou=x,,y"}, "search", "base"),
    "a filter that finds nothing": ({"filter": "(mail=nobody)"}, "search", "empty"),
    "a filter that is none": ({"filter": "(&(mail=*)(nonsense))"}, "search", "filter"),
    "attributes without addresses": ({"address_attributes": ["cn"], "filter": "(mail=*)"}, "search", "empty"),
    "pages beyond the limit": ({"page_size": 2000, "filter": "(objectClass=*)"}, "search", "size-limit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_directory_test_names_the_step_the_cause_and_the_cure(
    name: str,
    tmp_path: Path,
    server: Slapd,
    impostors: dict[str, str],
    command: Callable[..., tuple[int, str, str]],
) -> None:
    changes, step, reason = BROKEN[name]
    profile = server.profile()
    for key, value in changes.items():
        if key == "servers" and isinstance(value, str):
            value = [impostors.get(value, server.url.replace("ldap:", "ldaps:"))]
        if key == "password":
            key, value = "password_file", tmp_path / "other-password"
            value.write_text("wrong\n")
            value.chmod(0o600)
        profile[key] = value
    profile = {key: value for key, value in profile.items() if value is not None}
    code, out, _ = command(profile, "directory", "test", "--json")
    (found,) = json.loads(out)
    assert code == 1
    assert (found["failed"], found["failure"]["reason"]) == (step, reason), out
    assert found["failure"]["cure"]
    assert PASSWORD not in out
    assert "FAILED" in command(profile, "directory", "test")[1]


def test_the_audit_lists_what_is_not_verified(server: Slapd, command: Callable[..., tuple[int, str, str]]) -> None:
    assert command(server.profile(), "directory", "audit")[0] == 0
    for changes in ({"servers": [server.url], "insecure": True, "ca_file": None}, {"verify": False, "ca_file": None}):
        profile = {key: value for key, value in server.profile(**changes).items() if value is not None}
        code, out, _ = command(profile, "directory", "audit", "--json")
        assert (code, len(json.loads(out))) == (1, 1)


def test_names_that_mean_something_to_ldap_are_only_names(tmp_path: Path, server: Slapd) -> None:
    """Filter characters, quotes, controls and a NUL in a value: counted or taken as they are, never more."""
    server.modify(
        ldif(f"uid=evil,{PEOPLE}", ["inetOrgPerson", "dmzRelayAccount"], uid="evil", cn="*)(uid=*", sn="x", mail="evil@example.org",
             smtpdSenderRestrictions="no\r\n250 ok\x01 ü").replace("\nobjectClass", "\nchangetype: add\nobjectClass", 1)
    )  # fmt: skip
    site = site_of(tmp_path, server)
    site.good()
    text = site.snapshot.entry("evil@example.org").text
    assert text.isprintable()
    assert text.isascii()
    assert SERVICE["openldap"]
