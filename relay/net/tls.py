"""Owns: the server side of TLS: a context made from key material that is in memory only."""

from __future__ import annotations

import os
import ssl
from typing import Literal


class TlsError(Exception):
    """The certificate or key cannot be used; the message says why."""


def server_context(certificate: str, key: str, minimum: Literal["1.2", "1.3"]) -> ssl.SSLContext:
    """A context for STARTTLS and implicit TLS. ``certificate`` and ``key`` are PEM texts. Raises TlsError.

    The ssl module reads files only, so the texts go through an anonymous file in memory: the supervisor alone may
    read the key's file, and no worker needs a name for it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if minimum == "1.3" else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, f"{certificate}\n{key}".encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise TlsError(f"tls.certificate and tls.key cannot be used together: {error}") from None
    finally:
        os.close(descriptor)
    return context
