"""Owns: the shape of ``[[directory.ldap]]``: where a directory is, who asks it, and what is read there.

Plain values: no socket, no file. What an empty value stands for is the preset's (``directory.presets``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from relay.config.invalid import Invalid
from relay.config.ldap_url import LdapUrl, parse_ldap_url
from relay.config.section import Attribute, FilePath, Seconds, Section, ldap_filter
from relay.mail.address import is_domain

PRESETS: Final = ("active-directory", "exchange", "openldap", "rit-schema")
PORTS: Final = {"ldaps": 636, "ldap": 389}
GLOBAL_CATALOGUE: Final = {3268: "ldap", 3269: "ldaps"}
_TLS_PORTS: Final = frozenset((636, 3269))
_URL: Final = re.compile(
    r"(?P<scheme>[A-Za-z]+)://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s/?#:\[\]@]+))(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>/.*)?"
)
_SERVICE: Final = re.compile(r"_ldaps?\._tcp(\.[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)+")
_URL_HINT: Final = "write ldaps://dc1.example.com or ldap://dc1.example.com (which means StartTLS)"


@dataclass(frozen=True, slots=True)
class LdapServer:
    """One server of a profile. ``ldaps``: TLS from the first octet."""

    url: str
    host: str
    port: int
    ldaps: bool

    @property
    def is_service(self) -> bool:
        """The name of SRV records, which name the hosts."""
        return self.host.startswith("_")

    @property
    def is_global_catalogue(self) -> bool:
        """A part of every object of the forest, instead of all of one domain's (ports 3268 and 3269)."""
        return self.port in GLOBAL_CATALOGUE


def parse_server(url: str) -> LdapServer:
    """The server an LDAP URL (RFC 4516) names; base, scope and filter have keys of their own. Raises Invalid."""
    found = _URL.fullmatch(url)
    if found is None:
        raise Invalid(f'"{url}" is not the URL of a directory server', _URL_HINT)
    scheme = found["scheme"].lower()
    if scheme not in PORTS:
        raise Invalid(f'"{scheme}" is no way to reach a directory', _URL_HINT)
    if found["name"] is not None and found["name"].startswith("_"):
        if _SERVICE.fullmatch(found["name"]) is None:
            raise Invalid(
                f'"{found["name"]}" is no name of a directory service',
                f"write {scheme}://_ldap._tcp.dc._msdcs.example.com",
            )
    elif found["name"] is not None and not is_domain(found["name"]):
        raise Invalid(f'"{found["name"]}" is not a host name', _URL_HINT)
    if (found["rest"] or "/") != "/":
        raise Invalid(
            f'"{url}" says more than the server', f"it has keys of its own: write {parse_ldap_url(url).as_keys}"
        )
    port = int(found["port"] or PORTS[scheme])
    host = found["six"] or found["name"]
    if not 1 <= port <= 65535:
        raise Invalid(f"there is no port {port}", "leave the port out: 636 for ldaps, 389 for ldap")
    if scheme == "ldap" and port in _TLS_PORTS:
        raise Invalid(f"port {port} speaks TLS from the start, ldap:// does not", f"write ldaps://{host}:{port}")
    if scheme == "ldaps" and port in {389, 3268}:
        better = 636 if port == 389 else 3269
        raise Invalid(
            f"port {port} does not speak TLS from the start",
            f"write ldaps://{host}:{better}, or ldap://{host} for StartTLS",
        )
    return LdapServer(url, host, port, scheme == "ldaps")


def _server(value: str) -> str:
    parse_server(value)
    return value


def _version(value: int) -> int:
    if value != 3:
        raise Invalid(
            f"there is no LDAP version {value} here",
            "remove this, or write 3: version 2 was retired (RFC 3494), has neither StartTLS nor paged results, and every "
            "Active Directory and OpenLDAP speaks 3",
        )
    return value


def _pin(value: str) -> str:
    if re.fullmatch(r"sha256:[A-Za-z0-9+/]{43}=", value) is None:
        raise Invalid(f'"{value}" is not a pin', "write sha256: and 44 characters, as relay directory test prints it")
    return value


def _name(value: str) -> str:
    if re.fullmatch(r"[a-z][a-z0-9-]{0,30}", value) is None:
        raise Invalid(f'"{value}" is not a short name', "write up to 31 of a-z, 0-9 and -, a letter first, e.g. ad")
    return value


