"""Connection budgets: hub and clients over real sockets, in one loop. In the tree they run on uvloop."""

from __future__ import annotations

import asyncio
import socket
import sys
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config.schema import Limits
from relay.hub import client as hub_client
from relay.hub import reach
from relay.hub.budgets import CHANGES, Budgets
from relay.hub.client import HubClient
from relay.hub.frames import ANSWER, REQUEST, VERSION, Ask, Tell, Verdict, client_key
from relay.hub.server import ANNOUNCED_MAX_FACTOR, Hub, WorkerLink
from relay.policy.abuse import KEYS, network_key

A, B = "192.0.2.1", "192.0.2.2"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch) -> None:
    """Most tests here have no hub to wait for."""
    monkeypatch.setattr(reach, "START_WAIT_S", 0.05)


@pytest.fixture
def address(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("h") / "hub")


# From Python 3.13 on, closing a server would remove the socket's name, which here belongs to the supervisor.
KEEP_THE_NAME: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}


class Bench:
    """One hub at a time on a listening socket that outlives it, as the supervisor's does."""

    def __init__(self, address: str, sessions: int, per_client: int) -> None:
        self.address = address
        self.limits = Limits(sessions=sessions, sessions_per_client=per_client)
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(address)
        self.listening.listen(16)
        self.clients: list[HubClient] = []
        self.hub: Hub | None = None
        self.incarnation = 0

    async def start_hub(self, expected: int = 1) -> Hub:
        self.incarnation += 1
        loop = asyncio.get_running_loop()
        self.hub = hub = Hub(self.limits, expected, loop, first=self.incarnation == 1)
        copy = self.listening.dup()
        copy.settimeout(0)
        self.server = await loop.create_unix_server(lambda: WorkerLink(hub), sock=copy, **KEEP_THE_NAME)
        return hub

    async def kill_hub(self) -> None:
        """What the end of its process does: every connection breaks."""
        assert self.hub is not None
        self.server.close()
        for link in tuple(self.hub.workers):
            link.close()
        self.hub = None
        await until(lambda: not any(client.connected for client in self.clients))

    async def worker(self, live_workers: int = 1) -> HubClient:
        client = HubClient(self.address, self.limits.sessions, self.limits.sessions_per_client, live_workers)
        self.clients.append(client)
        await client.start()
        if self.hub is not None:
            await until(lambda: client.connected)
        return client

    async def close(self) -> None:
        for client in self.clients:
            client.stop()
        if self.hub is not None:
            await self.kill_hub()
        self.listening.close()
        await asyncio.sleep(0)


@pytest.fixture
async def make_bench(address: str):
    benches: list[Bench] = []

    def make(sessions: int = 100, per_client: int = 3) -> Bench:
        benches.append(Bench(address, sessions, per_client))
        return benches[-1]

    yield make
    for bench in benches:
        await bench.close()


async def until(true) -> None:
    """Until something becomes true; the test's own time-out is the deadline."""
    while not true():
        await asyncio.sleep(0.005)


async def ask(worker: HubClient, client: str) -> Verdict:
    answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
    worker.open(client, answer.set_result)
    return await answer


# --- keys ---
def test_an_ipv6_client_is_counted_by_its_64() -> None:
    assert client_key("2001:db8:0:1::1") == client_key("2001:db8:0:1:ffff::9") != client_key("2001:db8:0:2::1")


def test_an_ipv4_client_is_the_same_in_either_spelling() -> None:
    assert client_key(f"::ffff:{A}") == client_key(A)


def test_a_link_local_client_may_carry_its_interface() -> None:
    assert client_key("fe80::1%eth0") == client_key("fe80::2")


@given(st.ip_addresses(v=4), st.ip_addresses(v=6, network="2000::/3"))
def test_ipv4_clients_share_no_key_with_each_other_or_with_public_ipv6(four, six) -> None:
    assert client_key(str(four)) == int(four)
    assert client_key(str(six)) != client_key(str(four))


