"""Owns: what a certificate says about itself, by the ssl module alone: two ends in memory greet each other with it.

The handshake also proves what reading the file could not: that key and chain work for a client. No network is used.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Certificate:
    """``names`` are those of the subjectAltName; ``expires`` in seconds since 1970."""

    names: tuple[str, ...]
    expires: float


class CertificateFault(Exception):
    """A client would refuse this certificate today; the text is OpenSSL's reason."""


def examine(certificate: Path, key: Path) -> Certificate:
    """The certificate in the file, as a client sees it that trusts it. Raises CertificateFault, OSError."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The file is its own anchor, whoever issued it: trust is each client's own affair, dates are everybody's.
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.load_verify_locations(cafile=certificate)
    seen = _seen(certificate, key, client_context)
    names = tuple(str(pair[1]) for pair in seen.get("subjectAltName", ()))
    return Certificate(names, ssl.cert_time_to_seconds(str(seen["notAfter"])))


def distrust(certificate: Path, key: Path) -> str:
    """Why a client with this machine's authorities would not trust the file's chain; empty when it would."""
    try:
        _seen(certificate, key, ssl.create_default_context())
    except CertificateFault as fault:
        return str(fault)
    return ""


def _seen(certificate: Path, key: Path, client_context: ssl.SSLContext) -> dict[str, Any]:
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate, key, password="")
    client_context.check_hostname = False
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    try:
        # Client hello; the server's flight; the client's last flight. TLS 1.3 needs no more, 1.2 is not chosen here.
        for end in (client, server, client):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        raise CertificateFault(error.verify_message) from None
    except ssl.SSLError as error:
        raise CertificateFault(error.reason or str(error)) from None
    return dict(client.getpeercert() or {})


def covers(certificate: Certificate, host: str) -> bool:
    """Whether one of the names is ``host``; a wildcard stands for one label (RFC 6125 §6.4.3)."""
    parent = host.partition(".")[2]
    return any(name.lower() in {host.lower(), f"*.{parent}".lower()} for name in certificate.names)
