"""Owns: the proof, from a trace, that a process tree synced before it spoke.

    problems = unproved(calls, spool, acknowledgements(calls, rb"ACK (\\w+)"))

An acknowledgement is proved when, before the write(2) that carries it began, either the record of an intake log that holds
the message was written, in a segment whose header was synced before, and a sync of the segment began after that and ended
well; or: the log frame that names the message was
written, and so was the commit frame of its transaction, and a sync of the log began after that and ended well; and,
for a message with a body file: the file was linked, its last octet written, then file and folder synced, all before
the frame that names it was written. A file that replaces another is judged by ``unsafe_renames``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.queue.intake_file import MAGIC
from tests.durability.trace import RENAMES, SYNCS, WRITES, Call, linked_from, target_of


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
    return [f"{proof.told.id.decode()}: {proof.problem}" for proof in proofs(calls, spool, told) if proof.problem]


@dataclass(frozen=True, slots=True)
class Proof:
    """What an acknowledgement stands on: what each call was for, in order. ``problem``: what is missing, or empty."""

    told: Acknowledgement
    problem: str
    steps: tuple[tuple[str, Call], ...]


def proofs(calls: Sequence[Call], spool: Path, told: Iterable[Acknowledgement]) -> Iterator[Proof]:
    """The proof of each acknowledgement. Any text of the message's row may be its identifier."""
    evidence = _Evidence(calls, spool)
    for each in told:
        steps: list[tuple[str, Call]] = []
        problem = evidence.against(each, steps)
        yield Proof(each, problem, tuple(sorted(steps, key=lambda step: step[1].begin)))


_HEADER_OCTETS: Final = 24  # of a log frame; its octets 4 to 8 are not zero in a commit frame
_BODY_NAME: Final = rb"([0-9a-f]{16}\.body)"  # stands right behind the identifier in the row
_NOT_RECEIVED: Final = rb"(?![\r;])"  # behind it in the body's page, where it stands in the Received field


class _Evidence:
    def __init__(self, calls: Sequence[Call], spool: Path) -> None:
        wal = str(spool / "queue" / "queue.db-wal")
        self._folder = str(spool / "queue" / "bodies")
        self._frames = [c for c in calls if c.name == "pwrite64" and c.path == wal and c.result > 0]
        self._log_syncs = [c for c in calls if c.name in SYNCS and c.path == wal and c.result == 0]
        self._folder_syncs = [c for c in calls if c.name == "fsync" and c.path == self._folder and c.result == 0]
        intake = str(spool / "queue" / "intake-")
        self._records = [c for c in calls if c.name == "pwrite64" and c.path.startswith(intake) and c.result > 0]
        self._record_syncs = [c for c in calls if c.name in SYNCS and c.path.startswith(intake) and c.result == 0]
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

    def against(self, told: Acknowledgement, steps: list[tuple[str, Call]]) -> str:
        """Why it is not proved; empty when it is. ``steps`` gets what was found."""
        quoted = b'"' + told.id + b'"'
        record = next((r for r in self._records if r.end < told.line and quoted in r.data), None)
        if record is not None:
            return self._against_record(told, record, steps)
        row = re.compile(re.escape(told.id) + _NOT_RECEIVED)
        frame = next((f for f in self._frames if f.end < told.line and told.id in f.data and row.search(f.data)), None)
        if frame is None:
            return "no log frame names it"
        steps.append(("the log: page with its row", frame))
        sync = next((s for s in self._log_syncs if s.begin > frame.end and s.thread == frame.thread), None)
        if sync is None or sync.end >= told.line:
            return "the log was not synced between its frame and the acknowledgement"
        steps.append(("the log: synced", sync))
        heads = [
            f for f in self._frames if f.thread == frame.thread and f.end < sync.begin and len(f.data) == _HEADER_OCTETS
        ]
        if heads[-1].data[4:8] == bytes(4):
            return "the sync of the log came before the commit frame"
        steps.append(("the log: head of the commit frame", heads[-1]))
        found = re.search(re.escape(told.id) + _BODY_NAME, frame.data)
        return self._against_body(found[1].decode(), frame, steps) if found else ""

    def _against_record(self, told: Acknowledgement, record: Call, steps: list[tuple[str, Call]]) -> str:
        steps.append(("the log: record with the message", record))
        syncs = [sync for sync in self._record_syncs if sync.path == record.path]
        sync = next((sync for sync in syncs if sync.begin > record.end), None)
        if sync is None or sync.end >= told.line:
            return "the log was not synced between its record and the acknowledgement"
        steps.append(("the log: synced", sync))
        heads = [r for r in self._records if r.path == record.path and r.data[:8] == MAGIC and r.end < record.begin]
        if heads and _between(syncs, heads[-1], record) is None:
            return "the log was not synced between its header and its record"
        return ""

    def _against_body(self, name: str, frame: Call, steps: list[tuple[str, Call]]) -> str:
        if name not in self._links:
            return f"{name} was never linked"
        link, identity = self._links[name]
        if link.end > frame.begin:
            return f"{name} was linked after its row was written"
        steps.append(("the body: named", link))
        written = max(self._file_writes.get(identity, ()), key=lambda write: write.end, default=None)
        if written is None:
            return f"{name} was never written"
        steps.append(("the body: last octets", written))
        synced = _between(self._file_syncs.get(identity, ()), written, frame)
        if synced is None:
            return f"{name} was not synced between its last octet and its row"
        steps.append(("the body: synced", synced))
        folder = _between(self._folder_syncs, link, frame)
        if folder is None:
            return f"the folder was not synced between the link of {name} and its row"
        steps.append(("the folder: synced", folder))
        return ""


def _between(syncs: Iterable[Call], first: Call, last: Call) -> Call | None:
    """The first sync that began after one call had ended and ended before the other began."""
    return next((sync for sync in syncs if sync.begin > first.end and sync.end < last.begin), None)


def unsafe_renames(calls: Sequence[Call], folder: Path) -> tuple[list[str], list[str]]:
    """The names in ``folder`` that a rename gave to something new, and what is wrong with those renames.

    A file must be synced between its last write and the rename, and the folder between the rename and the end.
    """
    renamed: list[str] = []
    problems: list[str] = []
    for rename in calls:
        if rename.name not in RENAMES or rename.result < 0 or not target_of(rename).startswith(f"{folder}/"):
            continue
        source, target = rename.strings[0].decode(), target_of(rename)
        source = source if source.startswith("/") else f"{folder}/{source}"
        writes = [c for c in calls if c.name in WRITES and c.path == source and c.begin < rename.end]
        if not writes:
            continue  # a second name of what was durable before
        renamed.append(target.rpartition("/")[2])
        synced = [c for c in calls if c.name in SYNCS and c.path == source and c.result == 0]
        if _between(synced, max(writes, key=lambda write: write.end), rename) is None:
            problems.append(f"{target}: not synced between its last octet and its new name")
        folders = [c for c in calls if c.name in SYNCS and c.path == str(folder) and c.result == 0]
        if not any(c.begin > rename.end for c in folders):
            problems.append(f"{target}: the folder was not synced after the rename")
    return renamed, problems
