"""Owns: certificates for tests: an authority to trust, good certificates, and the bad ones that must be refused."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


class Authority:
    """A certificate authority of the test's own. Keys are made once; contexts are cheap."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self._stranger = trustme.CA()

    # --- for clients ---
    def client(self) -> ssl.SSLContext:
        """A client's context that trusts this authority and nothing else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._ca.configure_trust(context)
        return context

    def bundle(self, folder: Path) -> Path:
        """The authority's certificate as a PEM file."""
        path = folder / "authority.pem"
        self._ca.cert_pem.write_to_path(path)
        return path

    # --- for servers ---
    def server(self, *names: str) -> ssl.SSLContext:
        """A server's context with a good certificate for ``names``."""
        return self._context(self._ca.issue_cert(*(names or ("localhost", "127.0.0.1"))))

    def server_of_a_stranger(self, *names: str) -> ssl.SSLContext:
        """The right names, from an authority nobody trusts."""
        return self._context(self._stranger.issue_cert(*(names or ("localhost", "127.0.0.1"))))

    def server_expired(self, *names: str) -> ssl.SSLContext:
        """The right names and authority, valid until yesterday."""
        yesterday = datetime.now(UTC) - timedelta(days=1)
        return self._context(
            self._ca.issue_cert(
                *(names or ("localhost", "127.0.0.1")), not_before=yesterday - timedelta(days=9), not_after=yesterday
            )
        )

    def files(self, folder: Path, *names: str) -> tuple[Path, Path]:
        """Certificate chain and key as PEM files in ``folder``."""
        made = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")))
        chain, key = folder / "certificate.pem", folder / "key.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        return chain, key

    @staticmethod
    def _context(leaf: trustme.LeafCert) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(context)
        return context
