"""What is read from a directory: every address of the truth and no other, by every way to reach and ask a server."""

from __future__ import annotations

import base64
import hashlib
import ssl
from collections.abc import Callable

import pytest

from relay.directory.sync import Purpose
from tests.bed.certificates import Authority
from tests.bed.slapd import BASE, DOMAINS, PASSWORD, SERVICE, Slapd, Truth, ad_tree, ldif, openldap_tree
from tests.directory.conftest import Site, agrees

pytestmark = pytest.mark.needs("slapd", "ldapmodify")
MakeSite = Callable[..., Site]


def pin_of(server: Slapd) -> str:
    from cryptography import x509  # of the test bed's certificates: a second opinion on the pin
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = ssl.get_server_certificate(("127.0.0.1", server.tls_port))
    key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + base64.b64encode(hashlib.sha256(der).digest()).decode()


def test_the_snapshot_agrees_with_a_tree_like_active_directorys(ad: tuple[Slapd, Truth], make_site: MakeSite) -> None:
    server, truth = ad
    site = make_site(server)
    outcome = site.good()
    assert outcome.readings[0]["pages"] == 3
    agrees(site.snapshot, truth)


def test_the_snapshot_agrees_with_an_openldap_tree(openldap: tuple[Slapd, Truth], make_site: MakeSite) -> None:
    server, truth = openldap
    site = make_site(server)
    site.good()
    agrees(site.snapshot, truth)
    restricted = next(iter(truth.restricted))
    assert site.snapshot.entry(restricted).text == "Leave of absence until May"


@pytest.mark.parametrize(
    "changes",
    [
        {"servers": "url"},
        {"servers": "url", "insecure": True, "ca_file": None},
        {"ca_file": None, "pin": "pin"},
        {"ca_file": None, "verify": False},
        {"tls_server_name": "localhost"},
        {"base": BASE["ad"].upper()},
        {"page_size": 7},
        {"page_size": 1000},
    ],
    ids=["StartTLS", "in clear", "by pin", "unverified", "by name", "base given", "small pages", "largest pages"],
)
def test_every_way_to_reach_a_server_gives_the_same(
    changes: dict[str, object], ad: tuple[Slapd, Truth], make_site: MakeSite
) -> None:
    server, truth = ad
    if changes.get("servers") == "url":
        changes = {**changes, "servers": [server.url]}
    if "pin" in changes:
        changes = {**changes, "pin": [pin_of(server)]}
    site = make_site(server, changes)
    site.good()
    agrees(site.snapshot, truth)


def test_the_password_comes_from_a_file_the_environment_or_a_credential(
    ad: tuple[Slapd, Truth], make_site: MakeSite, tmp_path: object
) -> None:
    server, _ = ad
    (tmp_path / "ad-password").write_text(PASSWORD)
    for changes, environ in (
        ({"password_env": "AD_PASSWORD"}, {"AD_PASSWORD": PASSWORD}),
        ({"password_credential": "ad-password"}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}),
    ):
        site = make_site(server, {"password_file": None, **changes})
        site.environ = environ
        site.good()


def test_the_next_server_is_asked_when_the_first_cannot_answer(ad: tuple[Slapd, Truth], make_site: MakeSite) -> None:
    server, truth = ad
    site = make_site(server, {"servers": ["ldaps://127.0.0.1:1", server.tls_url]})
    outcome = site.good()
    agrees(site.snapshot, truth)
    assert outcome.readings[0]["server"] == server.tls_url
    assert "refused" in outcome.readings[0]["failed"][0]


def test_a_wrong_password_is_not_tried_on_the_next_server(ad: tuple[Slapd, Truth], make_site: MakeSite) -> None:
    server, _ = ad
    before = (server.folder / "slapd.log").read_text().count(" BIND dn=")
    site = make_site(server, {"password_file": None, "password_env": "P", "servers": [server.tls_url, server.url]})
    site.environ = {"P": "wrong"}
    outcome = site.sync()
    assert outcome.reason == "credentials"
    assert (server.folder / "slapd.log").read_text().count(" BIND dn=") == before + 1


