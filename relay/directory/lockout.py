"""Owns: how many wrong passwords a directory takes before it locks an account, where it lets that be read (row A8).

Active Directory: the domain's own entry, and fine-grained policies where they may be seen. OpenLDAP: entries of ppolicy. The
strictest policy counts, whomever it is for: the relay does not work out which one an account has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from relay.directory import ber
from relay.directory.failure import decoded
from relay.directory.link import ENTRIES_MAX, Link
from relay.directory.template import FilterTemplate, Login, first_text

_NOBODY: Final = Login("", "", "", "")
_TICKS: Final = 10_000_000
"""Active Directory counts times in tenths of microseconds, below zero."""
_DAY_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class Lockout:
    """An account is locked at the ``failures``-th wrong password, counted until ``window_s`` pass without one."""

    failures: int
    window_s: float


async def read(link: Link, head: str, until: float, *, is_ad: bool) -> Lockout | None:
    """The strictest policy that can be seen below ``head``; None when there is none. Raises LdapFailure."""
    if not is_ad:
        wanted = ("pwdLockout", "pwdMaxFailure", "pwdFailureCountInterval")
        found = await _search(link, head, 2, "(objectClass=pwdPolicy)", wanted, until)
        enforced = [one for one in found if first_text(one, "pwdLockout").upper() == "TRUE"]
        return _strictest([_of(one, "pwdMaxFailure", "pwdFailureCountInterval", 1) for one in enforced])
    domain = ("lockoutThreshold", "lockOutObservationWindow")
    found = await _search(link, head, 0, "(objectClass=*)", domain, until)
    policies = [_of(one, *domain, -_TICKS) for one in found]
    finer = ("msDS-LockoutThreshold", "msDS-LockoutObservationWindow")
    place = f"CN=Password Settings Container,CN=System,{head}"
    found = await _search(link, place, 1, "(objectClass=msDS-PasswordSettings)", finer, until)
    return _strictest(policies + [_of(one, *finer, -_TICKS) for one in found])


async def _search(
    link: Link, base: str, scope: int, text: str, attributes: tuple[str, ...], until: float
) -> list[Mapping[str, list[bytes]]]:
    compiled = FilterTemplate(text).octets(_NOBODY)
    found, result = await link.search(base, scope, compiled, attributes, ENTRIES_MAX, until)
    if result.code in {51, 52}:  # busy or unavailable: ask again later
        raise decoded(result.code, result.diagnostic, link.server.url)
    return [attributes for _, attributes in found]  # hidden or not there: what can be seen counts


def _of(entry: Mapping[str, list[bytes]], failures: str, window: str, unit: int) -> Lockout | None:
    most, span = first_text(entry, failures), first_text(entry, window)
    try:
        count, seconds = int(most or 0), int(span or 0) / unit
    except ValueError:
        return None
    if count < 1:  # never locked
        return None
    return Lockout(count, min(_DAY_S, seconds) if seconds > 0 else _DAY_S)  # 0: until an administrator comes


def _strictest(policies: list[Lockout | None]) -> Lockout | None:
    known = [policy for policy in policies if policy is not None]
    if not known:
        return None
    return Lockout(min(policy.failures for policy in known), max(policy.window_s for policy in known))


EVERYTHING: Final = ber.tlv(0x87, b"objectClass")
"""(objectClass=*), as it goes over the wire."""
_ROOT: Final = ("defaultNamingContext", "namingContexts")


async def head_of(link: Link, until: float) -> str:
    """The domain's own entry, or the only naming context; "" when the server does not say. Raises LdapFailure."""
    found, _ = await link.search("", 0, EVERYTHING, _ROOT, 1, until)
    root = found[0][1] if found else {}
    contexts = [one for one in root.get("namingcontexts", []) if one]
    return first_text(root, "defaultNamingContext") or (
        contexts[0].decode("utf-8", "replace") if len(contexts) == 1 else ""
    )
