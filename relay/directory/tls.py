"""Owns: how a directory's certificate is verified: by an authority, or by the pin of its key. No connection of its own."""

from __future__ import annotations

import base64
import calendar
import ssl
from dataclasses import dataclass
from hashlib import sha256

from relay.config.ldap import LdapProfile, LdapServer
from relay.directory.ber import header
from relay.directory.failure import LdapFailure, Reason
from relay.directory.stream import TlsStream


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What was shown. ``pin`` names its key; ``expires`` in seconds since 1970."""

    pin: str
    expires: float


def context(profile: LdapProfile) -> ssl.SSLContext:
    """TLS 1.2 or better; verifies unless keys are pinned or the configuration says not to. Raises LdapFailure."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    if profile.pin or not profile.verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    elif profile.ca_file is not None:
        try:
            made.load_verify_locations(cafile=profile.ca_file)
        except ssl.SSLError:
            raise LdapFailure(Reason.CERTIFICATE, f"{profile.ca_file} holds no certificate") from None
        except OSError as error:
            raise LdapFailure(Reason.CERTIFICATE, f"{profile.ca_file}: {error.strerror}") from None
    else:
        made.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return made


def shown(wrapped: TlsStream, profile: LdapProfile, server: LdapServer) -> PeerCertificate:
    """What the server showed, its pin checked where the profile has any. Raises LdapFailure."""
    return pinned(wrapped.getpeercert(), profile, server)


def pinned(der: bytes | None, profile: LdapProfile, server: LdapServer) -> PeerCertificate:
    """A server's certificate, its pin checked where the profile has any. Raises LdapFailure."""
    if der is None:
        raise LdapFailure(Reason.CERTIFICATE, "the server showed no certificate", server.url)
    try:
        found = describe(der)
    except (IndexError, ValueError):
        raise LdapFailure(Reason.CERTIFICATE, "the server's certificate cannot be read", server.url) from None
    if profile.pin and found.pin not in profile.pin:
        raise LdapFailure(Reason.CERTIFICATE, f"the server's key is {found.pin}, which is not pinned", server.url)
    return found


def describe(der: bytes) -> PeerCertificate:
    """Pin and end of a certificate (RFC 5280 §4.1). Raises IndexError or ValueError."""
    _, at, _ = header(der, 0)
    _, at, _ = header(der, at)
    if der[at] == 0xA0:  # version
        _, _, at = header(der, at)
    for _ in range(3):  # serial number, signature, issuer
        _, _, at = header(der, at)
    _, inner, at = header(der, at)
    _, _, inner = header(der, inner)  # notBefore
    kind, start, stop = header(der, inner)
    _, _, at = header(der, at)  # subject
    _, _, end = header(der, at)
    text = der[start:stop].decode("ascii").removesuffix("Z")
    if kind == 0x17:  # UTCTime: RFC 5280 §4.1.2.5.1
        text = ("19" if text >= "50" else "20") + text
    # By hand: strptime imports, which is too late where the process has changed its user.
    ends = calendar.timegm((int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2))))
    return PeerCertificate("sha256:" + base64.b64encode(sha256(der[at:end]).digest()).decode(), float(ends))


def certificate_fault(error: ssl.SSLError, server: LdapServer) -> LdapFailure:
    """The failure behind an error of the handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return LdapFailure(Reason.CERTIFICATE, f"certificate refused: {error.verify_message}", server.url)
    if error.reason in {"WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}:
        return LdapFailure(Reason.TLS, "the server does not speak TLS on this port", server.url)
    what = (error.reason or str(error)).replace("_", " ").lower()
    return LdapFailure(Reason.TLS, f"no TLS: {what}", server.url)
