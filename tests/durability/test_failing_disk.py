"""A relay whose disk fails says 451 or 452, keeps nothing of that message, and takes mail again afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for
from tests.bed.wire import END_OF_DATA, letter, stuffed
from tests.durability.load import LARGE
from tests.durability.trace import attached

pytestmark = pytest.mark.needs("strace", "root")  # strace on a process that runs already

STORED_LATER = "451 4.3.0 Message could not be stored"
FULL = "452 4.3.1 Insufficient system storage"


@pytest.fixture
def relay(make_relay: MakeRelay, next_hop: NextHop) -> RelayRunner:
    """One worker, everything by way of the queue."""
    return make_relay(next_hop, config={"delivery": {"express": False}})


@pytest.mark.parametrize(
    ("inject", "octets", "answer"),
    [
        ("fdatasync:error=EIO:when=1", letter("failed"), STORED_LATER),  # of the log, in the writer's thread
        ("fdatasync:error=EIO:when=1..3", letter("failed"), STORED_LATER),  # attempts to recover as well
        ("fsync:error=EIO:when=1", LARGE, STORED_LATER),  # of the body file
        ("fsync:error=EIO:when=2", LARGE, STORED_LATER),  # of its folder
        ("pwrite64:error=EIO:when=1", letter("failed"), STORED_LATER),  # of a log frame
        ("pwrite64:error=ENOSPC:when=1", letter("failed"), FULL),
    ],
    ids=["log", "log-and-recovery", "body", "folder", "frame", "frame-no-space"],
)
def test_a_failing_disk_answers_4xx_keeps_nothing_of_it_and_takes_mail_again(
    relay: RelayRunner, next_hop: NextHop, tmp_path: Path, inject: str, octets: bytes, answer: str
):
    with attached(relay.workers(), tmp_path / "trace", inject=inject), relay.client() as client:
        reply = client.open().deliver("failed@example.net", "user@example.com", octets)
        assert f"{reply.code} {reply.text}".startswith(answer)
        is_taken_again(relay, next_hop)
    assert "(INJECTED)" in (tmp_path / "trace").read_text("ascii")
    nothing_is_left_of_it(relay, next_hop)


def test_a_full_disk_under_the_body_of_a_message_answers_452(relay: RelayRunner, next_hop: NextHop, tmp_path: Path):
    [worker] = relay.workers()
    wire = stuffed(LARGE)
    half = len(wire) - 10_000  # the rest fits into memory, so the file is written to once more
    with relay.client() as client:
        client.open().envelope("failed@example.net", ["user@example.com"])
        client.expect("354", "DATA")
        client.send(wire[:half])
        body = wait_for(lambda: unnamed_body(worker), "body file of the worker")
        with attached([worker], tmp_path / "trace", inject="write:error=ENOSPC:when=1", path=body):
            client.send(wire[half:] + END_OF_DATA)
            client.expect(FULL)
        is_taken_again(relay, next_hop)
    assert "(INJECTED)" in (tmp_path / "trace").read_text("ascii")
    nothing_is_left_of_it(relay, next_hop)


def unnamed_body(worker: int) -> str:
    """The body file the worker writes to, as strace knows it."""
    descriptors = [os.readlink(each) for each in Path(f"/proc/{worker}/fd").iterdir() if each.is_symlink()]
    return next((path.removesuffix(" (deleted)") for path in descriptors if "/bodies/#" in path), "")


def is_taken_again(relay, next_hop):
    def accepted():
        with relay.client() as client:
            return client.open().deliver("after@example.net", "user@example.com", letter("after")).code == 250

    wait_for(accepted, "250 after the disk works again")
    next_hop.wait_for_accepted(1)


def nothing_is_left_of_it(relay, next_hop):
    assert relay.stop() == 0
    assert relay.command("queue", "list").stdout == "the queue is empty\n"
    assert list((relay.spool / "queue" / "bodies").iterdir()) == []
    assert {each.sender for each in next_hop.transactions} == {"after@example.net"}
