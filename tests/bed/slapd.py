"""Owns: a private slapd on high loopback ports with a tree like Active Directory's or OpenLDAP's, and the truth about it.

Reads are for the service account alone, unpaged searches end at 1,000 entries with result 4, pages are at most 1,000 long.
"""

from __future__ import annotations

import base64
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from tests.bed.certificates import Authority
from tests.bed.ports import free_port
from tests.bed.waiting import wait_for

Kind = Literal["ad", "openldap"]
BASE: Final[Mapping[Kind, str]] = {"ad": "dc=corp,dc=test", "openldap": "dc=example,dc=org"}
SERVICE: Final[Mapping[Kind, str]] = {
    "ad": "cn=svc-relay,ou=Service,dc=corp,dc=test",
    "openldap": "cn=relay,ou=Service,dc=example,dc=org",
}
PASSWORD: Final = "Relay-Passw0rd"
DOMAINS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "ad": ("corp.test", "office.corp.test"),
    "openldap": ("example.org", "example.net"),
}
_SCHEMA: Final = Path(__file__).parents[2] / "deploy/ldap/dmz-relay.schema"

# The names and syntaxes of Active Directory and Exchange, with numbers from OpenLDAP's arc for experiments.
_TEXT, _IA5, _INTEGER, _BOOLEAN, _OCTETS, _DN = (f"1.3.6.1.4.1.1466.115.121.1.{n}" for n in (15, 26, 27, 7, 40, 12))
_ATTRIBUTES: Final = (
    ("proxyAddresses", "caseIgnoreMatch", _TEXT),
    ("sAMAccountName", "caseIgnoreMatch", _TEXT),
    ("userPrincipalName", "caseIgnoreMatch", _TEXT),
    ("mailNickname", "caseIgnoreMatch", _TEXT),
    ("userAccountControl", "integerMatch", _INTEGER),
    ("primaryGroupID", "integerMatch", _INTEGER),
    ("msExchRecipientTypeDetails", "integerMatch", _INTEGER),
    ("msExchRequireAuthToSendTo", "booleanMatch", _BOOLEAN),
    ("delivContLength", "integerMatch", _INTEGER),
    ("uSNChanged", "integerMatch", _INTEGER),
    ("objectGUID", "octetStringMatch", _OCTETS),
    ("objectSid", "octetStringMatch", _OCTETS),
    ("invocationId", "octetStringMatch", _OCTETS),
    ("msDS-UserPasswordExpiryTimeComputed", "integerMatch", _INTEGER),
    ("lDAPDisplayName", "caseIgnoreMatch", _TEXT),
    ("isMemberOfPartialAttributeSet", "booleanMatch", _BOOLEAN),
    ("lockoutThreshold", "integerMatch", _INTEGER),
    ("lockOutObservationWindow", "integerMatch", _INTEGER),
    ("msDS-LockoutThreshold", "integerMatch", _INTEGER),
    ("msDS-LockoutObservationWindow", "integerMatch", _INTEGER),
)
_ORDER: Final = {"integerMatch": "ORDERING integerOrderingMatch"}
_CLASSES: Final = ("user", "contact", "group", "publicFolder", "msExchDynamicDistributionList", "attributeSchema")


def _ad_schema() -> str:
    arc = "1.3.6.1.4.1.4203.666.99"
    lines = [
        f"attributetype ( {arc}.1.{n} NAME '{name}' EQUALITY {rule} {_ORDER.get(rule, '')} SYNTAX {syntax} )"
        for n, (name, rule, syntax) in enumerate(_ATTRIBUTES)
    ]
    names = " $ ".join(name for name, _, _ in _ATTRIBUTES)
    lines += [
        f"objectclass ( {arc}.2.{n} NAME '{name}' SUP top STRUCTURAL MUST cn MAY ( mail $ displayName $ member $ "
        f"userPassword $ smtpdSenderRestrictions $ {names} ) )"
        for n, name in enumerate(_CLASSES)
    ]
    lines.append(
        f"objectclass ( {arc}.3.1 NAME 'samDomain' AUXILIARY MAY ( lockoutThreshold $ lockOutObservationWindow ) )"
    )
    lines.append(
        f"objectclass ( {arc}.3.2 NAME 'msDS-PasswordSettings' STRUCTURAL MUST cn "
        "MAY ( msDS-LockoutThreshold $ msDS-LockoutObservationWindow ) )"
    )
    return "\n".join(lines) + "\n"


