"""The lanes of mail exchangers: bounded, forgotten when nobody needs them, and never lost with mail in them."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from relay.config.schema import Config
from relay.mail.address import Mailbox
from relay.mail.answer import Answer, Stage
from relay.outbound import lanes as module
from relay.outbound.lanes import Lanes
from relay.policy.exchange import Exchanger
from relay.policy.route import NextHop
from relay.telemetry.maillog import MailLog
from tests.unit.scripted_hop import Hop, Message, Talk, brief, good, wait_until


class Shown:
    """What the lanes tell the metrics."""

    def __init__(self) -> None:
        self.connections: dict[str, int] = {}
        self.states: dict[str, str] = {}

    def next_hop_connections(self, name: str, count: int) -> None:
        self.connections[name] = count

    def next_hop_state(self, name: str, state: str) -> None:
        self.states[name] = state


class Site:
    """Lanes whose DNS is a table."""

    def __init__(self, hop: Hop, monkeypatch: pytest.MonkeyPatch) -> None:
        port = hop.lane.next_hop.port
        self.lines: list[str] = []
        self.hosts: defaultdict[str, tuple[str, ...]] = defaultdict(lambda: ("127.0.0.1",))
        self.exchangers: dict[str, tuple[str, ...]] = {}
        self.shown = Shown()
        self.config = self.configuration("", port)
        self.lanes = Lanes(self.config, 1, MailLog(self, "postfix", "mx"), self.shown)
        monkeypatch.setattr(self.lanes._exchanges, "find", self.find)
        monkeypatch.setattr(self.lanes._exchanges, "known", self.known)

    @staticmethod
    def configuration(extra: str, port: int) -> Config:
        lines = "".join(f"{name}.test smtp:{name}.test:{port}\n" for name in "abcdef")
        return Config.model_validate(
            {
                "server": {"hostname": "mx.example.com"},
                "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
                "delivery": {"tls": "off", "command_timeout_s": 5.0},
                "dns": {"servers": ["192.0.2.53"]},
                "routing": {"table": lines + extra},
            }
        )

    def known(self, domain: str, reach: str = "") -> tuple[Exchanger, ...]:
        return tuple(
            Exchanger(number, host, self.hosts[host])
            for number, host in enumerate(self.exchangers.get(domain, (f"mx.{domain}",)))
        )

    async def find(self, domain: str, reach: str) -> tuple[Exchanger, ...]:
        return self.known(domain)

    async def to(self, domain: str):
        mailbox = Mailbox(f"user@{domain}")
        return await self.lanes.find(self.lanes.of(mailbox), mailbox)

    def write(self, line: str) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        pass


@pytest.fixture
async def hop():
    made = Hop()
    made.scripts = [good]
    await made.start()
    yield made
    await made.end()


@pytest.fixture
async def site(hop, monkeypatch):
    made = Site(hop, monkeypatch)
    yield made
    for lane in list(made.lanes._all()):
        for connection in list(lane._connections):
            connection.transport.abort()
        lane.close()
    await asyncio.sleep(0.01)


async def delivered(lane) -> list[Answer]:
    message = Message()
    lane.submit(message, express=False)
    async with asyncio.timeout(20):
        return await message.result


TAKEN = [(Stage.FINAL, 250, "2.0.0")]


async def test_a_domain_gets_its_hosts_in_order_and_its_next_message_the_same_lanes(site):
    site.exchangers["a.test"] = ("one.test", "two.test")
    first = await site.to("a.test")
    assert [lane.next_hop.host for lane in first] == ["one.test", "two.test"]
    assert brief(await delivered(first[0])) == TAKEN
    mailbox = Mailbox("user@a.test")
    assert site.lanes.known(site.lanes.of(mailbox), mailbox) == first


async def test_a_host_nobody_has_spoken_to_is_not_known(site):
    mailbox = Mailbox("user@a.test")
    assert site.lanes.known(site.lanes.of(mailbox), mailbox) == []
    await site.to("a.test")
    assert site.lanes.known(site.lanes.of(mailbox), mailbox)


async def test_the_next_address_of_a_host_is_tried_when_one_fails(site):
    site.hosts["mx.a.test"] = ("127.0.0.2", "127.0.0.1")
    [lane] = await site.to("a.test")
    assert brief(await delivered(lane)) == TAKEN


async def test_where_all_are_busy_there_is_a_bound_and_an_empty_one_makes_room(site, monkeypatch):
    monkeypatch.setattr(module, "MX_LANES", 2)
    await site.to("a.test")
    [second] = await site.to("b.test")
    second._queued.append(Message())
    [third] = await site.to("c.test")  # in the place of the first
    third._queued.append(Message())
    assert {lane.next_hop.host for lane in site.lanes._found.values()} == {"mx.b.test", "mx.c.test"}
    full = await site.to("d.test")
    assert (full.stage, full.code, full.enhanced) == (Stage.ROUTE, 451, "4.4.5")
    second._queued.clear()
    third._queued.clear()


async def test_what_nobody_needs_is_forgotten(site, monkeypatch):
    [lane] = await site.to("a.test")
    assert brief(await delivered(lane)) == TAKEN
    site.lanes.sweep()
    assert site.shown.connections["mx"] == 1
    monkeypatch.setattr(module, "MX_LANE_S", -1.0)
    site.lanes.sweep()
    assert site.lanes._found, "it still has a connection"
    for connection in list(lane._idle):
        connection.quit()
    site.lanes.sweep()
    assert not site.lanes._found
    assert site.shown.connections["mx"] == 0
    assert "mx.a.test" not in str(site.shown.connections)


async def test_a_forgotten_host_that_is_somebodys_second_choice_serves_and_keeps_its_deadlines(site, hop, monkeypatch):
    """The lane is held by an attempt only; its connections must be swept all the same."""

    async def deaf(talk: Talk) -> None:
        await talk.hello("PIPELINING")
        await talk.until_closed()

    hop.scripts = [deaf, good]
    site.exchangers["a.test"] = ("one.test", "two.test")
    _, second = await site.to("a.test")
    monkeypatch.setattr(module, "MX_LANE_S", -1.0)
    site.lanes.sweep()
    assert not site.lanes._found
    message = Message()
    second.submit(message, express=False)
    await wait_until(lambda: second._connections)
    assert site.lanes.busy
    second.now = lambda: 1e9
    site.lanes.sweep()
    assert (await message.result)[0].text == "timed out waiting for an answer"
    await wait_until(lambda: second.empty)
    site.lanes.sweep()
    assert not site.lanes.busy
    second.now = asyncio.get_running_loop().time
    assert brief(await delivered(second)) == TAKEN


async def test_a_host_taken_out_of_the_configuration_is_swept_until_its_last_answer(site, hop):
    async def slow(talk: Talk) -> None:
        await talk.hello("PIPELINING")
        await talk.until_closed()

    hop.scripts = [slow]
    port = hop.lane.next_hop.port
    site.lanes.configure(Site.configuration(f"g.test smtp:[127.0.0.1]:{port}\n", port), 1)
    lane = site.lanes._lanes[NextHop("127.0.0.1", port)]
    message = Message()
    lane.submit(message, express=False)
    await wait_until(lambda: lane._connections)
    site.lanes.configure(Site.configuration("", port), 1)
    assert lane not in site.lanes._lanes.values()
    lane.now = lambda: 1e9
    site.lanes.sweep()
    assert (await message.result)[0].code == 0


async def test_strangers_are_not_probed_without_mail(site, hop):
    site.hosts["mx.a.test"] = ("127.0.0.2",)
    [lane] = await site.to("a.test")
    for _ in range(3):
        await delivered(lane)
    assert not lane.up
    lane.now = lambda: 1e9
    site.lanes.sweep()
    assert lane.empty
    assert lane.worth_trying
    assert any("next_hop_down" in line and "error" not in line for line in site.lines)


async def test_a_draining_worker_gives_new_hosts_no_express_mail(site):
    site.lanes.drain()
    [lane] = await site.to("a.test")
    assert not lane.has_room()


@pytest.mark.parametrize(
    ("said", "table", "largest"),
    [
        ({"one": 10, "two": 30}, "", 30),
        ({"one": 10}, "", None),
        ({"one": 10, "two": 0}, "", None),
        ({"one": 10, "two": 30}, "user@own.example smtp:[three]\n", None),
        ({"one": 10, "two": 30, "three": 40}, "user@own.example smtp:[three]\n", 40),
        ({"one": 10, "two": 30}, "user@own.example error:no\n", 30),
        ({"one": 10, "two": 30}, "user@own.example smtp:\n", None),
        ({"one": 10, "two": 30}, "user@elsewhere.example smtp:[three]\n* smtp:\n", 30),
    ],
)
async def test_the_largest_message_is_known_when_every_next_hop_of_the_own_domains_has_said_it(said, table, largest):
    config = Config.model_validate(
        {
            "server": {"hostname": "mx.example.com"},
            "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
            "domain": [{"names": ["own.example"]}],
            "route": [{"domains": ["own.example"], "next_hops": ["smtp:[one]", "smtp:[two]"]}],
            "dns": {"servers": ["192.0.2.53"]},
            "routing": {"table": table},
        }
    )
    lanes = Lanes(config, 1, None, Shown())
    for name, size in said.items():
        lanes._lanes[NextHop(name, 25)].largest = size
    assert lanes.largest == largest
