"""Owns: WHAT may be inside a header (row F10, RFC 5321 §6.3). Pure: header octets in, header octets out.

The header is in wire form: CR LF lines up to, not including, the empty line.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from relay.config.schema import Config, Mode

FIREWALL_RULE: Final = "content.header_firewall"
HOPS_RULE: Final = "limits.hops"
OWN_HOPS: Final = 10
"""Trace headers of this relay's own name that are a loop, long before ``limits.hops``: in by the relay, out by it, and the
same once more for each list or forwarder that sends it back is the most that honest mail does.
"""

_RESULTS: Final = b"authentication-results"
_RECEIVED: Final = re.compile(rb"\nreceived:[^\n]*(?:\n[ \t][^\n]*)*")
_RECEIVED_NAME: Final = b"received"
_FOLD: Final = re.compile(rb"\r?\n\.?(?=[ \t])")
_QUOTED: Final = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_PAIR: Final = re.compile(rb"\\(.)", re.DOTALL)
_TOKEN: Final = re.compile(rb'[^\x00- ()<>@,;:\\"/\[\]?=\x7f-\xff]+')  # RFC 2045 §5.1


class HeaderResult(NamedTuple):
    """``header`` as it may go on; ``removed`` names the header fields the firewall met, lower case, in order."""

    header: bytes
    removed: tuple[str, ...]
    hops: int


class HeaderRules:
    """Which header fields are taken from mail of untrusted clients, compiled once per configuration.

    The wire form counts: a dot that begins a line is taken off by whoever reads the message (RFC 5321 §4.5.2), so
    ``.X-Name:`` is the field X-Name, and ``. text`` continues a field.
    """

    __slots__ = ("_by_us", "_field", "_own", "_stems", "hops", "mode", "outgoing")

    def __init__(self, config: Config, fields: tuple[str, ...] | None = None) -> None:
        """``fields``: other names than those that mail from outside must not have."""
        content = config.content
        self.mode = content.header_firewall
        self.hops = config.limits.hops
        self._by_us = b" by " + config.server.hostname.lower().encode("ascii") + b" "
        self._own = config.server.hostname.lower().encode("ascii")
        leaving = (
            *(content.remove_headers if content.outbound else ()),
            *(["Received"] if content.hide_received else ()),
        )
        self.outgoing: HeaderRules | None = HeaderRules(config, leaving) if leaving and fields is None else None
        """What is taken from mail of our own that leaves; None when it stays as it is."""
        taken = (*content.remove_headers, "Authentication-Results") if fields is None else fields
        names = [name.lower().encode("ascii") for name in taken]
        # Behind a prefix anything up to the colon: who puts other characters there means the same field.
        patterns = [re.escape(name[:-1]) + rb"[^:\r\n]*" if name.endswith(b"*") else re.escape(name) for name in names]
        self._stems = tuple(b"\n" + name.rstrip(b"*") for name in names)
        self._field = re.compile(
            rb"(?<=\n)\.?(" + b"|".join(patterns) + rb")[ \t]*:([^\n]*\n(?:\.?[ \t][^\n]*\n)*)", re.IGNORECASE
        )

    def apply(self, header: bytes, trusted: bool) -> HeaderResult:  # noqa: FBT001 - a fact, not a switch
        """Count the Received lines and, unless the client is trusted, take out what it must not say."""
        lower = b"\n" + header.lower()
        if b"\n." in lower:
            lower = lower.replace(b"\n.", b"\n")
        hops = lower.count(b"\nreceived:")
        if hops >= OWN_HOPS and self._passes(lower) >= OWN_HOPS:
            hops = max(hops, self.hops)
        if trusted or self.mode is Mode.OFF:
            return HeaderResult(header, (), hops)
        for stem in self._stems:
            if stem in lower:
                break
        else:
            return HeaderResult(header, (), hops)
        removed: list[str] = []

        def judge(field: re.Match[bytes]) -> bytes:
            name = field[1].rstrip(b" \t").lower()
            if name == _RESULTS and not self._claims_to_be_ours(field[2]):
                return field[0]
            if name == _RECEIVED_NAME and self._is_our_trace(field[2]):
                return field[0]
            removed.append(name.decode("ascii", "replace"))
            return b""

        rest = self._field.sub(judge, b"\n" + header)[1:]
        kept = header if not removed or self.mode is Mode.LOG else rest
        return HeaderResult(kept, tuple(removed), hops)

    def _passes(self, lower: bytes) -> int:
        """How often a header, in lower case, says that the message passed this relay."""
        return sum(self._by_us in b" ".join(field.split()) for field in _RECEIVED.findall(lower))

    def _is_our_trace(self, value: bytes) -> bool:
        """Our own Received lines stay, whatever is hidden: without them nobody would notice a loop (RFC 5321 §6.3)."""
        return b" by " + self._own + b" " in b" ".join(_FOLD.sub(b"", value).lower().split()) + b" "

    def _claims_to_be_ours(self, value: bytes) -> bool:
        """RFC 8601 §5: results under our own authserv-id. What cannot be read but holds our name is taken for ours."""
        value = _FOLD.sub(b"", value).lower()
        identity = authserv_id(value)
        return identity == self._own if identity else self._own in value


def authserv_id(value: bytes) -> bytes:
    """The authserv-id that opens an unfolded Authentication-Results value (RFC 8601 §2.2); empty when none can be read.

    Comments before it may be nested; it is a token or a quoted string, with quoted pairs in either.
    """
    position, depth = 0, 0
    while position < len(value):
        octet = value[position : position + 1]
        if octet == b"(":
            depth += 1
        elif octet == b")" and depth:
            depth -= 1
        elif octet == b"\\" and depth:
            position += 1
        elif not depth and octet not in b" \t\r\n":
            break
        position += 1
    quoted = _QUOTED.match(value, position)
    if quoted is not None:
        return _PAIR.sub(rb"\1", quoted[1]).strip(b" \t.")
    token = _TOKEN.match(value, position)
    return token[0].rstrip(b".") if token is not None else b""
