"""The fixture of the interoperability tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bed.certificates import Authority
from tests.interop.world import World


@pytest.fixture(scope="session")
def world(authority: Authority) -> Iterator[World]:
    """Senders, relays and next hops, started once."""
    made = World(authority)
    yield made
    made.close()
