"""Owns: the shape of ``[auth]``: mechanisms, stores of accounts, and how many wrong guesses are let through.

Plain values only, as in ``config.schema``.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from relay.config.invalid import Invalid
from relay.config.section import DAY_S, Attribute, FilePath, Section, label, ldap_filter

STORES: Final = 20  # a login asks them one after the other


class Mechanism(StrEnum):
    """How a client logs in (SASL, RFC 4954)."""

    PLAIN = "PLAIN"
    LOGIN = "LOGIN"
    CRAM_MD5 = "CRAM-MD5"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_256_PLUS = "SCRAM-SHA-256-PLUS"


def _domain(value: str) -> str:
    if re.fullmatch(r"[\w.-]{1,255}", value) is None:
        raise Invalid(f'"{value}" is not the domain of a name', "write example.com, or CORP for names like CORP\\user")
    return value


class Store(Section):
    """One place where accounts stand."""

    name: Annotated[str, AfterValidator(label), Field(examples=["local"])]
    """Short name, used in logs and by listener.stores."""
    type: Annotated[Literal["file", "ldap"], Field(examples=["file"])]
    """file: NAME:PASSWORD:ADDRESSES a line, passwords as made by ``relay hash-password``. ldap: a directory."""
    path: FilePath | None = None
    """file: the file. The hub's user must be able to read it and nobody else should."""
    directory: str = ""
    """ldap: the name of the ``[[directory.ldap]]`` that says where the directory is and who asks it."""
    check: Literal["bind", "fastbind", "attribute"] = "bind"
    """ldap: bind searches the account and lets the directory check the password. fastbind does so with the name made from
    bind_name, without a search. attribute reads the stored password and checks it here."""
    user_attributes: Annotated[list[Attribute], Field(max_length=16)] = []
    """ldap: attributes in which the name is looked for; empty: sAMAccountName, userPrincipalName, mail and proxyAddresses in
    Active Directory, uid and mail elsewhere. More than one entry found: refused."""
    filter: Annotated[str, AfterValidator(ldap_filter), Field(max_length=4096)] = ""
    """ldap: filter of the accounts that may log in, e.g. (ritSmtpMailAccess=TRUE), besides user_attributes; with %u (name as
    names makes it), %U (before the @), %d (behind it) or %s (as typed) in it, instead of them."""
    names: Literal["as-typed", "add-domain", "strip-domain", "windows"] = "as-typed"
    """ldap: what is done to a name before it is looked for. add-domain: @DOMAIN is added where there is none. strip-domain:
    @DOMAIN and DOMAIN\\ are taken off. windows: DOMAIN\\ is put before a bare name."""
    domains: Annotated[list[Annotated[str, AfterValidator(_domain)]], Field(max_length=100)] = []
    """ldap: the domains of names; the first one is added, these are taken off (empty: any)."""
    bind_name: Annotated[str, Field(max_length=512)] = ""
    """fastbind: who binds, e.g. uid=%U,ou=People,dc=example,dc=org or %U@corp.example.com."""
    password_attribute: Attribute = "userPassword"  # noqa: S105 - the name of an attribute
    """attribute: where the stored password stands, as in files of accounts or as a directory writes it."""
    mechanisms: Annotated[list[Annotated[Mechanism, Field(strict=False)]], Field(max_length=len(Mechanism))] = []
    """attribute: what every stored password there can serve besides PLAIN and LOGIN."""
    account_attribute: Attribute | None = None
    """ldap: the attribute that names an account in log and grants; none: the first of user_attributes."""
    address_attributes: Annotated[list[Attribute], Field(max_length=32)] | None = None
    """ldap: attributes with the addresses that the account may send as; none: those of the ``[[directory.ldap]]``. Only
    addresses in domains of ``[[domain]]`` count."""
    timeout_s: Annotated[float, Field(ge=0.5, le=50)] = 10.0
    """ldap: longest wait of a login for the directory, all servers together, seconds; then 454."""
    connections: Annotated[int, Field(ge=1, le=64)] = 8
    """ldap: most connections for searches, and as many again for binds."""


class Auth(Section):
    """Logging in on the listeners that offer it (rows A1 to A9). Only ever inside TLS."""

    stores: Annotated[list[Store], Field(max_length=STORES)] = []
    """Where accounts stand; asked in this order."""
    mechanisms: Annotated[list[Annotated[Mechanism, Field(strict=False)]], Field(max_length=len(Mechanism))] = []
    """What is offered; empty: all that every account of every store of the listener can use."""
    by_hand: bool = False
    """Offer auth.mechanisms even where some accounts cannot use one of them. Their clients may then fail to log in."""
    account_failures: Annotated[int, Field(ge=3, le=1000)] = 9
    """Wrong passwords for one account, from anywhere, until auth.window_s pass without one. A directory's lock-out counts
    instead where it is known and lower."""
    client_failures: Annotated[int, Field(ge=3, le=10_000)] = 20
    """Failed logins of one client address within auth.window_s; then it is told 454."""
    network_failures: Annotated[int, Field(ge=3, le=100_000)] = 100
    """The same for a network: /24 of IPv4, /48 of IPv6."""
    window_s: Annotated[float, Field(ge=10, le=DAY_S)] = 900.0
    """How long a failure counts, seconds."""
    failure_delay_s: Annotated[float, Field(ge=0, le=30)] = 1.0
    """A failed login is answered after this long, whatever the reason, seconds."""
    show_login: bool = False
    """Name the account in the Received header."""
