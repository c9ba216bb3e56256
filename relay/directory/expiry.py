"""Owns: when the password of the account that reads a directory ends (row D14). Asked of the directory, at the end of a reading.

Active Directory computes it for each account; OpenLDAP's ppolicy is asked for the age of the password and of its policy, where
the account may read both. Nothing here may spoil a reading: what cannot be told is not told.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Mapping
from typing import Final

from relay.config.ldap import LdapProfile
from relay.directory.connection import SCOPES, Connection
from relay.directory.failure import LdapFailure

COMPUTED: Final = "msDS-UserPasswordExpiryTimeComputed"
_CHANGED, _POLICY, _AGE = "pwdChangedTime", "pwdPolicySubentry", "pwdMaxAge"
_NEVER: Final = 0x7FFFFFFFFFFFFFFF
_EPOCH_S: Final = 11_644_473_600
"""From 1601, where FILETIME begins, to 1970."""
_TICKS: Final = 10_000_000
_SPECIAL: Final = re.compile(rb"[\x00()*\\]")


def password_expires(connection: Connection, profile: LdapProfile) -> float | None:
    """Seconds since 1970; None when it never ends, when nobody logged in, and when it is not told. Never raises."""
    if not profile.bind:
        return None
    try:
        found = _own(connection, profile)
        if found is None:
            return None
        computed = _number(found, COMPUTED)
        if computed is not None:
            return None if computed in (0, _NEVER) else computed / _TICKS - _EPOCH_S
        changed, policy = found.get(_CHANGED.lower()), found.get(_POLICY.lower())
        if not changed or not policy:
            return None
        rules = connection.read(policy[0].decode("utf-8", "replace"), [_AGE])
        age = _number(rules or {}, _AGE)
        return _time(changed[0]) + age if age else None
    except (LdapFailure, ValueError):
        return None


def _own(connection: Connection, profile: LdapProfile) -> Mapping[str, list[bytes]] | None:
    """The account's entry: by its name, or by what it logs in with."""
    asked = [COMPUTED, _CHANGED, _POLICY]
    bind = profile.bind
    if "=" in bind:
        return connection.read(bind, asked)
    domain, windows, user = bind.partition("\\")
    name = (user if windows else domain).encode()
    safe = _SPECIAL.sub(lambda at: b"\\%02x" % at[0][0], name).decode()
    which = "sAMAccountName" if windows else "userPrincipalName"
    compiled = connection.compiled(f"({which}={safe})")
    found = [one for one in connection.pages(connection.base(), SCOPES["sub"], compiled, asked) if one is not None]
    return found[0][1] if len(found) == 1 else None


def _number(found: Mapping[str, list[bytes]], name: str) -> int | None:
    values = found.get(name.lower())
    return int(values[0]) if values and values[0].isdigit() else None


def _time(value: bytes) -> float:
    """GeneralizedTime in UTC, as slapd writes it. Raises ValueError."""
    text = value[:14].decode("ascii", "replace")
    # By hand: strptime imports, which is too late where the process has changed its user.
    return float(calendar.timegm((int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2)))))
