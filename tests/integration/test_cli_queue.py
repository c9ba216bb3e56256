"""`relay queue`, beside a running relay and on the spool of a stopped one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relay.config.schema import Queue
from relay.mail.address import Mailbox
from relay.mail.content import Content
from relay.mail.envelope import Envelope, QueueId
from relay.queue.boot import boot_clock
from relay.queue.prepare import prepare
from relay.queue.sqlite import SqliteStore
from relay.queue.store import Deferral, NewMessage
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import NextHop, Say, Step
from tests.bed.waiting import PATIENCE_S
from tests.bed.wire import letter

ROOT = Path(__file__).parents[2]

CONFIG = """\
[server]
hostname = "mx.example.com"
spool = "spool"

[[listener]]
name = "mx"
address = "127.0.0.1:2525"
"""


@pytest.fixture
def queue_command(tmp_path):
    (tmp_path / "relay.toml").write_text(CONFIG)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "relay", "queue", *arguments, "--config", "relay.toml"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S * 3,
            check=False,
        )

    return run


def waiting(number: int, octets: bytes = b"Subject: x\r\n\r\nbody\r\n", **changes: object) -> NewMessage:
    """A message to two recipients, whose first was tried once and is due in an hour."""
    answer = Deferral(0, 1, boot_clock() + 3600, 450, "4.2.0", str(changes.get("answer", "try later")), "192.0.2.1")
    envelope = Envelope(
        QueueId(f"4X{number:06d}"),
        Mailbox("sender@example.net"),
        (Mailbox("a@example.com"), Mailbox("b@example.com")),
        body_8bit=False,
        listener="mx",
        client="192.0.2.9",
    )
    return NewMessage(
        envelope,
        Content.of(octets),
        time.time() - 7200,
        86400.0,
        boot_clock() + 7200,
        leased=False,
        deferrals=(answer,),
    )


@pytest.fixture
def put(tmp_path):
    """Put messages into the queue of a relay that does not run."""

    def fill(*messages: NewMessage) -> None:
        async def work() -> None:
            store = SqliteStore(tmp_path / "spool", "boot:0:1", 0, Queue(), asyncio.get_running_loop())
            await store.put(messages)
            await store.close()

        prepare(tmp_path / "spool")
        asyncio.run(work())

    return fill


def test_a_stopped_relay_s_queue_is_listed_with_the_next_attempt_and_the_last_answer(queue_command, put):
    put(waiting(1), waiting(2))
    done = queue_command("list")
    assert (done.returncode, done.stderr) == (0, "")
    head, first, second, total = done.stdout.splitlines()
    assert head.split() == ["ID", "age", "size", "sender", "state", "next", "try", "to", "last", "answer"]
    assert first.split()[:8] == ["4X000001", "2", "h", "0.0", "KB", "<sender@example.net>", "waiting", "in"]
    assert first.endswith("a@example.com +1  192.0.2.1: 450 4.2.0 try later")
    assert second.startswith("4X000002")
    assert total == "2 messages, 4 recipients (0 held), 0.0 MB, the oldest 2 h"


def test_for_programs_each_message_is_an_object_in_a_line(queue_command, put):
    put(waiting(1), waiting(2))
    done = queue_command("list", "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["id"], first["state"], first["owner"]) == ("4X000001", "waiting", "")
    assert second["recipients"][0]["last_text"] == "try later"
    assert 3000 < first["recipients"][0]["due"] - time.time() <= 3600


def test_a_limit_shortens_the_list_and_not_the_sum(queue_command, put):
    put(*(waiting(number) for number in range(5)))
    lines = queue_command("list", "--limit", "2").stdout.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("5 messages, 10 recipients")
    assert len(queue_command("list", "--limit", "0", "--json").stdout.splitlines()) == 5


def test_show_prints_recipients_and_header(queue_command, put):
    put(waiting(1, b"Subject: the subject\r\nX-Long: a\r\n b\r\n\r\nthe body\r\n"))
    done = queue_command("show", "4X000001")
    assert (done.returncode, done.stderr) == (0, "")
    assert "192.0.2.1: 450 4.2.0 try later" in done.stdout
    assert "b@example.com" in done.stdout
    assert "Subject: the subject\nX-Long: a\n b\n" in done.stdout
    assert "the body" not in done.stdout
    shown = json.loads(queue_command("show", "4X000001", "--json").stdout)
    assert shown["header"] == ["Subject: the subject", "X-Long: a", " b"]
    assert [one["mailbox"] for one in shown["recipients"]] == ["a@example.com", "b@example.com"]


def test_a_stranger_s_header_cannot_steer_the_terminal(queue_command, put):
    put(waiting(1, b"Subject: \x1b[2J[red]x[/red]\x9b\xc2\x9b\x07\r\n\r\n"))
    shown = queue_command("show", "4X000001").stdout
    assert "Subject: \N{REPLACEMENT CHARACTER}[2J[red]x[/red]" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_an_empty_queue_says_so(queue_command, put):
    put()
    assert queue_command("list").stdout == "the queue is empty\n"
    assert queue_command("list", "--json").stdout == ""


def test_a_message_that_is_not_there_is_an_error_with_advice(queue_command, put, tmp_path):
    put()
    done = queue_command("show", "4X000001")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"relay: 4X000001 is not in the queue of {tmp_path}/spool; if it was, the log says what became of it\n"
    )


def test_a_spool_without_queue_is_an_error_and_stays_without(queue_command, tmp_path):
    done = queue_command("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not exist" in done.stderr
    assert not (tmp_path / "spool").exists()


def test_a_damaged_queue_is_an_error_without_traceback(queue_command, put, tmp_path):
    put(waiting(1))
    (tmp_path / "spool/queue/queue.db").write_bytes(b"x" * 8192)
    done = queue_command("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"relay: {tmp_path}/spool/queue/queue.db is damaged")


def test_a_running_relay_s_queue_is_listed_while_it_retries(make_relay: MakeRelay, next_hop: NextHop):
    next_hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"))
    relay = make_relay(next_hop, config={"queue": {"retry_s": [3600]}})
    with relay.client() as client:
        client.open()
        assert client.deliver("sender@example.net", ["user@example.com"], letter()).code == 250
    relay.wait_for_log("status=deferred")
    done = relay.command("queue", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "user@example.com" in done.stdout
    assert "450 4.2.1 mailbox busy" in done.stdout
    (message,) = map(json.loads, relay.command("queue", "list", "--json").stdout.splitlines())
    shown = json.loads(relay.command("queue", "show", message["id"], "--json").stdout)
    assert shown["header"][0].startswith("Received: ")
