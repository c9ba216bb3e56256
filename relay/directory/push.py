"""Owns: what becomes of signed files in the folder of a ``[[directory.push]]``: which is taken, which is set aside, which is kept.

================================  ===============================================================================
a file that                       becomes
================================  ===============================================================================
is signed, newer, young enough    the source's contents; it is kept sealed and leaves the folder once it is in place
a guard holds back                stays, for ``relay directory accept`` or the next file
is none of that                   moved into ``FOLDER/refused`` with its reason beside it; what was kept serves on
is shorter than it says           left for a minute, it may be on its way
================================  ===============================================================================

The kept file is sealed with a key that is made from the snapshot's, so that addresses lie on the disk as safely as in the
snapshot (row R17). Must not judge contents: guards do.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import stat
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from relay.config.push import Push, public_key
from relay.config.schema import Config
from relay.directory.build import Place
from relay.directory.failure import LdapFailure, Reason
from relay.directory.key import read_key, sync_folder
from relay.directory.layout import SnapshotError
from relay.directory.signed import FILE_OCTETS, Content, Header, Incomplete, Refused, content, verify
from relay.directory.snapshot import ACCEPT, EXACT, RESTRICTED, WIDE, Entry
from relay.directory.sources import Collection, Ours, Skip, Tally
from relay.mail.address import AddressFault, domain_of, is_domain, parse_utf8_mailbox

SUFFIX: Final = ".push"
CANDIDATES: Final = 64
"""Files of a folder that are looked at; the newest by name come first. More is somebody filling it."""
ASIDE: Final = 20
"""Refused files kept for a look; a sender that fails every minute must not fill the disk."""
ON_ITS_WAY_S: Final = 60.0
"""A file that is too short is left alone until nothing was written to it for this long."""
AHEAD_S: Final = 300.0
"""How far a signer's clock may be ahead."""
_KEPT_MAGIC: Final = b"DMZKEPT1"
_KEPT: Final = struct.Struct(">8sI")
_NONCE_OCTETS: Final = 12

Identity = tuple[str, int, int]


@dataclass(slots=True)
class Arrival:
    """What a source says now. ``path`` is the file in the folder, None for what was kept from before."""

    source: Push
    header: Header
    said: Content
    octets: bytes
    path: Path | None
    aside: list[tuple[Path, str]]
    superseded: list[Path]


def kept_path(config: Config, source: Push) -> Path:
    """Where the contents in use are kept."""
    return config.snapshot_path.parent / "push" / source.name


def waiting(config: Config) -> tuple[Identity, ...]:
    """The files that lie in the folders, for noticing new ones: a few system calls, nothing is read. Never raises."""
    return tuple(
        (str(path), status.st_mtime_ns, status.st_size)
        for source in config.directory.push
        for path, status in _files(source.folder)
    )


def arrive(config: Config, source: Push, place: Place, now: float, aside: list[tuple[Path, str]]) -> Arrival:
    """The newest good file, or what was kept. Changes nothing; ``aside`` is told which files are bad, and why.

    Raises LdapFailure when there is nothing to go by, or a bad file came and no good one: somebody has to look.
    """
    keys = [public_key(key) for key in source.keys]
    kept = _kept_header(kept_path(config, source))
    best: Arrival | None = None
    superseded: list[Path] = []
    bad: list[tuple[Path, str]] = []
    for path, status in _files(source.folder):
        try:
            octets = _octets(source.folder, path)
            header = verify(octets, keys)
            _fits(header, source, kept, now)
        except Incomplete as why:
            if now - status.st_mtime > ON_ITS_WAY_S:
                bad.append((path, str(why)))
            continue
        except Refused as why:
            bad.append((path, str(why)))
            continue
        if best is not None and header.serial <= best.header.serial:
            superseded.append(path)
            continue
        try:
            said = content(octets)
        except Refused as why:
            bad.append((path, str(why)))
            continue
        if best is not None and best.path is not None:
            superseded.append(best.path)
        best = Arrival(source, header, said, octets, path, bad, superseded)
    aside += bad
    if best is not None:
        return best
    if bad:
        raise LdapFailure(Reason.PUSH, "; ".join(f"{path.name}: {why}" for path, why in bad), str(source.folder))
    if kept is None:
        raise LdapFailure(Reason.PUSH, f"no file *{SUFFIX} has come yet", str(source.folder))
    octets = _unsealed(kept_path(config, source), place)
    return Arrival(source, kept, content(octets), octets, None, bad, superseded)


