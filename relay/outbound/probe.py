"""Owns: trying whether next hops take a connection, the way a delivery would open it, and leaving again with QUIT.

Nothing is delivered and no state of a running relay is touched: the lanes are this module's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from relay.config.schema import Config
from relay.mail.answer import Answer, Stage
from relay.outbound.client import Capabilities
from relay.outbound.lane import Lane
from relay.policy.route import NextHop
from relay.telemetry.maillog import MailLog

TRY_S: Final = 10.0
"""Longest wait for each step with a next hop; the whole of one is given twice as long. An operator waits for the answer."""
AT_ONCE: Final = 8
"""Next hops that are tried at the same time."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of it: ``offers`` of one that took the connection, else ``answer``.

    ``tls_failed``: STARTTLS was offered and did not work, and the connection went on in clear.
    """

    next_hop: NextHop
    offers: Capabilities | None
    answer: Answer | None
    tls_failed: bool = False


async def try_all(next_hops: Sequence[NextHop], config: Config, seconds: float = TRY_S) -> list[Tried]:
    """Each of them once, a few at a time. Never raises for what a next hop does."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(next_hop: NextHop) -> Tried:
        async with room:
            return await _try(next_hop, config, seconds)

    return await asyncio.gather(*map(one, next_hops))


async def _try(next_hop: NextHop, config: Config, seconds: float) -> Tried:
    notes = _Notes()
    lane = Lane(next_hop, config, 1, MailLog(notes, "json", config.server.hostname))
    lane.connect_timeout_s = min(seconds, lane.connect_timeout_s)
    lane.command_timeout_s = min(seconds, lane.command_timeout_s)
    try:
        opened = await asyncio.wait_for(lane.try_connection(), 2 * seconds)
    except TimeoutError:
        opened = Answer(Stage.CONNECT, 0, "", f"no connection within {2 * seconds:.0f} s")
    tls_failed = any("next_hop_tls_failed" in line for line in notes.lines)
    if isinstance(opened, Answer):
        return Tried(next_hop, None, opened, tls_failed)
    opened.quit()
    return Tried(next_hop, opened.capabilities, None, tls_failed)


class _Notes:
    """A log that is a list."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str, /) -> None:
        self.lines.append(line)

    def flush(self) -> None: ...
