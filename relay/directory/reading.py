"""Owns: reading whole profiles: which server, which groups, and that one reading never mixes two servers (row D3).

Raises LdapFailure when no server could be read to the end; then nothing of what came counts. Must not build a snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from relay.config.ldap import LdapProfile, LdapServer
from relay.config.schema import Config
from relay.directory.connection import SCOPES, Connection, Steps
from relay.directory.failure import MENDS_ELSEWHERE, LdapFailure, Reason
from relay.directory.harvest import Harvest, Members, dn_key
from relay.directory.lean import Lean
from relay.directory.ledger import Ledger
from relay.directory.presets import Plan, plan
from relay.directory.sources import Ours, Tally
from relay.directory.unique import Unique

PROGRESS_ENTRIES: Final = 1000
"""How often a reading says how far it is."""
GROUPS: Final = 100_000
"""Most groups followed from the chosen ones; groups within groups may form circles, which end by themselves."""

Progress = Callable[[str, int], None]
"""Name of the profile, and how many entries have come."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One profile, wholly read. ``certificate_expires``: seconds since 1970, None in clear."""

    profile: str
    server: str
    entries: int
    pages: int
    addresses: int
    seconds: float
    certificate_expires: float | None
    failed: tuple[str, ...]
    """What was wrong with servers asked before."""


def read_profile(
    config: Config,
    profile: LdapProfile,
    password: str,
    tally: Tally,
    progress: Progress,
    key: bytes,
    names: dict[int, str] | None = None,
) -> tuple[Ledger, Reading]:
    """Every entry of one server, the first that can be read to its end. Raises LdapFailure.

    ``key`` hashes the addresses; ``names`` is filled with them where it is given.
    """
    failures: list[LdapFailure] = []
    for server in profile.targets():
        began = time.monotonic()
        attempt, left_out = Ledger(key, names), Tally()
        try:
            connection = Connection(profile, server, password)
            try:
                harvest = _harvest(config, profile, connection, attempt, left_out, progress, key)
            finally:
                connection.close()
        except LdapFailure as failure:
            failures.append(failure)
            if failure.reason not in MENDS_ELSEWHERE:
                break
            continue
        tally.skipped.update(left_out.skipped)
        expires = connection.certificate.expires if connection.certificate else None
        seconds = time.monotonic() - began
        said = tuple(map(str, failures))
        counted = connection.counted
        return attempt, Reading(
            profile.name, server.url, harvest.entries, counted.pages, harvest.used, seconds, expires, said
        )
    raise LdapFailure(failures[0].reason, "; ".join(map(str, failures)))


@dataclass(frozen=True, slots=True)
class Look:
    """What a first look at a server found, step by step. ``failure`` stands for the step that is not among ``steps``."""

    profile: str
    server: str
    steps: tuple[tuple[str, str], ...]
    failed_step: str = ""
    failure: LdapFailure | None = None


STEPS: Final = ("DNS", "TCP", "TLS", "login", "search")


def look(config: Config, profile: LdapProfile, server: LdapServer, password: str) -> Look:
    """Everything a reading does, up to the first page, with the outcome of each step (row D10). Never raises."""
    steps = Steps()
    try:
        connection = Connection(profile, server, password, steps)
        try:
            tally = Tally()
            ledger, size = Ledger(b""), profile.page_size
            harvest = _harvest(config, profile, connection, ledger, tally, lambda _, __: None, b"", size)
            left_out = "".join(f", {count} × {reason}" for reason, count in tally.skipped.most_common(3))
            said = f"{harvest.entries} entries below {connection.base()} give {harvest.used} addresses{left_out}"
            steps.passed("search", said)
        finally:
            connection.close()
    except LdapFailure as failure:
        done = {name for name, _ in steps.done}
        step = next((name for name in STEPS if name not in done), "search")
        return Look(profile.name, server.url, tuple(steps.done), step, failure)
    return Look(profile.name, server.url, tuple(steps.done))


def _harvest(
    config: Config,
    profile: LdapProfile,
    connection: Connection,
    ledger: Ledger,
    tally: Tally,
    progress: Progress,
    key: bytes,
    most: int = 0,
) -> Harvest:
    """``most``: stop after so many entries, to look and not to take; 0 for all of them."""
    made = plan(profile, config.directory.restriction_attribute)
    ours = Ours.of(config)
    base = connection.base()
    if connection.server.is_global_catalogue:
        _check_partial_set(connection, connection.server, made)
    members = _members(connection, base, made, profile.groups) if profile.groups else None
    restricted = _members(connection, base, made, profile.restriction_groups) if profile.restriction_groups else None
    harvest = Harvest(profile, made, ours, ledger, tally, members, restricted)
    unique = Unique(is_ad=made.is_ad)
    wanted = [*made.attributes, unique.key_attribute, unique.stamp_attribute]
    if members is not None or restricted is not None:
        wanted += [made.user_name, "primarygroupid"] if made.is_ad else [made.user_name]
    take = Lean(harvest, ledger, key, unique).take if harvest.plain and not most else None
    progress(profile.name, 0)
    said = PROGRESS_ENTRIES
    compiled = connection.compiled(made.filter)
    for found in connection.pages(base, SCOPES[profile.scope], compiled, wanted, take):
        if found is not None:
            dn, attributes = found
            harvest.add(dn, attributes)
            ledger.end_row(unique.of(attributes))
        if harvest.entries >= said:
            progress(profile.name, harvest.entries)
            said = harvest.entries + PROGRESS_ENTRIES
        if harvest.entries == most:
            break
    progress(profile.name, harvest.entries)
    if not harvest.entries:
        raise LdapFailure(Reason.EMPTY, f"nothing under {base} fits {made.filter}", connection.server.url)
    if not harvest.used:
        reason, count = next(iter(tally.skipped.most_common(1)), ("", 0))
        because = f" ({count} × {reason})" if count else ""
        raise LdapFailure(
            Reason.EMPTY, f"{harvest.entries} entries give no usable address{because}", connection.server.url
        )
    return harvest


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
