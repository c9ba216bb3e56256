"""Owns: reading from an strace what processes did to their files, and what they told and were told.

    command = strace(output, [*program]) ; run it ; calls = read(output)
    with attached(pids, output) as threads: ... ; calls = read(output, threads)

The order of lines is strace's own: a call begins at its first line and ends where its result stands, so what ended
before something else began did so on the machine as well.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bed.waiting import PATIENCE_S, wait_for

CALLS: Final = (
    "openat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,link,linkat,rename,renameat,renameat2,"
    "unlink,unlinkat,fsync,fdatasync,sync_file_range,lseek,sendto,sendmsg,sendfile,copy_file_range,"
    "clone,clone3,fork,vfork"
)
"""All that changes files or tells somebody something, and clone for telling threads from processes."""

HEARS: Final = "read,readv,recvfrom,recvmsg"
"""What somebody is told: not among CALLS, for with them the trace of a start holds every module it reads."""

WRITES: Final = frozenset({"write", "pwrite64", "writev", "pwritev", "pwritev2", "sendto", "sendmsg"})
READS: Final = frozenset(HEARS.split(","))
SYNCS: Final = frozenset({"fsync", "fdatasync"})
RENAMES: Final = frozenset({"rename", "renameat", "renameat2"})

_LINE: Final = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_UNFINISHED: Final = " <unfinished ...>"
_RESULT: Final = re.compile(r"(.*)\) += (-?\d+|\?)(.*)", re.DOTALL)
_DESCRIPTOR: Final = re.compile(r"(\d+)<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?")
_STRING: Final = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')


def strace(output: Path, program: Sequence[object], *, inject: str = "", calls: str = CALLS) -> list[str]:
    """The command that runs ``program`` with its file calls, whole data included, written to ``output``."""
    return [*_strace(output, calls, inject), "--seccomp-bpf", *(str(each) for each in program)]


def _strace(output: Path, calls: str, inject: str) -> list[str]:
    command = ["strace", "-f", "-qq", "-y", "-xx", "-s", "100000000", "-o", str(output), "-e", f"trace={calls}"]
    return [*command, "-e", f"inject={inject}"] if inject else command


@contextmanager
def attached(
    pids: Iterable[int], output: Path, *, inject: str = "", calls: str = CALLS, path: str = ""
) -> Iterator[dict[int, int]]:
    """strace on processes that run, and on what they start, until the block or all of them end.

    Gives thread → process for ``read``. ``inject`` counts from here; with ``path`` only calls on that file are seen.
    """
    processes = list(pids)
    command = _strace(output, calls, inject) + (["-P", path] if path else [])
    command += [word for pid in processes for word in ("-p", str(pid))]
    with output.with_suffix(".stderr").open("wb") as stderr:
        tracer = subprocess.Popen(command, stderr=stderr)

    def has_all() -> dict[int, int]:
        assert tracer.poll() is None, f"strace: {output.with_suffix('.stderr').read_text()}"
        mark = f"TracerPid:\t{tracer.pid}\n"
        with suppress(FileNotFoundError):  # a thread that ended meanwhile
            threads = {int(task): pid for pid in processes for task in os.listdir(f"/proc/{pid}/task")}
            if all(mark in Path(f"/proc/{task}/status").read_text() for task in threads):
                return threads
        return {}

    try:
        yield wait_for(has_all, "strace on all threads")
    finally:
        with suppress(subprocess.TimeoutExpired):
            tracer.wait(0 if any(Path(f"/proc/{pid}").exists() for pid in processes) else PATIENCE_S)
        tracer.terminate()  # it lets go of who still runs
        tracer.wait(PATIENCE_S)


@dataclass(slots=True)
class Call:
    """One system call. ``begin`` and ``end`` are line numbers; ``end`` is that of no line when it never returned.

    ``path``: of the descriptor it worked on (for openat: of the one it returned); ``fd`` the descriptor's number.
    """

    process: int
    thread: int
    name: str
    arguments: str
    begin: int
    end: int = 1 << 60
    result: int = -1
    path: str = ""
    fd: int = -1
    strings: list[bytes] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        """What a write wrote."""
        return b"".join(self.strings)[: max(self.result, 0)]

    @property
    def number(self) -> int:
        """The last argument, where that is a number: the offset of pwrite64, the length of ftruncate."""
        return int(self.arguments.rpartition(", ")[2])


def read(output: Path, threads: Mapping[int, int] | None = None) -> list[Call]:
    """All calls that began, in the order they began. Raises ValueError for data that strace has cut short.

    ``threads``: the processes of threads that were there before the trace.
    """
    calls: list[Call] = []
    open_calls: dict[int, Call] = {}
    with output.open(encoding="ascii") as lines:
        for index, line in enumerate(lines):
            found = _LINE.match(line.rstrip("\n"))
            if found is None:
                continue
            thread, resumed, name, rest = int(found[1]), found[2], found[3], found[4]
            if resumed:
                call = open_calls.pop(thread)
                call.arguments += rest
            else:
                call = Call(thread, thread, name, rest, index)
                calls.append(call)
            if rest.endswith(_UNFINISHED):
                call.arguments = call.arguments.removesuffix(_UNFINISHED)
                open_calls[thread] = call
            else:
                _finish(call, index)
    _assign_processes(calls, threads or {})
    return calls


def _finish(call: Call, index: int) -> None:
    found = _RESULT.fullmatch(call.arguments)
    if found is None:
        return  # the process was killed inside it
    call.arguments = found[1]
    call.end = index
    call.result = -1 if found[2] == "?" else int(found[2])
    described = _DESCRIPTOR.match(found[2] + found[3]) if call.name == "openat" else _DESCRIPTOR.match(call.arguments)
    if described is not None:
        call.fd = int(described[1])
        call.path = _text(described[2]) + (" (deleted)" if described[3] else "")
    for string in _STRING.finditer(call.arguments):
        if string[2]:
            raise ValueError(f"line {index + 1}: strace was told to cut strings")
        call.strings.append(_octets(string[1]))


def _octets(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


def _text(escaped: str) -> str:
    return _octets(escaped).decode("utf-8", "replace")


def _assign_processes(calls: list[Call], threads: Mapping[int, int]) -> None:
    """Threads share descriptors with the process that made them, others do not."""
    made = {thread: process for thread, process in threads.items() if thread != process}
    for call in calls:
        if call.name in {"clone", "clone3"} and call.result > 0 and "CLONE_THREAD" in call.arguments:
            made[call.result] = call.thread
    for call in calls:
        while call.process in made:
            call.process = made[call.process]


def linked_from(call: Call, opened: dict[tuple[int, int], str]) -> str:
    """The path of what a linkat links: that of the descriptor behind /proc/self/fd/N."""
    source = call.strings[0].decode()
    if source.startswith("/proc/self/fd/"):
        return opened[call.process, int(source.rpartition("/")[2])]
    return source


def target_of(call: Call) -> str:
    """The path that link, rename or unlink names last, put together from folder descriptor and name."""
    name = call.strings[-1].decode()
    if name.startswith("/"):
        return name
    folders = _DESCRIPTOR.findall(call.arguments)
    return _text(folders[-1][1]) + "/" + name
