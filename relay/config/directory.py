"""Owns: the shape of ``[directory]``: where valid recipients and restricted senders come from, and what is said over them.

Plain values only, as in ``config.schema``.
"""

from __future__ import annotations

import datetime as dt
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from relay.config.destination import Host, parse_next_hop
from relay.config.invalid import Invalid
from relay.config.ldap import LdapProfile
from relay.config.push import Push
from relay.config.section import DAY_S, MANY, REFUSAL_OCTETS, TABLES, Attribute, FilePath, Section
from relay.mail.address import AddressFault, is_domain, parse_mailbox
from relay.mail.ruling import RULING_HINT, parse_ruling


def address_or_domain(value: str) -> str:
    """In lower case, a domain with @ in front. Raises Invalid."""
    if not is_domain(value.removeprefix("@")) and (isinstance(parse_mailbox(value), AddressFault) or "@" not in value):
        raise Invalid(
            f'"{value}" is neither an address nor a domain',
            "write user@example.com, or @example.com for all of a domain",
        )
    return (value if "@" in value else f"@{value}").lower()


def _action(value: str) -> str:
    if parse_ruling(value) is None or not value.isascii() or not value.isprintable() or len(value) > REFUSAL_OCTETS:
        raise Invalid(f'"{value[:REFUSAL_OCTETS]}" is no action', RULING_HINT)
    return value


def day(value: object) -> object:
    """A date, or its text as in JSON. Raises Invalid."""
    if isinstance(value, str):
        with suppress(ValueError):
            return dt.date.fromisoformat(value)
    elif isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return value
    raise Invalid(f'"{value}" is not a day', "write year, month and day: 2027-01-31")


def _own_host(value: str) -> str:
    target = parse_next_hop(value)
    if not isinstance(target, tuple) or len(target) != 1 or not isinstance(target[0], Host):
        raise Invalid(f'"{value}" is not one host', "write smtp:[mail1.example.com]:25")
    return value


class Source(Section):
    """One input of the snapshot."""

    type: Annotated[Literal["list", "map", "aliases", "ldif", "restricted", "overrides"], Field(examples=["list"])]
    """list: a valid address a line. map: a Postfix map, ADDRESS OK or ADDRESS 550 TEXT a line. aliases: ALIAS:
    SMTP:ADDRESS a line. ldif: entries with mail and proxyAddresses. restricted: ADDRESS [TEXT] a line. overrides: as map,
    over all other sources."""
    path: Annotated[FilePath, Field(examples=["recipients.txt"])]
    """The file."""


class Override(Section):
    """What is said of an address or a whole domain, whatever the directory says. In force with a reload."""

    address: Annotated[str, AfterValidator(address_or_domain), Field(examples=["user@example.com"])]
    """user@example.com, or @example.com for every address of a domain."""
    action: Annotated[str, AfterValidator(_action), Field(examples=["550 5.1.1 Has left the company"])]
    """OK takes the mail. 550 5.1.1 TEXT and the like (450 to 452, 550 to 554) refuse it with your own words."""
    comment: Annotated[str, Field(max_length=REFUSAL_OCTETS)] = ""
    """For people: why, who, which ticket. Shown by relay recipient and relay check."""
    expires: Annotated[dt.date, BeforeValidator(day)] | None = None
    """The last day it applies (UTC), e.g. 2027-01-31. relay check warns two weeks before."""


class Directory(Section):
    """Where valid recipients and restricted senders come from."""

    sources: Annotated[list[Source], Field(max_length=100)] = []
    """Inputs of ``relay directory build``."""
    overrides: Annotated[list[Override], Field(max_length=TABLES)] = []
    """Said over the sources; the first one that fits an address counts, those of an address before those of a domain."""
    ldap: Annotated[list[LdapProfile], Field(max_length=32)] = []
    """Directories to read, on a schedule and by ``relay directory sync``."""
    push: Annotated[list[Push], Field(max_length=8)] = []
    """Folders into which the inside drops signed snapshots, for a host that has no way to the directory."""
    sync_s: Annotated[float, Field(ge=1, le=DAY_S)] = 900.0
    """Time between two readings of the directories, seconds; varies by a tenth, so that relays do not ask in step."""
    full_every_s: Annotated[float, Field(ge=0, le=30 * DAY_S)] = DAY_S / 4
    """Between two readings of everything, seconds; those between them read what changed, where the server lets that be told.
    0: everything each time."""
    sync_timeout_s: Annotated[float, Field(ge=1, le=DAY_S)] = 600.0
    """A reading that takes longer is broken off, seconds."""
    max_age_s: Annotated[float, Field(ge=1, le=30 * DAY_S)] = DAY_S
    """Older than this, a snapshot read from a directory is stale, seconds."""
    stale: Literal["defer", "serve"] = "defer"
    """What a stale snapshot says of an unknown recipient. defer: 451 4.3.0. serve: 550 5.1.1, as before."""
    shrink: Annotated[float, Field(ge=0, le=1)] = 0.2
    """A reading that would remove more than this share of the addresses, of a domain's, or of the restricted senders is
    refused until ``relay directory accept``. 1 switches it off."""
    shrink_floor: Annotated[int, Field(ge=0, le=MANY)] = 10
    """That many may go in any case: in small directories a share says little."""
    canaries: Annotated[list[str], Field(max_length=100)] = []
    """Addresses that must be among the recipients, or the reading is refused."""
    restricted_canaries: Annotated[list[str], Field(max_length=100)] = []
    """Addresses that must be among the restricted senders, or the reading is refused."""
    history: Annotated[int, Field(ge=1, le=100)] = 5
    """Generations kept for ``relay directory rollback``."""
    names_max_age_s: Annotated[float, Field(ge=0, le=366 * DAY_S)] = 0.0
    """How long the addresses of replaced generations are kept by name for ``relay directory diff``, seconds. 0: no names are
    kept, the disk holds hashes alone. They are plain text, for root and ``process.hub_user``."""
    snapshot: FilePath | None = None
    """The snapshot file; default: SPOOL/directory/snapshot."""
    key_file: FilePath | None = None
    """32 octets that key the address hashes; default: SPOOL/directory/key, made at the first build."""
    restriction_attribute: Attribute = "smtpdSenderRestrictions"
    """LDIF and LDAP attribute that restricts a sender when its value is TRUE; any other text but FALSE is the reply's text."""

    next_hops: Annotated[
        list[Annotated[str, AfterValidator(_own_host)]],
        Field(max_length=100, examples=[["smtp:[mail1.example.com]:25", "smtp:[mail2.example.com]:25"]]),
    ] = []
    """Hosts that a directory's next_hop_attribute may send the mail of single recipients to. Any other value is counted, and
    the ordinary route serves."""

    @property
    def readings(self) -> list[LdapProfile]:
        """The directories that are read for the snapshot; the others serve logins alone."""
        return [profile for profile in self.ldap if profile.recipients]

    @property
    def scheduled(self) -> bool:
        """Whether the hub makes snapshots, from directories or from what is pushed; else only commands do."""
        return bool(self.push or self.readings)

    @property
    def scheduled_names(self) -> list[str]:
        """The names of all of these."""
        return [*(profile.name for profile in self.readings), *(source.name for source in self.push)]
