"""Owns: the figures that are read when somebody asks: queue, snapshot, spool, processes; for metrics and health alike.

Everything here blocks (disk, /proc) and runs in a thread. Must not change anything but a nameless probe file in the
spool, nor judge: ``web.health`` does.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import relay
from relay.config.schema import Config
from relay.directory.layout import Header, SnapshotError
from relay.directory.snapshot import inspect
from relay.directory.state import State, read_state, state_path
from relay.directory.weak import weaknesses
from relay.queue.store import QueueError, Stats
from relay.queue.view import Figures as QueueFigures
from relay.telemetry import catalogue
from relay.telemetry.catalogue import Family
from relay.telemetry.metrics import OTHER
from relay.telemetry.valuefiles import label_text, merged, readable

PROCESSES: Final = 80
"""Members with figures of their own: 64 workers, hub, web, supervisor, a sync; others add up under one label."""

PROBE_OCTETS: Final = 4096
"""A block: enough to meet a full or read-only disk."""

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """What /proc says about a member: CPU time in seconds since its start, resident memory in octets."""

    member: str
    cpu: float
    resident: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One look at everything. A value that could not be had is None, and its problem says why (else "")."""

    taken: float
    """Wall clock, seconds."""
    queue: Stats | None
    queue_problem: str
    snapshot: Header | None
    snapshot_problem: str
    directory: State
    """How readings of directories went; empty while there was none."""
    insecure: Mapping[tuple[str, ...], float]
    """Directory → 1 when it is asked in a way that should not last."""
    spool_free: int | None
    """Octets free for the relay's users."""
    spool_problem: str
    processes: tuple[Process, ...]
    alive: Mapping[str, float]
    """Member → wall clock of its loop's last turn."""
    page: tuple[Metric, ...]
    """What the members counted."""
    files_unreadable: int


class Probe:
    """Takes the figures of one tree. ``supervisor`` is its pid. Not for two threads at once."""

    def __init__(self, supervisor: int) -> None:
        self._supervisor = supervisor
        self._queue = QueueFigures()
        self._snapshot_seen: tuple[object, ...] = ()
        self._snapshot: tuple[Header | None, str] = (None, "")

    def take(self, config: Config) -> Figures:
        """Read everything; never raises for what is wrong with the things looked at."""
        spool = config.server.spool
        try:
            queue, queue_problem = self._queue.read(spool), ""
        except QueueError as error:
            queue, queue_problem = None, str(error)
        snapshot, snapshot_problem = self._look_at_snapshot(config.snapshot_path)
        free, spool_problem = _try_spool(spool / "queue")
        files, unreadable = readable(spool / "metrics")
        page = merged(files)
        return Figures(
            time.time(),
            queue,
            queue_problem,
            snapshot,
            snapshot_problem,
            read_state(state_path(config.snapshot_path)) if config.directory.scheduled else State(),
            _insecure(config),
            free,
            spool_problem,
            tuple(_processes(self._supervisor)),
            _alive(page),
            page,
            unreadable,
        )

    def _look_at_snapshot(self, path: Path) -> tuple[Header | None, str]:
        """Verified once for each file: reading 20 MB for every scrape would be a waste."""
        try:
            status = path.stat()
        except OSError as error:
            return None, f"{path}: {error.strerror}; run relay directory build"
        seen = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if seen != self._snapshot_seen:
            try:
                self._snapshot = inspect(path), ""
            except SnapshotError as error:
                self._snapshot = None, str(error)
            self._snapshot_seen = seen
        return self._snapshot


def _try_spool(folder: Path) -> tuple[int | None, str]:
    """Free octets, after a block was written to the disk and dropped."""
    try:
        space = os.statvfs(folder)
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, bytes(PROBE_OCTETS))
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return None, f"{folder}: {error.strerror}; check the disk and the owner of the folder"
    return space.f_bavail * space.f_frsize, ""


def _alive(page: Iterable[Metric]) -> dict[str, float]:
    return {
        sample.labels["member"]: sample.value
        for metric in page
        if metric.name == catalogue.ALIVE.name
        for sample in metric.samples
    }


def _processes(supervisor: int) -> Iterator[Process]:
    """The supervisor and its children. Those that end meanwhile, and all without /proc, are left out."""
    found = [(supervisor, "supervisor")]
    try:
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text("ascii")
    except OSError:
        children = ""
    found += [(int(pid), "") for pid in children.split()]
    for number, (pid, name) in enumerate(found):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
        except OSError:
            continue
        # proc_pid_stat(5): "pid (comm) state ppid …"; comm may hold spaces and brackets.
        command, _, rest = stat.partition("(")[2].rpartition(")")
        fields = rest.split()
        cpu = (int(fields[11]) + int(fields[12])) / _TICKS
        member = name or member_name(command)
        yield Process(member if number < PROCESSES else OTHER, cpu, int(fields[21]) * _PAGE)


