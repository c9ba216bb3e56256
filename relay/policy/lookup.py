"""Owns: what the DNS said about a name, as a value. Pure; ``net.dns`` asks.

Unknown is not "no": SERVFAIL, time-outs, lame and broken answers are ``UNKNOWN`` and never the reason for a 5xx.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

CHAIN: Final = 8
"""CNAMEs followed from one name to its records; what is longer is a loop or a mistake."""


class Found(Enum):
    """The kinds of answers."""

    RECORDS = "records"
    NODATA = "no such records"
    """The name exists, with other records only."""
    NXDOMAIN = "no such name"
    UNKNOWN = "unknown"
    """No usable answer; ``why`` says what came instead."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """A or AAAA records. ``aliases``: the CNAMEs on the way, in order; ``ttl`` in seconds."""

    found: Found
    records: tuple[str, ...] = ()
    ttl: float = 0.0
    aliases: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class MailExchangers:
    """MX records as (preference, host in lower case without final dot; "" for the root)."""

    found: Found
    records: tuple[tuple[int, str], ...] = ()
    ttl: float = 0.0
    aliases: tuple[str, ...] = ()
    why: str = ""


Lookup = Addresses | MailExchangers
