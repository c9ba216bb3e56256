"""The disk's floor: appends with fsync, small files with fsync, and SQLite (WAL, synchronous=FULL) by transaction size.

usage: fsync.py [--seconds 2] [--reps 3] FOLDER ...
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

Step = Callable[[], object]
Make = Callable[[Path], AbstractContextManager[Step]]
PREALLOCATED: Final = 64 << 20


@contextmanager
def append(folder: Path, octets: int, sync: Callable[[int], None], preallocated: int = 0) -> Iterator[Step]:
    """Write at the end of a file (or over preallocated blocks) and sync."""
    descriptor = os.open(folder / "append", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    piece = b"x" * octets
    if preallocated:
        os.write(descriptor, bytes(preallocated))
        os.fsync(descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)

    def step() -> None:
        os.write(descriptor, piece)
        sync(descriptor)

    try:
        yield step
    finally:
        os.close(descriptor)


@contextmanager
def new_file(folder: Path, octets: int) -> Iterator[Step]:
    """A file per message: create, write, fsync, fsync the folder, remove."""
    parent = os.open(folder, os.O_RDONLY)
    piece = b"x" * octets

    def step() -> None:
        path = folder / "message"
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, piece)
        os.fsync(descriptor)
        os.close(descriptor)
        os.fsync(parent)
        path.unlink()

    try:
        yield step
    finally:
        os.close(parent)


@contextmanager
def sqlite(folder: Path, rows: int, octets: int) -> Iterator[Step]:
    """One transaction of some rows."""
    database = sqlite3.connect(folder / "queue.db", isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=full")
    database.execute("create table queue(id integer primary key, envelope text, body blob, due real)")
    batch = [("x" * 100, os.urandom(octets), 0.0)] * rows

    def step() -> None:
        database.execute("begin immediate")
        database.executemany("insert into queue(envelope, body, due) values(?, ?, ?)", batch)
        database.execute("commit")

    try:
        yield step
    finally:
        database.close()


def rate(folder: Path, make: Make, seconds: float, reps: int) -> list[float]:
    """Steps a second, once per repetition, each in an empty folder on the file system of ``folder``."""
    rates = []
    for _ in range(reps):
        with tempfile.TemporaryDirectory(dir=folder) as empty, make(Path(empty)) as step:
            count, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds / reps:
                step()
                count += 1
            rates.append(count / passed)
    return rates


def floor(folder: Path) -> float:
    """Appends of 4 KB with fsync a second: the one figure that a table of durable rates has to name."""
    return statistics.median(rate(folder, partial(append, octets=4096, sync=os.fsync), 1.5, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    kinds: list[tuple[str, int, Make]] = [
        ("append 4 KB, fsync", 1, partial(append, octets=4096, sync=os.fsync)),
        ("append 4 KB, fdatasync", 1, partial(append, octets=4096, sync=os.fdatasync)),
        (
            "overwrite preallocated 4 KB, fdatasync",
            1,
            partial(append, octets=4096, sync=os.fdatasync, preallocated=PREALLOCATED),
        ),
        ("append 64 KB, fsync", 1, partial(append, octets=65536, sync=os.fsync)),
        ("new file of 1 KB, fsync, folder fsync", 1, partial(new_file, octets=1024)),
        ("new file of 1 MB, fsync, folder fsync", 1, partial(new_file, octets=1 << 20)),
    ]
    kinds += [
        (f"SQLite WAL FULL, {rows} rows of 1 KB each: rows", rows, partial(sqlite, rows=rows, octets=1024))
        for rows in (1, 10, 100)
    ]
    for folder in options.folders:
        for name, factor, make in kinds:
            rates = [one * factor for one in rate(folder, make, options.seconds, options.reps)]
            print(f"{folder!s:20} {name:45} {statistics.median(rates):9.0f}/s ({min(rates):.0f}..{max(rates):.0f})")


if __name__ == "__main__":
    main()
