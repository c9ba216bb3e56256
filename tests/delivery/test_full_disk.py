"""A spool on a disk that fills up: 452 in time, what is queued goes out, and taking resumes by itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.bed.client import Reply
from tests.bed.next_hop import NextHop, Say, Step
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for
from tests.bed.wire import letter

pytestmark = pytest.mark.needs("root")  # mounts a small disk

FULL = "4.3.1 Insufficient system storage"
LARGE = letter("large", b"a line of a body that lies in a file\r\n" * 8000)
BOX = "postmaster@ops.example.org"
RESERVE = 64 * 2**20


@pytest.fixture
def mounted(bed_folder: Path) -> Iterator[Callable[[Path], None]]:
    """Mounts small disks, and takes them away when their relay has ended."""
    folders: list[Path] = []

    def mount(folder: Path) -> None:
        folder.mkdir(mode=0o755)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", folder], check=True)
        folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small(mounted: Callable[[Path], None], make_relay, make_next_hop, way: str) -> tuple[RelayRunner, NextHop, NextHop]:
    hop, outside = make_next_hop(), make_next_hop()
    config = {"delivery": {"express": way == "express"}, "postmaster": {"mailbox": BOX}}
    relay = make_relay(hop, default_next_hop=outside.route, start=False, config=config)
    mounted(relay.spool)
    return relay.start(), hop, outside


def fill(disk: Path, *, leave: int) -> Path:
    """A file that leaves so many octets free."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while (free := _free(disk)) > leave:
            file.write(bytes(min(2**20, free - leave)))
    return filler


def _free(disk: Path) -> int:
    import os

    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def send(relay: RelayRunner, octets: bytes = letter(), to: str = "user@example.com") -> Reply:
    with relay.client() as client:
        return client.open().deliver("sender@example.net", to, octets)


@pytest.mark.parametrize("leave", [RESERVE - 2**20, 0], ids=["below-the-reserve", "nothing-left"])
def test_a_full_disk_refuses_what_needs_it_lets_the_queue_out_and_takes_again_by_itself(small, way, leave):
    relay, hop, outside = small
    hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"))
    waiting = [send(relay, octets) for octets in (letter("small"), LARGE)]
    assert {reply.code for reply in waiting} == {250}
    relay.wait_for_log("status=deferred", 2)
    filler = fill(relay.spool, leave=leave)
    wait_for(lambda: send(relay).text == FULL, "452 for mail that would have to be queued")
    assert send(relay, LARGE).text == FULL
    hop.behave()
    hop.wait_for_accepted(2)
    for reply in waiting:
        relay.wait_for_log(f"{reply.text.split()[-1]}: removed")
    if way == "express":
        assert send(relay).code == 250, "what the next hop takes at once needs no disk"
    else:
        assert send(relay).text == FULL
    assert send(relay, LARGE).text == FULL, "a large body needs it while it comes in"
    taken = len(hop.accepted)
    filler.unlink()
    wait_for(lambda: send(relay).code == 250, "mail is taken again")
    assert send(relay, LARGE).code == 250
    hop.wait_for_accepted(taken + 2)
    [told] = wait_for(
        lambda: [one for one in outside.accepted if one.recipients == (BOX,)], lambda: f"a letter; {relay.complaints()}"
    )
    assert b"queue_full" in told.message
    wait_for(lambda: relay.get("/readyz")[0] == 200, "readiness")
