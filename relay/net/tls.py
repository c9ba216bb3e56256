"""Owns: the server side of TLS: contexts made from key material that is in memory only, and which one a client gets."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import Iterable
from typing import Final, Literal

Named = tuple[tuple[str, ...], str, str]
"""Server names, certificate, key."""


class TlsError(Exception):
    """The certificate or key cannot be used; the message says why."""


def endpoint_binding(certificate: str) -> bytes:
    """The digest that SCRAM-SHA-256-PLUS binds a login to: ``tls-server-end-point`` (RFC 5929 §4). Empty when the
    certificate cannot be read so.

    The hash is that of the certificate's own signature, SHA-256 for those of old.
    """
    start = certificate.find(_PEM_BEGIN)
    end = certificate.find(_PEM_END, start)
    if start < 0 or end < 0:
        return b""
    try:
        der = ssl.PEM_cert_to_DER_cert(certificate[start : end + len(_PEM_END)])
        _, inside, _ = _field(der, 0)
        _, _, behind = _field(der, inside)  # what is signed
        _, inside, _ = _field(der, behind)  # the algorithm, and in it its identifier
        _, first, last = _field(der, inside)
    except (ValueError, IndexError):
        return b""
    return hashlib.new(_STRONGER.get(der[first:last].hex(), "sha256"), der).digest()


def _field(der: bytes, at: int) -> tuple[int, int, int]:
    """Tag of a DER field (X.690 §8.1), where its content begins, and where it ends."""
    length, begins = der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, begins = int.from_bytes(der[begins : begins + count], "big"), begins + count
    return der[at], begins, begins + length


_PEM_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_PEM_END: Final = "-----END CERTIFICATE-----"
_STRONGER: Final = {
    "2a864886f70d01010c": "sha384",  # RSA
    "2a864886f70d01010d": "sha512",
    "2a8648ce3d040303": "sha384",  # ECDSA
    "2a8648ce3d040304": "sha512",
}


class ServerContext(ssl.SSLContext):
    """A server's context. ``binding``: ``endpoint_binding`` of a certificate that was chosen by server name."""

    binding: bytes | None = None


def binding_of(end: ssl.SSLObject | None, usual: bytes) -> bytes:
    """What a login on this connection is bound to: ``usual``, unless the client asked for another certificate."""
    context = None if end is None else end.context
    return context.binding if isinstance(context, ServerContext) and context.binding is not None else usual


def client_context(policy: str, authorities: str = "", certificate: str = "", key: str = "") -> ssl.SSLContext | None:
    """The client's side of TLS; None for policy "off". All texts are PEM. Raises TlsError.

    Only "verified" looks at the certificate here: opportunistic TLS takes any (it is no worse than clear text), and a
    pinned one is compared after the handshake. ``authorities``: instead of those that the system trusts.
    """
    if policy == "off":
        return None
    try:
        context = ssl.create_default_context(cadata=authorities or None)
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(f"the file of authorities cannot be used: {error}") from None
    if policy != "verified":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate:
        _load_pair(context, certificate, key, "certificate and key of [[next_hop]]")
    return context


def _load_pair(context: ssl.SSLContext, certificate: str, key: str, what: str) -> None:
    """The ssl module reads files only, so the texts go through an anonymous file in memory."""
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, f"{certificate}\n{key}".encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise TlsError(f"{what} cannot be used together: {error}") from None
    finally:
        os.close(descriptor)


def server_context(
    certificate: str, key: str, minimum: Literal["1.2", "1.3"], ciphers: str, named: Iterable[Named] = ()
) -> ssl.SSLContext:
    """A context for STARTTLS and implicit TLS. ``certificate`` and ``key`` are PEM texts. Raises TlsError.

    ``named``: further certificates, for clients that ask for their names (SNI, RFC 6066 §3). Any other name, or none, gets
    the first one: a client that sends mail rarely verifies, and a handshake that fails is mail in the clear.
    """
    context = _context(certificate, key, minimum, ciphers, "tls")
    by_name: dict[str, ServerContext] = {}
    for number, (names, chain, its_key) in enumerate(named):
        other = _context(chain, its_key, minimum, ciphers, f"tls.named[{number}]")
        other.binding = endpoint_binding(chain)
        for name in names:
            by_name.setdefault(name, other)
    if by_name:

        def choose(end: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            if name:
                name = name.lower()
                chosen = by_name.get(name) or by_name.get(f"*.{name.partition('.')[2]}")
                if chosen is not None:
                    end.context = chosen

        context.sni_callback = choose
    return context


def _context(certificate: str, key: str, minimum: Literal["1.2", "1.3"], ciphers: str, what: str) -> ServerContext:
    """The ssl module reads files only, so the texts go through an anonymous file in memory: the supervisor alone may
    read the key's file, and no worker needs a name for it.
    """
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if minimum == "1.3" else ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    _load_pair(context, certificate, key, f"{what}.certificate and {what}.key")
    return context


def feed(protocol: asyncio.BufferedProtocol, octets: bytes) -> None:
    """Hand octets to a protocol as its transport would."""
    while octets:
        buffer = protocol.get_buffer(len(octets))
        count = min(len(buffer), len(octets))  # type: ignore[arg-type] # a memoryview, whatever the stub calls it
        buffer[:count] = octets[:count]  # type: ignore[index]
        protocol.buffer_updated(count)
        octets = octets[count:]