@pytest.mark.parametrize("text", ["", "mx.example.com", "192.0.2", "192.0.2.1:25", "1::2::3", "192.0.2.256"])
def test_what_is_no_address_has_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="is not an IP address"):
        client_key(text)


# --- counting ---
async def test_the_limit_of_a_client_is_exact_over_all_workers(make_bench) -> None:
    bench = make_bench(per_client=3)
    hub = await bench.start_hub()
    one, two = await bench.worker(2), await bench.worker(2)
    verdicts = [await ask(worker, A) for worker in (one, two, one, two, one)]
    assert verdicts == [Verdict.OK] * 3 + [Verdict.CLIENT_BUSY] * 2
    assert await ask(two, B) is Verdict.OK
    two.close(A)
    await until(lambda: hub.counts.total == 3)
    assert [await ask(one, A), await ask(one, A)] == [Verdict.OK, Verdict.CLIENT_BUSY]


async def test_the_limit_of_all_sessions_is_exact_over_all_workers(make_bench) -> None:
    bench = make_bench(sessions=10, per_client=10)
    await bench.start_hub()
    workers = [await bench.worker(3) for _ in range(3)]
    verdicts = await asyncio.gather(*(ask(workers[n % 3], str(IPv4Address(n))) for n in range(30)))
    assert sorted(verdicts) == [Verdict.OK] * 10 + [Verdict.BUSY] * 20


async def test_a_worker_that_dies_takes_its_counts_along(make_bench) -> None:
    bench = make_bench(per_client=2)
    hub = await bench.start_hub()
    dies, lives = await bench.worker(), await bench.worker()
    assert [await ask(dies, A), await ask(dies, A), await ask(lives, A)] == [
        Verdict.OK,
        Verdict.OK,
        Verdict.CLIENT_BUSY,
    ]
    dies.stop()
    await until(lambda: len(hub.workers) == 1)
    assert await ask(lives, A) is Verdict.OK
    lives.close(A)
    await until(lambda: (hub.counts.total, hub.counts.clients) == (0, {}))


async def test_new_limits_hold_for_the_next_session(make_bench) -> None:
    bench = make_bench(per_client=1)
    hub = await bench.start_hub()
    worker = await bench.worker()
    assert [await ask(worker, A), await ask(worker, A)] == [Verdict.OK, Verdict.CLIENT_BUSY]
    hub.counts.limit(Limits(sessions=100, sessions_per_client=2))
    assert [await ask(worker, A), await ask(worker, A)] == [Verdict.OK, Verdict.CLIENT_BUSY]


# --- without a hub ---
async def test_without_a_hub_a_worker_keeps_to_its_share(make_bench) -> None:
    bench = make_bench(sessions=9, per_client=5)
    worker = await bench.worker(live_workers=2)
    assert not worker.connected
    assert [await ask(worker, A) for _ in range(3)] == [Verdict.OK, Verdict.OK, Verdict.CLIENT_BUSY]
    assert [await ask(worker, B) for _ in range(3)] == [Verdict.OK, Verdict.OK, Verdict.BUSY]
    worker.live_workers = 1
    assert await ask(worker, A) is Verdict.OK
    worker.close(B)
    assert await ask(worker, A) is Verdict.OK


async def test_the_share_is_never_less_than_one_session(make_bench) -> None:
    bench = make_bench(sessions=100, per_client=1)
    worker = await bench.worker(live_workers=4)
    assert [await ask(worker, A), await ask(worker, A)] == [Verdict.OK, Verdict.CLIENT_BUSY]


async def test_after_a_hub_s_death_counts_are_exact_again(make_bench) -> None:
    bench = make_bench(per_client=4)
    await bench.start_hub()
    one, two = await bench.worker(2), await bench.worker(2)
    for worker in (one, one, two):
        assert await ask(worker, A) is Verdict.OK
    await bench.kill_hub()
    one.close(A)
    assert await ask(two, A) is Verdict.OK  # by its share of 2
    hub = await bench.start_hub(expected=2)
    await until(lambda: one.connected and two.connected)
    assert hub.counts.clients == {client_key(A): 3}
    assert [await ask(one, A), await ask(two, A)] == [Verdict.OK, Verdict.CLIENT_BUSY]


