"""Owns: what the demo needs on this computer: its ports, its folder, its certificate, its two processes.

All of it is read from config/demo.toml. Must not send mail.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, NoReturn, TypeVar

import trustme

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[1]
STATE: Final = ROOT / "demo" / "state"
CONFIG: Final = ROOT / "config" / "demo.toml"
SHIFT: Final = "DEMO_PORT_SHIFT"
"""The environment variable that moves all ports up, for a computer on which some are taken."""

PATIENCE_S: Final = 30.0
"""How long anything is waited for: it takes milliseconds, but a busy or small computer must not fail the demo."""
STOP_S: Final = 45.0
"""Longest wait for the relay to end by itself: its own limit for that (process.drain_timeout_s) and some."""
_POLL_S: Final = 0.02


class Trouble(Exception):
    """The demo cannot go on. The text says why and what to do."""


def wait_for(look: Callable[[], T], what: str) -> T:
    """The first truthy value of ``look``. Raises Trouble naming ``what`` when there is none in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise Trouble(f"waited {PATIENCE_S:.0f} s for {what}, which did not come")
        time.sleep(_POLL_S)
    return seen


@dataclass(frozen=True, slots=True)
class Plan:
    """What config/demo.toml says, as far as the demo has to know it. Addresses are ``host:port``."""

    config: Path
    hostname: str
    listeners: dict[str, str]
    exchange: str
    web: str
    log: Path

    @property
    def ports(self) -> dict[str, str]:
        """Who is to listen where."""
        relay = {f"the relay's listener {name}": address for name, address in self.listeners.items()}
        return relay | {"the relay's metrics": self.web, "the stand-in for Exchange": self.exchange}


def plan() -> Plan:
    """Read config/demo.toml; with ports to shift, a copy of it that ``furnish`` writes. Raises Trouble."""
    config = STATE / "demo.toml" if shift() else CONFIG
    read = tomllib.loads(_shifted())
    return Plan(
        config=config,
        hostname=read["server"]["hostname"],
        listeners={listener["name"]: listener["address"] for listener in read["listener"]},
        exchange=read["route"][0]["next_hops"][0].removeprefix("smtp:").replace("[", "").replace("]", ""),
        web=read["web"]["listen"],
        log=(CONFIG.parent / read["log"]["file"]).resolve(),
    )


def shift() -> int:
    """By how much the ports move. Raises Trouble."""
    text = os.environ.get(SHIFT) or "0"
    if not re.fullmatch(r"[0-9]{1,5}", text):
        raise Trouble(f"{SHIFT}={text}: not a number; write for example {SHIFT}=10000")
    return int(text)


def _shifted() -> str:
    """The configuration with its ports moved and its paths made independent of the file's place."""

    def move(at: re.Match[str]) -> str:
        port = int(at[2]) + shift()
        if port > 65535:
            raise Trouble(f"{SHIFT}={shift()} moves port {at[2]} past 65535; write a smaller number")
        return f"{at[1]}{port}"

    text = re.sub(r"(127\.0\.0\.1\]?:)(\d+)", move, CONFIG.read_text(encoding="utf-8"))
    return text.replace('"../', f'"{ROOT}/')


def ports_free(plan: Plan) -> None:
    """Find out before anything is started or removed whether all ports can be had. Raises Trouble."""
    taken: list[str] = []
    for who, address in plan.ports.items():
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                taken.append(f"{address}, meant for {who}: {error.strerror}")
    if taken:
        raise Trouble(
            "ports that the demo needs cannot be had:\n" + "\n".join(taken) + "\n"
            "Another demo may be running here. `ss -ltnp` shows who listens; end that program,\n"
            f"or let the demo use other ports: {SHIFT}=10000 make demo"
        )


