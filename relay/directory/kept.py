"""Owns: the ledger of a profile on disk, from which the next reading goes on (row R8): ``entries.NAME`` beside the snapshot.

Ids of entries as numbers, addresses as the snapshot's keyed hashes, texts of restrictions; no address, no name (row R17). Mode
0600, of the user who builds. Written whole beside and renamed. A file that is damaged, of another configuration or of another
key is as good as none: the next reading is a whole one. Must not read a directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from relay.config.ldap import LdapProfile
from relay.config.schema import Config
from relay.directory.build import Place
from relay.directory.key import key_id
from relay.directory.layout import Header, Need, Section, SnapshotError, pack, read
from relay.directory.ledger import Kind, Ledger
from relay.directory.marks import Mark
from relay.directory.snapshot import Entry
from relay.mail.reply import operator_text

FORM: Final = 1
"""Changes when entries are understood in another way than by the relay that wrote the file."""
MODE: Final = 0o600
_PREFIX: Final = "entries."
_COLUMNS: Final = ("keys", "sizes", "hashes", "kinds")
_KNOWN: Final = frozenset((*_COLUMNS, "about"))
_DIGEST_OCTETS: Final = 16


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of a profile. ``full``: when it was last read as a whole, seconds since 1970. ``skipped``: what was left
    out then, by reason.
    """

    ledger: Ledger
    mark: Mark
    full: float
    skipped: dict[str, int]


def path_of(snapshot: Path, profile: str) -> Path:
    """Where it is."""
    return snapshot.with_name(f"{_PREFIX}{profile}")


def load(config: Config, profile: LdapProfile, key: bytes) -> Kept | str:
    """What is kept, or why that is of no use. Never raises for what a file can hold."""
    path = path_of(config.snapshot_path, profile.name)
    if not path.exists():
        return "nothing is kept of an earlier reading"
    try:
        image = read(path, _KNOWN)
        about = json.loads(bytes(image.sections["about"].data))
        if image.header.key_id != key_id(key) or about["configuration"] != _digest(config, profile):
            return "the configuration or the key changed"
        ledger = Ledger(key)
        table = (Kind(_entry(entry), str(domain)) for entry, domain in about["table"])
        ledger.adopt(table, *(image.sections[name].data for name in _COLUMNS))
        return Kept(ledger, Mark(**about["mark"]), float(about["full"]), dict(about["skipped"]))
    except (SnapshotError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path.name} cannot be used"


def write(config: Config, profile: LdapProfile, place: Place, key: bytes, kept: Kept) -> Path:
    """Write it beside its place; ``settle`` puts it there. Raises OSError."""
    path = path_of(place.path, profile.name)
    ledger = kept.ledger
    about = {
        "configuration": _digest(config, profile),
        "mark": kept.mark.plain(),
        "full": kept.full,
        "skipped": kept.skipped,
        "table": [[_plain(entry), domain] for entry, domain in ledger.table],
    }
    sections = [
        Section(name, Need.REQUIRED, column.itemsize, memoryview(column).cast("B"))
        for name, column in zip(_COLUMNS, (ledger.keys, ledger.sizes, ledger.hashes, ledger.kinds), strict=True)
    ]
    sections.append(Section("about", Need.REQUIRED, 1, json.dumps(about).encode("ascii")))
    header = Header(0, kept.full, 0, key_id(key), len(ledger.hashes), 0, 0)
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    with open(descriptor, "wb") as file:
        file.writelines(pack(header, sections))
        file.flush()
        os.fchown(file.fileno(), place.owner, -1)
        os.fsync(file.fileno())
    return beside


def settle(config: Config, written: Iterable[Path]) -> None:
    """What was written is in force, and what belongs to no profile, or was not written anew, is gone. Raises OSError."""
    kept = set()
    for beside in written:
        path = beside.with_name(beside.name.removeprefix(".").removesuffix(".new"))
        beside.rename(path)
        kept.add(path.name)
    folder = config.snapshot_path.parent
    for name in os.listdir(folder):
        if name.startswith(_PREFIX) and name not in kept:
            (folder / name).unlink(missing_ok=True)


def forget(written: Iterable[Path]) -> None:
    """What was written does not count: the reading was not taken. Never raises."""
    for beside in written:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _digest(config: Config, profile: LdapProfile) -> str:
    """Of everything in the configuration that decides what an entry comes to."""
    said = {
        "form": FORM,
        "profile": profile.model_dump(mode="json"),
        "rewrite": config.senders.rewrite,
        "domains": [domain.model_dump(mode="json") for domain in config.domain],
        "directory": config.directory.model_dump(mode="json", exclude={"ldap", "sources", "overrides"}),
        "fields": [field.name for field in fields(Entry)],
    }
    return blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=_DIGEST_OCTETS).hexdigest()


def _plain(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if name != "ruling"}


def _entry(found: dict[str, Any]) -> Entry:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    values["text"] = operator_text(str(values["text"]))
    return Entry(**values)