def test_only_chosen_kinds_and_domains_are_recipients(ad: tuple[Slapd, Truth], make_site: MakeSite) -> None:
    server, truth = ad
    site = make_site(server, {"kinds": ["shared", "public-folders"], "domains": ["corp.test"]})
    site.good()
    lookup = site.snapshot.lookup
    # Of twenty objects number 15 is a room and number 18 a public folder (tests.bed.slapd).
    wanted = {
        a for a in truth.valid if a.endswith("@corp.test") and a.startswith("first.last")
        and int(a.removeprefix("first.last").partition("@")[0]) % 20 in (15, 18)
    }  # fmt: skip
    assert wanted
    assert {a for a in truth.valid if a.startswith("first.last") and lookup(a) & 1} == wanted


def test_disabled_accounts_of_persons_can_be_left_out_and_rooms_stay(
    ad: tuple[Slapd, Truth], make_site: MakeSite
) -> None:
    server, truth = ad
    site = make_site(server, {"disabled_users": False})
    outcome = site.good()
    gone = outcome.skipped["account of a person, disabled"]
    assert gone > 10
    lookup = site.snapshot.lookup
    kept = {a for a in truth.valid if lookup(a) & 1}
    numbers = {int(a.removeprefix("first.last").partition("@")[0]) for a in truth.valid - kept if a.startswith("first")}
    assert numbers == {i for i in range(2300) if i % 29 == 8 and i % 20 < 15}


@pytest.fixture
def groups(folder: object, authority: Authority, tmp_path: object) -> object:
    """Groups within groups in a circle, a primary group, one of 1,700 members, and names with every escape."""
    base = BASE["ad"]
    entries, _ = ad_tree(20)
    people = [f"cn=Member {i}\\2C\\C3\\BC,ou=Staff,{base}" for i in range(1700)]
    for i, dn in enumerate(people):
        entries.append(
            ldif(dn, ["user"], cn=f"Member {i},ü", proxyAddresses=f"SMTP:member{i}@corp.test", mailNickname=f"m{i}")
        )
    sid = b"\x01\x05" + b"\0" * 22 + (1234).to_bytes(4, "little")
    entries += [
        ldif(f"cn=primary,ou=Staff,{base}", ["user"], cn="primary", proxyAddresses="smtp:primary@corp.test",
             primaryGroupID="1234"),
        ldif(f"cn=outside,ou=Staff,{base}", ["user"], cn="outside", proxyAddresses="smtp:outside@corp.test"),
        ldif(f"cn=top,ou=Groups,{base}", ["group"], cn="top", member=[f"CN=Middle,OU=Groups,{base}"], objectSid=sid),
        ldif(f"cn=middle,ou=Groups,{base}", ["group"], cn="middle",
             member=[f"cn=big,ou=Groups,{base}", f"cn=top,ou=Groups,{base}"]),
        ldif(f"cn=big,ou=Groups,{base}", ["group"], cn="big", member=people),
        ldif(f"cn=quiet,ou=Groups,{base}", ["group"], cn="quiet", member=[people[3]]),
    ]  # fmt: skip
    place = tmp_path / "groups"
    place.mkdir()
    server = Slapd(place, "ad", entries, authority)
    yield server
    server.close()


def test_only_members_of_groups_nested_primary_and_large_are_recipients(groups: Slapd, make_site: MakeSite) -> None:
    base = BASE["ad"]
    site = make_site(groups, {"groups": [f"CN=top,OU=Groups,{base}"], "restriction_groups": [f"cn=quiet,ou=Groups,{base}"],
                              "restriction_text": "Not today"})  # fmt: skip
    site.good()
    snapshot = site.snapshot
    assert {i for i in range(1700) if not snapshot.lookup(f"member{i}@corp.test") & 1} == set()
    assert snapshot.lookup("primary@corp.test") & 1
    assert not snapshot.lookup("outside@corp.test") & 1
    assert snapshot.recipients == 1701
    assert snapshot.entry("member3@corp.test").text == "Not today"
    # Leaving the inner group shows in the next reading.
    groups.modify(
        f"dn: cn=big,ou=Groups,{base}\nchangetype: modify\ndelete: member\nmember: cn=Member 5\\2C\\C3\\BC,ou=Staff,{base}\n"
    )
    site.good()
    assert not site.snapshot.lookup("member5@corp.test") & 1
    assert site.snapshot.recipients == 1700


