"""`relay queue`'s commands that change something, beside a running relay and on the spool of a stopped one."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay.cli.options import CommandFailed
from relay.cli.queue import app
from relay.config.schema import Queue
from relay.mail.address import Mailbox
from relay.mail.content import MEMORY_OCTETS, Content
from relay.mail.envelope import Envelope, QueueId
from relay.queue.boot import boot_clock
from relay.queue.layout import Layout
from relay.queue.prepare import prepare
from relay.queue.sqlite import SqliteStore
from relay.queue.store import Deferral, NewMessage
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import Hold, NextHop, Say, Step
from tests.bed.wire import letter

CONFIG = """\
[server]
hostname = "mx.example.com"
spool = "spool"

[[listener]]
name = "mx"
address = "127.0.0.1:2525"

[[domain]]
names = ["one.example", "two.example"]

[[route]]
domains = ["one.example"]
next_hops = ["smtp:[192.0.2.1]"]

[[route]]
domains = ["*"]
next_hops = ["smtp:[exchange.example.com]:25"]

[log]
file = "relay.log"
"""
HOUR = 3600.0


def message(name: str, sender: str = "s@example.net", to: str = "a@one.example", age: float = 0.0) -> NewMessage:
    envelope = Envelope(QueueId(name), Mailbox(sender), (Mailbox(to),), body_8bit=False, listener="mx", client="c[::1]")
    failed = Deferral(0, 1, boot_clock() + HOUR, 450, "4.2.0", "try later", "192.0.2.1:25")
    content = Content.of(b"Subject: x\r\n\r\n..dots\r\nbody\r\n")
    return NewMessage(envelope, content, time.time() - age, 10 * HOUR, 0.0, leased=False, deferrals=(failed,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "relay.toml").write_text(CONFIG)
    (tmp_path / "relay.log").touch()
    prepare(tmp_path / "spool")
    return tmp_path


@pytest.fixture
def put(folder: Path) -> Callable[..., None]:
    def fill(*messages: NewMessage, large: str = "") -> None:
        async def work() -> None:
            store = SqliteStore(folder / "spool", "boot:0:1", 0, Queue(), asyncio.get_running_loop())
            given = list(messages)
            if large:
                descriptor = store.open_body()
                os.write(descriptor, b"Subject: large\r\n\r\n" + b"..\r\n" * MEMORY_OCTETS)
                content = Content(None, descriptor, 18 + 4 * MEMORY_OCTETS)
                given.append(replace(message(large), content=content))
            await store.put(given)
            await store.close()

        asyncio.run(work())

    return fill


@pytest.fixture
def queue(folder: Path) -> Callable[..., tuple[int, str]]:
    """``relay queue ARGUMENTS`` in this process: exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*arguments, "--config", str(folder / "relay.toml")])
        if isinstance(done.exception, CommandFailed):
            return 1, f"relay: {done.exception}"
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return run


def listed(queue: Callable[..., tuple[int, str]], *selection: str) -> dict[str, str]:
    """Id to state."""
    code, text = queue("list", "--json", *selection)
    assert code == 0, text
    return {each["id"]: each["state"] for each in map(json.loads, text.splitlines())}


@pytest.fixture
def three(put: Callable[..., None]) -> None:
    put(
        message("M1", age=3 * 86400),
        message("M2", "", "B@Two.Example"),
        message("M3", "bulk@lists.example.net", "c@two.example", age=1800),
    )


@pytest.mark.parametrize(
    ("selection", "meant"),
    [
        (["M1", "M3"], {"M1", "M3"}),
        (["--sender", "<>"], {"M2"}),
        (["--sender", "*@LISTS.example.net"], {"M3"}),
        (["--recipient", "b@two.example"], {"M2"}),
        (["--recipient", "a@*", "--recipient", "c@*"], {"M1", "M3"}),
        (["--domain", "two.example"], {"M2", "M3"}),
        (["--domain", "two.example", "--older", "20m"], {"M3"}),
        (["--older", "1d"], {"M1"}),
        (["--younger", "1h"], {"M2", "M3"}),
        (["--next-hop", "192.0.2.1"], {"M1", "M2", "M3"}),
        (["--next-hop", "exchange.example.com:25"], {"M2", "M3"}),
        (["--next-hop", "exchange.example.com", "--younger", "10m"], {"M2"}),
        (["--state", "held"], set()),
        (["--state", "held", "--state", "waiting"], {"M1", "M2", "M3"}),
    ],
)
def test_messages_are_selected_by_all_that_is_said(three, queue, selection, meant):
    assert set(listed(queue, *selection)) == meant


@pytest.mark.parametrize("wrong", [["--older", "soon"], ["--state", "tired"], ["--older", "-1"]])
def test_a_selection_that_means_nothing_is_refused_with_advice(three, queue, wrong):
    code, text = queue("delete", "--yes", *wrong)
    assert code == 2
    assert "write" in text or "No such option" in text
    assert len(listed(queue)) == 3


