"""Shared pieces of the benchmarks: targets and figures, process accounting, smtp-sink, smtp-source.

Linux only (/proc). smtp-source and smtp-sink come with the Debian package postfix.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_TICK: Final = os.sysconf("SC_CLK_TCK")
SINK_IDLE_S: Final = 3600
"""smtp-sink's time-out: it and the relays' pooled connections outlive a run."""


def say(text: str) -> None:
    """Progress goes to standard error: standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def tool(name: str) -> str:
    """Path of a program, most of them Postfix's; /usr/sbin is not always on PATH."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        sys.exit(f"{name} not found: `make install` as root installs what the benchmarks use")
    return found


def raise_open_files() -> None:
    """Allow this process as many open files as the system lets it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---------------------------------------------------------------------------------------------------------- processes
def _stat(pid: int) -> tuple[int, int]:
    """(parent's pid, CPU ticks with those of reaped children), from /proc/PID/stat; proc(5) numbers the fields."""
    data = Path(f"/proc/{pid}/stat").read_bytes()
    fields = data[data.rindex(b")") + 2 :].split()  # the name before may hold spaces; this starts at field 3
    return int(fields[1]), sum(int(ticks) for ticks in fields[11:15])


def tree(roots: Sequence[int]) -> list[int]:
    """The roots and all their living descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                children.setdefault(_stat(int(name))[0], []).append(int(name))
            except (OSError, ValueError):
                continue  # ended while we looked
    found, todo = [], list(roots)
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def cpu_seconds(roots: Sequence[int]) -> float:
    """CPU seconds of some process trees, reaped children included."""
    ticks = 0
    for pid in tree(roots):
        try:
            ticks += _stat(pid)[1]
        except OSError:
            continue
    return ticks / _TICK


def pss_bytes(pids: Sequence[int]) -> int:
    """Proportional set size of some processes: a page shared by n of them counts for 1/n in each."""
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


class PeakPss:
    """Samples the PSS of some process trees while the block runs; ``peak`` holds the highest sum, in bytes."""

    EVERY_S: Final = 0.02

    def __init__(self, roots: Sequence[int]) -> None:
        self._pids = tree(roots)
        self.peak = pss_bytes(self._pids)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._end.wait(self.EVERY_S):
            self.peak = max(self.peak, pss_bytes(self._pids))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()


def stop(process: subprocess.Popen[bytes], grace_s: float = 15) -> None:
    """SIGTERM, and SIGKILL when that is not heard."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(what: str, ready: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait for a condition; ends the program when it does not come."""
    end = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end:
            sys.exit(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.02)


def accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def split_endpoint(text: str) -> tuple[str, int]:
    """HOST:PORT; loopback only, because the benchmarks send floods."""
    host, _, port = text.rpartition(":")
    if not host.startswith("127.") and host not in {"localhost", "::1", "[::1]"}:
        sys.exit(f"refusing {text}: the benchmarks send to loopback only")
    return host, int(port)


# --------------------------------------------------------------------------------------------------------------- sink
class Sink:
    """An smtp-sink whose running message count can be read without touching it."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        descriptor, name = tempfile.mkstemp(prefix="sink-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self._counts = Path(name)
        command = [tool("smtp-sink"), "-c", "-m", "4000", "-t", str(SINK_IDLE_S)]
        if os.geteuid() == 0:
            command += ["-u", "nobody"]
        self.host, self.port = host, port
        self._process = subprocess.Popen([*command, f"{host}:{port}", "4000"], stdout=descriptor)
        os.close(descriptor)
        self._file = self._counts.open("rb", buffering=0)
        wait_until(f"smtp-sink on {host}:{port}", lambda: accepts(host, port), 20)

    def count(self) -> int:
        """Messages taken so far: the last mesg= of a line that smtp-sink -c writes over and over with CR."""
        size = os.fstat(self._file.fileno()).st_size
        tail = os.pread(self._file.fileno(), 200, max(0, size - 200))
        at = tail.rfind(b"mesg=", 0, tail.rfind(b"\r") + 1)
        return int(tail[at + 5 :].split(b"\r")[0]) if at >= 0 else 0

    def wait_for(self, total: int, timeout_s: float) -> float:
        """Wait until so many messages have come; returns the moment (monotonic)."""
        end = time.monotonic() + timeout_s
        while (got := self.count()) < total:
            if time.monotonic() > end:
                raise TimeoutError(f"the sink has {got} of {total} messages")
            time.sleep(0.005)
        return time.monotonic()

    def close(self) -> None:
        stop(self._process)
        self._file.close()
        self._counts.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- source
@dataclass(frozen=True, slots=True)
class Load:
    """What smtp-source sends: ``octets`` each, over ``sessions`` at once, a connection each or many over one."""

    sessions: int
    messages: int
    octets: int
    keep: bool


def send(host: str, port: int, load: Load, timeout_s: float = 240) -> float:
    """Send a load; returns the moment of the last acknowledgement (monotonic). RuntimeError when one was refused."""
    command = [tool("smtp-source"), "-N", "-s", str(load.sessions), "-m", str(load.messages), "-l", str(load.octets)]
    command += ["-f", "bench@sender.test", "-t", "user@example.com", "-M", "client.sender.test"]
    done = subprocess.run(
        [*command, *(["-d"] if load.keep else []), f"{host}:{port}"],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"smtp-source: {done.stderr.strip()[-300:]}")
    return time.monotonic()


# ------------------------------------------------------------------------------------------------ targets and figures
@dataclass(frozen=True, slots=True)
class Target:
    """A server under measurement: where it listens, its process trees, and the sink behind it."""

    name: str
    host: str
    port: int
    roots: Sequence[int]
    sink: Sink | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured thing: the median of each target, and of its ratios to the first target in the same repetition."""

    measure: str
    unit: str
    values: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [
            f"{name} {value:.4g}" + (f" (x{self.ratios[name]:.2f})" if name in self.ratios else "")
            for name, value in self.values.items()
        ]
        return f"{self.measure:28} {self.unit:12} " + "  ".join(parts)


def figure(measure: str, unit: str, rounds: Sequence[dict[str, float]]) -> Figure:
    """From one value per target and repetition. The ratio is taken inside a repetition, where the noise is the same."""
    if not rounds:
        return Figure(measure, unit)
    names = list(rounds[0])
    base = names[0]
    values = {name: statistics.median(row[name] for row in rounds) for name in names}
    ratios = {
        name: statistics.median(row[name] / row[base] for row in rounds)
        for name in names[1:]
        if all(row[base] for row in rounds)
    }
    return Figure(measure, unit, values, ratios)


def command_line(text: str | None) -> ArgumentParser:
    """The parser of a part that can be run alone against any servers."""
    made = ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="NAME,HOST:PORT,PIDS[,SINKPORT]",
        help="PIDS: root process ids joined by +, or @PIDFILE; SINKPORT: start an smtp-sink there, the target's next "
        "hop. The first target is the base of the ratios",
    )
    return made


def targets(specs: Sequence[str]) -> Iterator[Target]:
    for spec in specs:
        name, endpoint, pids, *sink = spec.split(",")
        host, port = split_endpoint(endpoint)
        if pids.startswith("@"):
            pids = Path(pids[1:]).read_text().strip()
        yield Target(name, host, port, [int(pid) for pid in pids.split("+")], Sink(int(sink[0])) if sink else None)
