"""Owns: the web member as the supervisor sees it: what to import before the change of user, and its run.

Importing this module is cheap; aiohttp comes with ``preload``, because ``relay serve`` answers its first client long
before anybody asks for a page. Must not know what the pages show.
"""

from __future__ import annotations

import asyncio

from relay.control import Child


def preload() -> None:
    """Import everything ``run`` will need: call it in the child, before it becomes another user."""
    import concurrent.futures.thread  # noqa: F401, PLC0415 - imported by asyncio at the first use of a thread
    import encodings.idna  # noqa: F401, PLC0415 - looked up by name at the first use of a host name

    import relay.web.member  # noqa: F401, PLC0415 - see the module's docstring


def run(child: Child) -> int:
    """Serve until drained; returns the exit code. The listening socket is the supervisor's and outlives this process."""
    from relay.web.member import serve  # noqa: PLC0415 - imported by preload

    return asyncio.run(serve(child))
