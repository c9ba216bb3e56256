"""The web member in its real place: a control socket to a supervisor's end, an inherited listening socket, a spool."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import values
from prometheus_client.parser import text_string_to_metric_families

from relay.config.schema import Config
from relay.control import (
    WEB_SLOT,
    Abort,
    Beat,
    Child,
    Commit,
    Drain,
    Link,
    Prepare,
    Prepared,
    Ready,
    Refused,
    Reopen,
    Secrets,
    ToSupervisor,
    pair,
)  # fmt: skip
from relay.directory.layout import Header, pack
from relay.mail import reply
from relay.queue.prepare import prepare
from relay.telemetry import catalogue, maillog, valuefiles
from relay.telemetry.metrics import Metrics
from relay.web import health, member
from relay.web.collect import member_name
from relay.web.member import serve
from tests.bed.waiting import wait_for


def write_snapshot(path: Path, generation: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_bytes(b"".join(pack(Header(generation, 1e9, 0, "0" * 16, 3, 2, 1), [])))
    beside.rename(path)


def configuration(tmp_path: Path, **changes: Any) -> Config:
    tables: dict[str, Any] = {
        "server": {"hostname": "mx.example.org", "spool": tmp_path / "spool"},
        "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
        "domain": [{"names": ["example.org"]}],
        "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:2525"]}],
        "log": {"file": tmp_path / "log"},
    }
    return Config.model_validate({**tables, **changes})


@dataclass
class Tree:
    """What a test holds of a tree: the supervisor's end, a worker's counters, the address of the pages."""

    config: Config
    link: Link
    address: tuple[str, int]
    worker: Metrics
    task: asyncio.Task[int]
    heard: list[ToSupervisor]

    async def raw(self, octets: bytes) -> bytes:
        """Everything the server says to ``octets`` until it closes; nothing when it breaks the connection off."""
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(octets)
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    async def get(self, path: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
        answer = await self.raw(f"{method} {path} HTTP/1.1\r\nHost: relay\r\n\r\n".encode())
        head, _, body = answer.decode().partition("\r\n\r\n")
        status, *fields = head.split("\r\n")
        return int(status.split()[1]), dict(field.lower().split(": ", 1) for field in fields), body

    async def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        status, _, body = await self.get("/metrics")
        assert status == 200
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found

    async def reasons(self) -> list[str]:
        status, _, body = await self.get("/readyz")
        found = json.loads(body)
        assert (status == 200) is found["ready"] is (found["reasons"] == [])
        return list(found["reasons"])

    async def answer(self, kind: type[ToSupervisor]) -> ToSupervisor:
        """The next message of this class."""

        def look() -> ToSupervisor | None:
            messages, _ = self.link.receive()
            self.heard += messages
            return next((message for message in self.heard if isinstance(message, kind)), None)

        found = await asyncio.to_thread(wait_for, look, kind.__name__)
        self.heard.remove(found)
        return found


@pytest.fixture(autouse=True)
def own_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of the metrics and the log of the process are globals; members have a process each, tests do not."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setattr(maillog, "_process_log", None)
    monkeypatch.setattr(member, "FRESH_S", 0.0)  # every request of a test looks anew


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Tree]:
    ours, theirs = pair()
    listening = socket.create_server(("127.0.0.1", 0))
    child = Child(
        config=config, secrets=Secrets(), slot=WEB_SLOT, incarnation=1, live_workers=1, control=theirs, listeners=(),
        web=listening, hub=None, hub_address="", boot_id="boot",
    )  # fmt: skip
    worker = Metrics(config.server.spool / "metrics", "worker-0")
    worker.flush()
    tree = Tree(config, Link(ours), listening.getsockname(), worker, asyncio.create_task(serve(child)), [])
    await tree.answer(Ready)
    try:
        yield tree
    finally:
        if not tree.task.done():
            tree.link.send(Drain())
        assert await asyncio.wait_for(tree.task, 20) == 0
        worker.close()
        theirs.close()
        ours.close()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = configuration(tmp_path)
    config.server.spool.mkdir()
    valuefiles.empty(config.server.spool / "metrics")
    prepare(config.server.spool)
    write_snapshot(config.snapshot_path)
    return config


@pytest.fixture
async def tree(config: Config) -> AsyncIterator[Tree]:
    async with running(config) as tree:
        yield tree


async def test_the_page_shows_what_workers_counted_and_what_the_spool_holds(tree: Tree) -> None:
    tree.worker.replied(reply.OK_MAIL, 3)
    tree.worker.flush()
    found = await tree.metrics()
    assert found["relay_replies_total"][("code", "250"), ("enhanced", "2.1.0"), ("reason", "mail_ok")] == 3
    assert found["relay_queue_messages"] == {(): 0}
    assert found["relay_queue_readable"] == {(): 1}
    assert found["relay_snapshot_generation"] == {(): 7}
    assert found["relay_snapshot_addresses"] == {(): 3}
    assert found["relay_snapshot_age_seconds"][()] > 0
    assert {labels[0][1] for labels in found["relay_process_resident_bytes"]} >= {"supervisor"}
    assert min(found["relay_process_resident_bytes"].values()) > 0


@pytest.mark.parametrize(
    ("command", "name"),
    [("relay-worker-0", "worker-0"), ("relay: worker 0", "worker-0"), ("relay", "other"), ('x" \n', "x?-?")],
)
def test_a_process_is_named_as_its_value_files_are(command: str, name: str) -> None:
    assert member_name(command) == name


async def test_every_metric_read_at_scrape_time_is_on_the_page(tree: Tree) -> None:
    _, _, body = await tree.get("/metrics")
    types = {(family.name, family.type) for family in text_string_to_metric_families(body)}
    assert {(family.name, family.type) for family in catalogue.SCRAPED} <= types


async def test_a_healthy_relay_is_alive_and_ready(tree: Tree) -> None:
    assert (await tree.get("/livez"))[0] == 200
    assert await tree.reasons() == []


async def test_a_missing_snapshot_makes_it_unready_and_a_new_one_ready_again(tree: Tree) -> None:
    path = tree.config.snapshot_path
    path.unlink()
    (why,) = await tree.reasons()
    assert str(path) in why
    assert "relay directory build" in why
    assert "relay_snapshot_generation" not in await tree.metrics()

    path.write_bytes(b"nonsense" * 100)
    (why,) = await tree.reasons()
    assert "not a snapshot" in why

    write_snapshot(path, generation=8)
    assert await tree.reasons() == []
    assert (await tree.metrics())["relay_snapshot_generation"] == {(): 8}


async def test_without_a_domain_that_uses_the_directory_no_snapshot_is_needed(config: Config) -> None:
    config.snapshot_path.unlink()
    open_domain = config.domain[0].model_copy(update={"recipients": "any"})
    async with running(config.model_copy(update={"domain": [open_domain]})) as tree:
        assert await tree.reasons() == []


async def test_without_its_queue_it_is_not_ready_and_the_page_still_answers(tree: Tree) -> None:
    shutil.rmtree(tree.config.server.spool / "queue")
    spool, queue = await tree.reasons()
    assert spool.startswith("spool: ")
    assert queue.startswith("queue: ")
    found = await tree.metrics()
    assert found["relay_queue_readable"] == {(): 0}
    assert "relay_queue_messages" not in found
    assert "relay_spool_free_bytes" not in found


async def test_a_full_disk_makes_it_unready(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SPOOL_FREE_OCTETS", 1 << 62)  # more than any disk has
    (why,) = await tree.reasons()
    assert why.startswith("spool: ")
    assert "make room" in why


async def test_when_no_worker_turns_its_loop_it_is_not_ready(config: Config) -> None:
    process = config.process.model_copy(update={"heartbeat_timeout_s": 0.5})
    async with running(config.model_copy(update={"process": process})) as tree:
        stopped = await asyncio.to_thread(wait_for, asyncio_reasons(tree), "silence of the worker noticed")
        assert stopped == ["workers: none is alive; see the log"]
        tree.worker.flush()
        assert await tree.reasons() == []


def asyncio_reasons(tree: Tree) -> Callable[[], list[str]]:
    """``tree.reasons`` for a thread."""
    loop = asyncio.get_running_loop()
    return lambda: asyncio.run_coroutine_threadsafe(tree.reasons(), loop).result()


async def test_a_damaged_value_file_does_not_take_the_page_away(tree: Tree) -> None:
    (tree.config.server.spool / "metrics" / "counter_worker-9.db").write_bytes(b"\xff" * 4096)
    found = await tree.metrics()
    assert found["relay_metrics_files_unreadable"] == {(): 1}
    assert found["relay_queue_readable"] == {(): 1}


@pytest.mark.parametrize("path", ["/", "/metrics/", "/admin", "/livez/../metrics", "//metrics"])
async def test_there_are_no_other_pages(tree: Tree, path: str) -> None:
    assert (await tree.get(path))[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
async def test_only_get_and_head_are_answered(tree: Tree, method: str) -> None:
    status, fields, _ = await tree.get("/metrics", method)
    assert (status, fields["allow"]) == (405, "get, head")


async def test_head_says_what_get_would_without_a_body(tree: Tree) -> None:
    status, fields, body = await tree.get("/livez", "HEAD")
    assert (status, body) == (200, "")
    assert int(fields["content-length"]) > 0


@pytest.mark.parametrize(
    "request_octets",
    [
        b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: relay\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
async def test_no_answer_names_a_program_version_and_the_connection_ends(tree: Tree, request_octets: bytes) -> None:
    answer = (await tree.raw(request_octets)).lower()
    assert answer.startswith(b"http/1.")
    assert b"aiohttp" not in answer
    assert b"python" not in answer


async def test_a_connection_that_asks_nothing_is_closed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "CONNECTION_S", 0.05)
    assert await tree.raw(b"GET /livez HTTP/1.1\r\n") == b""


async def test_connections_beyond_the_bound_are_refused_and_the_next_are_served_again(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "CONNECTIONS", 1)
    _, writer = await asyncio.open_connection(*tree.address)
    assert await tree.raw(b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n") == b""
    writer.close()
    await writer.wait_closed()

    async def served() -> bytes:
        return await tree.raw(b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n")

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(
        wait_for, lambda: asyncio.run_coroutine_threadsafe(served(), loop).result(), "service after the crowd"
    )


async def test_many_askers_at_once_cost_one_look(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "FRESH_S", 3600.0)
    first = await tree.metrics()
    tree.worker.late()
    tree.worker.flush()
    again = await asyncio.gather(*(tree.metrics() for _ in range(10)))
    assert all(page == first for page in again)


async def test_it_beats(tree: Tree) -> None:
    await tree.answer(Beat)


async def test_a_new_configuration_is_prepared_then_taken(tree: Tree, tmp_path: Path) -> None:
    other = tmp_path / "other" / "snapshot"
    directory = tree.config.directory.model_copy(update={"snapshot": other})
    tree.link.send(Prepare(tree.config.model_copy(update={"directory": directory}), Secrets()))
    await tree.answer(Prepared)
    assert await tree.reasons() == []  # nothing changes before the commit
    tree.link.send(Commit())
    missing = await asyncio.to_thread(wait_for, asyncio_reasons(tree), "commit")
    assert str(other) in missing[0]


async def test_a_log_that_cannot_be_opened_refuses_the_configuration(tree: Tree, tmp_path: Path) -> None:
    log = tree.config.log.model_copy(update={"file": tmp_path / "nowhere" / "log"})
    tree.link.send(Prepare(tree.config.model_copy(update={"log": log}), Secrets()))
    refused = await tree.answer(Refused)
    assert isinstance(refused, Refused)
    assert "nowhere" in refused.why
    tree.link.send(Abort())
    assert await tree.reasons() == []


async def test_it_opens_its_log_again(tree: Tree) -> None:
    path = tree.config.log.file
    assert path is not None
    path.rename(path.with_suffix(".1"))
    tree.link.send(Reopen())
    await asyncio.to_thread(wait_for, path.exists, "new log")


async def test_a_drain_ends_it_and_the_port_is_free(tree: Tree) -> None:
    tree.link.send(Drain())
    assert await asyncio.wait_for(tree.task, 20) == 0
    with pytest.raises(ConnectionRefusedError):
        await tree.raw(b"")


AFTER_PRELOAD = """
import asyncio, builtins, os, socket, sys
from pathlib import Path
from relay.config.schema import Config
from relay.control import Child, Drain, Link, Secrets, WEB_SLOT, pair
from relay.telemetry import valuefiles
from relay.web import server