def furnish(plan: Plan) -> None:
    """An empty folder for the state, and in it a certificate for the relay. Raises OSError."""
    if STATE.exists():
        shutil.rmtree(STATE)
    STATE.mkdir(mode=0o700)
    if plan.config != CONFIG:
        plan.config.write_text(_shifted(), encoding="utf-8")
    authority = trustme.CA(organization_name="DMZ Relay demo")
    certificate = authority.issue_cert(plan.hostname, "localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(STATE / "authority.pem")
    (STATE / "key.pem").touch(mode=0o600)
    (STATE / "key.pem").write_bytes(certificate.private_key_pem.bytes())
    (STATE / "certificate.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))


def environment() -> dict[str, str]:
    """Without the reader's own settings for a relay, which would override the demo's configuration."""
    return {key: value for key, value in os.environ.items() if not key.startswith("DMZ_RELAY")}


def relay(plan: Plan, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``relay ARGUMENTS --config ...``, as the reader would. Raises Trouble when it takes for ever."""
    command = [sys.executable, "-m", "relay", *arguments, "--config", str(plan.config)]
    try:
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise Trouble(f"relay {' '.join(arguments)}: no end after {PATIENCE_S:.0f} s") from None


class Exchange:
    """The stand-in for Exchange: a process that can be stopped and started again."""

    def __init__(self, plan: Plan) -> None:
        self.maildir = STATE / "maildir"
        self.command = (str(ROOT / "demo" / "exchange.py"), "--listen", plan.exchange, "--maildir", str(self.maildir))
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Return when it accepts. Raises Trouble."""
        with _undisturbed():
            self._process = _start(self.command, stdout=subprocess.PIPE, stderr=None)
        said = self._process.stdout
        assert said is not None
        # Readable when it says "ready", and when it ends before that.
        if not select.select([said], [], [], PATIENCE_S)[0] or said.readline() != "ready\n":
            raise Trouble("the stand-in for Exchange did not start; see above")

    def stop(self) -> None:
        """End it as a crash would: its port refuses connections afterwards."""
        if self._process is not None:
            with self._process as process:
                process.terminate()
            self._process = None

    def mail(self) -> list[Path]:
        """The messages it has, in no order; each is one file."""
        return list((self.maildir / "new").glob("*"))


class Relay:
    """``relay serve`` on the demo's configuration."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pidfile = STATE / "relay.pid"
        self._errors = STATE / "relay.stderr"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Return when all listeners accept. Raises Trouble."""
        command = ("-m", "relay", "serve", "--config", str(self._plan.config), "--pidfile", str(self._pidfile))
        with self._errors.open("w") as errors, _undisturbed():
            self._process = _start(command, stdout=errors, stderr=errors)
        wait_for(self._has_started, "the relay to accept connections")

    def _has_started(self) -> bool:
        self.must_run()
        return self._pidfile.exists()

    def must_run(self) -> None:
        """Raises Trouble with its last words when it has ended."""
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            raise Trouble(f"the relay ended with exit code {code}: {self.complaints() or 'without a word'}")

    def watch(self) -> NoReturn:
        """Wait until it ends, which it should not. Raises Trouble."""
        assert self._process is not None
        self._process.wait()
        self.must_run()
        raise AssertionError("it has ended")

    def complaints(self) -> str:
        """Its standard error: empty unless something is wrong."""
        return self._errors.read_text(errors="replace").strip()

    def log(self) -> list[str]:
        """Its log so far."""
        with contextlib.suppress(FileNotFoundError):
            return self._plan.log.read_text(encoding="ascii", errors="replace").splitlines()
        return []

    def stop(self) -> None:
        """Let it finish its work. Raises Trouble when it had to be killed or ended badly."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.terminate()
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its children go with it
            process.wait()
            raise Trouble(f"the relay did not end within {STOP_S:.0f} s and was killed") from None
        if code != 0:
            raise Trouble(f"the relay ended with exit code {code}: {self.complaints()}")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: a process that was just started must be known to who has to end it."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda at, _frame: came.append(at)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _start(command: tuple[str, ...], *, stdout: int | IO[str], stderr: int | IO[str] | None) -> subprocess.Popen[str]:
    """In a session of its own: Ctrl-C is for the demo, which then ends the others in order."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
