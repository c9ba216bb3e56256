"""Owns: a disk that loses power: from a trace, the files as they would be found after a cut at any line.

What is certain to survive: octets of a file that were written before a sync of that file began which ended before the
cut; names that were made or removed before a sync of their folder likewise. Everything else may or may not be there:
dice decide, by default none of it is. Maps of shared memory (journals, the log's index) are not in a trace and do not
survive. ``reopened`` is the queue that is found there.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from relay.config.schema import Queue
from relay.mail.envelope import Envelope
from relay.queue.layout import Tuning
from relay.queue.prepare import prepare
from relay.queue.sqlite import SqliteStore
from relay.queue.store import SetAside
from tests.durability.trace import SYNCS, WRITES, Call, linked_from, target_of

SECTOR: Final = 512
"""What a disk writes whole or not at all."""

_BLOCK: Final = 64 * 1024
_ZEROS: Final = bytes(_BLOCK)


def dice() -> random.Random:
    """For cuts and survivors; the seed is printed, so that a failing test can be repeated."""
    seed = random.randrange(1 << 32)
    sys.stdout.write(f"seed {seed}\n")
    return random.Random(seed)


@dataclass(slots=True)
class _Change:
    """A write (offset, data) or a change of length (offset, None) that is not synced yet."""

    call: Call
    offset: int
    data: bytes | None


@dataclass(slots=True)
class _File:
    content: bytearray = field(default_factory=bytearray)
    position: int = 0
    pending: list[_Change] = field(default_factory=list)


@dataclass(slots=True)
class _Naming:
    """A name that was given to a file, or taken away (None)."""

    call: Call
    path: str
    file: _File | None


@dataclass(slots=True)
class Disk:
    """The spool while the trace goes by: certain content, and what is on its way."""

    root: str
    names: dict[str, _File] = field(default_factory=dict)
    certain: dict[str, _File] = field(default_factory=dict)
    namings: list[_Naming] = field(default_factory=list)
    _opened: dict[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, spool: Path, was: Path | None = None) -> Disk:
        """The disk as it is when the trace begins: empty, or with the content of ``was``, a copy of the spool."""
        disk = cls(str(spool))
        for path in was.rglob("*") if was is not None else ():
            if path.is_file() and not path.name.endswith("-shm"):
                file = _File(bytearray(path.read_bytes()))
                disk.names[str(spool / path.relative_to(was))] = file
        disk.certain = dict(disk.names)
        return disk

    def watch(self, calls: Sequence[Call]) -> Iterator[int]:
        """Let the calls happen; yields the line of each beginning and each end, for a cut right after it.

        A write counts from its beginning (any part of it may reach the disk), a sync at its end.
        """
        moments: list[tuple[int, int, Call]] = []
        for call in calls:
            moments.append((call.begin, 0, call))
            if call.end < 1 << 60:
                moments.append((call.end, 1, call))
        for line, done, call in sorted(moments, key=lambda moment: moment[:2]):
            if done:
                self._end(call)
            else:
                self._begin(call)
            yield line

    def _begin(self, call: Call) -> None:
        file = self.names.get(call.path)
        if call.name in WRITES and file is not None:
            data = call.data
            offset = call.number if call.name == "pwrite64" else file.position
            if call.name == "write":
                file.position += len(data)
            elif call.name != "pwrite64":
                raise NotImplementedError(f"{call.name} to {call.path}")
            file.pending.append(_Change(call, offset, data))
        elif call.name == "ftruncate" and file is not None:
            file.pending.append(_Change(call, call.number, None))
        elif call.name in {"sendfile", "copy_file_range", "fallocate", "truncate"} and file is not None:
            raise NotImplementedError(f"{call.name} to {call.path}")

    def _end(self, call: Call) -> None:
        if call.result < 0:
            return
        match call.name:
            case "openat":
                self._opened[call.process, call.result] = call.path
                if not call.path.startswith(self.root):
                    return
                if "O_TMPFILE" in call.arguments:
                    self.names[call.path] = _File()
                elif "O_CREAT" in call.arguments and call.path not in self.names and not call.path.endswith("-shm"):
                    self._name(call, call.path, _File())
            case "lseek":
                file = self.names.get(call.path)
                if file is not None:
                    file.position = call.result
            case "link" | "linkat":
                if target_of(call).startswith(self.root):
                    self._name(call, target_of(call), self.names[linked_from(call, self._opened)])
            case "rename" | "renameat" | "renameat2":
                target = target_of(call)
                if target.startswith(self.root):
                    folder = re.sub(r"[^/]*$", "", target)
                    source = call.strings[0].decode()
                    source = source if source.startswith("/") else folder + source
                    self._name(call, target, self.names[source])
                    self._name(call, source, None)
            case "unlink" | "unlinkat":
                if target_of(call).startswith(self.root):
                    self._name(call, target_of(call), None)
            case name if name in SYNCS:
                self._sync(call)
            case _:
                pass

    def _name(self, call: Call, path: str, file: _File | None) -> None:
        if file is None:
            self.names.pop(path, None)
        else:
            self.names[path] = file
        self.namings.append(_Naming(call, path, file))

    def _sync(self, call: Call) -> None:
        file = self.names.get(call.path)
        if file is not None:
            settled = [change for change in file.pending if change.call.end < call.begin]
            file.pending = [change for change in file.pending if change.call.end >= call.begin]
            for change in settled:
                _apply(file.content, change)
            return
        kept: list[_Naming] = []
        for naming in self.namings:
            if naming.path.rpartition("/")[0] == call.path and naming.call.end < call.begin:
                _rename(self.certain, naming)
            else:
                kept.append(naming)
        self.namings = kept

    def write_to(self, folder: Path, chance: random.Random | None = None) -> None:
        """Lay the spool out in ``folder`` as found after the cut.

        Without ``chance`` only what is certain; with it each change on its way survives at random, whole or torn at a
        sector.
        """
        names = dict(self.certain)
        if chance is not None:
            for naming in self.namings:
                if chance.random() < 0.5:
                    _rename(names, naming)
        for path, file in names.items():
            content = file.content
            if chance is not None and file.pending:
                content = deepcopy(content)
                for change in file.pending:
                    if chance.random() < 0.5:
                        _apply(content, _torn(change, chance))
            target = folder / Path(path).relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_sparse(target, content)


def _write_sparse(path: Path, content: bytearray) -> None:
    """Without blocks of zeros: a log is mostly that, and is written hundreds of times."""
    with path.open("wb") as out:
        for start in range(0, len(content), _BLOCK):
            block = content[start : start + _BLOCK]
            if block != _ZEROS[: len(block)]:
                out.seek(start)
                out.write(block)
        out.truncate(len(content))


def _apply(content: bytearray, change: _Change) -> None:
    if change.data is None:
        length = change.offset
        del content[length:]
        content.extend(bytes(length - len(content)))
        return
    end = change.offset + len(change.data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    content[change.offset : end] = change.data


def _torn(change: _Change, chance: random.Random) -> _Change:
    if change.data is None or chance.random() < 0.7:
        return change
    keep = (chance.randrange(len(change.data) + 1) + change.offset) // SECTOR * SECTOR - change.offset
    return _Change(change.call, change.offset, change.data[: max(keep, 0)])


def _rename(names: dict[str, _File], naming: _Naming) -> None:
    if naming.file is None:
        names.pop(naming.path, None)
    else:
        names[naming.path] = naming.file


@dataclass(frozen=True, slots=True)
class Found:
    """A message that was in the queue: ``envelope`` names its recipients still to be served."""

    envelope: Envelope
    octets: bytes


def reopened(spool: Path, boot: str, tuning: Tuning, *, broken: list[SetAside] | None = None) -> dict[str, Found]:
    """Every message of the queue by its identifier, claimed by a new tree after a restart of the machine.

    An entry that cannot be read whole goes to ``broken``; without it, there must be none.
    """
    prepare(spool, boot=boot, tuning=tuning)
    aside: list[SetAside] = [] if broken is None else broken
    found = asyncio.run(_claimed(spool, boot, tuning, aside))
    assert broken is not None or aside == []
    return found


async def _claimed(spool: Path, boot: str, tuning: Tuning, aside: list[SetAside]) -> dict[str, Found]:
    loop = asyncio.get_running_loop()
    store = SqliteStore(spool, f"{boot}:0:1", 0, Queue(), loop, boot=boot, tuning=tuning, on_aside=aside.append)
    await store.take_over_slot()
    claimed, _ = await store.claim(10_000)
    await store.close()
    found = {}
    for each in claimed:
        assert each.recipients
        found[str(each.envelope.id)] = Found(each.envelope, b"".join(each.content.chunks()))
        each.content.close()
    return found
