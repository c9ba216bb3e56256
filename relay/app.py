"""Owns: the composition root: one function per role, which wires its objects and runs them until they are drained.

A role function gets a ``Child`` in a fresh process of its final user, and returns the exit code. Must not import
inside a role: everything is imported before the fork (``preload``).
"""

from __future__ import annotations

import encodings.idna
import importlib
import importlib.util
import os
import stat
from pathlib import Path
from typing import Final

from relay import worker as worker_role
from relay.config.schema import Config
from relay.control import Child
from relay.directory import connection, signed
from relay.hub import server as hub_server
from relay.web import server as web_server

_CODECS: Final = (encodings.idna,)
"""Looked up by name at run time (host names), when an import is not possible any more."""

_LATE: Final = ("asyncio.unix_events", "concurrent.futures.thread", "ctypes.util", "ssl")
"""Modules that others import on first use."""


def preload() -> None:
    """Import what the roles would import later; in the supervisor, before the first fork."""
    for name in _LATE:
        importlib.import_module(name)


def worker(child: Child) -> int:
    """Take and deliver mail."""
    return worker_role.run(child)


def hub(child: Child) -> int:
    """Count sessions over all workers, check logins."""
    return hub_server.run(child)


def load_hub(config: Config) -> None:
    """Import what checks logins, and ldap3 where the hub's user could not do it later; else only the process that reads a
    directory pays for it.
    """
    if config.directory.ldap and not all(map(_open_to_all, ("ldap3", "pyasn1", "pprint"))):  # the last: Python's own
        connection.preload()
    if config.directory.push:
        signed.preload()
    hub_server.load(config)


def _open_to_all(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin) if spec is not None and spec.origin is not None else Path()
    return os.stat(file).st_mode & stat.S_IROTH != 0 and all(
        os.stat(one).st_mode & stat.S_IXOTH for one in file.parents
    )


def load_web(_: Config) -> None:
    """Import what only web needs; in its process, before it becomes another user."""
    web_server.preload()


def web(child: Child) -> int:
    """Answer /metrics, /livez and /readyz."""
    return web_server.run(child)