def test_held_messages_stay_until_they_are_released(three, queue):
    assert queue("hold", "M1", "M2") == (0, "2 messages with 2 recipients held\n")
    assert listed(queue) == {"M1": "held", "M2": "held", "M3": "waiting"}
    assert queue("hold", "--all") == (0, "1 message with 1 recipient held\n2 messages had nothing to change\n")
    assert queue("retry", "--all") == (0, "0 messages with 0 recipients due now\n3 messages had nothing to change\n")
    assert queue("release", "--state", "held", "--domain", "two.example")[1].startswith(
        "2 messages with 2 recipients rel"
    )
    assert listed(queue) == {"M1": "held", "M2": "waiting", "M3": "waiting"}
    assert "now" in queue("list", "M2")[1]


def test_deletion_is_asked_for_and_says_what_it_did(three, queue, folder):
    code, text = queue("delete", "--domain", "two.example")
    assert (code, len(listed(queue))) == (2, 3)
    assert text == "relay: this would delete 2 messages (M2, M3); nothing was done, add --yes if that is meant\n"
    assert queue("delete", "--domain", "two.example", "--yes") == (0, "2 messages with 2 recipients deleted\n")
    assert listed(queue) == {"M1": "waiting"}
    code, text = queue("delete", "M1", "M9", "--yes", "--json")
    assert code == 1
    assert json.loads(text) == {
        "action": "delete", "messages": 1, "recipients": 1, "in_delivery": 0, "selected": 1, "not_found": ["M9"],
    }  # fmt: skip
    assert listed(queue) == {}
    log = (folder / "relay.log").read_text()
    assert [line.split("queue_request ")[1].rpartition(" by=")[0] for line in log.splitlines()] == [
        f"action=delete id={name}" for name in ("M2", "M3", "M1")
    ]


def test_nothing_is_changed_where_nothing_was_said(three, queue):
    for command in ("hold", "release", "retry", "reroute", "bounce", "delete"):
        code, text = queue(command)
        assert (code, text.startswith("relay: say which")) == (1, True), command
    assert queue("hold", "--all", "--domain", "one.example")[0] == 1
    assert set(listed(queue).values()) == {"waiting"}
    assert queue("hold", "--domain", "nobody.example") == (0, "no message in the queue is like that\n")


def test_a_deleted_message_takes_its_body_file_along(put, queue, folder):
    put(large="M1")
    bodies = Layout.of(folder / "spool").bodies
    assert len(list(bodies.iterdir())) == 1
    assert queue("delete", "M1", "--yes")[0] == 0
    assert list(bodies.iterdir()) == []


def test_show_prints_the_whole_message_as_it_is(put, folder):
    put(message("M1"), large="M2")
    for name, octets in (
        ("M1", b"Subject: x\r\n\r\n.dots\r\nbody\r\n"),
        ("M2", b"Subject: large\r\n\r\n" + b".\r\n" * MEMORY_OCTETS),
    ):
        command = [sys.executable, "-m", "relay", "queue", "show", name, "--config", folder / "relay.toml"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        assert subprocess.run([*command, "--body"], capture_output=True, env=environment, check=True).stdout == octets
    assert subprocess.run([*command, "--headers"], capture_output=True, env=environment, check=True).stdout == (
        b"Subject: large\r\n"
    )


def test_many_messages_are_changed_in_portions(put, queue):
    put(*(message(f"M{number}") for number in range(1203)))
    assert queue("hold", "--all")[1] == "1203 messages with 1203 recipients held\n"
    assert queue("delete", "--all", "--yes")[1] == "1203 messages with 1203 recipients deleted\n"
    assert queue("list") == (0, "the queue is empty\n")


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("domain", {"two.example": 2, "one.example": 1}),
        ("next-hop", {"192.0.2.1:25": 3}),
        ("sender", {"s@example.net": 1, "<>": 1, "bulk@lists.example.net": 1}),
        ("state", {"waiting": 3}),
        ("answer", {"450 4.2.0 try later": 3}),
    ],
)
def test_the_summary_puts_the_queue_together(three, queue, by, groups):
    rows = [json.loads(line) for line in queue("summary", "--by", by, "--json")[1].splitlines()]
    assert {row[by.replace("-", "_")]: row["messages"] for row in rows} == groups
    assert queue("summary", "--by", by)[1].splitlines()[1].startswith(next(iter(groups)))


@pytest.fixture
def terminal(folder: Path) -> Iterator[Callable[..., str]]:
    """A terminal of 80 columns."""

    def run(*arguments: str, says: bytes = b"") -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = [sys.executable, "-m", "relay", "queue", *arguments, "--config", str(folder / "relay.toml")]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "NO_COLOR": "1", "TERM": "dumb"}
        environment.pop("COLUMNS", None)
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        os.write(ours, says)
        text = b""
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(ours, 65536):
                text += piece
        process.wait()
        os.close(ours)
        return text.decode().replace("\r\n", "\n")

    return run