async def test_a_second_hub_lets_nobody_ask_before_all_have_announced(make_bench) -> None:
    bench = make_bench(per_client=2)
    await bench.start_hub()
    worker = await bench.worker(2)
    await bench.kill_hub()
    # The other worker is slow to announce: a bare connection that has not said HELLO.
    hub = await bench.start_hub(expected=2)
    reader, writer = await asyncio.open_unix_connection(bench.address)
    await until(lambda: len(hub.workers) == 2 and any(link.greeted for link in hub.workers))
    assert not worker.connected
    writer.write(REQUEST.pack(Ask.ANNOUNCE, 2, client_key(A)) + REQUEST.pack(Ask.HELLO, VERSION, 0))
    assert ANSWER.unpack(await reader.readexactly(ANSWER.size)) == (Tell.WELCOME, 0, VERSION)
    await until(lambda: worker.connected)
    assert await ask(worker, A) is Verdict.CLIENT_BUSY
    writer.close()
    await writer.wait_closed()


async def test_a_second_hub_does_not_wait_for_ever_for_a_worker(make_bench) -> None:
    bench = make_bench()
    await bench.start_hub()
    worker = await bench.worker()
    await bench.kill_hub()
    await bench.start_hub(expected=5)
    await until(lambda: worker.connected)


async def test_sessions_between_announcement_and_welcome_are_counted(make_bench) -> None:
    bench = make_bench(per_client=3)
    await bench.start_hub()
    worker = await bench.worker()
    assert await ask(worker, A) is Verdict.OK
    await bench.kill_hub()
    hub = await bench.start_hub(expected=2)
    await until(lambda: any(link.greeted for link in hub.workers))
    assert not worker.connected
    worker.close(A)
    assert await ask(worker, B) is Verdict.OK
    await until(lambda: worker.connected)
    await until(lambda: hub.counts.clients == {client_key(B): 1})


async def test_a_hub_that_hangs_is_left_and_questions_are_answered_by_the_share(make_bench, monkeypatch) -> None:
    monkeypatch.setattr(hub_client, "ANSWER_TIMEOUT_S", 0.05)
    bench = make_bench(per_client=1)
    bench.listening.settimeout(0)
    loop = asyncio.get_running_loop()
    starting = asyncio.create_task(bench.worker())
    stuck, _ = await loop.sock_accept(bench.listening)
    await loop.sock_sendall(stuck, ANSWER.pack(Tell.WELCOME, 0, VERSION))
    worker = await starting
    assert worker.connected
    answers = [ask(worker, A), ask(worker, A)]
    assert await asyncio.gather(*answers) == [Verdict.OK, Verdict.CLIENT_BUSY]
    assert not worker.connected
    stuck.close()


async def test_stopping_answers_what_is_open(make_bench) -> None:
    bench = make_bench()
    bench.listening.settimeout(0)
    loop = asyncio.get_running_loop()
    starting = asyncio.create_task(bench.worker())
    stuck, _ = await loop.sock_accept(bench.listening)
    await loop.sock_sendall(stuck, ANSWER.pack(Tell.WELCOME, 0, VERSION))
    worker = await starting
    question = asyncio.create_task(ask(worker, A))
    await asyncio.sleep(0)
    worker.stop()
    assert await question is Verdict.OK
    stuck.close()


# --- a worker that lies ---
@pytest.mark.parametrize(
    "frames",
    [
        REQUEST.pack(Ask.CLOSE, 0, 1),
        REQUEST.pack(Ask.HELLO, VERSION + 1, 0),
        REQUEST.pack(99, 0, 0),
        REQUEST.pack(Ask.ANNOUNCE, 2**32 - 1, 1),
        REQUEST.pack(Ask.ANNOUNCE, 1, 1) * (100 * ANNOUNCED_MAX_FACTOR + 1),
    ],
    ids=["closes what it has not", "other version", "unknown type", "announces billions", "announces without end"],
)
async def test_a_connection_that_makes_no_sense_ends_without_a_trace(make_bench, frames: bytes) -> None:
    bench = make_bench()
    hub = await bench.start_hub()
    worker = await bench.worker()
    reader, writer = await asyncio.open_unix_connection(bench.address)
    writer.write(frames)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    assert await ask(worker, A) is Verdict.OK
    await until(lambda: len(hub.workers) == 1)
    assert hub.counts.clients == {client_key(A): 1}


