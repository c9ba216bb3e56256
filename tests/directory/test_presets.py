"""Presets and places that the big trees do not have: rit-schema, and a global catalogue with a part of the attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.directory.snapshot import ACCEPT, IMAP, RESTRICTED
from tests.bed.certificates import Authority
from tests.bed.ldap_faults import ENTRY, FaultProxy, with_value
from tests.bed.slapd import BASE, PASSWORD, SERVICE, Slapd, ldif
from tests.directory.conftest import Site

pytestmark = pytest.mark.needs("slapd")
AD, UNIX = BASE["ad"], BASE["openldap"]
SCHEMA = f"ou=Schema,{AD}"
IN_THE_SET = (
    "proxyAddresses", "smtpdSenderRestrictions", "msExchRequireAuthToSendTo", "delivContLength", "userAccountControl",
    "msExchRecipientTypeDetails", "objectClass",
)  # fmt: skip


def known(name: str, *, partial: bool = True) -> str:
    return ldif(
        f"cn={name},{SCHEMA}", ["attributeSchema"], cn=name, lDAPDisplayName=name,
        isMemberOfPartialAttributeSet="TRUE" if partial else "FALSE",
    )  # fmt: skip


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Slapd]:
    tree = [
        ldif(AD, ["top", "dcObject", "organization"], dc="corp", o="Test"),
        *(ldif(f"ou={name},{AD}", ["organizationalUnit"], ou=name) for name in ("Staff", "Service", "Schema")),
        ldif(SERVICE["ad"], ["user"], cn="svc-relay", userPassword=PASSWORD, sAMAccountName="svc-relay",
             **{"msDS-UserPasswordExpiryTimeComputed": "134200000000000000"}),
        ldif(f"cn=one,ou=Staff,{AD}", ["user"], cn="one", proxyAddresses="SMTP:one@corp.test", userAccountControl="512",
             smtpdSenderRestrictions="TRUE"),
        *(known(name) for name in IN_THE_SET),
        known("ritMailHost", partial=False),
    ]  # fmt: skip
    made = Slapd(tmp_path_factory.mktemp("forest"), "ad", tree, authority)
    yield made
    made.close()


@pytest.fixture
def catalogue(forest: Slapd) -> Iterator[FaultProxy]:
    """The forest at the port of a global catalogue, whose root names the schema as Active Directory's does."""
    made = FaultProxy(forest.port, at=("127.0.0.9", 3268))
    made.act = lambda message, found, before: (
        with_value(message, "schemaNamingContext", SCHEMA) if (found, before) == (ENTRY, 0) else message
    )
    yield made
    made.close()


def test_a_global_catalogue_is_read_where_it_has_every_attribute_that_is_asked(
    forest: Slapd, catalogue: FaultProxy, make_site: Callable[..., Site]
) -> None:
    site = make_site(forest, {"servers": [catalogue.url], "insecure": True, "ca_file": None, "base": AD})
    site.good()
    assert site.snapshot.lookup("one@corp.test") & (ACCEPT | RESTRICTED) == ACCEPT | RESTRICTED


def test_a_global_catalogue_without_an_attribute_is_refused_by_its_name(
    forest: Slapd, catalogue: FaultProxy, make_site: Callable[..., Site]
) -> None:
    profile = {"servers": [catalogue.url], "insecure": True, "ca_file": None, "base": AD}
    outcome = make_site(forest, {**profile, "next_hop_attribute": "ritMailHost"}).sync()
    assert outcome.reason == "rights"
    assert "the global catalogue has no ritmailhost" in outcome.why


def test_rit_schema_reads_addresses_restrictions_hosts_and_imap_access(
    tmp_path: Path, authority: Authority, make_site: Callable[..., Site]
) -> None:
    def account(name: str, **more: str | list[str]) -> str:
        return ldif(f"uid={name},ou=People,{UNIX}", ["inetOrgPerson", "ritMailAccount"], uid=name, cn=name, sn="x",
                    mail=f"{name}@example.org", **more)  # fmt: skip

    tree = [
        ldif(UNIX, ["top", "dcObject", "organization"], dc="example", o="Test"),
        *(ldif(f"ou={name},{UNIX}", ["organizationalUnit"], ou=name) for name in ("People", "Service")),
        ldif(SERVICE["openldap"], ["organizationalRole", "simpleSecurityObject"], cn="relay", userPassword=PASSWORD),
        account("ann", mailAlternateAddress=["Ann.Other@example.net", "x@elsewhere.example"], ritMailHost="Mail1.Example.org",
                ritImapMailAccess="TRUE"),
        account("bea", smtpdSenderRestrictions="On leave", ritImapMailAccess="FALSE", ritMailHost="elsewhere.example"),
        ldif(f"uid=cid,ou=People,{UNIX}", ["inetOrgPerson"], uid="cid", cn="cid", sn="x", mail="cid@example.org"),
    ]  # fmt: skip
    place = tmp_path / "unix"
    place.mkdir()
    server = Slapd(place, "openldap", tree, authority)
    try:
        site = make_site(server, {"preset": "rit-schema"}, next_hops=["smtp:[mail1.example.org]"])
        outcome = site.good()
    finally:
        server.close()
    entry = site.snapshot.entry
    assert site.snapshot.recipients == 3
    for address in ("ann@example.org", "ann.other@example.net"):
        found = entry(address)
        assert found is not None
        assert (found.flags, found.next_hop) == (ACCEPT | IMAP, "mail1.example.org")
    found = entry("bea@example.org")
    assert found is not None
    assert (found.flags, found.text, found.next_hop) == (ACCEPT | RESTRICTED, "On leave", "elsewhere.example")
    assert entry("cid@example.org") is None
    assert outcome.skipped["the mail host is none of directory.next_hops: elsewhere.example"] == 1


def test_the_end_of_a_password_is_what_the_directory_computes(forest: Slapd, make_site: Callable[..., Site]) -> None:
    reading = make_site(forest, {"bind": SERVICE["ad"]}).good().readings[0]
    assert reading["password_expires"] == 1_775_526_400.0  # 134200000000000000 tenths of microseconds from 1601 on
