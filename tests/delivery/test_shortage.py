"""The whole relay short of descriptors and of memory: 4xx, nothing acknowledged is lost, recovery by itself."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed.client import Client, ConnectionEnded
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import Hold, NextHop, Step
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for
from tests.bed.wire import letter

DESCRIPTORS = 160
LARGE = b"a line of a message that does not fit into memory\r\n" * 4000
"""200 KB: on its way in it lies in a file, which takes a descriptor."""

MEGABYTE = 1024 * 1024
GROUP_OCTETS = 640 * MEGABYTE
"""What the relay and the program that uses it all up may have together."""


def begin(client: Client, sender: str) -> bool:
    """Up to the middle of a large message; False when the client was turned away before."""
    if client.read().code != 220:
        return False
    client.command("EHLO client.example.net")
    for command in (f"MAIL FROM:<{sender}>", "RCPT TO:<user@example.com>", "DATA"):
        if client.command(command).code >= 400:
            return False
    client.send(b"Subject: large\r\n\r\n" + LARGE)
    return True


def is_taken(relay: RelayRunner, sender: str) -> bool:
    """Whether a client is let in; then its mail has to be taken."""
    with relay.client() as client:
        if client.read().code != 220:
            return False
        client.ehlo()
        assert client.deliver(sender, ["user@example.com"], letter()).code == 250
    return True


@pytest.mark.needs("prlimit")
def test_when_descriptors_are_used_up_clients_are_asked_to_come_again_and_nothing_is_lost(
    make_relay: MakeRelay, next_hop: NextHop
) -> None:
    limits = {"sessions": 5000, "sessions_per_client": 5000}
    relay = make_relay(next_hop, start=False, config={"limits": limits})
    relay.start(under=["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"])
    acknowledged, codes = set(), set()
    with contextlib.ExitStack() as held:
        open_ones: dict[str, Client] = {}
        for number in range(DESCRIPTORS):
            client = held.enter_context(relay.client())
            sender = f"s{number}@example.net"
            try:
                if begin(client, sender):
                    open_ones[sender] = client
                else:
                    codes.add(421)
            except (ConnectionEnded, ConnectionError):
                codes.add(421)
        assert len(open_ones) < DESCRIPTORS
        relay.wait_for_log("short_of what=descriptors")
        for sender, client in open_ones.items():
            try:
                client.send(b".\r\n")
                code = client.read().code
            except (ConnectionEnded, ConnectionError):
                code = 421
            codes.add(code)
            if code == 250:
                acknowledged.add(sender)
    assert codes <= {250, 421, 451, 452}
    assert acknowledged
    assert codes - {250}
    relay.wait_for_log("enough_of what=descriptors")
    wait_for(lambda: is_taken(relay, "after@example.net"), "a place, once those who left are noticed")
    wanted = acknowledged | {"after@example.net"}
    wait_for(
        lambda: wanted <= {one.sender for one in next_hop.accepted}, lambda: f"all of {wanted}; {relay.complaints()}"
    )


class Group:
    """A control group of memory, version 1 or 2, below the one that this process is in."""

    def __init__(self, name: str) -> None:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            version_2 = number == "0" and Path("/sys/fs/cgroup/cgroup.controllers").exists()
            if not version_2 and "memory" not in controllers.split(","):
                continue
            top = Path("/sys/fs/cgroup") if version_2 else Path("/sys/fs/cgroup/memory")
            self._home = top / path.lstrip("/")
            self._folder = self._home / name
            self._limit = "memory.max" if version_2 else "memory.limit_in_bytes"
            try:
                self._folder.mkdir()
                (self._folder / self._limit).write_text(str(GROUP_OCTETS))
                self.enter()
            except OSError as error:
                pytest.skip(f"no control group can be made here: {error}")
            self.leave()
            return
        pytest.skip("this machine counts no memory by control groups")

    def enter(self) -> None:
        """This process, and what it starts from now on, is in the group."""
        (self._folder / "cgroup.procs").write_text("0")

    def leave(self) -> None:
        """This process is where it was; what it has started stays."""
        (self._home / "cgroup.procs").write_text("0")

    def remove(self) -> None:
        """Once nobody is in it."""
        wait_for(lambda: not (self._folder / "cgroup.procs").read_text(), "an empty group")
        self._folder.rmdir()


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group(f"dmz-relay-test-{time.monotonic_ns()}")
    yield made
    made.remove()


@pytest.fixture
def crowded(group: Group, make_relay: MakeRelay, next_hop: NextHop) -> Iterator[RelayRunner]:
    """A relay in a group of its own; gone before the group is."""
    relay = make_relay(next_hop, start=False)
    relay.build_directory()
    group.enter()
    try:
        relay.start(build=False)
    finally:
        group.leave()
    yield relay
    relay.stop()


@pytest.mark.needs("root")
def test_when_memory_is_used_up_mail_waits_outside_and_what_is_inside_goes_on(
    group: Group, crowded: RelayRunner, next_hop: NextHop
) -> None:
    relay = crowded
    hold = next_hop.on(Step.FINAL, Hold(), times=1).hold
    with relay.client() as client:
        assert client.open().deliver("before@example.net", ["user@example.com"], letter()).code == 250
    hold.wait_reached()
    group.enter()
    try:
        hog = subprocess.Popen(
            [sys.executable, "-c", f"taken = b'x' * {GROUP_OCTETS - 90 * MEGABYTE}; print(flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    finally:
        group.leave()
    try:
        assert hog.stdout is not None
        assert hog.stdout.readline()
        relay.wait_for_log("short_of what=memory")
        with relay.client() as client:
            client.open()
            assert client.command("MAIL FROM:<meanwhile@example.net>").text.startswith("4.3.1")
        hold.release()
        wait_for(lambda: "before@example.net" in {one.sender for one in next_hop.accepted}, "the mail that is inside")
    finally:
        hog.kill()
        hog.communicate()
    relay.wait_for_log("enough_of what=memory")
    with relay.client() as client:
        assert client.open().deliver("after@example.net", ["user@example.com"], letter()).code == 250
    wait_for(lambda: "after@example.net" in {one.sender for one in next_hop.accepted}, "the mail after it")