assert "aiohttp" not in sys.modules
config = Config.model_validate_json(sys.argv[1])
valuefiles.empty(config.server.spool / "metrics")
server.preload()
ours, theirs = pair()
listening = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    ours.close()
    before = set(sys.modules)
    server.run(Child(
        config=config, secrets=Secrets(), slot=WEB_SLOT, incarnation=2, live_workers=1, control=theirs, listeners=(),
        web=listening, hub=None, hub_address="", boot_id="boot",
    ))
    print(*sorted(set(sys.modules) - before), flush=True)
    os._exit(0)
theirs.close()
ours.setblocking(True)
ours.recv(1000)
for path in ("/metrics", "/readyz", "/livez", "/nothing"):
    with socket.create_connection(listening.getsockname()) as client:
        client.sendall(f"GET {path} HTTP/1.1\\r\\nHost: relay\\r\\n\\r\\n".encode())
        while client.recv(65536):
            pass
Link(ours).send(Drain())
os.wait()
"""


def test_after_preload_nothing_more_is_imported(config: Config) -> None:
    """The process has become another user by then, and the program's files may be out of its reach."""
    done = subprocess.run(
        [sys.executable, "-c", AFTER_PRELOAD, config.model_dump_json()], check=True, capture_output=True, text=True
    )
    assert (done.stdout.split(), done.stderr) == ([], "")
