"""Owns: how one next hop is spoken to: TLS from the start or by STARTTLS, which certificate is good, who the relay is there.

From ``[delivery]`` and the ``[[next_hop]]`` table that fits. Must not open connections.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

from relay.config import schema
from relay.config.schema import Config
from relay.control import HopSecret
from relay.net.tls import client_context
from relay.outbound.login import Login
from relay.policy.route import NextHop

NO_SECRETS: Mapping[str, HopSecret] = {}


@dataclass(frozen=True, slots=True)
class Peer:
    """What a connection has to be like. ``context`` None: no TLS."""

    context: ssl.SSLContext | None = field(repr=False)
    required: bool
    implicit: bool = False
    pins: frozenset[str] = frozenset()
    login: Login | None = None

    def knows(self, certificate: bytes | None) -> bool:
        """Whether the certificate (DER) is one of the pinned ones; without pins every one is."""
        return not self.pins or (certificate is not None and hashlib.sha256(certificate).hexdigest() in self.pins)


def settings_of(hop: NextHop, config: Config) -> schema.NextHop | None:
    """The table of a next hop: the one with its port before one without."""
    fitting = [
        entry for entry in config.next_hop if entry.host.lower() == hop.host.lower() and entry.port in {0, hop.port}
    ]
    return max(fitting, key=lambda entry: entry.port, default=None)


def peer_of(hop: NextHop, config: Config, secrets: Mapping[str, HopSecret]) -> Peer:
    """How to speak to ``hop``. Raises TlsError when its certificates cannot be used."""
    entry = settings_of(hop, config)
    policy = (entry.tls if entry is not None else "") or config.delivery.tls
    if entry is None:
        return Peer(client_context(policy), policy == "verified")
    secret = secrets.get(entry.own_key, HopSecret())
    context = client_context(policy, secret.authorities, secret.certificate, secret.key)
    login = None
    if entry.user:
        login = Login(entry.user, secret.password, tuple(entry.mechanisms))
    required = entry.implicit or policy in {"required", "verified", "pinned"}
    return Peer(context, required, entry.implicit, frozenset(entry.pins) if policy == "pinned" else frozenset(), login)


def check_peers(config: Config, secrets: Mapping[str, HopSecret]) -> None:
    """Raises TlsError when the certificates of some ``[[next_hop]]`` cannot be used."""
    for entry in config.next_hop:
        peer_of(NextHop(entry.host, entry.port), config, secrets)