def test_in_80_columns_each_message_takes_its_own_lines_and_no_id_is_torn(put, terminal):
    long = "a.very.long.local.part.of.an.address.that.goes.on@one.example"
    put(message("1A21D4EEF8100000007", long, long, age=7200), message("1A21D4EEF8100000008"))
    lines = terminal("list").splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split()[:6] == ["1A21D4EEF8100000007", "2", "h", "0.0", "KB", "waiting"]
    assert lines[2].strip() == "192.0.2.1:25: 450 4.2.0 try later"
    assert lines[3].startswith("1A21D4EEF8100000008")
    assert lines[-1].startswith("2 messages, 2 recipients")
    assert all(len(line) <= 80 for line in terminal("summary").splitlines())


def test_on_a_terminal_deletion_asks_and_takes_no_for_an_answer(put, terminal, queue):
    put(message("M1"))
    assert "Delete 1 message (M1)? [y/N]: " in terminal("delete", "M1", says=b"n\n")
    assert listed(queue) == {"M1": "waiting"}
    assert "1 message with 1 recipient deleted" in terminal("delete", "M1", says=b"y\n")
    assert listed(queue) == {}


def test_a_queue_of_another_version_is_neither_read_nor_changed(three, queue, folder):
    import sqlite3

    connection = sqlite3.connect(Layout.of(folder / "spool").database)
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    for command in ("list", "hold"):
        code, text = queue(command, "M1")
        assert (code, "is of an older relay" in text) == (1, True)


# --- beside a running relay ---------------------------------------------------------------------------------------------
def test_a_running_relay_takes_up_what_the_commands_did(make_relay: MakeRelay, make_next_hop):
    hop, outside = make_next_hop(), make_next_hop()
    hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"))
    relay = make_relay(hop, default_next_hop=outside.route, config={"queue": {"retry_s": [3600]}})

    def send(*to: str) -> str:
        with relay.client() as client:
            return client.open().deliver("sender@example.net", to, letter()).text.split()[-1]

    def run(*arguments: str) -> str:
        done = relay.command("queue", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    retried, returned, held, deleted = [send("user@example.com") for _ in range(4)]
    relay.wait_for_log("status=deferred", 4)
    assert "held" in run("hold", held)
    assert "returned" in run("bounce", returned, "--yes")
    [report] = outside.wait_for_accepted(1)
    assert report.recipients == ("sender@example.net",)
    assert b"returned to its sender by the postmaster" in report.wire
    assert "deleted" in run("delete", deleted, "--yes")
    hop.behave()
    assert "due now" in run("retry", "--all")
    hop.wait_for_accepted(1)
    relay.wait_for_log(f"{retried}: removed")
    assert [json.loads(line)["id"] for line in run("list", "--json").splitlines()] == [held]
    assert "released" in run("release", held)
    hop.wait_for_accepted(2)
    relay.wait_for_log(f"{held}: removed")
    assert "the queue is empty" in run("list")
    assert {line.split("action=")[1].split()[0] for line in relay.grep("queue_request ")} == {
        "hold", "bounce", "delete", "retry", "release",
    }  # fmt: skip


def test_a_message_is_not_deleted_under_its_attempt(make_relay: MakeRelay, next_hop: NextHop):
    hold = next_hop.on(Step.FINAL, Hold()).hold
    relay = make_relay(next_hop, config={"delivery": {"express": False}})
    with relay.client() as client:
        queue_id = client.open().deliver("sender@example.net", "user@example.com", letter()).text.split()[-1]
    next_hop.wait_until(lambda hop: hop.said("DATA"), "DATA")
    done = relay.command("queue", "delete", queue_id, "--yes")
    assert done.returncode == 1
    assert f"1 message ({queue_id}) in delivery at this moment and left alone" in done.stdout
    hold.release()
    next_hop.wait_for_accepted(1)
    relay.wait_for_log(f"{queue_id}: removed")


def test_an_entry_without_its_body_file_is_set_aside_listed_and_released_once_mended(
    make_relay: MakeRelay, next_hop: NextHop
):
    next_hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"), only="<user", times=2)
    relay = make_relay(next_hop, config={"queue": {"retry_s": [1.5]}})
    with relay.client() as client:
        client.open()
        large = letter("large", b"a line of a body that lies in a file\r\n" * 3000)
        queue_id = client.deliver("sender@example.net", "user@example.com", large).text.split()[-1]
        relay.wait_for_log(f"{queue_id}: to=.*status=deferred")
        [body] = Layout.of(relay.spool).bodies.iterdir()
        body.rename(relay.folder / "away")
        relay.wait_for_log(f"queue_entry_set_aside id={queue_id}")
        assert client.deliver("sender@example.net", "bob@example.com", letter()).code == 250, "the others go on"
    done = relay.command("queue", "list", "--state", "aside", "--json")
    [aside] = map(json.loads, done.stdout.splitlines())
    assert (aside["id"], aside["state"]) == (queue_id, "set aside")
    assert "missing" in aside["aside"]
    relay.wait_for_metric("relay_queue_corrupt_messages", 1)
    (relay.folder / "away").rename(body)
    next_hop.behave()
    assert relay.command("queue", "release", queue_id).stdout == "1 message with 1 recipient released, due now\n"
    relay.wait_for_log(f"{queue_id}: removed")
    assert any(b"large" in one.message for one in next_hop.accepted)