@dataclass
class Truth:
    """What a relay must make of the tree; addresses in lower case."""

    valid: set[str] = field(default_factory=set)
    never: set[str] = field(default_factory=set)
    restricted: set[str] = field(default_factory=set)
    internal: set[str] = field(default_factory=set)
    limited: set[str] = field(default_factory=set)


def _line(name: str, value: str | bytes) -> str:
    raw = value if isinstance(value, bytes) else value.encode()
    return f"{name}:: {base64.b64encode(raw).decode()}\n"


def ldif(dn: str, classes: Iterable[str], **attributes: str | bytes | list[str]) -> str:
    """One entry; everything as base64, so that nothing needs a rule."""
    lines = [_line("dn", dn), *(_line("objectClass", name) for name in classes)]
    for name, values in attributes.items():
        lines += [_line(name, value) for value in (values if isinstance(values, list) else [values])]
    return "".join(lines) + "\n"


def _root(kind: Kind, folders: Iterable[str]) -> list[str]:
    base = BASE[kind]
    dc = base.split(",")[0].removeprefix("dc=")
    return [
        ldif(base, ["top", "dcObject", "organization"], dc=dc, o="Test"),
        *(ldif(f"ou={name},{base}", ["organizationalUnit"], ou=name) for name in folders),
    ]


def ad_tree(count: int, seed: int = 1) -> tuple[list[str], Truth]:
    """``count`` objects as Exchange leaves them: all kinds, prefixes, foreign domains, oddities."""
    dice, truth, base = random.Random(seed), Truth(), BASE["ad"]
    entries = _root("ad", ("Staff", "Shared", "Groups", "Contacts", "Folders", "Service"))
    entries.append(ldif(SERVICE["ad"], ["user"], cn="svc-relay", sAMAccountName="svc-relay", userPassword=PASSWORD))
    staff: list[str] = []
    for i in range(count):
        domain = dice.choice(DOMAINS["ad"])
        primary = f"First.Last{i}@{domain}"
        proxies = [f"SMTP:{primary}", f"X400:c=de;s=last{i};", f"x500:/o=Corp/cn=u{i}", f"SIP:sip{i}@{domain}"]
        mine = {primary.lower()}
        truth.never |= {f"sip{i}@{domain}", f"x400:{primary}".lower()}
        for j in range(dice.choice((0, 1, 2, 3))):
            proxies.append(f"{dice.choice(('smtp', 'Smtp', 'SMTP'))}:alias{j}.{i}@{domain}")
            mine.add(f"alias{j}.{i}@{domain}")
        if i % 50 == 7:
            proxies.append(f"smtp:u{i}@partner.example")
            truth.never.add(f"u{i}@partner.example")
        if i % 97 == 11:
            proxies += [
                "smtp:",
                f"smtp:@{domain}",
                f"smtp:nodomain{i}",
                f"smtp:two@at{i}@{domain}",
                f"smtp:nul\0{i}@{domain}",
            ]
            truth.never |= {f"@{domain}", f"nodomain{i}", f"two@at{i}@{domain}"}
        if i % 97 == 12:
            proxies.append(f'smtp:"quoted name {i}"@{domain}')
            mine.add(f'"quoted name {i}"@{domain}')
        if i % 97 == 13:
            proxies.append(f"smtp:o'brien*(){i}@{domain}".replace("*()", "&"))
            mine.add(f"o'brien&{i}@{domain}")
        if i % 97 == 14:
            proxies.append(f"smtp:jörg{i}@{domain}")
            mine.add(f"jörg{i}@{domain}")
        if i == 40:
            proxies += [f"smtp:many{n}@{DOMAINS['ad'][0]}" for n in range(1600)]
            mine |= {f"many{n}@{DOMAINS['ad'][0]}" for n in range(1600)}
        common: dict[str, str | bytes | list[str]] = {
            "proxyAddresses": proxies, "mail": primary, "mailNickname": f"u{i}", "objectGUID": i.to_bytes(16, "big"),
            "uSNChanged": str(1000 + i), "sAMAccountName": f"u{i}",
        }  # fmt: skip
        kind = i % 20
        if kind < 15:
            if i % 37 == 5:
                common["smtpdSenderRestrictions"] = "TRUE"
                truth.restricted |= mine | ({f"u{i}@partner.example"} if i % 50 == 7 else set())
            if i % 41 == 6:
                common["delivContLength"] = "1024"
                truth.limited |= mine
            disabled = i % 29 == 8
            dn = f"cn=Last\\2C First {i},ou=Staff,{base}"
            staff.append(dn)
            entries.append(
                ldif(dn, ["user"], cn=f"Last, First {i}", userAccountControl="514" if disabled else "512",
                     msExchRecipientTypeDetails="1", **common)
            )  # fmt: skip
        elif kind == 15:
            entries.append(
                ldif(f"cn=room {i},ou=Shared,{base}", ["user"], cn=f"room {i}", userAccountControl="514",
                     msExchRecipientTypeDetails=dice.choice(("4", "16", "32")), **common)
            )  # fmt: skip
        elif kind == 16:
            if i % 3 == 0:
                common["msExchRequireAuthToSendTo"] = "TRUE"
                truth.internal |= mine
            members = dice.sample(staff, min(3, len(staff)))
            entries.append(ldif(f"cn=list {i},ou=Groups,{base}", ["group"], cn=f"list {i}", member=members, **common))
        elif kind == 17:
            entries.append(ldif(f"cn=contact {i},ou=Contacts,{base}", ["contact"], cn=f"contact {i}", **common))
        elif kind == 18:
            entries.append(ldif(f"cn=folder {i},ou=Folders,{base}", ["publicFolder"], cn=f"folder {i}", **common))
        else:
            entries.append(ldif(f"cn=HealthMailbox{i},ou=Staff,{base}", ["user"], cn=f"HealthMailbox{i}", **common))
            truth.never |= mine
            continue
        truth.valid |= mine
    return entries, truth


