"""Owns: the frames that workers and hub exchange, and how a client address becomes a key.

Fixed-size frames keep a batch cheap: one ``iter_unpack`` a read, one write a loop iteration. Both sides run the same
release (all are forked from one supervisor), so a version is checked once per connection and never negotiated.

A type whose content is longer states in ``argument`` how many octets follow its frame.
"""

from __future__ import annotations

import socket
from enum import IntEnum
from functools import lru_cache
from struct import Struct
from typing import Final

VERSION: Final = 1

COUNT_MAX: Final = 0xFFFFFF
"""Largest count in SPENT."""

REQUEST: Final = Struct("<BxxxIQ")
"""Worker to hub: type, argument, client key."""

ANSWER: Final = Struct("<BBxxI")
"""Hub to worker: type, verdict, argument."""


class Ask(IntEnum):
    """What a worker says."""

    ANNOUNCE = 1
    """argument: so many sessions of the client are open already; counted without a limit, not answered."""
    HELLO = 2
    """All that was open is announced; answered by WELCOME. argument: ``VERSION``."""
    OPEN = 3
    """May a session of the client open? argument: tag of the answer."""
    CLOSE = 4
    """One session of the client ended; not answered."""
    LOGINS = 5
    """Alone on a connection: from here on it is about logins (``auth.question``). argument: ``VERSION``."""
    SPENT = 16
    """The client spent of a budget; not answered, repeated to the other workers. argument: ``budget << 24 | count``."""


class Tell(IntEnum):
    """What the hub says."""

    WELCOME = 1
    """Counts are complete: ask from now on. argument: ``VERSION``."""
    VERDICT = 2
    """The answer to OPEN. argument: its tag."""
    LOAD = 16
    """argument: so many sessions are open over all workers; told when that changed."""
    KEY_HIGH = 17
    KEY_LOW = 18
    SPENT = 19
    """Three frames in a row: both halves of a key, and what it spent with another worker, as in ``Ask.SPENT``."""


class Verdict(IntEnum):
    """May this session open?"""

    OK = 0
    """Counted; the worker closes it later."""
    BUSY = 1
    """``limits.sessions`` are open."""
    CLIENT_BUSY = 2
    """``limits.sessions_per_client`` of this client are open."""


_IPV4_MAPPED: Final = bytes(10) + b"\xff\xff"


KEYS_CACHED: Final = 4096
"""Addresses whose keys are remembered (half a megabyte): each is needed twice a connection, and parsing takes 0.7 µs."""


@lru_cache(KEYS_CACHED)
def client_key(client: str) -> int:
    """The 64 bits a client is counted by: an IPv4 address, or the /64 of an IPv6 address.

    An IPv6 host owns its /64 and can change the rest at will. IPv4 addresses take the keys of ::/32, which is reserved
    (RFC 4291 section 2.4). Raises ValueError for anything that is not an address.
    """
    try:
        if ":" not in client:
            return int.from_bytes(socket.inet_pton(socket.AF_INET, client), "big")
        packed = socket.inet_pton(socket.AF_INET6, client.partition("%")[0])
    except OSError:
        raise ValueError(f"{client!r} is not an IP address") from None
    if packed.startswith(_IPV4_MAPPED):
        return int.from_bytes(packed[12:], "big")
    return int.from_bytes(packed[:8], "big")
