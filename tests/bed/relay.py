"""Owns: a relay of a test's own: the shipped program on an ordinary configuration in a folder of its own.

Nothing of the relay is imported here: what a test sees is what an operator sees.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from tests.bed.client import Client
from tests.bed.ports import free_port
from tests.bed.waiting import PATIENCE_S, wait_for

ROOT: Final = Path(__file__).parents[2]
START_S: Final = 60.0
"""Longest wait for the listeners: a second of work for an idle machine, and tests share theirs."""
STOP_S: Final = 60.0
"""Longest wait for an orderly end: the drain time-out below and some."""

Table = dict[str, Any]

RECIPIENTS: Final = ("user@example.com", "bob@example.com", "carol@example.com")
RESTRICTED: Final = ("restricted@example.com",)


class RelayRunner:
    """One relay. ``start`` waits until it accepts; ``stop`` returns its exit code; both may be repeated."""

    def __init__(
        self,
        folder: Path,
        next_hop: str | Sequence[str],
        *,
        listeners: Mapping[str, str] | None = None,
        recipients: Iterable[str] = RECIPIENTS,
        restricted: Iterable[str] = RESTRICTED,
        certificate: tuple[Path, Path] | None = None,
        default_next_hop: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """``next_hop`` as a route names it, ``smtp:[host]:port``, one or several; ``listeners`` maps names to roles.

        ``config`` is laid over the defaults table by table: ``{"queue": {"retry_s": [5]}}``; a value of None removes.
        """
        self.folder = folder
        self.spool = folder / "spool"
        self.log_file = folder / "relay.log"
        self.stderr_file = folder / "stderr"
        self.config_file = folder / "relay.toml"
        self.pidfile = folder / "relay.pid"
        self.recipients_file = folder / "recipients"
        self.restricted_file = folder / "restricted"
        self.ports = {name: free_port() for name in (listeners or {"mx": "mx"})}
        self.web_port = free_port()
        self.may_fail = False
        """Set by tests that break the relay on purpose: no objection to tracebacks and exit codes at the end."""
        self._process: subprocess.Popen[bytes] | None = None
        hops = [next_hop] if isinstance(next_hop, str) else list(next_hop)
        self.config: Table = {
            "server": {"hostname": "mx.example.com", "spool": self.spool, "workers": 1},
            "process": {"user": "", "hub_user": "", "drain_timeout_s": 20.0},
            "listener": [
                {"name": name, "role": role, "address": f"127.0.0.1:{self.ports[name]}"}
                for name, role in (listeners or {"mx": "mx"}).items()
            ],
            # All tests come from a few addresses and close to limits: what they do together must not be held against one.
            "limits": {
                "unknown_recipients_per_client": 0,
                "unknown_recipients_per_network": 0,
                "stress_percent": 0,
                "tarpit_s": 0.0,
            },
            "domain": [{"names": ["example.com"]}],
            "route": [{"domains": ["example.com"], "next_hops": hops}],
            "queue": {"retry_s": [0.5], "retry_jitter": 0.0},
            "directory": {
                "sources": [
                    {"type": "list", "path": self.recipients_file},
                    {"type": "restricted", "path": self.restricted_file},
                ]
            },
            "log": {"file": self.log_file},
            "web": {"listen": f"127.0.0.1:{self.web_port}"},
        }
        if certificate is not None:
            self.config["tls"] = {"certificate": certificate[0], "key": certificate[1]}
        if default_next_hop is not None:
            self.config["route"].append({"domains": ["*"], "next_hops": [default_next_hop]})
        self.recipients_file.write_text("".join(f"{line}\n" for line in recipients))
        self.restricted_file.write_text("".join(f"{line}\n" for line in restricted))
        self.configure(config or {})

    # --- configuration ---
    def configure(self, changes: Mapping[str, Any]) -> None:
        """Lay ``changes`` over the configuration and write it; a running relay takes it up at ``reload``."""
        _lay_over(self.config, changes)
        self.config_file.write_text(toml(self.config))

    def command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """``relay ARGUMENTS --config FILE``; the caller judges exit code and output."""
        return subprocess.run(
            [sys.executable, "-m", "relay", *map(str, arguments), "--config", str(self.config_file)],
            cwd=ROOT,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S * 3,
            check=False,
        )

    def build_directory(self) -> None:
        """``relay directory build``, which must succeed."""
        built = self.command("directory", "build")
        assert built.returncode == 0, f"relay directory build: {built.stdout}{built.stderr}"

    # --- life ---
    def start(self, *, build: bool = True, under: Sequence[str] = ()) -> RelayRunner:
        """Build the snapshot, run ``relay serve``, return when every listener accepts.

        ``under``: a command that runs another in its own place, such as prlimit with its options.
        """
        assert self._process is None, "it runs already"
        if build:
            self.build_directory()
        self.pidfile.unlink(missing_ok=True)
        with self.stderr_file.open("ab") as stderr:
            self._process = subprocess.Popen(
                [
                    *under,
                    sys.executable,
                    "-m",
                    "relay",
                    "serve",
                    "--config",
                    self.config_file,
                    "--pidfile",
                    self.pidfile,
                ],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        wait_for(self._has_started, lambda: f"pidfile of the relay; it said: {self.complaints()}", START_S)
        return self

    def _has_started(self) -> bool:
        assert self._process is not None
        code = self._process.poll()
        assert code is None, f"relay serve ended with {code}: {self.complaints()}"
        return self.pidfile.exists() and self.pidfile.read_text().strip() == str(self._process.pid)

    @property
    def supervisor(self) -> int:
        """The supervisor's pid."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def workers(self) -> list[int]:
        """The workers' pids, by slot."""
        return [pid for _, pid in sorted((name, pid) for name, pid in self._members() if "worker" in name)]

    def hub(self) -> int:
        """The hub's pid; fails the test when there is none."""
        return self._member("hub")

    def web(self) -> int:
        """The web member's pid; fails the test when there is none."""
        return self._member("web")

    def _member(self, role: str) -> int:
        found = [pid for name, pid in self._members() if role in name]
        assert found, f"the tree has no {role}"
        return found[0]

    def _members(self) -> list[tuple[str, int]]:
        return [(name, pid) for pid, name in children_of(self.supervisor).items()]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor."""
        os.kill(self.supervisor, number)

    def wait_for_exit(self, patience_s: float = STOP_S) -> int:
        """The exit code of the supervisor, once it has ended and its children with it."""
        assert self._process is not None
        children = set(children_of(self._process.pid))
        code = self._process.wait(patience_s)
        self._process = None
        wait_for(lambda: not any(map(is_alive, children)), f"end of the children {sorted(children)}")
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to drain and end; its exit code."""
        self.send_signal(number)
        return self.wait_for_exit()

    def kill_tree(self) -> None:
        """kill -9 of every member at once, as a power cut would."""
        tree = [self.supervisor, *children_of(self.supervisor)]
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)  # so that the supervisor replaces nobody meanwhile
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for_exit()

    def close(self) -> None:
        """The end: stop it when it runs; fail on a bad exit code or a traceback, unless ``may_fail``."""
        code = 0
        if self._process is not None:
            if self._process.poll() is None:
                self.send_signal(signal.SIGCONT)
                self.send_signal(signal.SIGTERM)
            try:
                code = self.wait_for_exit()
            except subprocess.TimeoutExpired:
                self.kill_tree()
                code = -1
        if not self.may_fail:
            assert code == 0, f"the relay ended with {code}: {self.complaints()}"
            assert "Traceback" not in self.complaints(), self.complaints()

    # --- conversation ---
    def address(self, name: str = "mx") -> tuple[str, int]:
        """Where a listener is."""
        return "127.0.0.1", self.ports[name]

    def client(self, name: str = "mx", **options: Any) -> Client:
        """A new connection to a listener; options as ``Client`` has them."""
        return Client(self.address(name), **options)

    # --- what it tells ---
    def complaints(self) -> str:
        """Standard error and the last lines of the log."""
        stderr = self.stderr_file.read_text(errors="replace") if self.stderr_file.exists() else ""
        return stderr + "\n".join(self.log_lines()[-60:])

    def log_lines(self) -> list[str]:
        """The whole log so far."""
        if not self.log_file.exists():
            return []
        return self.log_file.read_text(errors="replace").splitlines()

    def grep(self, pattern: str) -> list[str]:
        """The log lines in which ``pattern`` is found."""
        return [line for line in self.log_lines() if re.search(pattern, line)]

    def wait_for_log(self, pattern: str, count: int = 1, patience_s: float = PATIENCE_S) -> list[str]:
        """The lines with ``pattern``, once there are ``count``."""
        return wait_for(
            lambda: lines if len(lines := self.grep(pattern)) >= count else [],
            lambda: f"{count} log lines with {pattern!r}; the log: {self.complaints()}",
            patience_s,
        )

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page of the web member."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.web_port}{path}", timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.read().decode()

    def metric(self, sample: str, **labels: str) -> float:
        """The sum over all samples of that name that have these labels; 0 when there is none."""
        status, text = self.get("/metrics")
        assert status == 200, text
        return sum(
            found.value
            for family in text_string_to_metric_families(text)
            for found in family.samples
            if found.name == sample and labels.items() <= found.labels.items()
        )

    def wait_for_metric(self, sample: str, value: float, **labels: str) -> None:
        """Wait until it is at least ``value``: counters are flushed some times a second."""
        wait_for(
            lambda: self.metric(sample, **labels) >= value,
            lambda: f"{sample}{labels} of {value}, only {self.metric(sample, **labels)}",
        )


