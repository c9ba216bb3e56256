r"""Owns: accounts that stand in a directory: finding the one that a name means, and letting it be checked (rows A3 to A6, A9).

A search as the relay's own account finds exactly one entry, and the password goes to its DN, whatever the client typed: the
directory's own ways to spell an account (case, spaces, SID, ``x\0y``) never reach a bind. Whatever the directory cannot do is
``StoreAway``, which is 454; a refusal is the directory's own word about this password. It must not count guesses, nor know SMTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import unicodedata
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from relay.auth.abilities import Abilities, Ambiguous, Answer, Bind, Entry, StoreAway
from relay.auth.secret import Secret, SecretError, read_secret, verifies
from relay.config.auth import Mechanism, Store
from relay.config.ldap import LdapProfile, LdapServer
from relay.config.schema import Config
from relay.directory import ber, lockout
from relay.directory.failure import NO_LOGON_SERVER, LdapFailure, Reason, ad_meaning, decoded
from relay.directory.link import Link
from relay.directory.lockout import EVERYTHING, Lockout, head_of
from relay.directory.pool import Pool
from relay.directory.presets import plan
from relay.directory.template import PLACES, FilterTemplate, Login, any_of, first_text, name
from relay.mail.address import AddressFault, Mailbox, parse_mailbox, unquoted
from relay.policy.ownership import Account
from relay.telemetry.maillog import note

PASSWORDS: Final = frozenset({Mechanism.PLAIN, Mechanism.LOGIN})
SECRETS_MAX: Final = 8
"""Stored passwords of one entry that are looked at; directories allow several values."""
CHANGED: Final = ("pwdlastset", "pwdchangedtime", "modifytimestamp")
"""What changes with the password; the first that an entry has counts (Active Directory, ppolicy, everything)."""
_DISABLED: Final = 2  # userAccountControl, ADS_UF_ACCOUNTDISABLE
NAME_MAX: Final = 256
"""Longest name of an account, characters; Active Directory's have 20, or 1024 octets as UPN that nobody uses."""
POLICY_S: Final = 3600.0
"""How often the directory is asked when it locks accounts."""

# What a server says about the password, and about nothing else; all other codes are trouble of the directory.
_WRONG: Final = {
    49: "wrong password",
    48: "the directory holds no password that it could check",
    32: "there is no such entry",
    34: "the name is no name there",
    50: "the directory refuses this account",
    19: "the directory refuses this account",
}
_ACCOUNT: Final = re.compile(r"account|password", re.IGNORECASE)
"""A server that is unwilling (53) because of the account says so: inactivated, locked. Else it is unwilling in general."""
_PREFIX: Final = re.compile(r"([A-Za-z][A-Za-z0-9-]*):")
_LIST: Final = re.compile(r"[,;]\s*")
_PLAIN_NAME: Final = re.compile(r"[\w.+'-]+(?: [\w.+'-]+)*(?:@[\w.-]+)?")
"""What fastbind takes: Active Directory knows an account by many more spellings, each of which would have its own budget."""


def abilities(store: Store) -> Abilities:
    """What the configuration says of a store in a directory."""
    if store.check == "attribute":
        able = PASSWORDS | frozenset(store.mechanisms)
        why = f"auth.stores {store.name} does not list it in mechanisms"
    else:
        able = PASSWORDS
        why = f"{store.check}: the directory checks the password itself and has to be shown it"
    return Abilities(able, dict.fromkeys(frozenset(Mechanism) - able, why))