def _fits(header: Header, source: Push, kept: Header | None, now: float) -> None:
    """Raises Refused."""
    if header.name != source.name:
        raise Refused(f"is signed for {header.name!r}, this source is {source.name!r} (--name)")
    if kept is not None and header.serial == kept.serial:
        raise Refused(f"has serial number {header.serial}, which is in use already: the same file again")
    if kept is not None and header.serial < kept.serial:
        raise Refused(f"has serial number {header.serial}, and {kept.serial} is in use: an older file, or a replay")
    if header.created > now + AHEAD_S:
        raise Refused(f"was signed {header.created - now:.0f} s in the future; set the clocks")
    if now - header.created > source.max_age_s:
        raise Refused(f"was signed {now - header.created:.0f} s ago, max_age_s is {source.max_age_s:g}")


def take(arrival: Arrival, ours: Ours, collection: Collection, tally: Tally) -> int:
    """Add what it says of our domains; how many addresses that were. Raises LdapFailure."""
    grouped: defaultdict[int, list[str]] = defaultdict(list)
    records, verified = arrival.said.records, ours.of_directories
    spelt: set[str] = set()
    for key, number in arrival.said.addresses.items():
        entry = records[number]
        domain = domain_of(key)
        if entry.flags & EXACT:
            if key.startswith("=") and domain in ours.sensitive:
                spelt.add(domain)
                collection.add(key, entry)
            continue
        fault = _unusable(key, entry)
        if fault is not None:
            tally.skip(fault)
        elif entry.ruling is not None:
            if domain not in ours.all:
                tally.skip(Skip.NO_DOMAIN)
            elif not collection.rule(key, entry):
                tally.skip(Skip.SAID_BEFORE)
        elif domain in verified or not entry.flags & ACCEPT:
            grouped[number].append(key)
        elif entry.flags & RESTRICTED:
            collection.add(key, Entry(RESTRICTED, entry.text))
        else:
            tally.skip(Skip.FOREIGN)
    for number, keys in grouped.items():
        collection.add_all(keys, records[number])
    used = sum(map(len, grouped.values()))
    if unspelt := {domain_of(key) for keys in grouped.values() for key in keys} & ours.sensitive - spelt:
        raise LdapFailure(
            Reason.PUSH,
            f'{min(unspelt)} has case = "sensitive" here, and the file knows no spellings; write it inside, too',
            str(arrival.source.folder),
        )
    if not used:
        raise LdapFailure(
            Reason.PUSH, "has no address of a domain of this relay", str(arrival.path or arrival.source.folder)
        )
    return used


def _unusable(key: str, entry: Entry) -> Skip | None:
    if entry.flags & WIDE:
        return None if key.startswith("@") and is_domain(key[1:]) else Skip.SYNTAX
    return Skip.SYNTAX if isinstance(parse_utf8_mailbox(key), AddressFault) or "@" not in key else None


# --- afterwards --------------------------------------------------------------------------------------------------------
def settle(config: Config, arrival: Arrival, place: Place) -> None:
    """It is in place: keep it, and clear the folder of it and of older ones. Raises LdapFailure and OSError."""
    if arrival.path is None:
        return
    _keep(config, arrival, place)
    try:
        for done in (arrival.path, *arrival.superseded):
            done.unlink(missing_ok=True)
    except OSError as error:
        raise LdapFailure(
            Reason.PUSH, f"is in use, and cannot be taken out of its folder: {error.strerror}", str(arrival.path)
        ) from None


