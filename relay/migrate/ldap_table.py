"""Owns: what a Postfix LDAP table (ldap_table(5)) comes to as ``[[directory.ldap]]``. Text in, text out: pure.

Postfix asks the directory for one address at a time; the relay reads all of them. So a filter with ``%s`` becomes one that finds every
entry with such an attribute. Whatever has no counterpart becomes a comment with its reason: nothing is left out silently, and a
condition of the filter least of all, for it decides who gets mail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

PARAMETER: Final = re.compile(r"(?P<name>[A-Za-z0-9_]+)\s*=\s*(?P<value>.*)", re.DOTALL)
_ASSERTION: Final = re.compile(r"\((?P<name>[A-Za-z][A-Za-z0-9_;.-]*)(?P<how>=|~=|>=|<=)(?P<value>[^()]*)\)")
_BETWEEN: Final = re.compile(r"(?<=\))\s+(?=[()])|(?<=[&|!(])\s+(?=\()")
_WHOLE: Final = frozenset({"%s", "%u@%d"})
_PREFIXED: Final = re.compile(r"(?P<prefix>smtp:)(?:%s|%u@%d)", re.IGNORECASE)
_HOST: Final = re.compile(
    r"(?:(?P<scheme>ldaps?|ldapi)://)?(?P<host>\[[^\]]+\]|[^:/\s]+)(?::(?P<port>\d+))?/?", re.IGNORECASE
)
_TRANSPORT: Final = re.compile(r"(?:smtp|relay|lmtp):", re.IGNORECASE)
_REFUSAL: Final = re.compile(r"(?:REJECT|DEFER|[45]\d\d)\b", re.IGNORECASE)
_TLS_PORTS: Final = frozenset({"636", "3269"})

MEANINGLESS: Final[Mapping[str, str]] = {
    "cache": "the relay asks no directory during mail",
    "cache_expiry": "the relay asks no directory during mail",
    "cache_size": "the relay asks no directory during mail",
    "debuglevel": "relay directory test takes its place",
    "recursion_limit": "groups are followed to their end",
    "expansion_limit": "there is none",
    "size_limit": "pages are asked for, without a limit on the whole",
    "dereference": "aliases are not followed; give each base a profile of its own",
    "chase_referrals": "referrals are never followed: they would get the password; name the server that has the base",
    "sasl_mechs": "logins are simple ones inside TLS",
    "sasl_realm": "logins are simple ones inside TLS",
    "sasl_authz_id": "logins are simple ones inside TLS",
    "sasl_minssf": "logins are simple ones inside TLS",
    "tls_ca_cert_dir": "write ca_file with the one certificate of the authority",
    "tls_cert": "client certificates are not supported towards directories; use bind and a password",
    "tls_key": "client certificates are not supported towards directories; use bind and a password",
    "tls_random_file": "not needed",
    "tls_cipher_suite": "the system's policy for TLS holds",
    "special_result_attribute": "members of groups: write groups = [DN, ...] to take only those",
    "leaf_result_attribute": "results are not rewritten: the recipient stays as it is",
    "terminal_result_attribute": "results are not rewritten: the recipient stays as it is",
}
"""Parameters without a counterpart, and why that is no loss, or what to do."""


class NoTable(ValueError):
    """The file is none of Postfix's LDAP tables. The text says why."""


@dataclass(slots=True)
class Profile:
    """A ``[[directory.ldap]]`` in the making: keys with their values in TOML, comments above them."""

    file: str
    name: str
    keys: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: object) -> None:
        """A value that JSON and TOML write alike: text, truth, number, list of texts."""
        self.keys[key] = json.dumps(value, ensure_ascii=False)

    def note(self, text: str) -> None:
        """Something for a person to read."""
        if text not in self.notes:
            self.notes.append(text)

    def lines(self) -> Iterator[str]:
        """As it stands in a configuration."""
        yield f"# from {self.file}"
        yield from (f"# {note}" for note in self.notes)
        yield "[[directory.ldap]]"
        yield from (f"{key} = {value}" for key, value in self.keys.items())


def parse(text: str) -> dict[str, str]:
    """Parameters by name, as main.cf writes them: a line that begins with a space continues the one before. Raises NoTable."""
    logical: list[str] = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line[0].isspace() and logical:
            logical[-1] += " " + line.strip()
        else:
            logical.append(line.strip())
    found: dict[str, str] = {}
    for line in logical:
        parameter = PARAMETER.fullmatch(line)
        if parameter is None:
            raise NoTable(f'"{line[:60]}" is no parameter; an LDAP table has lines NAME = VALUE')
        found[parameter["name"]] = parameter["value"].strip()
    if not found.keys() & {"search_base", "query_filter", "server_host"}:
        raise NoTable("has no search_base, query_filter or server_host; is it an LDAP table (ldap_table(5))?")
    return found


