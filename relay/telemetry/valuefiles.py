"""Owns: the files that carry metric values from the members to the metrics page, and every use of internals of
prometheus_client (its multiprocess mode is written for pids; members here are slots).

A member's files are named after its slot (``worker-0``), so that a replaced worker goes on counting where its
predecessor stopped and dead pids leave nothing behind. Must not know any metric.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client import Histogram, values
from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

KILOBYTE: Final = 1024

FILE_OCTETS: Final = {
    "counter": 512 * KILOBYTE,
    "histogram": 512 * KILOBYTE,
    "gauge_livesum": 256 * KILOBYTE,
    "gauge_livemin": 4 * KILOBYTE,
    "gauge_livemax": 4 * KILOBYTE,
}
"""Size of each value file: more than all bounded label sets need (tested), allocated at once. The library would
leave holes in the file and grow it; a full disk then ends the process with SIGBUS at the first write into a hole."""

FOLDER_MODE: Final = 0o3770
"""Workers, hub and web have different users and one group: files get the group of the folder. The folder is the
supervisor's and sticky: a worker that was broken into must not exchange its files, nor the hub's, for links."""
FILE_MODE: Final = 0o640

LABEL_OCTETS: Final = 80
"""Longest label value: the size of the files counts on it."""

# The library's own annotations stop here.
_multi_process_value: Final[Callable[..., Any]] = values.MultiProcessValue
_merge: Final[Callable[[Sequence[str]], Iterable[Metric]]] = MultiProcessCollector.merge
_read_values: Final[Callable[[str], Iterable[tuple[Any, ...]]]] = MmapedDict.read_all_values_from_file

_DAMAGE: Final = (RuntimeError, ValueError, struct.error)
"""What reading a damaged file raises."""

_FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


def empty(folder: Path, group: int = -1) -> None:
    """Make ``folder`` (for ``group``, a gid, -1: as it is) or delete the files of an earlier run in it.

    For the supervisor, before the first fork. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.suffix in (".db", ".new"):
            entry.unlink()
    if group >= 0:
        os.chown(folder, os.geteuid(), group)
    folder.chmod(FOLDER_MODE)


def retire(folder: Path, identifier: str) -> None:
    """Forget the gauges of a member that is gone; its counters stay. Harmless when there are none."""
    for path in folder.glob(f"gauge_*_{identifier}.db"):
        path.unlink(missing_ok=True)


class ValueFiles:
    """The value files of one member; metrics are made between ``select()`` and the next member's ``select()``.

    Make it after the fork. When the files cannot be had (disk full) ``shared`` is False and values live in memory
    only: a relay without metrics is better than none.
    """

    def __init__(self, folder: Path, identifier: str) -> None:
        if not identifier or "_" in identifier or "/" in identifier:
            raise ValueError(f"{identifier!r} cannot name value files; write for example worker-0")
        self._folder = folder
        self.problem: OSError | None = None
        self.known: dict[str, list[dict[str, str]]] = {}
        try:
            self._allocate(identifier)
        except OSError as error:
            self.problem = error
            self._values: Any = values.MutexValue
        else:
            self._values = _multi_process_value(process_identifier=lambda: identifier)

    @property
    def shared(self) -> bool:
        """Whether the metrics page can see the values."""
        return self.problem is None

    def select(self) -> None:
        """Have the library put new values into these files; its choice is a global of the process."""
        os.environ[_FOLDER_VARIABLE] = str(self._folder)
        values.ValueClass = self._values

    def close(self) -> None:
        """Let go of the files. The values stay in them."""
        if self.shared:
            self._values.close_all_files()

    def _allocate(self, identifier: str) -> None:
        retire(self._folder, identifier)
        for prefix, octets in FILE_OCTETS.items():
            path = self._folder / f"{prefix}_{identifier}.db"
            if path.exists():
                try:
                    self._remember(path)
                except _DAMAGE:
                    path.unlink()
                else:
                    continue
            _create(path, octets)

    def _remember(self, path: Path) -> None:
        """Note the label sets an earlier process of the slot left: they count against the bounds."""
        for key in _keys(path):
            name, _sample, labels, _text = json.loads(key)
            if "le" not in labels:
                self.known.setdefault(name, []).append(labels)


def _create(path: Path, octets: int) -> None:
    """A file of zeros under its name only when complete: the metrics page may read at any moment."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)  # of a process that was killed right here
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        os.fchmod(descriptor, FILE_MODE)  # whatever the umask: web has to read the hub's
        os.posix_fallocate(descriptor, 0, octets)
    except OSError:
        new.unlink()
        raise
    finally:
        os.close(descriptor)
    new.rename(path)


def _keys(path: Path) -> list[str]:
    """The keys in a file. Raises OSError or one of ``_DAMAGE``; the library takes some nonsense for an empty file."""
    with path.open("rb") as file:
        (used,) = struct.unpack("=i", file.read(4))
    if not 0 <= used <= path.stat().st_size:
        raise ValueError(f"{path} cannot hold {used} octets")
    return [key for key, *_ in _read_values(str(path))]


def readable(folder: Path) -> tuple[list[str], int]:
    """Paths of the value files that parse, and how many do not: one damaged file must not take the page away."""
    good: list[str] = []
    bad = 0
    for path in sorted(folder.glob("*.db")):
        try:
            _keys(path)
        except FileNotFoundError:
            continue
        except (OSError, *_DAMAGE):
            bad += 1
        else:
            good.append(str(path))
    return good, bad


def merged(files: Sequence[str]) -> tuple[Metric, ...]:
    """The values of all members as one page."""
    return tuple(_merge(files))


def observe_in_bulk(histogram: Histogram, counts: Sequence[int], total: float) -> None:
    """What ``observe()`` does, for many observations at once: 1.7 µs each there, here once per bucket and flush.

    ``counts`` has one number per bucket, the one above the last bound included, not cumulated; ``total`` is their sum.
    """
    histogram._sum.inc(total)
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)


def label_text(value: object) -> str:
    """``value`` as a label: printable ASCII without quotes and backslashes, at most ``LABEL_OCTETS``."""
    return "".join(c if "!" <= c <= "~" and c not in '"\\' else "?" for c in str(value)[:LABEL_OCTETS])
