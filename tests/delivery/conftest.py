"""Owns: the bed of the delivery tests: one relay in front of many scripted next hops, each with a domain of its own.

A *spot* is such a next hop with its domain and a sender that nobody else uses, so that tests share one relay and never
see each other's mail: starting a relay takes longer than most of these tests. Reports go to ``outside``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from relay.cli.queue import app
from tests.bed.next_hop import NextHop, Transaction
from tests.bed.relay import RelayRunner, toml
from tests.bed.waiting import wait_for
from tests.bed.wire import letter


@dataclass(frozen=True)
class Sent:
    """What the client was told. ``id`` is the queue id of a 250, empty otherwise."""

    code: int
    text: str
    id: str

    @property
    def queued(self) -> bool:
        """250 from the disk."""
        return self.code == 250 and self.text.startswith("2.0.0 Ok: queued as ")

    @property
    def delivered(self) -> bool:
        """250 because the next hop has it."""
        return self.code == 250 and self.text.startswith("2.0.0 Ok: delivered as ")


class Spot:
    """A next hop, its domain, and a sender for it."""

    def __init__(self, bed: Bed, number: int, hop: NextHop) -> None:
        self.bed = bed
        self.hop = hop
        self.second = bed.seconds[number] if bed.seconds else None
        self.relay = bed.relay
        self.domain = f"d{number}.example.com"
        self.sender = f"sender{number}@example.net"
        self.name = f"{'lmtp:' if hop.protocol == 'lmtp' else ''}{hop.host}:{hop.port}"

    def to(self, local: str = "user") -> str:
        """An address here."""
        return f"{local}@{self.domain}"

    def send(
        self,
        *recipients: str | tuple[str, str],
        message: bytes = letter(),
        sender: str | None = None,
        parameters: str = "",
    ) -> Sent:
        """One message on a connection of its own, to ``user`` here unless told otherwise."""
        with self.relay.client() as client:
            reply = client.open().deliver(
                self.sender if sender is None else sender, recipients or [self.to()], message, parameters
            )
        return Sent(reply.code, reply.text, reply.text.split()[-1] if reply.code == 250 else "")

    def taken(self, count: int = 1, tries: int | None = None) -> list[Transaction]:
        """The messages the next hop took, which must be ``count``, and ``tries`` with those it did not take.

        Waited for: it notes them behind its reply.
        """
        seen = wait_for(
            lambda: (
                (self.hop.accepted, len(self.hop.transactions))
                if len(self.hop.accepted) >= count and len(self.hop.transactions) >= (tries or 0)
                else ()
            ),
            lambda: f"{count} messages taken in {tries} tries, only {len(self.hop.accepted)}; {self.hop.story()}",
        )
        accepted, tried = seen
        assert len(accepted) == count
        assert tries in (None, tried)
        return list(accepted)

    def reports(self, count: int = 1) -> list[Transaction]:
        """The reports that reached this spot's sender, once there are ``count``."""
        return wait_for(
            lambda: found if len(found := self._reports()) >= count else [],
            lambda: f"{count} reports to {self.sender}; {self.relay.complaints()}",
        )

    def _reports(self) -> list[Transaction]:
        return [one for one in self.bed.outside.accepted if one.recipients == (self.sender,)]

    def wait_for_result(self, queue_id: str, status: str, recipient: str = "", said: str = "") -> str:
        """The first log line of a result."""
        who = (recipient or self.to()).replace(".", r"\.")
        return self.relay.wait_for_log(rf"{queue_id}: to=<{who}>, relay={self.name}, .*status={status} .*{said}")[0]

    def delivered(self, queue_id: str, recipient: str = "") -> None:
        """Wait until the log says so and the queue has let go of it."""
        self.wait_for_result(queue_id, "sent", recipient)
        self.bed.wait_until_gone(queue_id)

    def metric(self, sample: str, value: float, **labels: str) -> None:
        """Wait for a metric of this next hop; the page may be a second old."""
        self.relay.wait_for_metric(sample, value, next_hop=self.name, **labels)