def children_of(pid: int) -> dict[int, str]:
    """Pid → name of the living children of a process."""
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                name, rest = _stat(int(entry))
                if int(rest[1]) == pid and rest[0] not in "ZX":
                    found[int(entry)] = name
    return found


def is_alive(pid: int) -> bool:
    """False for the dead and for zombies."""
    try:
        return _stat(pid)[1][0] not in "ZX"
    except OSError:
        return False


def _stat(pid: int) -> tuple[str, list[str]]:
    """Name, and what follows it in /proc/PID/stat: state, parent, ... (the name may hold spaces and brackets)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    name, _, rest = text.partition("(")[2].rpartition(")")
    return name, rest.split()


def _environment() -> dict[str, str]:
    """Without the settings that would override the test's configuration."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DMZ_RELAY")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", "TZ": "UTC"}


def _lay_over(table: Table, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            table.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(table.get(key), dict):
            _lay_over(table[key], value)
        else:
            table[key] = value


def toml(table: Table) -> str:
    """A configuration as TOML: keys, tables, and lists of tables, one level deep each, all else inline."""
    lines: list[str] = []
    for key, value in table.items():
        match value:
            case dict():
                lines += [f"[{key}]", *(f"{name} = {_inline(item)}" for name, item in value.items()), ""]
            case [dict(), *_]:
                for item in value:
                    lines += [f"[[{key}]]", *(f"{name} = {_inline(one)}" for name, one in item.items()), ""]
            case _:
                raise AssertionError(f"{key} = {value!r} stands outside any table")
    return "\n".join(lines)


def _inline(value: object) -> str:
    match value:
        case list() | tuple():
            return "[" + ", ".join(map(_inline, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + "}"
        case Path():
            return json.dumps(str(value))
        case _:
            return json.dumps(value)  # strings, numbers and booleans are the same in TOML
