"""The demo as a newcomer runs it: the tour, what it says to try next, Ctrl-C, and how it fails."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.bed.waiting import wait_for

ROOT = Path(__file__).parents[2]
PORTS = (2465, 2525, 2580, 2587, 2626)
END_S = 90.0
RESTRICTED = "554 5.7.1 <kiosk@example.com>: Sender address rejected: This account is not allowed to send emails"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's files in a folder of their own: the state of a demo that runs in this tree stays untouched."""
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("state", "__pycache__"))
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "demo.toml", tmp_path / "config")
    return tmp_path


@pytest.fixture
def shift() -> int:
    """All ports of the demo are free this much higher, below those that the test bed hands out."""
    for number in random.SystemRandom().sample(range(3000, 9000), 100):
        with suppress(OSError):
            for port in PORTS:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + number))
            return number
    raise AssertionError("no free ports")


Start = Callable[..., "Demo"]


class Demo:
    """A demo that runs; ``said`` is what it has printed."""

    def __init__(self, folder: Path, shift: int, **environment: str) -> None:
        self._output = folder / "output"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, folder / "demo" / "run.py"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "DEMO_PORT_SHIFT": str(shift), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def said(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> None:
        def look() -> bool:
            assert self.process.poll() is None, self.said
            return text in self.said

        wait_for(look, lambda: f"{text!r} in: {self.said}", END_S)

    def end(self) -> int:
        return self.process.wait(END_S)


@pytest.fixture
def start(folder: Path, shift: int) -> Iterator[Start]:
    """Demos; whatever becomes of the test, each is ended, and none may leave a process behind."""
    made: list[Demo] = []

    def begin(**environment: str) -> Demo:
        made.append(Demo(folder, shift, **environment))
        return made[-1]

    yield begin
    for demo in made:
        if demo.process.poll() is None:
            demo.process.terminate()
            demo.end()
    assert processes_in(folder) == []


def processes_in(folder: Path) -> list[str]:
    """Command lines of living processes that name the folder: relay and stand-in alike."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and str(folder).encode() in (line := (entry / "cmdline").read_bytes()):
                found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_the_tour_goes_as_told_and_leaves_the_mail_behind(start: Start, folder: Path) -> None:
    demo = start(DEMO_EXIT="1")
    assert demo.end() == 0, demo.said
    for line in (
        "250 2.0.0 Ok: delivered as",
        "with ESMTPS",
        "header removed: x-ms-exchange-organization-scl",
        "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown; from=<customer@example.net>",
        f"{RESTRICTED}; from=<kiosk@example.com>",
        "554 5.7.1 <victim@example.org>: Relay access denied",
        "250 2.0.0 Ok: queued as",
        "1 message, 1 recipient",
        "the queue is empty",
        "=> Everything went as told.",
    ):
        assert line in demo.said
    assert "\033" not in demo.said, "colour where there is no terminal"
    mail = [path.read_text() for path in (folder / "demo" / "state" / "maildir" / "new").iterdir()]
    assert sorted(re.search("^Subject: (.*)$", text, re.MULTILINE)[1] for text in mail) == [
        "Good morning",
        "Good morning, encrypted",
        "While you were out",
        "You have won",
    ]
    assert not any("X-MS-Exchange-Organization" in text for text in mail)


def test_every_command_it_says_to_try_works_and_control_c_ends_all(start: Start, folder: Path, shift: int) -> None:
    demo = start()
    demo.wait_for("Ctrl-C ends the demo")
    commands = re.findall(r"^    (?!client|relay )(\S+ .*)$", demo.said.partition("goes on running")[2], re.MULTILINE)
    relay = [command for command in commands if "/relay " in command]
    assert len(relay) == 5, commands
    expected = {"recipient nobody@": 1, "sender camera@": 1}  # refused, which is what they say
    for command in relay:
        code = next((code for words, code in expected.items() if words in command), 0)
        done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == code, (command, done.stdout, done.stderr)
    down = next(command for command in commands if command.startswith("kill "))
    subprocess.run(["/bin/sh", "-c", down], check=True)  # kill is the shell's own; the program is in procps
    with smtplib.SMTP("127.0.0.1", 2525 + shift) as client:
        client.sendmail("me@example.net", "orders@example.com", "Subject: later\r\n\r\n")
    up = next(command for command in commands if "exchange.py" in command)
    with subprocess.Popen(up.split(), cwd=folder, stdout=subprocess.DEVNULL) as exchange:
        new = folder / "demo" / "state" / "maildir" / "new"
        wait_for(lambda: any("Subject: later" in mail.read_text() for mail in new.iterdir()), "the mail sent meanwhile")
        demo.process.send_signal(signal.SIGINT)
        assert demo.end() == 0, demo.said
        exchange.terminate()


def test_a_step_that_goes_wrong_is_named_with_what_was_seen(start: Start, folder: Path) -> None:
    script = folder / "demo" / "exchange.py"
    text = script.read_text()
    assert text.count('"250 2.6.0 Queued mail for delivery"') == 1
    script.write_text(text.replace('"250 2.6.0 Queued mail for delivery"', '"554 5.6.0 Not today"'))
    demo = start(DEMO_EXIT="1")
    assert demo.end() == 1
    assert "step 1 (A message from the Internet for somebody who exists) did not go as told" in demo.said
    assert 'expected the answer "250 2.0.0 Ok", got "554 5.6.0' in demo.said
    assert "Everything went as told" not in demo.said


def test_a_reply_with_other_words_fails_the_demo(start: Start, folder: Path) -> None:
    (folder / "demo" / "restricted.txt").write_text("kiosk@example.com Something else\n")
    demo = start(DEMO_EXIT="1")
    assert demo.end() == 1
    assert "step 5 (A sender who is not allowed to send) did not go as told" in demo.said
    assert "Sender address rejected: Something else" in demo.said


def test_a_taken_port_is_named_before_anything_is_touched(start: Start, folder: Path, shift: int) -> None:
    state = folder / "demo" / "state"
    state.mkdir()
    (state / "of-an-earlier-demo").touch()
    with socket.create_server(("127.0.0.1", 2587 + shift)):
        demo = start(DEMO_EXIT="1")
        assert demo.end() == 1
    assert f"127.0.0.1:{2587 + shift}, meant for the relay's listener submission: Address already in use" in demo.said
    assert "DEMO_PORT_SHIFT=" in demo.said
    assert (state / "of-an-earlier-demo").exists()


def test_stopped_in_the_middle_of_the_tour_it_ends_everything(start: Start) -> None:
    demo = start()
    demo.wait_for("\n1. ")
    demo.process.send_signal(signal.SIGTERM)
    assert demo.end() == 130
    assert "Stopped before the end of the tour" in demo.said
