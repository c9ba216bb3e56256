"""Owns: WHAT may be inside a header (row F10, RFC 5321 §6.3). Pure: header octets in, header octets out.

The header is in wire form: CR LF lines up to, not including, the empty line.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from relay.config.schema import Config, Mode

FIREWALL_RULE: Final = "content.header_firewall"
HOPS_RULE: Final = "limits.hops"


class HeaderResult(NamedTuple):
    """``header`` as it may go on; ``removed`` names the header fields the firewall met, lower case, in order."""

    header: bytes
    removed: tuple[str, ...]
    hops: int


class HeaderRules:
    """Which header fields are taken from mail of untrusted clients, compiled once per configuration."""

    __slots__ = ("_field", "_stems", "hops", "mode")

    def __init__(self, config: Config) -> None:
        self.mode = config.content.header_firewall
        self.hops = config.limits.hops
        names = [name.lower().encode("ascii") for name in config.content.remove_headers]
        # RFC 8601 §5: results that claim to be ours. The authserv-id may be folded or follow a comment.
        own = re.escape(config.server.hostname.lower().encode("ascii"))
        results = rb"authentication-results(?=[ \t]*:(?:[ \t\r\n]|\([^()]*\))*\"?" + own + rb"(?![a-z0-9.-]))"
        patterns = [re.escape(name[:-1]) + rb"[!-9;-~]*" if name.endswith(b"*") else re.escape(name) for name in names]
        self._stems = (*(b"\n" + name.rstrip(b"*") for name in names), b"\nauthentication-results")
        self._field = re.compile(
            rb"(?<=\n)(" + b"|".join([*patterns, results]) + rb")[ \t]*:[^\n]*\n(?:[ \t][^\n]*\n)*", re.IGNORECASE
        )

    def apply(self, header: bytes, trusted: bool) -> HeaderResult:  # noqa: FBT001 - a fact, not a switch
        """Count the Received lines and, unless the client is trusted, take out what it must not say."""
        lower = b"\n" + header.lower()
        hops = lower.count(b"\nreceived:")
        if trusted or self.mode is Mode.OFF:
            return HeaderResult(header, (), hops)
        for stem in self._stems:
            if stem in lower:
                break
        else:
            return HeaderResult(header, (), hops)
        removed = tuple(m[1].decode("ascii").lower() for m in self._field.finditer(b"\n" + header))
        if not removed or self.mode is Mode.LOG:
            return HeaderResult(header, removed, hops)
        return HeaderResult(self._field.sub(b"", b"\n" + header)[1:], removed, hops)