async def test_frames_may_arrive_in_any_pieces(make_bench) -> None:
    bench = make_bench(per_client=1)
    await bench.start_hub()
    reader, writer = await asyncio.open_unix_connection(bench.address)
    frames = REQUEST.pack(Ask.HELLO, VERSION, 0) + REQUEST.pack(Ask.OPEN, 7, 1) + REQUEST.pack(Ask.OPEN, 8, 1)

    for at in range(0, len(frames), 5):
        writer.write(frames[at : at + 5])
        await writer.drain()
        await asyncio.sleep(0)
    answers: list[tuple[int, int, int]] = []
    while len(answers) < 3:
        answer = ANSWER.unpack(await reader.readexactly(ANSWER.size))
        if answer[0] != Tell.LOAD:  # comes by time
            answers.append(answer)
    assert answers == [
        (Tell.WELCOME, 0, VERSION),
        (Tell.VERDICT, Verdict.OK, 7),
        (Tell.VERDICT, Verdict.CLIENT_BUSY, 8),
    ]
    writer.close()
    await writer.wait_closed()


# --- what clients spend ---
def learn(budgets: Budgets, limit: int) -> None:
    budgets.configure(Limits(unknown_recipients_per_client=limit, unknown_recipients_per_network=0))


async def test_what_a_client_spends_with_one_worker_counts_with_all_others(make_bench) -> None:
    bench = make_bench()
    await bench.start_hub()
    one, two, three = [await bench.worker(3) for _ in range(3)]
    now = asyncio.get_running_loop().time()
    for worker in (one, two, three):
        learn(worker.budgets, 10)
    for worker in (one, two):
        for _ in range(5):
            worker.budgets.unknown(A, now)
        worker.exchange()
    await until(lambda: all(worker.budgets.blocks(A, now) is not None for worker in (one, two, three)))
    assert three.budgets.blocks(B, now) is None


async def test_without_a_hub_each_worker_counts_for_itself(make_bench) -> None:
    bench = make_bench()
    worker = await bench.worker()
    learn(worker.budgets, 3)
    now = asyncio.get_running_loop().time()
    for _ in range(3):
        assert worker.budgets.blocks(A, now) is None
        worker.budgets.unknown(A, now)
        worker.exchange()
    assert worker.budgets.blocks(A, now) is not None


async def test_workers_hear_how_many_sessions_are_open_everywhere(make_bench) -> None:
    bench = make_bench()
    await bench.start_hub()
    one, two = await bench.worker(2), await bench.worker(2)
    await ask(one, A)
    await ask(two, B)
    await until(lambda: one.load == two.load == 2)
    one.close(A)
    await until(lambda: one.load == two.load == 1)
    later = await bench.worker(3)
    await until(lambda: later.load == 1)
    await bench.kill_hub()
    assert (one.load, two.load) == (0, 2)  # no session, and one for each of two


def test_what_budgets_remember_has_a_bound() -> None:
    budgets = Budgets()
    learn(budgets, 1)
    for number in range(KEYS + 100):
        budgets.unknown(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(budgets._buckets[0]) == KEYS
    assert len(list(budgets.changes(0.0))) == CHANGES
    assert list(budgets.changes(1e9)) == []
    assert budgets.blocked == {}


@given(st.ip_addresses(v=4), st.ip_addresses(v=6, network="2000::/3"))
def test_keys_of_networks_are_no_keys_of_clients(four, six) -> None:
    clients = {client_key(str(four)), client_key(str(six))}
    networks = {network_key(key) for key in clients}
    assert len(clients | networks) == 4
    assert all(key < 1 << 50 for key in networks)