class Bed:
    """A relay and its spots. ``config`` is laid over settings that retry quickly and never run out of patience."""

    def __init__(
        self, folder: Path, spots: int, config: Mapping[str, Any], *, second: bool, first: str, default: bool,
        protocol: str,
    ) -> None:  # fmt: skip
        """``second``: each route has a second next hop; ``first``: this one is in front of all others. ``default``:
        the rest is routed to ``outside``.
        """
        self.outside = NextHop()
        self.hops = [NextHop(protocol=protocol) for _ in range(spots)]
        self.seconds = [NextHop() for _ in range(spots if second else 0)]
        domains = [f"d{number}.example.com" for number in range(spots)]
        routes = []
        for number, domain in enumerate(domains):
            names = [first, *(hops[number].route for hops in (self.hops, self.seconds) if hops)]
            routes.append({"domains": [domain], "next_hops": [name for name in names if name]})
        self.relay = RelayRunner(
            folder,
            self.outside.route,
            config={
                "domain": [{"names": domains, "recipients": "any"}],
                "route": [*routes, *([{"domains": ["*"], "next_hops": [self.outside.route]}] if default else [])],
                "queue": {"retry_s": [0.4]},
                # A busy machine must not make a next hop late where a test is not about that.
                "delivery": {"express_deadline_s": 60.0},
            },
        )
        self.relay.configure(config)
        self.relay.start(build=False)
        # All that a look at the queue needs: reading dozens of routes for each would take longer than the look.
        self._view = folder / "view.toml"
        self._view.write_text(toml({"server": self.relay.config["server"], "listener": self.relay.config["listener"]}))
        self._next = 0

    def spot(self) -> Spot:
        """One that nobody has used."""
        number, self._next = self._next, self._next + 1
        return Spot(self, number, self.hops[number])

    # --- the queue, as an operator sees it ---
    def queue(self) -> dict[str, dict[str, Any]]:
        """``relay queue list --json`` by queue id."""
        listed = CliRunner().invoke(
            app,
            ["list", "--json", "--limit", "0", "--config", str(self._view)],
            env={key: None for key in os.environ if key.startswith("DMZ_RELAY")},
        )
        assert listed.exit_code == 0, listed.output
        return {message["id"]: message for message in map(json.loads, listed.stdout.splitlines())}

    def queued(self, queue_id: str) -> dict[str, Any]:
        """One message of the queue, which must be there."""
        messages = self.queue()
        assert queue_id in messages, f"{queue_id} is not in the queue: {sorted(messages)}"
        return messages[queue_id]

    def wait_for_queued(self, queue_id: str, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """One message of the queue, once it is as wanted."""
        return wait_for(
            lambda: message if (message := self.queue().get(queue_id)) and condition(message) else {},
            lambda: f"{queue_id} in the queue as wanted, only {self.queue().get(queue_id)}; {self.relay.complaints()}",
        )

    def wait_until_gone(self, queue_id: str) -> None:
        """Wait until the queue does not name it."""
        wait_for(lambda: queue_id not in self.queue(), lambda: f"end of {queue_id}; {self.relay.complaints()}")

    def by_next_hop(self, sample: str, **labels: str) -> dict[str, float]:
        """A metric's values that have these labels, by next hop."""
        _, text = self.relay.get("/metrics")
        return {
            found.labels["next_hop"]: found.value
            for family in text_string_to_metric_families(text)
            for found in family.samples
            if found.name == sample and labels.items() <= found.labels.items()
        }

    def close(self) -> list[str]:
        """The end; returns what the relay did that RFC 5321 forbids."""
        hops = [self.outside, *self.hops, *self.seconds]
        for hop in hops:
            hop.behave()
        try:
            self.relay.close()
        finally:
            for hop in hops:
                hop.close()
        return [violation for hop in hops for violation in hop.violations]


MakeBed = Callable[..., Bed]


def _beds() -> Iterator[MakeBed]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    folder.chmod(0o755)
    made: list[Bed] = []

    def make(
        spots: int = 3, *, second: bool = False, first: str = "", default: bool = True, protocol: str = "smtp",
        **config: Any,
    ) -> Bed:  # fmt: skip
        own = folder / f"relay-{len(made)}"
        own.mkdir()
        made.append(Bed(own, spots, config, second=second, first=first, default=default, protocol=protocol))
        return made[-1]

    yield make
    violations: list[str] = []
    problems: list[Exception] = []
    for bed in made:
        try:
            violations += bed.close()
        except (AssertionError, OSError) as problem:
            problems.append(problem)
    shutil.rmtree(folder)
    if problems:
        raise problems[0]
    assert violations == []


make_bed = pytest.fixture(_beds, name="make_bed")
"""Relays of a test's own, for settings that no other test wants."""

_module_beds = pytest.fixture(_beds, name="_module_beds", scope="module")


@pytest.fixture(scope="module")
def shared(_module_beds: MakeBed, request: pytest.FixtureRequest) -> Callable[[str], Bed]:
    """The relay of a way that a module's tests share, with as many spots as the module's ``SPOTS`` says."""
    made: dict[str, Bed] = {}

    def get(way: str) -> Bed:
        if way not in made:
            made[way] = _module_beds(request.module.SPOTS, delivery={"express": way == "express"})
        return made[way]

    return get


@pytest.fixture(params=["express", "durable"])
def way(request: pytest.FixtureRequest) -> str:
    """Both ways of a message."""
    return request.param


@pytest.fixture
def bed(shared: Callable[[str], Bed], way: str) -> Bed:
    """The shared relay of this way."""
    return shared(way)


@pytest.fixture
def spot(bed: Bed) -> Spot:
    """A next hop nobody has used."""
    return bed.spot()
