"""Owns: a slapd with accounts of every kind, and one relay whose listeners let them log in by one kind of store each."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.bed.certificates import Authority
from tests.bed.client import Client
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.slapd import BASE, SERVICE, Slapd, ldif, openldap_tree
from tests.submission.world import DOVECOT, made

PASSWORD: Final = "correct horse: bättery"
ROOT: Final = BASE["openldap"]
SCHEMES: Final = ("{SSHA}", "{SSHA256}", "{SSHA512}", "{ARGON2}")
STORED: Final = (
    f'access to dn.subtree="ou=Stored,{ROOT}" attrs=userPassword by dn.exact="{SERVICE["openldap"]}" read by anonymous auth',
)


def person(uid: str, place: str = "People", **more: Any) -> str:
    """An account; its password is kept as slapd keeps it unless ``userPassword`` says otherwise."""
    name = uid.replace("\\", "\\5C").replace(",", "\\2C").replace('"', "\\22").replace("+", "\\2B")
    whole: dict[str, Any] = {"uid": uid, "cn": uid, "sn": uid, "userPassword": PASSWORD, **more}
    return ldif(f"uid={name},ou={place},{ROOT}", ["inetOrgPerson", "ritMailAccount"], **whole)


def user(name: str, control: int = 512, **more: Any) -> str:
    """An account as Active Directory has it."""
    dn = f"cn={name.title()},ou=AD,{ROOT}"
    return ldif(dn, ["user"], cn=name.title(), sAMAccountName=name, userPrincipalName=f"{name}@corp.test",
                userAccountControl=str(control), userPassword=PASSWORD, **more)  # fmt: skip


def entries() -> Iterator[str]:
    yield from openldap_tree(0)[0]
    for place in ("Stored", "AD"):
        yield ldif(f"ou={place},{ROOT}", ["organizationalUnit"], ou=place)
    yield person("ann", mail=["ann@example.com", "ann@partner.example"], mailAlternateAddress="ann.smith@example.com",
                 ritSmtpMailAccess="TRUE")  # fmt: skip
    yield person("bob", mail="bob@example.com")
    yield person("phone", mail="phone@example.com", ritSmtpMailAccess="TRUE")
    yield person("a*b(c)\\d", mail="odd@example.com", ritSmtpMailAccess="TRUE")
    yield person("twin1", mail=["twin@example.com", "twin1@example.com"], ritSmtpMailAccess="TRUE")
    yield person("twin2", mail=["twin@example.com"], ritSmtpMailAccess="TRUE")
    yield person("mute", mail=["mute@example.com", "restricted@example.com"], ritSmtpMailAccess="TRUE")
    for scheme in SCHEMES:
        name = scheme.strip("{}").lower()
        yield person(name, "Stored", userPassword=slappasswd(scheme), employeeType="hash", mail=f"{name}@example.com")
    yield person(
        "crypt", "Stored", userPassword=made("SHA512-CRYPT", PASSWORD), employeeType="hash", mail="crypt@example.com"
    )
    yield person("test", "Stored", userPassword=DOVECOT, employeeType="cram", mail="test@example.com")
    yield person(
        "carl", "Stored", userPassword=made("CRAM-MD5", PASSWORD), employeeType="cram", mail="carl@example.com"
    )
    yield person(
        "sam", "Stored", userPassword=made("SCRAM-SHA-256", PASSWORD), employeeType="scram", mail="sam@example.com"
    )
    yield person("clea", "Stored", userPassword=PASSWORD, employeeType="clear", mail="clea@example.com")
    yield person("both", "Stored", userPassword=[made("SCRAM-SHA-256", PASSWORD), made("CRAM-MD5", PASSWORD)],
                 employeeType="clear", mail="both@example.com")  # fmt: skip
    yield user("dora", mail="dora@example.com",
               proxyAddresses=["SMTP:dora@example.com", "smtp:d@example.com", "smtp:dora@partner.example", "X400:c=de;"])  # fmt: skip
    yield user("room", 514, mail="room@example.com")


def slappasswd(scheme: str) -> str:
    """What OpenLDAP's own program makes."""
    modules = {"{ARGON2}": ["-o", "module-load=argon2"], "{SSHA256}": ["-o", "module-load=pw-sha2"],
               "{SSHA512}": ["-o", "module-load=pw-sha2"]}  # fmt: skip
    command = ["slappasswd", "-o", "module-path=/usr/lib/ldap", *modules.get(scheme, []), "-h", scheme, "-s", PASSWORD]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


