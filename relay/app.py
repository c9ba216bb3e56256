"""Owns: the composition root: one function per role, which wires its objects and runs them until they are drained.

A role function gets a ``Child`` in a fresh process of its final user, and returns the exit code. Must not import
inside a role: everything is imported before the fork (``preload``).
"""

from __future__ import annotations

import encodings.idna
import importlib
from typing import Final

from relay.config.schema import Config
from relay.control import Child
from relay.hub import server as hub_server
from relay import worker as worker_role

_CODECS: Final = (encodings.idna,)
"""Looked up by name at run time (host names), when an import is not possible any more."""

_LATE: Final = ("asyncio.unix_events", "concurrent.futures.thread", "ctypes.util", "ssl")
"""Modules that others import on first use."""


def preload(config: Config) -> None:
    """Import everything that the roles of this configuration need, in the supervisor."""
    for name in _LATE:
        importlib.import_module(name)
    if config.web.listen is not None:
        importlib.import_module("relay.web.server")


def worker(child: Child) -> int:
    """Take and deliver mail."""
    return worker_role.run(child)


def hub(child: Child) -> int:
    """Count sessions over all workers."""
    return hub_server.run(child)


def web(child: Child) -> int:
    """Answer /metrics, /livez and /readyz."""
    # By name: without web.listen nothing of it is loaded.
    return int(importlib.import_module("relay.web.server").run(child))
