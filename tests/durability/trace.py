"""Owns: reading what a process tree did to its files from an strace, and the proof that it synced before it spoke.

    command = strace(output, [*program]) ; run it ; calls = read(output)
    problems = unproved(calls, spool, acknowledgements(calls, rb"ACK (\\w+)"))

An acknowledgement is proved when, before the write(2) that carries it began: the log frame that names the message was
written, and so was the commit frame of its transaction, and a sync of the log began after that and ended well; and,
for a message with a body file: the file was linked, its last octet written, then file and folder synced, all before
the frame that names it was written. The order of lines is strace's own: a call begins at its first line and ends
where its result stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

CALLS: Final = (
    "openat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,link,linkat,rename,renameat,renameat2,"
    "unlink,unlinkat,fsync,fdatasync,sync_file_range,lseek,sendto,sendmsg,sendfile,copy_file_range,"
    "clone,clone3,fork,vfork"
)
"""All that changes files or tells somebody something, and clone for telling threads from processes."""

WRITES: Final = frozenset({"write", "pwrite64", "writev", "pwritev", "pwritev2", "sendto", "sendmsg"})
SYNCS: Final = frozenset({"fsync", "fdatasync"})

_LINE: Final = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_UNFINISHED: Final = " <unfinished ...>"
_RESULT: Final = re.compile(r"(.*)\) += (-?\d+|\?)(.*)", re.DOTALL)
_DESCRIPTOR: Final = re.compile(r"(\d+)<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?")
_STRING: Final = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_NUMBER: Final = re.compile(r"-?\d+$")


def strace(output: Path, program: Sequence[object], *, inject: str = "", calls: str = CALLS) -> list[str]:
    """The command that runs ``program`` with its file calls, whole data included, written to ``output``."""
    command = ["strace", "-f", "-qq", "-y", "-xx", "-s", "100000000", "--seccomp-bpf", "-o", str(output)]
    command += ["-e", f"trace={calls}"]
    if inject:
        command += ["-e", f"inject={inject}"]
    return [*command, *(str(each) for each in program)]


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
        found = _NUMBER.search(self.arguments)
        assert found is not None, self.arguments
        return int(found[0])


def read(output: Path) -> list[Call]:
    """All calls that began, in the order they began. Raises ValueError for data that strace has cut short."""
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
    _assign_processes(calls)
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


def _assign_processes(calls: list[Call]) -> None:
    """Threads share descriptors with the process that made them, others do not."""
    made: dict[int, int] = {}
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


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """Somebody was told that a message is safe: at this line, about this identifier."""

    line: int
    id: bytes


def acknowledgements(calls: Iterable[Call], pattern: bytes) -> Iterator[Acknowledgement]:
    """Each match of ``pattern`` (group 1: the identifier) in what was written to descriptors that are no files.

    For the relay itself: ``rb"250 2\\.0\\.0 Ok: queued as (\\w+)"``.
    """
    wanted = re.compile(pattern)
    for call in calls:
        if call.name in WRITES and not call.path.startswith("/") and call.strings:
            for found in wanted.finditer(b"".join(call.strings)):
                yield Acknowledgement(call.begin, found[1])


def unproved(calls: Sequence[Call], spool: Path, told: Iterable[Acknowledgement]) -> list[str]:
    """What is wrong with each acknowledgement that is not proved; empty when all are."""
    evidence = _Evidence(calls, spool)
    return [f"{each.id.decode()}: {problem}" for each in told if (problem := evidence.against(each))]


_HEADER_OCTETS: Final = 24  # of a log frame; its octets 4 to 8 are not zero in a commit frame
_BODY_NAME: Final = rb"([0-9a-f]{16}\.body)"  # stands right behind the identifier in the row


class _Evidence:
    def __init__(self, calls: Sequence[Call], spool: Path) -> None:
        wal = str(spool / "queue" / "queue.db-wal")
        self._folder = str(spool / "queue" / "bodies")
        self._frames = [c for c in calls if c.name == "pwrite64" and c.path == wal and c.result > 0]
        self._log_syncs = [c for c in calls if c.name in SYNCS and c.path == wal and c.result == 0]
        self._folder_syncs = [c for c in calls if c.name == "fsync" and c.path == self._folder and c.result == 0]
        self._links: dict[str, tuple[Call, str]] = {}
        self._file_writes: dict[str, list[Call]] = {}
        self._file_syncs: dict[str, list[Call]] = {}
        self._read_bodies(calls)

    def _read_bodies(self, calls: Sequence[Call]) -> None:
        """Inode numbers are used again, so an unnamed file is known by the call that made it."""
        opened: dict[tuple[int, int], str] = {}
        present: dict[str, str] = {}
        for call in calls:
            if call.name == "openat" and call.result >= 0:
                identity = call.path
                if "O_TMPFILE" in call.arguments:
                    identity = present[call.path] = f"{call.path} of line {call.begin}"
                opened[call.process, call.result] = identity
            elif call.name == "linkat" and call.result == 0 and target_of(call).startswith(self._folder):
                name = target_of(call).rpartition("/")[2]
                self._links[name] = (call, linked_from(call, opened))
            elif call.path.startswith(self._folder + "/"):
                identity = present.get(call.path, call.path)
                if call.name in WRITES:
                    self._file_writes.setdefault(identity, []).append(call)
                elif call.name == "fsync" and call.result == 0:
                    self._file_syncs.setdefault(identity, []).append(call)

    def against(self, told: Acknowledgement) -> str:
        """Why it is not proved; empty when it is."""
        frame = next((f for f in self._frames if f.end < told.line and told.id in f.data), None)
        if frame is None:
            return "no log frame names it"
        sync = next((s for s in self._log_syncs if s.begin > frame.end and s.thread == frame.thread), None)
        if sync is None or sync.end >= told.line:
            return "the log was not synced between its frame and the acknowledgement"
        heads = [
            f for f in self._frames if f.thread == frame.thread and f.end < sync.begin and len(f.data) == _HEADER_OCTETS
        ]
        if heads[-1].data[4:8] == bytes(4):
            return "the sync of the log came before the commit frame"
        found = re.search(re.escape(told.id) + _BODY_NAME, frame.data)
        return self._against_body(found[1].decode(), frame) if found else ""

    def _against_body(self, name: str, frame: Call) -> str:
        if name not in self._links:
            return f"{name} was never linked"
        link, identity = self._links[name]
        if link.end > frame.begin:
            return f"{name} was linked after its row was written"
        written = max((w.end for w in self._file_writes.get(identity, ())), default=-1)
        if written < 0:
            return f"{name} was never written"
        if not any(s.begin > written and s.end < frame.begin for s in self._file_syncs.get(identity, ())):
            return f"{name} was not synced between its last octet and its row"
        if not any(s.begin > link.end and s.end < frame.begin for s in self._folder_syncs):
            return f"the folder was not synced between the link of {name} and its row"
        return ""