def openldap_tree(count: int, seed: int = 1) -> tuple[list[str], Truth]:
    """``count`` accounts as mail servers of the Unix world have them."""
    dice, truth, base = random.Random(seed), Truth(), BASE["openldap"]
    entries = _root("openldap", ("People", "Groups", "Service"))
    entries.append(
        ldif(SERVICE["openldap"], ["organizationalRole", "simpleSecurityObject"], cn="relay", userPassword=PASSWORD)
    )
    odd = ["a*b", "paren(x)", "back\\slash", "comma,x", 'quote"x', "ümlaut"]
    for i in range(count):
        uid = odd[i] if i < len(odd) else f"user{i}"
        domain = dice.choice(DOMAINS["openldap"])
        addresses = [f"user{i}@{domain}", *(f"alias{j}.{i}@{domain}" for j in range(dice.choice((0, 1, 2))))]
        more: dict[str, str | bytes | list[str]] = {"mail": addresses[0]}
        if addresses[1:]:
            more["mailAlternateAddress"] = addresses[1:]
        if i % 31 == 4:
            more["smtpdSenderRestrictions"] = "Leave of absence until May"
            truth.restricted |= set(addresses)
        truth.valid |= set(addresses)
        name = uid.replace("\\", "\\5C").replace(",", "\\2C").replace('"', "\\22")
        entries.append(
            ldif(f"uid={name},ou=People,{base}", ["inetOrgPerson", "dmzRelayAccount"], uid=uid, cn=f"Person {i}",
                 sn=str(i), **more)
        )  # fmt: skip
    return entries, truth