def _keep(config: Config, arrival: Arrival, place: Place) -> None:
    path = kept_path(config, arrival.source)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if place.owner != -1 and os.lstat(path.parent).st_uid == os.geteuid():
        os.chown(path.parent, place.owner, -1, follow_symlinks=False)
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(_sealed(arrival, place))
        file.flush()
        os.fchown(file.fileno(), place.owner, -1)
        os.fsync(file.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def set_aside(bad: list[tuple[Path, str]]) -> None:
    """Move refused files out of the way, their reasons beside them. What cannot be moved is met again. Never raises."""
    for path, why in bad:
        folder = path.parent / "refused"
        with suppress(OSError):
            folder.mkdir(mode=0o750, exist_ok=True)
            (folder / f"{path.name}.reason").write_text(f"{why}\n", encoding="utf-8")
            path.rename(folder / path.name)
            older = sorted(folder.glob(f"*{SUFFIX}"), key=lambda one: one.lstat().st_mtime, reverse=True)[ASIDE:]
            for one in older:
                one.unlink(missing_ok=True)
                one.with_name(f"{one.name}.reason").unlink(missing_ok=True)


# --- files -------------------------------------------------------------------------------------------------------------
def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    found: list[tuple[Path, os.stat_result]] = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                with suppress(OSError):
                    found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    yield from sorted(found, reverse=True)[:CANDIDATES]


def _octets(folder: Path, path: Path) -> bytes:
    """Raises Refused."""
    try:
        around = os.stat(folder)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refused("is not an ordinary file")
            if around.st_mode & stat.S_IWOTH:
                raise Refused(f"every user may write into {folder}; chmod o= {folder}")
            if status.st_mode & stat.S_IROTH and around.st_mode & stat.S_IXOTH:
                raise Refused(f"every user may read it, and it lists the addresses; chmod o= {folder}")
            if status.st_size > FILE_OCTETS:
                raise Refused(f"has {status.st_size} octets, more than {FILE_OCTETS}")
            return file.read(FILE_OCTETS)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}; let the user who reads (process.hub_user) read it") from None


def _kept_header(path: Path) -> Header | None:
    """Of the kept file: readable without a key, so that a replay is known even when that was lost. Raises LdapFailure."""
    try:
        with path.open("rb") as file:
            magic, length = _KEPT.unpack(file.read(_KEPT.size))
            if magic == _KEPT_MAGIC:
                return Header(**json.loads(file.read(length)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LdapFailure(Reason.PUSH, f"cannot be read: {error.strerror}", str(path)) from None
    except (struct.error, ValueError, TypeError):
        pass
    raise LdapFailure(Reason.PUSH, "is damaged; remove it, and push a new file", str(path))


def _cipher(key: bytes) -> Any:
    made = blake2b(key, digest_size=32, person=b"dmz-relay push").digest()
    return importlib.import_module("cryptography.hazmat.primitives.ciphers.aead").ChaCha20Poly1305(made)


def _sealed(arrival: Arrival, place: Place) -> bytes:
    head = json.dumps(asdict(arrival.header)).encode("ascii")
    nonce = secrets.token_bytes(_NONCE_OCTETS)
    try:
        key = read_key(place.key_path)  # the build may just have made it
    except SnapshotError:  # root's alone, and handed to who reads
        key = place.key
    return _KEPT.pack(_KEPT_MAGIC, len(head)) + head + nonce + bytes(_cipher(key).encrypt(nonce, arrival.octets, head))


def _unsealed(path: Path, place: Place) -> bytes:
    """Raises LdapFailure."""
    wrong = importlib.import_module("cryptography.exceptions").InvalidTag
    try:
        whole = path.read_bytes()
        _, length = _KEPT.unpack_from(whole)
        head = whole[_KEPT.size : _KEPT.size + length]
        rest = whole[_KEPT.size + length :]
        return bytes(_cipher(place.known_key()).decrypt(rest[:_NONCE_OCTETS], rest[_NONCE_OCTETS:], head))
    except (OSError, ValueError, struct.error, wrong):
        raise LdapFailure(
            Reason.PUSH, "was kept under another key of the snapshot, or is damaged; push a new file", str(path)
        ) from None