class LdapStore:
    """One store. Its event loop is the hub's."""

    def __init__(self, store: Store, profile: LdapProfile, password: str, config: Config) -> None:
        """Raises LdapFailure when the filter cannot be read."""
        self.store = store
        self.abilities = abilities(store)
        self.domains: Final = tuple(domain.casefold() for domain in store.domains)
        self._profile = profile
        self._ours = frozenset(one for domain in config.domain for one in domain.names)
        preset = plan(profile, "")
        names = tuple(store.user_attributes) or (
            ("sAMAccountName", "userPrincipalName", "mail", "proxyAddresses") if preset.is_ad else ("uid", "mail")
        )
        self._filter = FilterTemplate(_filter(store, names, is_ad=preset.is_ad))
        self._account = (store.account_attribute or names[0]).lower()
        self._addresses = (
            preset.addresses
            if store.address_attributes is None
            else tuple(one.lower() for one in store.address_attributes)
        )
        wanted = [self._account, *self._addresses, "useraccountcontrol", *CHANGED]
        if store.check == "attribute":
            wanted.append(store.password_attribute.lower())
        self._wanted = tuple(dict.fromkeys(wanted))
        self._base = profile.base
        self._is_ad = preset.is_ad
        self.lockout: Lockout | None = None
        """When the directory locks an account, as far as that is known."""
        self._policy_due = 0.0
        self._policy_known = False
        self._reading: asyncio.Task[None] | None = None
        self.salt = hashlib.blake2b(password.encode(), digest_size=32, person=b"salts").digest()
        """Secret, and the same as long as the relay's own password is."""
        self._service = Pool(profile, password, store.connections, self._told, service=True)
        self._guests = Pool(profile, password, store.connections, self._told, service=False)

    def close(self) -> None:
        """Hang up."""
        self._service.close()
        self._guests.close()

    async def find(self, typed: str) -> Entry | None:
        """The account that a name means. Raises Ambiguous, StoreAway."""
        login = self._login(typed)
        if login is None:
            return None
        if self.store.check != "attribute" and self._profile.bind:
            await self._policy()
        if self.store.check == "fastbind":
            return self._unseen(login)
        try:
            found = await self._service.ask(lambda link, until: self._search(link, login, until), self._until())
        except LdapFailure as failure:
            raise StoreAway(f"{self.store.name}: {failure}") from None
        if not found:
            return None
        if len(found) > 1:
            raise Ambiguous(f"the name fits several entries of {self.store.name}")
        return self._entry(login, *found[0])

    # --- names ---------------------------------------------------------------------------------------------------------
    def _login(self, typed: str) -> Login | None:
        """The name with its modifier; None when it has no form that the filter could ask for."""
        store, domains = self.store, self.store.domains
        whole = unicodedata.normalize("NFKC", typed).strip()
        flat, backslash, bare = whole.partition("\\")
        user, at, domain = whole.rpartition("@")
        match store.names:
            case "add-domain":
                if not at and not backslash:
                    whole = f"{whole}@{domains[0]}"
            case "strip-domain":
                if at and self._ours_to_strip(domain):
                    whole = user
                elif backslash and self._ours_to_strip(flat):
                    whole = bare
            case "windows":
                if not at and not backslash:
                    whole = f"{domains[0]}\\{whole}"
            case "as-typed":
                pass
        half = whole.partition("\\")[2] or whole
        user, at, domain = half.rpartition("@")
        login = Login(typed, whole, user if at else half, domain or (domains[0] if domains else ""))
        if not login.user or ("d" in self._filter.places and not login.domain):
            return None
        return login

    def _ours_to_strip(self, domain: str) -> bool:
        return not self.domains or domain.casefold() in self.domains

    # --- search --------------------------------------------------------------------------------------------------------
    async def _search(self, link: Link, login: Login, until: float) -> list[ber.Entry]:
        scope = {"base": 0, "one": 1, "sub": 2}[self._profile.scope]
        base = await self._where(link, until)
        found, result = await link.search(base, scope, self._filter.octets(login), self._wanted, 2, until)
        if result.code and not (result.code == 4 and len(found) > 1):
            raise decoded(result.code, result.diagnostic, link.server.url)
        return found

    async def _where(self, link: Link, until: float) -> str:
        if not self._base:
            self._base = await head_of(link, until)
            if not self._base:
                raise LdapFailure(Reason.BASE, "the server does not say where to search", link.server.url)
        return self._base

    async def _policy(self) -> None:
        """Read when the directory locks accounts: before the first login, and now and then behind the others."""
        now = asyncio.get_running_loop().time()
        if now >= self._policy_due:
            self._policy_due = now + POLICY_S
            self._reading = asyncio.create_task(self._read_policy())
        if not self._policy_known and self._reading is not None:
            await asyncio.shield(self._reading)

    async def _read_policy(self) -> None:
        async def read(link: Link, until: float) -> Lockout | None:
            head = await head_of(link, until)
            return await lockout.read(link, head, until, is_ad=self._is_ad) if head else None

        try:
            found = await self._service.ask(read, self._until())
        except LdapFailure:  # the login that comes next says why
            self._policy_due = 0.0
            return
        self._policy_known = True
        if found is not None and found != self.lockout:
            note("info", "auth_lockout", store=self.store.name, failures=found.failures, window_s=found.window_s)
        elif found is None and self._is_ad and self.lockout is None:
            note("warning", "auth_lockout_unknown", store=self.store.name)
        self.lockout = found or self.lockout

    def _entry(self, login: Login, dn: str, attributes: Mapping[str, list[bytes]]) -> Entry:
        account = self._account_of(login, attributes)
        stamp = next((attributes[one][0] for one in CHANGED if attributes.get(one)), b"")
        barred = "the account is disabled" if _is_disabled(attributes) else ""
        if self.store.check == "attribute":
            secrets = self._secrets(account.name, attributes)
            return Entry(account, secrets, barred=barred or ("" if secrets else "it has no stored password"))
        return Entry(account, (), self._bind_as(dn), dn.encode() + stamp, barred)

    def _account_of(self, login: Login, attributes: Mapping[str, list[bytes]]) -> Account:
        owned: set[Mailbox] = set()
        for attribute in self._addresses:
            for raw in attributes.get(attribute, ()):
                owned |= self._owned(raw)
        name = first_text(attributes, self._account).strip()
        if not name.isprintable() or len(name) > NAME_MAX:  # it goes to logs and headers
            name = ""
        return Account(name or login.user.lower(), frozenset(owned))

    def _owned(self, raw: bytes) -> set[Mailbox]:
        try:
            value = raw.decode().strip()
        except UnicodeDecodeError:
            return set()
        prefix = _PREFIX.match(value)
        if prefix is not None:
            if prefix[1].lower() != "smtp":
                return set()
            value = value[prefix.end() :].strip()
        found = set()
        for one in [value] if prefix is not None else _LIST.split(value):
            mailbox = parse_mailbox(one)
            if not isinstance(mailbox, AddressFault) and mailbox.rpartition("@")[2].lower() in self._ours:
                found.add(Mailbox(unquoted(mailbox).lower()))
        return found

    def _secrets(self, account: str, attributes: Mapping[str, list[bytes]]) -> tuple[Secret, ...]:
        found: list[Secret] = []
        for raw in attributes.get(self.store.password_attribute.lower(), [])[:SECRETS_MAX]:
            try:
                found.append(read_secret(raw.decode()))
            except (SecretError, UnicodeDecodeError) as fault:
                why = str(fault) if isinstance(fault, SecretError) else "it is not UTF-8"
                note("warning", "auth_secret_unusable", store=self.store.name, account=account, cause=why)
        able = frozenset[Mechanism]().union(*map(verifies, found))
        missing = self.abilities.mechanisms - able
        if found and missing:
            said = " ".join(sorted(missing))
            note("warning", "auth_secret_unusable", store=self.store.name, account=account, cause=f"not for {said}")
        return tuple(found)

    # --- binds ---------------------------------------------------------------------------------------------------------
    def _bind_as(self, dn: str) -> Bind:
        async def bind(password: bytes) -> Answer:
            return await self._shown(lambda link, until: _bind(link, dn, password, until))

        return bind

    def _unseen(self, login: Login) -> Entry | None:
        """fastbind: what is known of an account before it has logged in."""
        if _PLAIN_NAME.fullmatch(login.whole.partition("\\")[2] or login.whole) is None or not self._one_spelling(
            login
        ):
            return None
        who = name(self.store.bind_name, login)

        async def bind(password: bytes) -> Answer:
            return await self._shown(lambda link, until: self._bind_and_look(link, login, who, password, until))

        return Entry(Account(login.user, frozenset()), (), bind, who.encode())

    def _one_spelling(self, login: Login) -> bool:
        """Whether the name is written the one way that this store takes: each other one would have a budget of its own."""
        match self.store.names:
            case "add-domain":
                return login.domain.casefold() in self.domains and "\\" not in login.whole
            case "windows":
                return login.whole.casefold() == f"{self.domains[0]}\\{login.user}".casefold()
            case "as-typed":
                return "\\" not in login.whole
            case "strip-domain":
                return True

    async def _bind_and_look(self, link: Link, login: Login, who: str, password: bytes, until: float) -> Answer:
        """fastbind, and then what the entry says: read as the relay where it has an account, else as who logged in."""
        answer = await _bind(link, who, password, until)
        if not answer.right:
            return answer
        try:
            if self._profile.bind:
                found, code = await self._service.ask(lambda other, till: self._own(other, login, who, till), until)
            else:
                found, code = await self._own(link, login, who, until)
        except LdapFailure as failure:  # the password was right: nothing is to be counted
            raise StoreAway(f"{self.store.name}: {failure}") from None
        if len(found) == 1:
            account = self._account_of(login, found[0][1])
            barred = _is_disabled(found[0][1])
            return Answer(not barred, "the account is disabled" if barred else "", account)
        if self.store.filter or len(found) > 1:
            why = (
                "the account lacks the right that the filter asks for" if not found else "the name fits several entries"
            )
            return Answer(right=False, why=why)
        note("warning", "auth_addresses_unseen", store=self.store.name, account=login.user, result=code)
        return Answer(right=True, account=Account(login.user.lower(), frozenset()))

    async def _own(self, link: Link, login: Login, who: str, until: float) -> tuple[list[ber.Entry], int]:
        is_dn = "=" in self.store.bind_name
        base = who if is_dn else await self._where(link, until)
        asked = self._filter.octets(login) if not is_dn or self.store.filter else EVERYTHING
        found, result = await link.search(base, 0 if is_dn else 2, asked, self._wanted, 2, until)
        return found, result.code

    async def _shown(self, question: Callable[[Link, float], Awaitable[Answer]]) -> Answer:
        shown = False

        async def asked(link: Link, until: float) -> Answer:
            nonlocal shown
            shown = True
            return await question(link, until)

        try:
            return await self._guests.give_password(asked, self._until())
        except LdapFailure as failure:
            raise StoreAway(f"{self.store.name}: {failure}", shown=shown) from None

    def _until(self) -> float:
        return asyncio.get_running_loop().time() + self.store.timeout_s

    def _told(self, server: LdapServer, failure: LdapFailure | None) -> None:
        if failure is None:
            note("info", "auth_directory_back", store=self.store.name, server=server.url)
        else:
            note(
                "error",
                "auth_directory_failed",
                store=self.store.name,
                server=server.url,
                reason=failure.reason,
                why=failure.what,
                cure=failure.cure,
            )


async def _bind(link: Link, dn: str, password: bytes, until: float) -> Answer:
    result = await link.bind(dn, password, until)
    if result.code == 0:
        return Answer(right=True)
    meaning = ad_meaning(result.diagnostic)
    about_account = result.code in _WRONG or (result.code == 53 and _ACCOUNT.search(result.diagnostic) is not None)
    if about_account and meaning != NO_LOGON_SERVER:
        return Answer(right=False, why=meaning or _WRONG.get(result.code, "the directory refuses this account"))
    raise decoded(result.code, result.diagnostic, link.server.url)


def _is_disabled(attributes: Mapping[str, list[bytes]]) -> bool:
    control = first_text(attributes, "useraccountcontrol")
    return control.isdecimal() and bool(int(control) & _DISABLED)


def _filter(store: Store, names: tuple[str, ...], *, is_ad: bool) -> str:
    if {at[1] for at in PLACES.finditer(store.filter)} - {"%"}:
        return store.filter
    wanted = [any_of(names)]
    if store.filter:
        wanted.insert(0, store.filter)
    elif is_ad:
        wanted.insert(0, "(objectClass=user)")
    return wanted[0] if len(wanted) == 1 else f"(&{''.join(wanted)})"
