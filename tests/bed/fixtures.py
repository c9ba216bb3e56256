"""Owns: the fixtures of the test bed. Each gives back what it started, and fails the test on what went wrong there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.bed.certificates import Authority
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.servers import Postfix, SmtpSink

MakeNextHop = Callable[..., NextHop]
MakeRelay = Callable[..., RelayRunner]


@pytest.fixture
def bed_folder() -> Iterator[Path]:
    """A folder that other users may pass, unlike tmp_path: servers drop their privileges."""
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def authority() -> Authority:
    """The certificate authority of the run."""
    return Authority()


@pytest.fixture
def make_next_hop() -> Iterator[MakeNextHop]:
    """Scripted next hops, options as ``NextHop`` has them. A breach of RFC 5321 by the relay fails the test."""
    made: list[NextHop] = []

    def make(**options: Any) -> NextHop:
        made.append(NextHop(**options))
        return made[-1]

    yield make
    for hop in made:
        hop.close()
    assert [violation for hop in made for violation in hop.violations] == []


@pytest.fixture
def next_hop(make_next_hop: MakeNextHop) -> NextHop:
    """One scripted next hop that behaves until told otherwise."""
    return make_next_hop()


@pytest.fixture
def make_relay(bed_folder: Path) -> Iterator[MakeRelay]:
    """Relays that accept, options as ``RelayRunner`` has them; ``next_hop`` may be a server or a route."""
    made: list[RelayRunner] = []

    def make(next_hop: Any, *, start: bool = True, **options: Any) -> RelayRunner:
        folder = bed_folder / f"relay-{len(made)}"
        folder.mkdir()
        if "default_next_hop" in options:
            options["default_next_hop"] = _route(options["default_next_hop"])
        several = isinstance(next_hop, Sequence) and not isinstance(next_hop, str)
        routes = [_route(one) for one in (next_hop if several else [next_hop])]
        relay = RelayRunner(folder, routes, **options)
        made.append(relay)
        return relay.start() if start else relay

    yield make
    problems: list[Exception] = []
    for relay in made:
        try:
            relay.close()
        except (AssertionError, OSError) as problem:
            problems.append(problem)
        print(f"--- log of {relay.folder.name} ---\n{relay.complaints()}")
    if problems:
        raise problems[0]


def _route(server: Any) -> str:
    return server if isinstance(server, str) else server.route


@pytest.fixture
def relay(make_relay: MakeRelay, next_hop: NextHop) -> RelayRunner:
    """A relay with one worker in front of ``next_hop``."""
    return make_relay(next_hop)


@pytest.fixture
def make_sink(bed_folder: Path) -> Iterator[Callable[..., SmtpSink]]:
    """Postfix's smtp-sink; mark the test ``needs("smtp-sink")``."""
    made: list[SmtpSink] = []

    def make(*options: str) -> SmtpSink:
        folder = bed_folder / f"sink-{len(made)}"
        folder.mkdir()
        made.append(SmtpSink(folder, *options))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


@pytest.fixture
def make_postfix(bed_folder: Path) -> Iterator[Callable[..., Postfix]]:
    """Private Postfix instances, options as ``Postfix`` has them; mark the test ``needs("postfix", "root")``."""
    made: list[Postfix] = []

    def make(**options: Any) -> Postfix:
        folder = bed_folder / f"postfix-{len(made)}"
        folder.mkdir()
        made.append(Postfix(folder, **options))
        return made[-1]

    yield make
    for postfix in made:
        postfix.close()
