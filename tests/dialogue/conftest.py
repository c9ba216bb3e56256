"""Fixtures of the dialogues: a shared relay for each configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.dialogue.sites import Site, Sites


@pytest.fixture(scope="session")
def sites(authority: Authority) -> Iterator[Sites]:
    """The relays of this test process."""
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-dialogue-"))
    folder.chmod(0o755)
    made = Sites(folder, authority)
    yield made
    made.close()


@pytest.fixture
def usual(sites: Sites) -> Site:
    """An ordinary relay."""
    return sites.get("usual")


@pytest.fixture
def narrow(sites: Sites) -> Site:
    """Small limits, sizes and numbers alike; JSON log."""
    return sites.get("narrow")


@pytest.fixture
def hasty(sites: Sites) -> Site:
    """Time-outs of a second, three sessions for a client."""
    return sites.get("hasty")


@pytest.fixture
def watching(sites: Sites) -> Site:
    """Every rule in mode log."""
    return sites.get("watching")


@pytest.fixture
def soft(sites: Sites) -> Site:
    """soft_bounce; restricted senders are told at MAIL; bare line ends are refused."""
    return sites.get("soft")


@pytest.fixture
def listed(sites: Sites) -> Site:
    """Recipients by map, alias list and overrides; tags, case and a mailbox for postmaster."""
    return sites.get("listed")


@pytest.fixture
def fronted(sites: Sites) -> Site:
    """Behind a balancer (127.0.0.1); certificates for several names; TLS required of 192.0.2.64/26."""
    return sites.get("fronted")


@pytest.fixture
def wary(sites: Sites) -> Site:
    """Small budgets, a pause before the greeting, a tarpit, stress from 10 sessions on; two workers."""
    return sites.get("wary")


@pytest.fixture
def blind(sites: Sites) -> Site:
    """No snapshot."""
    return sites.get("blind")


@pytest.fixture
def world(sites: Sites) -> Site:
    """UTF-8 in addresses."""
    return sites.get("world")
