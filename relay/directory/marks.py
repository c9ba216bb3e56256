"""Owns: where a directory stood when it was read, and whether what changed since can be told from there (row R8).

Active Directory: uSNChanged counts the changes of one domain controller and one life of its database (invocationId), so
increments follow only there. OpenLDAP: contextCSN says for each server of a replicated directory up to which change this one
has come; where it is not kept, the newest entryCSN has to do. Must not read entries.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from relay.directory.connection import Connection
from relay.directory.harvest import dn_key

MARGIN_S: Final = 60
"""Without contextCSN: how much earlier than the newest change seen a change may be stamped that is seen later."""


@dataclass(frozen=True, slots=True)
class Mark:
    """``why`` says why nothing can follow from it, and is empty when something can."""

    server: str = ""
    invocation: str = ""
    usn: int = 0
    csns: dict[str, str] = field(default_factory=dict)
    """Server number → its last change that has come here."""
    newest: str = ""
    """Greatest entryCSN that was read."""
    members: str = ""
    """A digest of who is in the chosen groups."""
    why: str = ""

    def plain(self) -> dict[str, Any]:
        """For JSON; ``Mark(**plain)`` is the same again."""
        return asdict(self)


def stands(connection: Connection, base: str, members: str, *, is_ad: bool) -> Mark:
    """Where the directory stands now; asked before anything is read from it. Raises LdapFailure."""
    return _active_directory(connection, members) if is_ad else _openldap(connection, base, members)


def _active_directory(connection: Connection, members: str) -> Mark:
    def said(name: str) -> str:
        values = connection.root.get(name.lower())
        return values[0].decode("utf-8", "replace") if values else ""

    service, usn = said("dsServiceName"), said("highestCommittedUSN")
    if not service or not usn.isdecimal():
        return Mark(why="the server does not say where it stands (dsServiceName, highestCommittedUSN)")
    found = connection.read(service, ["invocationId"])
    invocation = (found or {}).get("invocationid")
    if not invocation:
        return Mark(why=f"the account may not read invocationId of {service}")
    return Mark(f"{service} {said('dnsHostName')}", invocation[0].hex(), int(usn), members=members)


def _openldap(connection: Connection, base: str, members: str) -> Mark:
    contexts = [one.decode("utf-8", "replace") for one in connection.root.get("namingcontexts", ())]
    below = dn_key(base)
    over = [one for one in contexts if below == dn_key(one) or below.endswith("," + dn_key(one))]
    csns: dict[str, str] = {}
    if over:
        found = connection.read(max(over, key=len), ["contextCSN"])
        for raw in (found or {}).get("contextcsn", ()):
            csn = raw.decode("ascii", "replace")
            parts = csn.split("#")
            if len(parts) == 4:
                csns[parts[2]] = csn
    return Mark(connection.server.url, csns=csns, members=members)


def breaks(old: Mark, new: Mark) -> str:
    """Why what changed between the two cannot be told; empty when it can."""
    if new.why:
        return new.why
    if old.server != new.server:
        return f"another server: {new.server} after {old.server}"
    if old.invocation != new.invocation:
        return "the server's database is another one (invocationId)"
    if new.usn < old.usn or any(new.csns[sid] < csn for sid, csn in old.csns.items() if sid in new.csns):
        return "the server stands where it stood before: it was restored"
    if old.csns.keys() != new.csns.keys():
        return "other servers take part in the directory (contextCSN)"
    if not (old.usn or old.csns or old.newest):
        return "entries have no entryCSN that may be read"
    if old.members != new.members:
        return "members of the chosen groups changed"
    return ""


def since(old: Mark, new: Mark) -> str:
    """The filter of what changed between them; empty when nothing did."""
    if new.usn:
        return f"(uSNChanged>={old.usn + 1})" if new.usn != old.usn else ""
    if new.csns:
        moved = [csn for sid, csn in old.csns.items() if new.csns[sid] != csn]
        return f"(entryCSN>={min(moved)})" if moved else ""
    at = dt.datetime.strptime(old.newest[:14], "%Y%m%d%H%M%S").replace(tzinfo=dt.UTC) - dt.timedelta(seconds=MARGIN_S)
    return f"(entryCSN>={at:%Y%m%d%H%M%S}.000000Z#000000#000#000000)"
