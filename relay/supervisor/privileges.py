"""Owns: who the children run as, how they become it for good, and that they die with the supervisor.

Names are resolved before the fork: a child neither asks a name service nor imports anything.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
from dataclasses import dataclass
from typing import Final

from relay.config.schema import Process
from relay.supervisor.errors import Refusal

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Identity:
    """A user with its groups. ``groups`` are all supplementary groups of the process."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Identities:
    """Who workers and web, and who the hub runs as; None: as the supervisor."""

    worker: Identity | None
    hub: Identity | None


def identities(process: Process) -> Identities:
    """The users of the configuration; both None when not started as root. Raises Refusal for unknown users.

    The hub is also in the workers' group: for its socket, and for the folder of the metrics.
    """
    if os.geteuid() != 0:
        return Identities(None, None)
    problems: list[str] = []
    worker = _identity("process.user", process.user, (), problems)
    hub = _identity("process.hub_user", process.hub_user, () if worker is None else (worker.gid,), problems)
    if problems:
        raise Refusal(*problems)
    return Identities(worker, hub)


def _identity(key: str, name: str, more: tuple[int, ...], problems: list[str]) -> Identity | None:
    if not name:
        return None
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        problems.append(
            f"{key}: there is no user {name!r}; create it (useradd --system --user-group --no-create-home "
            f'--shell /usr/sbin/nologin {name}) or write {key} = "" to keep root'
        )
        return None
    if entry.pw_uid == 0:
        problems.append(f'{key}: {name!r} is root; name an ordinary user, or write {key} = "" to keep root')
        return None
    groups = tuple(sorted({*os.getgrouplist(name, entry.pw_gid), *more}))
    return Identity(name, entry.pw_uid, entry.pw_gid, groups)


def become(identity: Identity | None) -> None:
    """Give up root for good; verified. Raises OSError."""
    if identity is not None:
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
        if (
            os.getresuid() != (identity.uid,) * 3
            or os.getresgid() != (identity.gid,) * 3
            or set(os.getgroups()) != set(identity.groups)
        ):
            raise PermissionError(f"the process did not become {identity.name}")
        try:
            os.setuid(0)
        except PermissionError:
            pass
        else:
            raise PermissionError(f"the process could become root again after it became {identity.name}")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends. After ``become``: a change of user clears it.

    Raises ProcessLookupError when the parent is gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the supervisor is gone")


def call_process(name: str) -> None:
    """The name in ps and top (15 octets)."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def _prctl(option: int, argument: int | ctypes.c_char_p) -> None:
    value = argument if isinstance(argument, ctypes.c_char_p) else ctypes.c_ulong(argument)
    if _LIBC.prctl(option, value, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
