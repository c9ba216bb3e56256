"""Owns: the generations before the one in use, and going back to one (row R9).

Only generations that said something else are kept, as hard links beside the snapshot. Must not touch the one in use but
through ``directory.build``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from relay.directory.build import Place, next_generation, put
from relay.directory.layout import Header, Section, SnapshotError, pack, read
from relay.directory.snapshot import KNOWN, Snapshot, inspect

FOLDER: Final = "history"


def folder_of(snapshot: Path) -> Path:
    """Where they are."""
    return snapshot.parent / FOLDER


def generations(snapshot: Path) -> Iterator[tuple[Path, Header]]:
    """Those that can be gone back to, newest first."""
    found: list[tuple[Path, Header]] = []
    try:
        names = os.listdir(folder_of(snapshot))
    except OSError:
        return
    for name in names:
        if name.isdecimal():
            path = folder_of(snapshot) / name
            try:
                found.append((path, inspect(path)))
            except SnapshotError:
                continue
    yield from sorted(found, key=lambda one: one[1].generation, reverse=True)


def keep(place: Place, generation: int, most: int) -> None:
    """Keep the one in place under its number, and no more than ``most``. Raises OSError."""
    folder = folder_of(place.path)
    folder.mkdir(mode=0o750, exist_ok=True)
    if os.lstat(folder).st_uid == os.geteuid():
        os.chown(folder, place.owner, place.group, follow_symlinks=False)
    kept = folder / str(generation)
    kept.unlink(missing_ok=True)
    os.link(place.path, kept)
    for path, _ in list(generations(place.path))[most:]:
        path.unlink(missing_ok=True)


def go_back(place: Place, wanted: int | None, now: float, most: int) -> tuple[int, Snapshot]:
    """Put an earlier generation in place as a new one; the newest kept one unless ``wanted`` says which.

    Returns what it was, and what it is now. Raises SnapshotError and OSError.
    """
    found = [(path, header) for path, header in generations(place.path) if wanted in {None, header.generation}]
    if not found:
        which = "an earlier generation" if wanted is None else f"generation {wanted}"
        raise SnapshotError(
            f"{folder_of(place.path)}: {which} is not kept; relay directory history lists those that are"
        )
    path, header = found[0]
    key = place.known_key()
    old = Snapshot.open(path, key)  # proves that the key is its own
    image = read(path, KNOWN)
    sections: list[Section] = list(image.sections.values())
    again = Header(
        next_generation(place.path), now, 0, header.key_id, header.addresses, header.recipients, header.restricted
    )
    pieces = pack(again, sections)
    keep(place, inspect(place.path).generation, most + 1)  # the one gone back to is among them
    return old.generation, put(place, pieces, key)
