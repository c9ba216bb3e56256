"""Owns: the event loop of unit tests: what talks to next hops runs on the loop that workers run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import pytest
import uvloop

from tests.unit.scripted_hop import Hop

ON_UVLOOP: Final = frozenset({"test_client.py", "test_lane.py"})
"""Their transports differ from asyncio's: pausing, closing, TLS."""

Loop = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Loop]:
    return {"uvloop": uvloop.new_event_loop} if item.path.name in ON_UVLOOP else {"asyncio": asyncio.new_event_loop}


@pytest.fixture
async def hop() -> AsyncIterator[Hop]:
    """A scripted next hop and its lane."""
    made = Hop()
    await made.start()
    yield made
    await made.end()
