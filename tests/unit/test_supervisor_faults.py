"""What the supervisor does with workers that misbehave in ways the real one never should. The faults are scripted,
everything around them is real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bed.ports import free_port
from tests.bed.waiting import wait_for

TREE = """
import asyncio, os, sys, time
from pathlib import Path
from relay import app
from relay.config.load import load
from relay.control import Abort, Commit, Control, Drain, Prepare, Prepared, Ready, Refused, Workers
from relay.supervisor import members
from relay.supervisor.tree import run
from relay.supervisor.birth import Role
from relay.supervisor.members import Part
from relay.telemetry.maillog import note

fault, path = sys.argv[1], Path(sys.argv[2])
members.START_TIMEOUT_S = 1.0

async def serve(child):
    control = Control(child.control, asyncio.get_running_loop(), child.config.process.heartbeat_timeout_s)
    drained = asyncio.Event()
    control.on(Drain, lambda _: drained.set())
    control.on(Workers, lambda message: note("info", "told", slot=child.slot, live=message.live))
    control.on(Abort, lambda _: note("info", "aborted", slot=child.slot))
    control.on(Commit, lambda _: note("info", "committed", slot=child.slot))
    answer = Refused("the moon is full") if fault == "refuses" and child.slot == 1 else Prepared()
    control.on(Prepare, lambda _: control.send(answer))
    if child.slot == 1 and fault in faults_before_ready:
        faults_before_ready[fault](child)
    control.send(Ready())
    if child.slot == 1 and fault in faults_when_ready:
        faults_when_ready[fault](child)
    note("info", "serving", slot=child.slot, owner=child.owner, live=child.live_workers, secrets=child.secrets)
    await drained.wait()
    return 0

def raises(child):
    raise LookupError("there is no such thing")

faults_before_ready = {
    "raises": raises,
    "exits": lambda child: os._exit(3),
    "hangs": lambda child: time.sleep(60),
}
faults_when_ready = {
    "dies young": lambda child: os._exit(4),
    "closes its control socket": lambda child: os.close(child.control.fileno()),
    "speaks nonsense": lambda child: child.control.send(b"{]"),
    "speaks out of turn": lambda child: child.control.send(b'{"type":"drain"}'),
}
faults_when_ready["dies once"] = lambda child: child.incarnation == 1 and os._exit(4)
roles = {
    Part.WORKER: Role(lambda child: asyncio.run(serve(child))), Part.HUB: Role(app.hub), Part.WEB: Role(app.web)
}
sys.exit(run(path, load(path, os.environ), path.with_name("pid"), roles))
"""

CONFIG = """
[server]
hostname = "mx.example.com"
spool = "spool"
workers = 2
[process]
user = ""
hub_user = ""
heartbeat_timeout_s = 2.0
[[listener]]
name = "mx"
address = "127.0.0.1:{port}"
"""

Start = Callable[[str], "FaultyTree"]


class FaultyTree:
    """A tree whose worker-1 has a fault; its log goes to standard error, here a file."""

    def __init__(self, folder: Path, fault: str) -> None:
        self.config = folder / "relay.toml"
        self.config.write_text(CONFIG.format(port=free_port()))
        self._said = folder / "said"
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TREE, fault, self.config], stderr=said, env={**os.environ, "PYTHONPATH": "."}
            )

    def said(self, pattern: str, count: int = 1) -> list[str]:
        """The matches in what it said, once there are ``count``."""
        return wait_for(
            lambda: found if len(found := re.findall(pattern, self._said.read_text())) >= count else [],
            lambda: f"{count} of {pattern!r} in {self._said.read_text()}",
        )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    trees: list[FaultyTree] = []

    def start(fault: str) -> FaultyTree:
        trees.append(FaultyTree(tmp_path, fault))
        return trees[-1]

    yield start
    for tree in trees:
        if tree.process.poll() is None:
            tree.process.send_signal(signal.SIGTERM)
        tree.process.wait(20)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raises", "LookupError: there is no such thing"),
        ("exits", "exit code 3"),
        ("hangs", "it was not ready after 1 s"),
    ],
)
def test_a_worker_that_does_not_start_ends_the_start_with_its_reason(start: Start, fault: str, why: str) -> None:
    tree = start(fault)
    assert tree.process.wait(20) == 1
    assert tree.said(rf"start_failed .*worker-1 did not start: {why}")


def test_a_left_over_pidfile_does_not_stay_when_the_start_fails(start: Start, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1\n")
    assert start("raises").process.wait(20) == 1
    assert not (tmp_path / "pid").exists()


def test_the_pidfile_appears_when_all_are_ready_and_goes_with_the_tree(start: Start, tmp_path: Path) -> None:
    tree = start("none")
    tree.said("supervisor_ready")
    assert (tmp_path / "pid").read_text() == f"{tree.process.pid}\n"
    tree.process.send_signal(signal.SIGTERM)
    assert tree.process.wait(20) == 0
    assert not (tmp_path / "pid").exists()


def test_a_worker_that_dies_again_and_again_is_started_less_and_less_often(start: Start) -> None:
    tree = start("dies young")
    assert tree.said(r"process_died process=worker-1 .*pause_s=([\d.]+)", 4)[:4] == ["0.0", "0.5", "1.0", "2.0"]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("closes its control socket", "it closed its control socket"),
        ("speaks nonsense", "a control packet makes no sense"),
        ("speaks out of turn", "a child sent drain"),
    ],
)
def test_a_worker_that_breaks_the_protocol_is_killed(start: Start, fault: str, why: str) -> None:
    assert start(fault).said(f"process_killed process=worker-1 .*{why}")


def test_workers_are_told_how_many_they_are(start: Start) -> None:
    tree = start("dies young")
    tree.said("told slot=0 live=1")
    tree.said("told slot=0 live=2")


def test_each_process_of_a_slot_is_another_owner_of_leases(start: Start) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    tree = start("dies once")
    assert sorted(tree.said("serving slot=. owner=([^ ]+)", 2)) == [f"{boot}:0:1", f"{boot}:1:2"]
    assert set(tree.said("serving .* (live=.)", 2)) == {"live=2"}


def test_one_refusal_aborts_a_reload_for_all(start: Start) -> None:
    tree = start("refuses")
    tree.said("supervisor_ready")
    tree.process.send_signal(signal.SIGHUP)
    assert tree.said("configuration_refused why=.worker-1: the moon is full")
    assert tree.said("aborted slot=(.)") == ["0"]
    assert "committed" not in "".join(tree.said("(?s).+"))


def test_secrets_do_not_show_in_a_log(start: Start) -> None:
    tree = start("none")
    assert set(tree.said("secrets=(.*)", 2)) == {'"Secrets()"'}
