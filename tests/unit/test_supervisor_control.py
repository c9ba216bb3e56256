"""The control socket: what fits, what is refused, what never blocks, and that a child ends with its supervisor."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relay.config.schema import Config
from relay.control import (
    BEATS_PER_TIMEOUT,
    EXIT_ORPHANED,
    OUTBOX_MAX,
    PACKET_MAX,
    Abort,
    Beat,
    Commit,
    Control,
    ControlError,
    Drain,
    Failed,
    Link,
    Prepare,
    Prepared,
    Ready,
    Refused,
    Reopen,
    Secrets,
    Start,
    Workers,
    decode,
    encode,
    pair,
    receive_start,
)

SECRETS = Secrets("-----BEGIN CERTIFICATE-----\nä\n", "-----BEGIN PRIVATE KEY-----\n", bytes(range(32)))


def config(domains: int = 1) -> Config:
    names = [f"department-{number}.example.com" for number in range(domains)]
    return Config.model_validate(
        {
            "server": {"hostname": "mx.example.com", "spool": Path("/var/spool/x")},
            "listener": [{"name": "mx", "address": "[::]:25"}],
            "domain": [{"names": names}],
            "route": [{"domains": ["*"], "next_hops": ["smtp:[exchange.example.com]:25"]}],
        }
    )


@pytest.mark.parametrize(
    "message",
    [
        Start(SECRETS), Prepare(config(), SECRETS), Commit(), Abort(), Reopen(), Drain(), Workers(3),
        Ready(), Beat(), Prepared(), Refused("no"), Failed("ValueError: ü"),
    ],
    ids=lambda message: message.kind,
)  # fmt: skip
def test_a_message_arrives_as_it_was_sent(message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "packet",
    [b"", b"{", b"\xff", b"[]", b"{}", b'{"type":"rm"}', b'{"type":[]}', b'{"type":"start"}', b'{"type":"workers"}',
     b'{"type":"start","secrets":{"tls_certificate":"","tls_key":"","snapshot_key":"xx"}}',
     b'{"type":"prepare","config":{},"secrets":{"tls_certificate":"","tls_key":"","snapshot_key":""}}'],
)  # fmt: skip
def test_a_packet_that_makes_no_sense_is_refused(packet: bytes) -> None:
    with pytest.raises(ControlError):
        decode(packet)


def test_secrets_are_never_printed() -> None:
    printed = repr(Prepare(config(), SECRETS))
    assert "BEGIN" not in printed
    assert repr(SECRETS.snapshot_key) not in printed


@pytest.fixture
def ends():
    ours, theirs = pair()
    theirs.settimeout(5)
    yield Link(ours), theirs
    ours.close()
    theirs.close()


def test_the_largest_packet_passes_the_socket(ends) -> None:
    link, theirs = ends
    room = PACKET_MAX - len(encode(Start(Secrets())))
    link.send(Start(Secrets(tls_certificate="x" * room)))
    assert not link.waiting
    assert len(receive_start(theirs).secrets.tls_certificate) == room
    with pytest.raises(ControlError, match=f"{PACKET_MAX + 1} octets"):
        link.send(Start(Secrets(tls_certificate="x" * (room + 1))))


def test_a_configuration_of_five_thousand_domains_passes(ends) -> None:
    link, theirs = ends
    message = Prepare(config(5000), Secrets("x" * 60_000, "x" * 4000, bytes(32)))
    link.send(message)
    assert decode(theirs.recv(PACKET_MAX)) == message


def test_a_child_that_does_not_read_cannot_block_or_fill_the_supervisor(ends) -> None:
    link, theirs = ends
    big = Start(Secrets(tls_certificate="x" * (PACKET_MAX // 2)))
    sent = 0
    with pytest.raises(ControlError, match="does not read"):  # noqa: PT012 - which of them fails is the system's choice
        while sent < 2 * OUTBOX_MAX:
            link.send(big)
            sent += 1
    assert link.waiting
    # Nothing is lost or reordered for one that reads after all.
    read = 0
    while link.waiting:
        assert decode(theirs.recv(PACKET_MAX)) == big
        read += 1
        link.flush()
    while read < sent:
        assert decode(theirs.recv(PACKET_MAX)) == big
        read += 1


def test_last_words_are_heard_before_the_end(ends) -> None:
    link, theirs = ends
    theirs.send(encode(Ready()))
    theirs.send(encode(Failed("it rains")))
    theirs.close()
    assert link.receive() == ([Ready(), Failed("it rains")], True)


async def until(true) -> None:
    while not true():
        await asyncio.sleep(0.005)


async def test_a_loop_that_turns_beats_and_one_that_is_stuck_does_not(ends) -> None:
    link, theirs = ends
    control = Control(theirs, asyncio.get_running_loop(), 0.05 * BEATS_PER_TIMEOUT)
    beats: list[object] = []
    await until(lambda: beats.extend(link.receive()[0]) or len(beats) >= 3)
    assert set(beats) == {Beat()}
    link.receive()
    time.sleep(0.25)  # a stuck loop is what this is about: five beats are due meanwhile
    assert link.receive() == ([], False)
    control.close()


async def test_a_shorter_time_out_quickens_the_beats_at_the_commit(ends) -> None:
    link, theirs = ends
    control = Control(theirs, asyncio.get_running_loop(), 3600.0)
    heard: list[object] = []
    quick = config().model_copy(update={"process": config().process.model_copy(update={"heartbeat_timeout_s": 0.5})})
    link.send(Prepare(quick, Secrets()))
    await until(lambda: heard.extend(link.receive()[0]) or Prepared() in heard)
    heard.clear()
    link.send(Commit())
    await until(lambda: heard.extend(link.receive()[0]) or heard.count(Beat()) >= 3)
    control.close()


async def test_each_message_goes_to_its_callback(ends) -> None:
    link, theirs = ends
    control = Control(theirs, asyncio.get_running_loop(), 60.0)
    seen: list[object] = []
    for kind in (Workers, Prepare, Commit, Abort, Reopen, Drain):
        control.on(kind, seen.append)
    sent = [Workers(2), Prepare(config(), SECRETS), Commit(), Abort(), Reopen(), Drain()]
    for message in sent:
        link.send(message)
    await until(lambda: len(seen) == len(sent))
    assert seen == sent
    control.close()


async def test_answers_wait_for_a_supervisor_that_does_not_read(ends) -> None:
    link, theirs = ends
    control = Control(theirs, asyncio.get_running_loop(), 60.0)
    why = "x" * 4096
    sent = 0
    while True:
        try:
            control.send(Refused(why))
        except ControlError:
            break
        sent += 1
    heard: list[object] = []
    await until(lambda: heard.extend(link.receive()[0]) or heard.count(Refused(why)) == sent)
    control.close()


ORPHAN = """
import asyncio, socket, sys
from relay.control import Control

async def serve():
    Control(socket.socket(fileno=int(sys.argv[1])), asyncio.get_running_loop(), 60.0)
    await asyncio.sleep(60)

asyncio.run(serve())
"""


def test_a_child_ends_when_its_supervisor_is_gone() -> None:
    """By the control socket alone: no parent dies here."""
    ours, theirs = pair()
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(theirs.fileno())], pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        ours.settimeout(20)
        assert decode(ours.recv(PACKET_MAX)) == Beat()  # its loop turns
        ours.close()
        assert child.wait(20) == EXIT_ORPHANED