def convert(file: str, text: str, taken: Sequence[Profile] = ()) -> Profile | None:
    """The profile of one table. ``taken``: those made before; a table of senders or next hops of the same entries adds to
    them, and gives None. Raises NoTable.
    """
    said = parse(text)
    profile = Profile(file, _name(file, {one.name for one in taken}))
    for parameter, value in said.items():
        if parameter not in _KNOWN:
            profile.note(
                f"{parameter} = {value}: {MEANINGLESS[parameter]}"
                if parameter in MEANINGLESS
                else f"{parameter} = {value}: no parameter of LDAP tables that is known here; not carried over"
            )
    addresses = _filter(profile, said)
    profile.keys = {"name": json.dumps(profile.name), "preset": json.dumps(_preset(said, addresses)), **profile.keys}
    before = len(profile.notes)
    _servers(profile, said)
    _login(profile, said)
    _place(profile, said)
    return _result(profile, said, taken, profile.notes[before:])


def _name(file: str, taken: set[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", file.rpartition("/")[2].removesuffix(".cf").lower()).strip("-")[:28]
    name = stem if stem[:1].isalpha() else f"ldap-{stem}".rstrip("-")
    return next(
        one for number in range(1, len(taken) + 2) if (one := name if number == 1 else f"{name}-{number}") not in taken
    )


def _preset(said: Mapping[str, str], addresses: Sequence[str]) -> str:
    """Filter and attributes are written out beside it, so that it decides about little: kinds and restrictions."""
    everything = " ".join(said.values()).lower()
    if "rit" in everything and "ritmail" in everything.replace("imap", ""):
        return "rit-schema"
    if "proxyaddresses" in {one.lower() for one in addresses}:
        return "exchange"
    words = ("samaccountname", "userprincipalname", "objectcategory", "useraccountcontrol", "memberof:1.2.840")
    return "active-directory" if any(word in everything for word in words) else "openldap"


# --- the filter --------------------------------------------------------------------------------------------------------
def _filter(profile: Profile, said: Mapping[str, str]) -> list[str]:
    """The filter that finds all of them; the attributes that hold addresses."""
    asked = said.get("query_filter", "(mailacceptinggeneralid=%s)")
    addresses: list[str] = []
    kept: list[str] = []

    def all_of(found: re.Match[str]) -> str:
        name, how, value = found["name"], found["how"], found["value"]
        prefixed = _PREFIXED.fullmatch(value)
        if "%" not in value.replace("%%", ""):
            kept.append(found[0])
            return found[0].replace("%%", "%")
        if name.lower() not in map(str.lower, addresses) and (value in _WHOLE or prefixed):
            addresses.append(name)
        elif not (value in _WHOLE or prefixed):
            profile.note(
                f"{found[0]}: asks for a part of the address, and the relay reads whole ones; look at this filter"
            )
        return f"({name}{how}{prefixed['prefix'] if prefixed else ''}*)"

    made = _ASSERTION.sub(all_of, _BETWEEN.sub("", asked if asked.startswith("(") else f"({asked})"))
    profile.set("filter", made)
    if kept:
        profile.note(f"kept in the filter, it decides who gets mail: {' '.join(kept)}")
    if addresses:
        profile.set("address_attributes", addresses)
    else:
        profile.note("the filter compares no attribute with a whole address: write address_attributes = [...]")
    return addresses


# --- the server --------------------------------------------------------------------------------------------------------
def _servers(profile: Profile, said: Mapping[str, str]) -> None:
    port = said.get("server_port", "389")
    start_tls = said.get("start_tls", "no").lower() == "yes"
    servers: list[str] = []
    for word in re.split(r"[\s,]+", said.get("server_host", "localhost").strip()):
        found = _HOST.fullmatch(word)
        if found is None or (found["scheme"] or "").lower() == "ldapi":
            profile.note(f"server_host = {word}: no counterpart; name a host, as ldaps://ldap.example.com")
            continue
        own = found["port"] or ("" if found["scheme"] else port)
        tls = (found["scheme"] or "ldap").lower() == "ldaps" or own in _TLS_PORTS
        usual = own in {"", "636" if tls else "389"}
        servers.append(f"{'ldaps' if tls else 'ldap'}://{found['host']}{'' if usual else f':{own}'}")
    profile.set("servers", servers)
    clear = any(server.startswith("ldap://") for server in servers)
    if clear and not start_tls:
        profile.note(
            "start_tls is off: Postfix sends the password in clear. The relay begins with StartTLS on ldap://;"
        )
        profile.note(
            "should the server not have it, write insecure = true, and know that anyone on the way reads along"
        )
    if said.get("version", "2") != "3":
        stated = "version = 2" if "version" in said else "no version, which means 2"
        profile.note(f"{stated}: the relay speaks LDAPv3 only, as every server does; there is nothing to write")
    if said.get("tls_ca_cert_file"):
        profile.set("ca_file", said["tls_ca_cert_file"])
    if said.get("tls_require_cert", "no").lower() != "yes" and (start_tls or not clear):
        profile.note(
            "tls_require_cert is off: Postfix takes any certificate. The relay verifies it; ca_file or pin says by what"
        )


def _login(profile: Profile, said: Mapping[str, str]) -> None:
    bind = said.get("bind", "yes").lower()
    if bind == "sasl":
        profile.note("bind = sasl: logins are simple ones inside TLS; make an account with a password")
    if bind in {"no", "none"}:
        profile.note("bind = no: asked as nobody; Active Directory refuses that")
    elif said.get("bind_dn"):
        profile.set("bind", said["bind_dn"])
        profile.set("password_file", f"/etc/dmz-relay/{profile.name}.password")
        profile.note(f"the password is not printed: write bind_pw of {profile.file} into that file, mode 600")


def _place(profile: Profile, said: Mapping[str, str]) -> None:
    base = said.get("search_base", "")
    if "%" in base:
        profile.note(f"search_base = {base}: a base for each address has no counterpart; write a profile for each")
    else:
        profile.set("base", base)
    scope = said.get("scope", "sub").lower()
    if scope != "sub":
        profile.set("scope", scope)
    if "domain" in said:
        names = [word for word in re.split(r"[\s,]+", said["domain"]) if word]
        plain = [name for name in names if not set(name) & set(":/$")]
        if plain:
            profile.set("domains", plain)
        for name in names:
            if name not in plain:
                profile.note(f"domain = {name}: tables are not read here; write its domains into domains = [...]")
    if "timeout" in said and said["timeout"].isdecimal():
        profile.set("connect_timeout_s", float(said["timeout"]))


# --- what the table is for ---------------------------------------------------------------------------------------------
def _result(
    profile: Profile, said: Mapping[str, str], taken: Sequence[Profile], common: Container[str]
) -> Profile | None:
    """A result means: valid, refused as a sender, or sent to a host. Only the first is a profile of its own. ``common``: notes
    about the server, which need not be said twice.
    """
    attributes = [word for word in re.split(r"[\s,]+", said.get("result_attribute", "maildrop")) if word]
    form = said.get("result_format", said.get("result_filter", "%s"))
    if _TRANSPORT.match(form) or any("mailhost" in one.lower() for one in attributes):
        key, what = "next_hop_attribute", "where the mail of a recipient goes"
        profile.note(f"result_format = {form}: write the hosts that may be named into directory.next_hops")
    elif _REFUSAL.match(form) or any("restrict" in one.lower() for one in attributes):
        key, what = "restriction_attribute", "who may not send"
        if form != "%s":
            profile.note(f"result_format = {form}: the text stands in senders.text, or in the attribute itself")
    else:
        names = {name.strip('"').lower() for name in profile.keys.get("address_attributes", "").strip("[]").split(", ")}
        strange = [one for one in attributes if one.lower() not in names]
        if strange:
            profile.note(
                f"result_attribute = {' '.join(attributes)}: a result says that the address is valid; its value is not used."
            )
            profile.note("Should it rewrite addresses (virtual_alias_maps), leave that to the next hop")
        if form not in {"%s", "OK"}:
            profile.note(f"result_format = {form}: results are not rewritten; the recipient stays as it is")
        return profile
    profile.set(key, attributes[0])
    for one in attributes[1:]:
        profile.note(f"result_attribute has {one} as well: only the first one is read")
    same = next(
        (one for one in taken if all(one.keys.get(k) == profile.keys.get(k) for k in ("servers", "base"))), None
    )
    if same is None:
        profile.note(
            f"this table says {what}; with recipients counted, too: its entries become valid recipients. Put the key"
        )
        profile.note(
            "into the profile of the recipients, if these are the same entries (name both files in one command)"
        )
        return profile
    same.set(key, attributes[0])
    same.note(f"{key} is from {profile.file}; it is read from the entries of this profile's filter")
    if same.keys.get("filter") != profile.keys.get("filter"):
        same.note(f"its own filter was {profile.keys['filter']}: entries that only it finds are not read")
    for note in profile.notes:
        if note not in common:
            same.note(f"{profile.file}: {note}")
    return None


_KNOWN: Final = frozenset({
    "server_host", "server_port", "search_base", "query_filter", "result_format", "result_filter", "domain",
    "result_attribute", "scope", "bind", "bind_dn", "bind_pw", "version", "start_tls", "tls_ca_cert_file",
    "tls_require_cert", "timeout",
})  # fmt: skip