def test_a_group_that_is_not_there_refuses_the_reading(ad: tuple[Slapd, Truth], make_site: MakeSite) -> None:
    server, _ = ad
    outcome = make_site(server, {"groups": [f"cn=nobody,{BASE['ad']}"]}).sync()
    assert outcome.reason == "base"
    assert "cn=nobody" in outcome.why


def test_changes_in_the_directory_show_in_the_next_reading(openldap: tuple[Slapd, Truth], make_site: MakeSite) -> None:
    server, _ = openldap
    site = make_site(server)
    site.good()
    people = f"ou=People,{BASE['openldap']}"
    server.modify(
        f"dn: uid=user100,{people}\nchangetype: modify\nadd: mailAlternateAddress\nmailAlternateAddress: new@example.org\n"
        "-\nadd: smtpdSenderRestrictions\nsmtpdSenderRestrictions: TRUE\n\n"
        f"dn: uid=user101,{people}\nchangetype: modrdn\nnewrdn: uid=renamed\ndeleteoldrdn: 1\n\n"
        f"dn: uid=user102,{people}\nchangetype: delete\n\n"
        f"dn: uid=user103,{people}\nchangetype: modify\ndelete: mail\n\n"
        f"dn: {people}\nchangetype: modrdn\nnewrdn: ou=Everyone\ndeleteoldrdn: 1\n"
    )
    before = site.snapshot
    outcome = site.good()
    after = site.snapshot
    assert after.lookup("new@example.org") == 3
    gone = {f"user{n}@{d}" for n in (102, 103) for d in DOMAINS["openldap"] if before.lookup(f"user{n}@{d}")}
    assert len(gone) == 2
    assert {a for a in gone if after.lookup(a)} == set()
    assert outcome.difference["added"] == 1
    assert any(after.lookup(f"user101@{domain}") for domain in DOMAINS["openldap"])
    server.modify(f"dn: ou=Everyone,{BASE['openldap']}\nchangetype: modrdn\nnewrdn: ou=People\ndeleteoldrdn: 1\n")


@pytest.mark.parametrize("kind", ["ad", "openldap"])
def test_ten_thousand_entries_agree_with_the_truth(
    kind: str, tmp_path: object, authority: Authority, make_site: MakeSite
) -> None:
    entries, truth = ad_tree(10_000, seed=2) if kind == "ad" else openldap_tree(10_000, seed=2)
    place = tmp_path / "large"
    place.mkdir()
    server = Slapd(place, kind, entries, authority)
    try:
        site = make_site(server)
        site.good()
        agrees(site.snapshot, truth)
        assert site.sync(Purpose.DRY_RUN).unchanged
    finally:
        server.close()


def test_two_directories_add_up_each_in_its_domains(
    ad: tuple[Slapd, Truth], openldap: tuple[Slapd, Truth], tmp_path: object
) -> None:
    site = Site(
        tmp_path, ad[0].profile(domains=["corp.test"]), openldap[0].profile(domains=["example.net"]),
        domains=(*DOMAINS["ad"], *DOMAINS["openldap"]),
    )  # fmt: skip
    site.good()
    lookup = site.snapshot.lookup
    for truth, domain in ((ad[1], "corp.test"), (openldap[1], "example.net")):
        found = {a for a in truth.valid if lookup(a) & 1}
        # The tree of openldap was changed by a test above; nothing that is left is of another domain.
        assert found
        assert {a for a in found if not a.endswith(f"@{domain}")} == set()
    assert SERVICE["ad"]
