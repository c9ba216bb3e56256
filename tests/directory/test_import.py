"""Postfix's LDAP tables as profiles (row O7): what they find is found, and nothing of them vanishes without a word."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.cli.main import main
from tests.bed.slapd import BASE, DOMAINS, SERVICE, Slapd, Truth
from tests.directory.conftest import Site

Import = Callable[..., tuple[int, str, str]]

PARAMETERS = {
    "server_host": "ldap.example.org", "search_base": "dc=example,dc=org", "query_filter": "(mail=%s)",
    "result_attribute": "mail", "bind": "no", "version": "3", "start_tls": "yes", "tls_require_cert": "yes",
}  # fmt: skip


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Import:
    """``relay import ldap`` of tables by name: a text, or parameters laid over the usual ones."""

    def run(**tables: str | dict[str, str | None]) -> tuple[int, str, str]:
        files = []
        for name, said in tables.items():
            file = tmp_path / f"{name}.cf"
            if isinstance(said, dict):
                whole = {**PARAMETERS, **said}
                said = "".join(f"{key} = {value}\n" for key, value in whole.items() if value is not None)
            file.write_text(said)
            files.append(str(file))
        monkeypatch.setattr(sys, "argv", ["relay", "import", "ldap", *files])
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return run


def profiles(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(out)["directory"]["ldap"]
    return found


def test_a_condition_of_the_filter_stays_and_is_named(imported: Import) -> None:
    asked = "(&(objectClass=ritMailAccount)\n  (ritImapMailAccess=TRUE)(|(mail=%s)(mailAlternateAddress=%s)))"
    code, out, _ = imported(people={"query_filter": asked})
    (profile,) = profiles(out)
    assert code == 0
    kept = "(&(objectClass=ritMailAccount)(ritImapMailAccess=TRUE)(|(mail=*)(mailAlternateAddress=*)))"
    assert profile["filter"] == kept
    assert profile["address_attributes"] == ["mail", "mailAlternateAddress"]
    assert profile["preset"] == "rit-schema"
    assert "decides who gets mail: (objectClass=ritMailAccount) (ritImapMailAccess=TRUE)" in out


def test_active_directory_is_seen_by_its_attributes(imported: Import) -> None:
    (profile,) = profiles(imported(ad={"query_filter": "(&(objectCategory=person)(proxyAddresses=smtp:%s))"})[1])
    assert (profile["preset"], profile["filter"]) == (
        "exchange", "(&(objectCategory=person)(proxyAddresses=smtp:*))",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "servers"),
    [
        ({"server_host": "a.example b.example:3890"}, ["ldap://a.example", "ldap://b.example:3890"]),
        ({"server_host": "ldaps://a.example:636 ldap://b.example"}, ["ldaps://a.example", "ldap://b.example"]),
        ({"server_host": "a.example", "server_port": "636"}, ["ldaps://a.example"]),
        ({"server_host": None}, ["ldap://localhost"]),
    ],
)
def test_servers_are_named_as_here(imported: Import, changes: dict[str, str | None], servers: list[str]) -> None:
    assert profiles(imported(one=changes)[1])[0]["servers"] == servers


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"version": None}, "no version, which means 2"),
        ({"version": "2"}, "LDAPv3 only"),
        ({"start_tls": "no"}, "password in clear"),
        ({"tls_require_cert": None}, "takes any certificate"),
        ({"cache": "yes"}, "cache = yes"),
        ({"special_result_attribute": "member"}, "groups = [DN"),
        ({"result_attribute": "maildrop"}, "virtual_alias_maps"),
        ({"result_format": "%s@elsewhere.example"}, "results are not rewritten"),
        ({"tls_cert": "/x"}, "client certificates"),
        ({"chase_referrals": "1"}, "referrals are never followed"),
        ({"search_base": "ou=%d,dc=example"}, "a base for each address"),
        ({"domain": "example.org hash:/etc/domains"}, "tables are not read here"),
        ({"bind": "sasl"}, "bind = sasl"),
        ({"invented": "7"}, "invented = 7"),
        ({"query_filter": "(|(mail=%s)(uid=%u))"}, "a part of the address"),
        ({"query_filter": "(uid=%u)"}, "write address_attributes"),
    ],
)
def test_what_has_no_counterpart_gets_a_word(imported: Import, changes: dict[str, str | None], word: str) -> None:
    comments = [line for line in imported(one=changes)[1].splitlines() if line.startswith("#")]
    assert any(word in line for line in comments), comments


def test_a_password_is_not_printed(imported: Import) -> None:
    _, out, err = imported(one={"bind": "yes", "bind_dn": "cn=relay,dc=example", "bind_pw": "s3cret-word"})
    assert "s3cret-word" not in out + err
    assert profiles(out)[0]["password_file"] == "/etc/dmz-relay/one.password"


def test_senders_and_hosts_of_the_same_entries_join_the_recipients(imported: Import) -> None:
    _, out, _ = imported(
        people={},
        senders={"result_attribute": "smtpdSenderRestrictions"},
        hosts={"result_attribute": "ritMailHost", "result_format": "smtp:[%s]"},
    )
    (profile,) = profiles(out)
    assert profile["restriction_attribute"] == "smtpdSenderRestrictions"
    assert profile["next_hop_attribute"] == "ritMailHost"
    assert "directory.next_hops" in out
    # Elsewhere they are a profile of their own, and its danger is told.
    _, out, _ = imported(people={}, senders={"result_attribute": "restriction", "search_base": "dc=other"})
    assert [one["name"] for one in profiles(out)] == ["people", "senders"]
    assert "become valid recipients" in out


def test_a_file_that_is_no_table_is_told(imported: Import, tmp_path: Path) -> None:
    code, _, err = imported(one="smtpd_banner = hello\n")
    assert (code, "is it an LDAP table" in err) == (1, True)
    code, _, err = imported(one="what is this\n")
    assert (code, "is no parameter" in err) == (1, True)
    # What would be no valid configuration is marked, and the exit code says so.
    code, out, _ = imported(one={"server_host": "ldapi://%2fvar%2frun"})
    assert (code, "# TO DO: servers" in out) == (1, True)


@pytest.mark.needs("slapd", "ldapmodify")
def test_what_postfix_would_find_is_in_the_snapshot(
    openldap: tuple[Slapd, Truth], imported: Import, tmp_path: Path
) -> None:
    server, truth = openldap
    given = server.profile()
    _, out, _ = imported(
        people={
            "server_host": server.url, "search_base": BASE["openldap"], "bind": "yes", "bind_dn": SERVICE["openldap"],
            "bind_pw": "x", "tls_ca_cert_file": str(server.ca_file),
            "query_filter": "(|(mail=%s)(mailAlternateAddress=%s)(mailLocalAddress=%s))",
        }
    )  # fmt: skip
    profile = {**profiles(out)[0], "password_file": given["password_file"]}
    site = Site(tmp_path / "site", profile, domains=DOMAINS["openldap"])
    site.good()
    assert {address for address in truth.valid if not site.snapshot.lookup(address)} == set()
    assert site.snapshot.recipients == len(truth.valid)