def member_name(command: str) -> str:
    """A process's name in /proc as the member's in value files: ``relay-worker-0`` is worker-0."""
    return label_text(command.removeprefix("relay").lstrip(" :-").replace(" ", "-")) or OTHER


class _Page(Collector):
    """Everything on the metrics page."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures
        yield from figures.page
        yield _gauge(catalogue.BUILD, {(relay.__version__,): 1})
        yield _gauge(catalogue.FILES_UNREADABLE, figures.files_unreadable)
        yield from _queue(figures)
        yield from _snapshot(figures)
        yield from _directory(figures)
        if figures.spool_free is not None:
            yield _gauge(catalogue.SPOOL_FREE, figures.spool_free)
        cpu: defaultdict[tuple[str, ...], float] = defaultdict(float)
        memory: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for process in figures.processes:
            cpu[process.member,] += process.cpu
            memory[process.member,] += process.resident
        seconds = CounterMetricFamily(
            catalogue.PROCESS_CPU.name, catalogue.PROCESS_CPU.text, labels=catalogue.PROCESS_CPU.labels
        )
        for labels, value in cpu.items():
            seconds.add_metric(labels, value)
        yield seconds
        yield _gauge(catalogue.PROCESS_MEMORY, memory)


def _queue(figures: Figures) -> Iterator[Metric]:
    yield _gauge(catalogue.QUEUE_READABLE, figures.queue is not None)
    if figures.queue is not None:
        stats = figures.queue
        yield _gauge(catalogue.QUEUE_MESSAGES, stats.messages)
        yield _gauge(catalogue.QUEUE_RECIPIENTS, stats.recipients)
        yield _gauge(catalogue.QUEUE_HELD, stats.held)
        yield _gauge(catalogue.QUEUE_LEASED, stats.leased)
        yield _gauge(catalogue.QUEUE_BYTES, stats.octets)
        yield _gauge(catalogue.QUEUE_OLDEST, max(0.0, figures.taken - stats.oldest) if stats.oldest else 0)
        yield _gauge(catalogue.QUEUE_CORRUPT, stats.corrupt)


def _snapshot(figures: Figures) -> Iterator[Metric]:
    yield _gauge(catalogue.SNAPSHOT_USABLE, figures.snapshot is not None)
    if figures.snapshot is not None:
        header = figures.snapshot
        yield _gauge(catalogue.SNAPSHOT_AGE, max(0.0, figures.taken - header.created))
        yield _gauge(catalogue.SNAPSHOT_BYTES, header.size)
        yield _gauge(catalogue.SNAPSHOT_GENERATION, header.generation)
        yield _gauge(catalogue.SNAPSHOT_ADDRESSES, header.addresses)
        yield _gauge(catalogue.SNAPSHOT_RESTRICTED, header.restricted)


def _insecure(config: Config) -> dict[tuple[str, ...], float]:
    weak = {name for name, _, _ in weaknesses(config)}
    return {(profile.name,): float(profile.name in weak) for profile in config.directory.ldap}


def _directory(figures: Figures) -> Iterator[Metric]:
    state = figures.directory

    def ends(what: str) -> dict[tuple[str, ...], float]:
        return {
            (name,): float(reading[what]) - figures.taken
            for name, reading in state.profiles.items()
            if reading.get(what)
        }

    once = bool(state.succeeded)
    age: dict[tuple[str, ...], float] = {(): max(0.0, figures.taken - state.succeeded)} if once else {}
    took: dict[tuple[str, ...], float] = {(kind,): seconds for kind, seconds in state.took.items()}
    yield _gauge(catalogue.DIRECTORY_AGE, age)
    yield _gauge(catalogue.DIRECTORY_DURATION, took)
    yield _counter(catalogue.DIRECTORY_READ, {(kind,): times for kind, times in state.kinds.items()})
    yield _counter(catalogue.DIRECTORY_FAILED, {(reason,): count for reason, count in state.failures.items()})
    yield _gauge(catalogue.DIRECTORY_CERTIFICATE, ends("certificate_expires"))
    yield _gauge(catalogue.DIRECTORY_PASSWORD, ends("password_expires"))
    yield _gauge(catalogue.DIRECTORY_WEAK, figures.insecure)


def _counter(family: Family, values: Mapping[tuple[str, ...], float]) -> Metric:
    metric = CounterMetricFamily(family.name, family.text, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _gauge(family: Family, values: float | Mapping[tuple[str, ...], float]) -> Metric:
    metric = GaugeMetricFamily(family.name, family.text, labels=family.labels)
    for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        metric.add_metric(labels, value)
    return metric


def page(figures: Figures) -> bytes:
    """The metrics page in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Page(figures))
    return generate_latest(registry)
