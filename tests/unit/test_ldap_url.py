"""LDAP URLs (RFC 4516), read and written; and the schema file for Active Directory beside the one for OpenLDAP."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from relay.config.invalid import Invalid
from relay.config.ldap_url import LdapUrl, parse_ldap_url
from relay.directory import ldif

DEPLOY = Path(__file__).parents[2] / "deploy/ldap"


@pytest.mark.parametrize(
    ("text", "read", "written"),
    [
        ("ldap://ldap.example.net", LdapUrl("ldap", "ldap.example.net"), ""),
        ("LDAP://ldap.example.net/", LdapUrl("ldap", "ldap.example.net"), "ldap://ldap.example.net"),
        ("ldap:///o=University%20of%20Michigan,c=US", LdapUrl("ldap", "", "o=University of Michigan,c=US"), ""),
        ("ldap://h/o=U,c=US?postalAddress", LdapUrl("ldap", "h", "o=U,c=US", ("postalAddress",)), ""),
        ("ldap://h:6666/o=U,c=US??sub?(cn=Babs%20Jensen)", LdapUrl("ldap", "h:6666", "o=U,c=US", (), "sub", "(cn=Babs Jensen)"), ""),
        ("ldaps://[2001:db8::7]/??one?", LdapUrl("ldaps", "[2001:db8::7]", "", (), "one"), "ldaps://[2001:db8::7]/??one"),
        ("ldap://h/o=Question%3f,c=US?mail", LdapUrl("ldap", "h", "o=Question?,c=US", ("mail",)), "ldap://h/o=Question%3F,c=US?mail"),
        ("ldap://h/o=a?mail,cn?sub?(x=*)?x-other", LdapUrl("ldap", "h", "o=a", ("mail", "cn"), "sub", "(x=*)"), "ldap://h/o=a?mail,cn?sub?(x=*)"),
        ("ldap://h/o=%C3%BCber?*", LdapUrl("ldap", "h", "o=über"), "ldap://h/o=%C3%BCber"),
    ],
)  # fmt: skip
def test_an_url_is_read_and_written_again(text: str, read: LdapUrl, written: str) -> None:
    assert parse_ldap_url(text) == read
    assert str(read) == (written or text)
    assert parse_ldap_url(str(read)) == read


@pytest.mark.parametrize(
    "text",
    ["http://h", "ldap:h", "ldap://h/o=%zz", "ldap://h/o=a??tree", "ldap://h/o=a????!bindname=x", "ldap://h/%ff%fe", "ldap://h/a?b?sub?(c=d)?e?f"],
)  # fmt: skip
def test_what_is_none_is_said(text: str) -> None:
    with pytest.raises(Invalid):
        parse_ldap_url(text)


def test_the_schema_for_active_directory_has_what_the_one_for_openldap_has() -> None:
    unix = (DEPLOY / "dmz-relay.schema").read_text(encoding="ascii")
    said: list[ldif.LdifFault] = []
    with (DEPLOY / "dmz-relay-ad.ldif").open("rb") as file:
        text = file.read().decode("ascii")
    assert said == []
    names = set(re.findall(r"^lDAPDisplayName: (\S+)$", text, re.MULTILINE))
    assert names == set(re.findall(r"NAME '(\w+)'", unix))
    identifiers = re.findall(r"^(?:attributeID|governsID): (\S+)$", text, re.MULTILINE)
    assert len(set(identifiers)) == len(identifiers) == len(names)
    assert all(int(arc) < 2**28 for one in identifiers for arc in one.split("."))  # more than that it cannot hold
    guids = re.findall(r"^schemaIDGUID:: (\S+)$", text, re.MULTILINE)
    assert len(set(guids)) == len(guids) == len(names)