STORES: Final[dict[str, dict[str, Any]]] = {
    "people": {"directory": "people"},
    "right": {"directory": "people", "filter": "(&(uid=%U)(ritSmtpMailAccess=TRUE))"},
    "fast": {"directory": "people", "check": "fastbind", "bind_name": f"uid=%U,ou=People,{ROOT}"},
    "hash": {"directory": "stored", "check": "attribute", "filter": "(employeeType=hash)"},
    "cram": {"directory": "stored", "check": "attribute", "filter": "(employeeType=cram)", "mechanisms": ["CRAM-MD5"]},
    "scram": {"directory": "stored", "check": "attribute", "filter": "(employeeType=scram)",
              "mechanisms": ["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"]},
    "clear": {"directory": "stored", "check": "attribute", "filter": "(employeeType=clear)",
              "mechanisms": ["CRAM-MD5", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"]},
    "strip": {"directory": "people", "names": "strip-domain", "domains": ["example.com", "CORP"], "user_attributes": ["uid"]},
    "add": {"directory": "people", "names": "add-domain", "domains": ["example.com"], "user_attributes": ["mail"],
            "account_attribute": "uid"},
    "ad": {"directory": "ad"},
    "fastad": {"directory": "ad", "check": "fastbind", "names": "windows", "domains": ["CORP"], "bind_name": "%u"},
}  # fmt: skip


def profiles(slapd: Slapd, **changes: Any) -> list[dict[str, Any]]:
    """The ``[[directory.ldap]]`` of the stores, for logins alone."""
    places = {"people": "People", "stored": "Stored", "ad": "AD"}
    return [
        slapd.profile(
            name=name, base=f"ou={place},{ROOT}", recipients=False,
            preset="active-directory" if name == "ad" else "openldap", **changes,
        )
        for name, place in places.items()
    ]  # fmt: skip


class Directory:
    """The slapd, the relay before it, and a file of accounts that stands before the directory in one chain."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.authority = authority
        (folder / "slapd").mkdir()
        self.slapd = Slapd(folder / "slapd", "openldap", entries(), authority, access=STORED)
        self.hop = NextHop()
        local = folder / "local"
        local.write_text("ann:of the file:ann@example.com\nlocal:of the file:local@example.com\n")
        (folder / "relay").mkdir()
        self.relay = RelayRunner(
            folder / "relay",
            self.hop.route,
            listeners={"mx": "mx", **dict.fromkeys((*STORES, "chain"), "submission")},
            certificate=authority.files(folder),
            default_next_hop=self.hop.route,
            restricted=["restricted@example.com"],
            config={
                "auth": {
                    "stores": [
                        {"name": "local", "type": "file", "path": local},
                        *({"name": name, "type": "ldap", **keys} for name, keys in STORES.items()),
                    ],
                    "failure_delay_s": 0.02,
                    "account_failures": 1000,
                    "client_failures": 10_000,
                    "network_failures": 10_000,
                },
            },
        )
        self.relay.config["directory"]["ldap"] = profiles(self.slapd)
        for listener in self.relay.config["listener"]:
            name = listener["name"]
            listener["stores"] = ["local", "people"] if name == "chain" else [] if name == "mx" else [name]
        self.relay.configure({})
        self.relay.start()

    def client(self, listener: str, **options: Any) -> Client:
        """A session inside TLS, EHLO said."""
        client = self.relay.client(listener, **options).open()
        client.starttls(self.authority.client())
        client.ehlo()
        return client

    def close(self) -> None:
        """Stop everything."""
        try:
            self.relay.close()
        finally:
            self.hop.close()
            self.slapd.close()
