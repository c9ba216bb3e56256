"""How workers share the clients: who has more leaves the next one to another, and nobody waits for a worker that is stuck."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections import Counter

import pytest

from tests.bed.client import Client
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner

CLIENTS = 12
MANY = 100


@pytest.fixture
def relay(make_relay: MakeRelay, next_hop: NextHop) -> RelayRunner:
    config = {
        "server": {"workers": 2},
        "process": {"heartbeat_timeout_s": 300.0},
        "limits": {"sessions_per_client": 1000},
    }
    return make_relay(next_hop, config=config)


def by_worker(relay: RelayRunner, clients: int) -> Counter[int]:
    """How many of so many clients each worker has taken, by pid."""
    lines = relay.wait_for_log(r"smtpd\[\d+\]: connect from ", clients)
    return Counter(int(re.search(r"smtpd\[(\d+)\]", line)[1]) for line in lines)  # type: ignore[index]


def test_a_worker_without_sessions_gets_the_next_clients_and_nobody_waits_for_one_that_is_stuck(
    relay: RelayRunner,
) -> None:
    stuck, free = relay.workers()
    os.kill(stuck, signal.SIGSTOP)
    with contextlib.ExitStack() as clients:

        def come() -> Client:
            client = clients.enter_context(relay.client())
            assert client.greeting().code == 220
            return client

        for _ in range(CLIENTS):
            come()
        assert by_worker(relay, CLIENTS) == {free: CLIENTS}
        os.kill(stuck, signal.SIGCONT)
        for more in range(1, MANY):
            come()
            if by_worker(relay, CLIENTS + more)[stuck] >= CLIENTS // 2:
                break
        taken = by_worker(relay, CLIENTS + more)
        assert taken[stuck] >= CLIENTS // 2
        assert taken[free] - CLIENTS < MANY // 2


def test_a_worker_that_was_replaced_begins_without_the_sessions_of_the_old_one(relay: RelayRunner) -> None:
    first, second = relay.workers()
    with contextlib.ExitStack() as clients:
        for _ in range(CLIENTS):
            assert clients.enter_context(relay.client()).greeting().code == 220
        victim, _ = by_worker(relay, CLIENTS).most_common(1)[0]
        os.kill(victim, signal.SIGKILL)
        relay.wait_for_log("process_died")
        for more in range(1, MANY):
            client = clients.enter_context(relay.client())
            assert client.greeting().code == 220
            new = set(by_worker(relay, CLIENTS + more)) - {first, second}
            if new:
                break
        assert new
