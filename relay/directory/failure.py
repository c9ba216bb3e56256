"""Owns: why a directory could not be read: reasons with their cures, and what Active Directory's numbers mean (row D9).

Pure. The reason is a metrics label and a field of the log; the text is for the operator, and holds no secret.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """Why; a closed set, so that it can label a metric."""

    DNS = "dns"
    REFUSED = "refused"
    FILTERED = "filtered"
    CERTIFICATE = "certificate"
    TLS = "tls"
    NOT_LDAP = "not-ldap"
    CREDENTIALS = "credentials"
    NEEDS_TLS = "needs-tls"
    RIGHTS = "rights"
    LOST = "lost"
    SLOW = "slow"
    BASE = "base"
    FILTER = "filter"
    SIZE_LIMIT = "size-limit"
    REFERRAL = "referral"
    PAGING = "paging"
    EMPTY = "empty"
    BUSY = "busy"
    SHRUNK = "shrunk"
    CANARY = "canary"
    SOURCES = "sources"
    PUSH = "push"
    CRASHED = "crashed"
    OTHER = "other"


CURES: Final[dict[Reason, str]] = {
    Reason.DNS: "check the name, and that this host's resolver knows the internal zone",
    Reason.REFUSED: "check the port, and that the directory service runs there",
    Reason.FILTERED: "open the port in the firewall between this host and the directory (relay firewall shows the flows)",
    Reason.CERTIFICATE: "set ca_file to the authority that signed it, tls_server_name to a name in it, or pin its key",
    Reason.TLS: "use ldaps:// where the server has a certificate; Active Directory needs one for StartTLS, too",
    Reason.NOT_LDAP: "check host and port: something else answers there",
    Reason.CREDENTIALS: "check bind and the password; mind that Active Directory locks an account after a few failures",
    Reason.NEEDS_TLS: "use ldaps:// or ldap:// without insecure: the server takes no password in clear",
    Reason.RIGHTS: "let the account read these entries, or bind: the server shows nothing to this one",
    Reason.LOST: "look at the server's log; the next server of the profile is asked meanwhile",
    Reason.SLOW: "look at the server's load, or raise the time-outs of the profile",
    Reason.BASE: "write base as the directory spells it, or leave it out to ask the server",
    Reason.FILTER: "mend the filter: the server did not understand it",
    Reason.SIZE_LIMIT: "lower page_size below the server's limit (Active Directory: MaxPageSize, 1000)",
    Reason.REFERRAL: "name the server that holds the base itself: referrals are not followed, they would get the password",
    Reason.PAGING: "the server does not page as it must (RFC 2696); ask another one",
    Reason.EMPTY: "check base, filter and the rights of the account, or the domains of the profile",
    Reason.BUSY: "the server is overloaded or going down; it is tried again with the next reading",
    Reason.SHRUNK: "look at relay directory sync --dry-run; if it is right, relay directory accept",
    Reason.CANARY: "find out why that address is missing, or change the canaries",
    Reason.SOURCES: "mend the source named",
    Reason.PUSH: "look at the sender inside: relay directory export --signed there, then bring the file here",
    Reason.CRASHED: "this is a fault of the relay: report it with the log",
    Reason.OTHER: "look the message up in the directory's documentation",
}

MENDS_ELSEWHERE: Final = frozenset(Reason) - {Reason.CREDENTIALS, Reason.FILTER}
"""Worth asking the next server. A wrong password is not: every further try brings the account nearer to its lock-out."""


class LdapFailure(Exception):
    """The directory was not read, or not wholly. ``where`` is the server's URL, or empty."""

    def __init__(self, reason: Reason, what: str, where: str = "") -> None:
        super().__init__(f"{where}: {what}" if where else what)
        self.reason = reason
        self.what = what
        self.where = where

    @property
    def cure(self) -> str:
        """What to do about it."""
        return CURES[self.reason]


NO_LOGON_SERVER: Final = "no domain controller could check it"
"""The one meaning that says nothing about the password."""
_AD_DATA: Final = re.compile(r"AcceptSecurityContext error, data ([0-9a-fA-F]+)")
_AD_MEANINGS: Final[dict[str, str]] = {
    "51f": NO_LOGON_SERVER,
    "525": "there is no such user",
    "52e": "wrong password (or no such user)",
    "530": "the account may not log in at this hour",
    "531": "the account may not log in from this computer",
    "532": "the password has expired",
    "533": "the account is disabled",
    "568": "the account is in too many groups",
    "701": "the account has expired",
    "773": "the password must be changed first",
    "775": "the account is locked after too many failed logins",
}

_CODES: Final[dict[int, tuple[Reason, str]]] = {
    1: (Reason.OTHER, "operations error (Active Directory says so to a search before a login)"),
    2: (Reason.NOT_LDAP, "the server took this for a breach of the protocol"),
    3: (Reason.SLOW, "the server's time limit is exceeded"),
    4: (Reason.SIZE_LIMIT, "the server's size limit is exceeded: the answer is not complete"),
    7: (Reason.CREDENTIALS, "the server knows no simple login"),
    8: (Reason.NEEDS_TLS, "the server wants TLS or signing before a password"),
    10: (Reason.REFERRAL, "the server refers to another one"),
    11: (Reason.SIZE_LIMIT, "an administrative limit of the server is exceeded"),
    12: (Reason.PAGING, "the server does not know the paged results control"),
    13: (Reason.NEEDS_TLS, "the server wants TLS"),
    18: (Reason.FILTER, "the filter compares an attribute in a way that it has not"),
    32: (Reason.BASE, "there is no such base"),
    34: (Reason.BASE, "the base is not written as a distinguished name"),
    48: (Reason.CREDENTIALS, "this kind of login is not allowed"),
    49: (Reason.CREDENTIALS, "the login was refused"),
    50: (Reason.RIGHTS, "the account may not do this"),
    51: (Reason.BUSY, "the server is busy"),
    52: (Reason.BUSY, "the server is unavailable"),
    53: (Reason.RIGHTS, "the server is unwilling"),
    87: (Reason.FILTER, "the filter is wrong"),
}


def ad_meaning(diagnostic: str) -> str:
    """What Active Directory's number in a refused login means; "" for other words."""
    data = _AD_DATA.search(diagnostic)
    return _AD_MEANINGS.get(data[1].lower(), "") if data else ""


def decoded(code: int, diagnostic: str, where: str) -> LdapFailure:
    """The failure that a result code other than success (0) stands for, with the server's own words."""
    reason, what = _CODES.get(code, (Reason.OTHER, "the server refused"))
    meaning = ad_meaning(diagnostic)
    if meaning:
        what = f"{what}: {meaning}"
    said = "".join(c if c.isprintable() else "?" for c in diagnostic)[:200]
    return LdapFailure(reason, f"{what} (result {code}{f': {said}' if said else ''})", where)