def _variable(value: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", value) is None or value.startswith("DMZ_RELAY__"):
        raise Invalid(
            f'"{value}" cannot name the variable', "write the name of an environment variable, e.g. AD_PASSWORD"
        )
    return value


def _credential(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value) is None or value in {".", ".."}:
        raise Invalid(f'"{value}" cannot name a credential', "write the name that LoadCredential= gives it")
    return value


def _own_domain(value: str) -> str:
    if not is_domain(value):
        raise Invalid(f'"{value}" is not a domain name', "write what stands behind the @, e.g. example.com")
    return value.lower()


def _dn(value: str) -> str:
    if "\0" in value or (value and re.match(r"\s*[A-Za-z0-9.-]+\s*=", value) is None):
        raise Invalid(f'"{value}" is not a distinguished name', "write it whole, e.g. OU=Staff,DC=example,DC=com")
    return value


Dn = Annotated[str, AfterValidator(_dn)]


class LdapProfile(Section):
    """A directory to read. There may be several, for example one for each domain."""

    name: Annotated[str, AfterValidator(_name), Field(examples=["ad"])]
    """Short name, used in logs, metrics and commands."""
    preset: Annotated[Literal["active-directory", "exchange", "openldap", "rit-schema"], Field(examples=["exchange"])]
    """What the entries look like: filter and attributes below follow from it where they are not set."""
    servers: Annotated[
        list[Annotated[str, AfterValidator(_server)]],
        Field(min_length=1, max_length=16, examples=[["ldaps://dc1.example.com", "ldaps://dc2.example.com"]]),
    ]
    """ldaps://HOST, or ldap://HOST with StartTLS; HOST may be the name of SRV records, _ldap._tcp.dc._msdcs.DOMAIN; the next one is asked while one cannot answer. One reading never mixes
    two servers. Ports 3268 and 3269 are the global catalogue."""
    version: Annotated[int, AfterValidator(_version)] = 3
    """Of the protocol. There is no other than 3; for configurations that come from programs which had a choice."""
    insecure: bool = False
    """Speak ldap:// without TLS: password and addresses can be read on the way. Shown by every check."""
    ca_file: FilePath | None = None
    """PEM file of the authority that signed the servers' certificates; none: the system's authorities."""
    pin: Annotated[list[Annotated[str, AfterValidator(_pin)]], Field(max_length=16)] = []
    """Public keys to trust instead of an authority, sha256:BASE64; relay directory test prints a server's."""
    verify: bool = True
    """false takes any certificate, so that anyone on the way can pose as the directory. Shown by every check."""
    tls_server_name: str = ""
    """The name in the certificate, where the URL has an address."""
    recipients: bool = True
    """false: nothing is read from it for the snapshot; it serves logins alone (``[[auth.stores]]``)."""
    bind: Annotated[str, Field(max_length=512)] = ""
    """Who asks: a DN, user@example.com or DOMAIN\\user; empty: anonymous, which Active Directory refuses."""
    password_file: FilePath | None = None
    """File that holds the password alone."""
    password_env: Annotated[str, AfterValidator(_variable)] | None = None
    """Environment variable that holds the password."""
    password_credential: Annotated[str, AfterValidator(_credential)] | None = None
    """Credential of systemd (LoadCredential=) that holds the password."""
    base: Dn = ""
    """Where to search; empty: what the server names as its naming context."""
    scope: Literal["sub", "one", "base"] = "sub"
    """Everything below the base, its direct children, or the base alone."""
    filter: Annotated[str, AfterValidator(ldap_filter), Field(max_length=4096)] = ""
    """LDAP filter of the entries to read; empty: the preset's."""
    kinds: list[Literal["users", "shared", "contacts", "groups", "dynamic-groups", "public-folders"]] | None = None
    """Active Directory presets: which objects give recipients; none: all of them. Shared and room mailboxes are disabled
    accounts there, and belong to shared."""
    disabled_users: bool = True
    """Active Directory presets: whether disabled accounts of persons keep getting mail."""
    system_mailboxes: bool = False
    """Whether Exchange's own mailboxes (HealthMailbox, SystemMailbox and the like) are recipients."""
    address_attributes: Annotated[list[Attribute], Field(max_length=32)] | None = None
    """Attributes that hold addresses; values with a prefix count only as smtp:. None: the preset's."""
    domains: Annotated[list[Annotated[str, AfterValidator(_own_domain)]], Field(max_length=10_000)] = []
    """Only addresses of these domains; empty: of all with recipients = "directory"."""
    groups: Annotated[list[Dn], Field(max_length=100)] = []
    """Only members of these groups are recipients, members of groups in them included; empty: everyone."""
    restriction_attribute: Attribute | None = None
    """Attribute that restricts a sender: TRUE with the configured text, any other value but FALSE is the text. None: the
    preset's, or directory.restriction_attribute."""
    restriction_values: Annotated[list[str], Field(max_length=100)] = []
    """Values of that attribute that restrict; empty: as said above."""
    restriction_groups: Annotated[list[Dn], Field(max_length=100)] = []
    """Members of these groups are restricted senders."""
    restriction_text: Annotated[str, Field(max_length=200)] = ""
    """Wording for senders restricted by a value or a group; empty: senders.text."""
    next_hop_attribute: Attribute | None = None
    """Attribute that names the host of a recipient's mail, one of directory.next_hops. None: the preset's, which is
    ritMailHost for rit-schema, and none for the others."""
    page_size: Annotated[int, Field(ge=1, le=100_000)] = 990
    """Entries asked for at once; Active Directory gives at most 1000."""
    connect_timeout_s: Seconds = 10.0
    """Connecting, TLS and login at one server, seconds."""
    answer_timeout_s: Seconds = 30.0
    """Longest silence of a server, seconds."""
    page_timeout_s: Seconds = 120.0
    """One page, seconds."""

    def url(self, server: LdapServer, attributes: tuple[str, ...], asked: str) -> LdapUrl:
        """What is read at a server, to be shown; ``asked``: the filter in use."""
        scheme, _, place = server.url.rstrip("/").partition("://")
        return LdapUrl(scheme.lower(), place, self.base, attributes, self.scope, asked)

    def targets(self) -> list[LdapServer]:
        """The servers in order."""
        return [parse_server(url) for url in self.servers]
