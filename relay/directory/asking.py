"""Owns: what one profile asks of one connection: its filter and attributes, who is in its groups, and gathering entries.

Raises LdapFailure. Must not fail over, nor decide whether to ask for everything or for what changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Final

from relay.config.ldap import LdapProfile, LdapServer
from relay.config.schema import Config
from relay.directory.connection import SCOPES, Connection
from relay.directory.failure import LdapFailure, Reason
from relay.directory.harvest import Harvest, Members, dn_key
from relay.directory.lean import Lean
from relay.directory.ledger import Ledger
from relay.directory.presets import Plan, plan
from relay.directory.primary import Gathered
from relay.directory.sources import Ours, Tally
from relay.directory.unique import Unique

PROGRESS_ENTRIES: Final = 1000
"""How often a reading says how far it is."""
GROUPS: Final = 100_000
"""Most groups followed from the chosen ones; groups within groups may form circles, which end by themselves."""
_DIGEST_OCTETS: Final = 16

Progress = Callable[[str, int], None]
"""Name of the profile, and how many entries have come."""


class Job:
    """A profile on a connection, ready to gather into ``ledger``. ``members`` is a digest of who is in the chosen groups."""

    def __init__(
        self,
        config: Config,
        profile: LdapProfile,
        connection: Connection,
        ledger: Ledger,
        tally: Tally,
        progress: Progress,
        key: bytes,
    ) -> None:
        """Reads the groups. Raises LdapFailure."""
        self.profile = profile
        self.connection = connection
        self.ledger = ledger
        self.plan = made = plan(profile, config.directory.restriction_attribute)
        self.base = connection.base()
        self.scope = SCOPES[profile.scope]
        self._progress = progress
        self._tally = tally
        if connection.server.is_global_catalogue:
            _check_partial_set(connection, connection.server, made)
        members = _members(connection, self.base, made, profile.groups) if profile.groups else None
        restricted = (
            _members(connection, self.base, made, profile.restriction_groups) if profile.restriction_groups else None
        )
        self.members = _digest(members, restricted)
        if config.senders.rewrite != "off":
            ledger.primaries = Gathered(ledger.hash_of)
        self.harvest = Harvest(
            profile, made, Ours.of(config), ledger, tally, members, restricted, primaries=ledger.primaries
        )
        self.unique = Unique(is_ad=made.is_ad)
        self._wanted = [*made.attributes, self.unique.key_attribute, self.unique.stamp_attribute]
        if members is not None or restricted is not None:
            self._wanted += [made.user_name, "primarygroupid"] if made.is_ad else [made.user_name]
        self._take = Lean(self.harvest, ledger, key, self.unique).take if self.harvest.plain else None

    def gather(self, also: str = "", most: int = 0) -> None:
        """Entries into the ledger: those of the filter that fit ``also``, and no more than ``most``, 0 for all."""
        harvest, name = self.harvest, self.profile.name
        compiled = self.connection.compiled(f"(&{self.plan.filter}{also})" if also else self.plan.filter)
        take = None if most else self._take
        self._progress(name, harvest.entries)
        said = harvest.entries + PROGRESS_ENTRIES
        for found in self.connection.pages(self.base, self.scope, compiled, self._wanted, take):
            if found is not None:
                dn, attributes = found
                harvest.add(dn, attributes)
                self.ledger.end_row(self.unique.of(attributes))
            if harvest.entries >= said:
                self._progress(name, harvest.entries)
                said = harvest.entries + PROGRESS_ENTRIES
            if harvest.entries == most:
                break
        self._progress(name, harvest.entries)

    def prove(self) -> None:
        """Raises LdapFailure when nothing came, or nothing of use."""
        harvest, url = self.harvest, self.connection.server.url
        if not harvest.entries:
            raise LdapFailure(Reason.EMPTY, f"nothing under {self.base} fits {self.plan.filter}", url)
        if not harvest.used:
            reason, count = next(iter(self._tally.skipped.most_common(1)), ("", 0))
            because = f" ({count} × {reason})" if count else ""
            raise LdapFailure(Reason.EMPTY, f"{harvest.entries} entries give no usable address{because}", url)

    @property
    def newest(self) -> str:
        """The greatest stamp that came, where stamps are times."""
        return self.unique.newest.decode("ascii", "replace")


def _digest(*groups: Members | None) -> str:
    state = blake2b(digest_size=_DIGEST_OCTETS)

    def note(words: Iterable[str]) -> None:
        for word in sorted(words):
            state.update(word.encode("utf-8", "replace") + b"\0")
        state.update(b"\0")

    for members in groups:
        if members is not None:
            note(members.names)
            note(members.users)
            note(members.primary)
    return state.hexdigest()


def _members(connection: Connection, base: str, made: Plan, chosen: list[str]) -> Members:
    """Everyone in the chosen groups and in groups within them (row R10). Raises LdapFailure when one is not there."""
    every: dict[str, str] = {}
    for found in connection.pages(base, SCOPES["sub"], connection.compiled(made.groups), ["1.1"]):
        if found is not None:
            every[dn_key(found[0])] = found[0]
    names: set[str] = set()
    users: set[str] = set()
    primary: set[str] = set()
    waiting = list(chosen)
    seen = {dn_key(dn) for dn in chosen}
    asked = [*made.membership, "objectsid"] if made.is_ad else list(made.membership)
    while waiting:
        dn = waiting.pop()
        read = connection.read(dn, asked)
        if read is None:
            raise LdapFailure(Reason.BASE, f"there is no group {dn}, or it may not be read", connection.server.url)
        group = connection.whole(dn, read)
        if sid := group.get("objectsid"):
            primary.add(str(int.from_bytes(sid[0][-4:], "little")))  # the RID, what primaryGroupID holds
        users.update(value.decode("utf-8", "replace").lower() for value in group.get("memberuid", ()))
        for name in ("member", "uniquemember"):
            for raw in group.get(name, ()):
                member = raw.decode("utf-8", "replace")
                key = dn_key(member)
                names.add(key)
                if key in every and key not in seen and len(seen) < GROUPS:
                    seen.add(key)
                    waiting.append(every[key])
    return Members(frozenset(names), frozenset(users), frozenset(primary))


def _check_partial_set(connection: Connection, server: LdapServer, made: Plan) -> None:
    """A global catalogue has not every attribute: one that is absent there would read as "not restricted" (row D5)."""
    schema = connection.root.get("schemanamingcontext")
    if not schema:
        return
    asked = "".join(f"(lDAPDisplayName={name})" for name in made.attributes)
    compiled = connection.compiled(f"(&(objectClass=attributeSchema)(isMemberOfPartialAttributeSet=TRUE)(|{asked}))")
    found = {
        value.decode("ascii", "replace").lower()
        for one in connection.pages(schema[0].decode(), SCOPES["sub"], compiled, ["lDAPDisplayName"])
        for value in (one[1].get("ldapdisplayname", ()) if one is not None else ())
    }
    if missing := [name for name in made.attributes if name not in found]:
        raise LdapFailure(
            Reason.RIGHTS,
            f"the global catalogue has no {', '.join(missing)}: ask port 636 or 389 of each domain, "
            "or add them to the partial attribute set",
            server.url,
        )
