"""Owns: reading profiles: which server, all entries or what changed, and that one reading never mixes two servers (row D3).

Raises LdapFailure when no server could be read to the end; then nothing of what came counts. Must not build a snapshot.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

from relay.config.ldap import LdapProfile, LdapServer
from relay.config.schema import Config
from relay.directory.asking import Job, Progress
from relay.directory.connection import Connection, Steps
from relay.directory.expiry import password_expires
from relay.directory.failure import MENDS_ELSEWHERE, LdapFailure
from relay.directory.incremental import Full, update
from relay.directory.kept import Kept
from relay.directory.ledger import Ledger
from relay.directory.marks import Mark, breaks, stands
from relay.directory.servers import Memory, servers_of
from relay.directory.sources import Tally

FULL: Final = "full"
INCREMENTAL: Final = "incremental"


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
    kind: str = "full"
    """``full`` or ``incremental``."""
    changed: int = 0
    """Entries that came or went."""
    why: str = ""
    """Why it was a full one; empty when it was not."""
    password_expires: float | None = None
    """When the password of the account that read ends, seconds since 1970; None: never, or not told."""


@dataclass(frozen=True, slots=True)
class Came:
    """A profile's ledger as it is now, how it was read, and where the directory stood before."""

    ledger: Ledger
    reading: Reading
    mark: Mark
    skipped: dict[str, int]
    """What was left out at the last full one, by reason."""


def read_profile(
    config: Config,
    profile: LdapProfile,
    password: str,
    tally: Tally,
    progress: Progress,
    key: bytes,
    names: dict[int, str] | None = None,
    kept: Kept | str = "asked for",
    memory: Memory | None = None,
    last: str = "",
) -> Came:
    """One server's entries, of the first that can be read to its end. Raises LdapFailure.

    ``key`` hashes the addresses; ``names`` is filled with them where it is given. ``kept``: from where to go on, which is
    changed then; or why everything has to be read. ``memory``: of servers that failed, kept up to date; ``last``: the URL of the
    server that was read last.
    """
    memory = memory or Memory({}, time.time())
    failures: list[LdapFailure] = []
    for server in memory.in_turn(servers_of(config, profile, last)):
        began = time.monotonic()
        left_out = Tally()
        try:
            connection = Connection(profile, server, password)
            try:
                one = _One(config, profile, connection, left_out, progress, key, names)
                ledger, mark, changed, why = one.read(kept)
                ends = password_expires(connection, profile)
            finally:
                connection.close()
        except LdapFailure as failure:
            failures.append(failure)
            if failure.reason not in MENDS_ELSEWHERE:
                break
            memory.note(server, failure)
            continue
        memory.note(server, None)
        skipped = kept.skipped if not why and not isinstance(kept, str) else dict(left_out.skipped)
        tally.skipped.update(skipped)
        expires = connection.certificate.expires if connection.certificate else None
        return Came(ledger, Reading(
            profile.name, server.url, len(ledger.keys), connection.counted.pages, len(ledger.hashes),
            time.monotonic() - began, expires, tuple(map(str, failures)), FULL if why else INCREMENTAL, changed, why, ends,
        ), mark, skipped)  # fmt: skip
    raise LdapFailure(failures[0].reason, "; ".join(map(str, failures)))


@dataclass(frozen=True, slots=True)
class _One:
    """One server on its way into a ledger."""

    config: Config
    profile: LdapProfile
    connection: Connection
    tally: Tally
    progress: Progress
    key: bytes
    names: dict[int, str] | None

    def read(self, kept: Kept | str) -> tuple[Ledger, Mark, int, str]:
        """The ledger, where it stands, how many entries came or went, and why all of them were read: empty when not."""
        job = self._job()
        mark = stands(self.connection, job.base, job.members, is_ad=job.plan.is_ad)
        why = kept if isinstance(kept, str) else breaks(kept.mark, mark)
        if not isinstance(kept, str) and not why:
            try:
                changed = update(job, kept.ledger, kept.mark, mark)
                return kept.ledger, replace(mark, newest=max(kept.mark.newest, job.newest)), changed, ""
            except Full as reason:
                why = str(reason)
                self.tally.skipped.clear()
                job = self._job()
        job.gather()
        job.prove()
        ledger = job.ledger
        mark = replace(mark, newest=job.newest)
        if not mark.why and (job.unique.missing or len(set(ledger.keys)) != len(ledger.keys)):
            mark = Mark(
                why=f"{job.unique.key_attribute} and {job.unique.stamp_attribute} may not be read of every entry"
            )
        return ledger, mark, len(ledger.keys), mark.why or why

    def _job(self) -> Job:
        ledger = Ledger(self.key, self.names)
        return Job(self.config, self.profile, self.connection, ledger, self.tally, self.progress, self.key)


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
            job = Job(config, profile, connection, ledger, tally, lambda _, __: None, b"")
            job.gather(most=size)
            job.prove()
            harvest = job.harvest
            left_out = "".join(f", {count} × {reason}" for reason, count in tally.skipped.most_common(3))
            said = f"{harvest.entries} entries below {connection.base()} give {harvest.used} addresses{left_out}"
            ends = password_expires(connection, profile)
            if ends is not None:
                said += f"; the password of {profile.bind} ends in {(ends - time.time()) / 86400:.0f} days"
            steps.passed("search", said)
        finally:
            connection.close()
    except LdapFailure as failure:
        done = {name for name, _ in steps.done}
        step = next((name for name in STEPS if name not in done), "search")
        return Look(profile.name, server.url, tuple(steps.done), step, failure)
    return Look(profile.name, server.url, tuple(steps.done))
