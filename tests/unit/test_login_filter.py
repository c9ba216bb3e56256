"""What a client types is filled into filters and names of a directory, and never changes what is asked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.directory import ber
from relay.directory.failure import LdapFailure
from relay.directory.template import FilterTemplate, Login, any_of, name

FILTER = FilterTemplate("(&(|(uid=%u)(mail=%U@%d)(cn=a%s*))(!(x=100%%))(memberOf=cn=Mail\\2a,dc=test))")


def shape(octets: bytes) -> object:
    """Tags and nesting, and the content of what is not nested."""
    found, at = [], 0
    while at < len(octets):
        tag, start, at = ber.header(octets, at)
        found.append((tag, shape(octets[start:at]) if tag & 0x20 else octets[start:at]))
    return found


@given(st.text(min_size=1, max_size=50), st.text(max_size=300))
@settings(deadline=None, max_examples=100)
def test_no_login_changes_what_is_asked(user: str, domain: str) -> None:
    user, domain = (text.encode("utf-8", "replace").decode() for text in (user, domain))
    login = Login(f"typed {user}", f"{user}@{domain}", user, domain)
    [(_, [(_, terms), (_, negated), (_, group)])] = shape(FILTER.octets(login))
    assert terms == [
        (0xA3, [(4, b"uid"), (4, f"{user}@{domain}".encode())]),
        (0xA3, [(4, b"mail"), (4, f"{user}@{domain}".encode())]),
        (0xA4, [(4, b"cn"), (0x30, [(0x80, f"atyped {user}".encode())])]),
    ]
    assert negated == [(0xA3, [(4, b"x"), (4, b"100%")])]
    assert group == [(4, b"memberOf"), (4, b"cn=Mail*,dc=test")]


def test_a_name_in_a_dn_is_escaped_and_one_elsewhere_is_not() -> None:
    login = Login('a,b="c"', 'a,b="c"', 'a,b="c"', "CORP")
    assert name("uid=%U,ou=People,dc=test", login) == 'uid=a\\,b\\=\\"c\\",ou=People,dc=test'
    assert name("%d\\%U", login) == 'CORP\\a,b="c"'


def test_proxy_addresses_are_asked_for_by_their_kind() -> None:
    assert any_of(("uid",)) == "(uid=%u)"
    assert any_of(("mail", "proxyAddresses")) == "(|(mail=%u)(proxyAddresses=smtp:%u))"


@pytest.mark.parametrize("text", ["(uid=%u", "uid", "(&)(|)", "((uid=%u))"])
def test_a_filter_that_cannot_be_read_is_refused_when_it_is_loaded(text: str) -> None:
    with pytest.raises(LdapFailure):
        FilterTemplate(text)