class Slapd:
    """One slapd. ``stop`` and ``start`` may be repeated: the data stays."""

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        entries: Iterable[str],
        authority: Authority,
        *,
        names: tuple[str, ...] = (),
        access: tuple[str, ...] = (),
        overlays: tuple[str, ...] = (),
    ) -> None:
        """``access``: rules before its own; ``overlays``: lines at the end of the database's."""
        self.kind: Kind = kind
        self._access, self._overlays = access, overlays
        self.folder = folder
        self.port, self.tls_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "db").mkdir()
        self.ca_file = authority.bundle(folder)
        chain, key = authority.files(folder, *(names or ("localhost", "127.0.0.1")))
        self.configure(chain, key)
        tree = folder / "tree.ldif"
        tree.write_text("".join(entries))
        subprocess.run(["slapadd", "-q", "-f", self._config, "-l", tree], check=True, capture_output=True, timeout=100)
        self.start()

    def configure(self, chain: Path, key: Path) -> None:
        """Write the configuration; a running slapd takes it at its next start."""
        schema = self.folder / "ad.schema"
        schema.write_text(_ad_schema())
        base, service = BASE[self.kind], SERVICE[self.kind]
        standard = [f"include /etc/ldap/schema/{name}.schema" for name in ("core", "cosine", "inetorgperson")]
        self._config = self.folder / "slapd.conf"
        self._config.write_text("\n".join([
            *standard, f"include {_SCHEMA}", f"include {schema}", f"pidfile {self.folder}/slapd.pid",
            "modulepath /usr/lib/ldap", "moduleload back_mdb", "moduleload syncprov", "moduleload ppolicy", "moduleload argon2",
            f"TLSCertificateFile {chain}", f"TLSCertificateKeyFile {key}", "threads 2", "loglevel 256",
            "sizelimit size.soft=1000 size.hard=1000 size.pr=1000 size.prtotal=unlimited",
            'access to dn.base="" by * read', *self._access,
            "access to attrs=userPassword by anonymous auth by * none",
            f'access to * by dn.exact="{service}" read by anonymous auth by * none',
            "database mdb", f'suffix "{base}"', f'rootdn "cn=manager,{base}"', f"rootpw {PASSWORD}",
            f"directory {self.folder}/db", "maxsize 1073741824", "dbnosync", "index objectClass,mail,uid eq,pres", "overlay syncprov",
            *self._overlays,
        ]) + "\n")  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def url(self) -> str:
        """For StartTLS or clear text."""
        return f"ldap://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        """For TLS from the start."""
        return f"ldaps://127.0.0.1:{self.tls_port}"

    def profile(self, **changes: object) -> dict[str, object]:
        """A ``[[directory.ldap]]`` that works; a value of None removes its key."""
        password = self.folder / "password"
        password.write_text(PASSWORD + "\n")
        password.chmod(0o600)
        whole: dict[str, object] = {
            "name": self.kind, "preset": "exchange" if self.kind == "ad" else "openldap", "servers": [self.tls_url],
            "ca_file": self.ca_file, "bind": SERVICE[self.kind], "password_file": password, **changes,
        }  # fmt: skip
        return {key: value for key, value in whole.items() if value is not None}

    def start(self) -> None:
        """Run it until ``stop``."""
        urls = f"ldap://127.0.0.1:{self.port}/ ldaps://127.0.0.1:{self.tls_port}/"
        with (self.folder / "slapd.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["slapd", "-d", "256", "-f", self._config, "-h", urls], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        wait_for(lambda: self._accepts() or self._process.poll() is not None, "slapd")
        assert self._process.poll() is None, (self.folder / "slapd.log").read_text()[-2000:]

    def _accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.tls_port), 5).close()
            return True
        except OSError:
            return False

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def hang(self, signal_number: signal.Signals = signal.SIGSTOP) -> None:
        """Let it stand still: connections are taken by the kernel and nothing is answered. SIGCONT lets it go on."""
        assert self._process is not None
        self._process.send_signal(signal_number)

    def searches(self) -> int:
        """How many searches it was ever asked."""
        return (self.folder / "slapd.log").read_text(errors="replace").count(" SRCH base=")

    def binds(self, dn: str) -> int:
        """How many times it was shown a password for ``dn``."""
        return (self.folder / "slapd.log").read_text(errors="replace").count(f'BIND dn="{dn}" method=128')

    def modify(self, text: str) -> None:
        """Change records (LDIF), as the manager."""
        done = subprocess.run(
            ["ldapmodify", "-x", "-H", self.url, "-D", f"cn=manager,{BASE[self.kind]}", "-w", PASSWORD],
            input=text, text=True, capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        """End it, and let go of the data."""
        self.stop()
        shutil.rmtree(self.folder / "db", ignore_errors=True)
