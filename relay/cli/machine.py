"""Owns: what ``relay check`` looks at on this machine: ports, the spool's disk, the clock. It changes nothing.

A port is bound for a moment and never listened on; the disk is tried with a file that has no name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from relay.cli.grade import Finding, Grade
from relay.config.addresses import split_address
from relay.config.schema import Config
from relay.queue.layout import Tuning

PRIVILEGED_PORTS: Final = 1024
SLOW_SYNC_S: Final = 0.2  # a spinning disk needs some 10 ms; mail waits for this on every commit
RESERVE_OCTETS: Final = Tuning().reserve_octets
FEW_INODES: Final = 10_000  # each large message is a file
CLOCK_SLACK_S: Final = 300.0  # files a little in the future: another machine's clock, a leap
NOT_BEFORE: Final = 1_700_000_000.0  # November 2023, older than this program: a machine whose clock was never set

_LISTEN: Final = "0A"  # include/net/tcp_states.h
_STA_UNSYNC: Final = 0x0040  # sys/timex.h
_TIMEX_OCTETS: Final = 256  # struct timex has 208 on Linux
_TIMEX_STATUS: Final = 40  # its status on 64-bit Linux

# File systems on which flock, fsync or rename are not what the queue relies on, or which forget.
_ELSEWHERE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "fuse.sshfs", "afs"})
_FORGETFUL: Final = {
    "tmpfs": "it is memory: a restart of this machine loses the queue",
    "ramfs": "it is memory: a restart of this machine loses the queue",
    "overlay": "it belongs to a container: its end loses the queue",
}


class Holder(NamedTuple):
    """Who listens on a port."""

    pid: int
    name: str


def ports(config: Config) -> Iterator[Finding]:
    """Whether each address can be listened on, or who does."""
    wanted = [(f"listener {listener.name}", listener.address) for listener in config.listener]
    if config.web.listen is not None:
        wanted.append(("web", config.web.listen))
    ours = running(config.server.spool)
    for topic, text in wanted:
        host, port = split_address(text)
        fault = _bind(host, port)
        if fault == errno.EADDRINUSE:
            yield _taken(topic, text, port, ours)
        elif fault == errno.EADDRNOTAVAIL:
            yield Finding(
                Grade.ERROR, topic, f"no interface of this machine has {host}", "write one that it has, or 0.0.0.0"
            )
        elif fault == errno.EACCES and port < PRIVILEGED_PORTS:
            hint = "start the relay as root, by a systemd socket, or with CAP_NET_BIND_SERVICE"
            yield Finding(Grade.WARNING, topic, f"port {port} may not be opened by this user", hint)
        elif fault:
            yield Finding(Grade.ERROR, topic, f"{text} cannot be opened: {os.strerror(fault)}", "write another address")


def _bind(host: str, port: int) -> int:
    """0 when the address is free, else the error number."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port))
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0


def _taken(topic: str, text: str, port: int, ours: int) -> Finding:
    holder = listening(port)
    if holder is None:
        if ours:
            return Finding(Grade.OK, topic, f"{text} is taken, by the relay that runs on this spool as it seems")
        hint = f"find out who by ss -ltnp 'sport = :{port}' as root, and stop that first"
        return Finding(Grade.ERROR, topic, f"{text} is taken by another program", hint)
    if ours and ours in (holder.pid, _parent(holder.pid)):
        return Finding(Grade.OK, topic, f"{text} is taken by the relay that runs (pid {ours})")
    if holder.pid == 1:
        return Finding(Grade.OK, topic, f"{text} is held by {holder.name}, for a socket unit")
    hint = "stop it, or give the relay another address"
    return Finding(Grade.ERROR, topic, f"{text} is taken by {holder.name} (pid {holder.pid})", hint)


def running(spool: Path) -> int:
    """The supervisor's pid of the relay on this spool, 0 when none runs: its lock names it, and lets nobody else have it."""
    try:
        with (spool / "lock").open(encoding="ascii") as file:
            pid = int(file.read(32) or 0)
            held = any(
                line.split()[1] == "FLOCK" and line.split()[5].endswith(f":{os.fstat(file.fileno()).st_ino}")
                for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()
                if len(line.split()) > 5
            )
    except (OSError, ValueError):
        return 0
    return pid if held and Path(f"/proc/{pid}").exists() else 0


def listening(port: int) -> Holder | None:
    """Who listens on a TCP port, as far as this user may see it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if any(os.readlink(descriptor) in inodes for descriptor in (process / "fd").iterdir()):
                return Holder(int(process.name), (process / "comm").read_text(errors="replace").strip())
        except OSError:
            continue  # another user's, or gone
    return None


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")), 0)


def spool(config: Config) -> Iterator[Finding]:
    """The folder that must not forget."""
    folder = config.server.spool
    if not folder.is_dir():
        yield Finding(Grade.OK, "spool", f"{folder} will be made at the first start")
        folder = next(parent for parent in folder.parents if parent.is_dir())
    else:
        yield from _rights(folder)
    kind = file_system(folder)
    if kind in _ELSEWHERE:
        yield Finding(Grade.WARNING, "spool", f"{folder} is on {kind}, another machine's disk", "use a local disk")
    elif kind in _FORGETFUL:
        yield Finding(Grade.WARNING, "spool", f"{folder} is on {kind}: {_FORGETFUL[kind]}", "use a disk or a volume")
    yield from _room(config, folder)
    yield from _sync(folder)


def _rights(folder: Path) -> Iterator[Finding]:
    status = folder.stat()
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        yield Finding(Grade.ERROR, "spool", f"every user may write to {folder}", f"chmod o-w {folder}")
    if os.geteuid() == 0 and status.st_uid != 0:
        yield Finding(
            Grade.WARNING,
            "spool",
            f"{folder} belongs to uid {status.st_uid}, and root writes there",
            f"chown root {folder}",
        )


def _room(config: Config, folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    if free < RESERVE_OCTETS:
        hint = "make room: a full disk answers 452 to everybody"
        yield Finding(
            Grade.ERROR, "spool", f"{folder} has {free / 2**20:,.0f} MB left, and new mail is answered 452", hint
        )
        return
    # Each session may hold one message of the largest size; ten at once are a quiet minute after an outage.
    if free < 10 * config.limits.message_octets:
        hint = "make room: a full disk answers 452 to everybody"
        yield Finding(Grade.WARNING, "spool", f"{folder} has {free / 2**20:,.0f} MB left", hint)
    else:
        yield Finding(Grade.OK, "spool", f"{folder}, {free / 2**30:,.1f} GB free")
    status = os.statvfs(folder)
    if status.f_files > 0 and status.f_favail < FEW_INODES:
        yield Finding(Grade.WARNING, "spool", f"{folder} has {status.f_favail} inodes left", "remove small files there")
    if status.f_flag & os.ST_RDONLY:
        yield Finding(Grade.ERROR, "spool", f"{folder} is mounted read-only", "mount it for writing, look at its disk")


def _sync(folder: Path) -> Iterator[Finding]:
    """One write and fsync as a commit does it, in a file without a name."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (
            errno.EOPNOTSUPP,
            errno.EISDIR,
            errno.ENOENT,
        ):  # the last two: a file system that knows none
            hint = "make it writable for the user that starts the relay"
            yield Finding(Grade.ERROR, "spool", f"nothing can be written to {folder}: {error.strerror}", hint)
        return
    try:
        os.write(descriptor, bytes(4096))
        begun = time.monotonic()
        os.fsync(descriptor)
        took = time.monotonic() - begun
    except OSError as error:
        hint = "look at the disk: mail is acknowledged only after this"
        yield Finding(Grade.ERROR, "spool", f"{folder} does not keep what is written: {error.strerror}", hint)
        return
    finally:
        os.close(descriptor)
    if took > SLOW_SYNC_S:
        text = f"{folder}: a sync took {took:.1f} s; each message in the queue waits for one"
        yield Finding(Grade.WARNING, "spool", text, "use a faster disk, or one with less to do")


def file_system(folder: Path) -> str:
    """Its type, as mount(8) names it; empty when that cannot be read."""
    best, kind = "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    path = str(folder.resolve())
    for line in lines:
        before, _, behind = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, behind.split()[0]
    return kind


def clock(config: Config) -> Iterator[Finding]:
    """Whether the time can be right: dates in mail, retries, certificates and snapshots hang on it."""
    now = time.time()
    hint = "set the clock, and let chrony or systemd-timesyncd keep it"
    if now < NOT_BEFORE:
        yield Finding(Grade.ERROR, "clock", f"it is {_day(now)} by this machine's clock", hint)
        return
    for path in (config.snapshot_path, config.server.spool / "queue", config.tls.certificate):
        try:
            changed = path.stat().st_mtime if path is not None else 0.0
        except OSError:
            continue
        if changed > now + CLOCK_SLACK_S:
            text = f"{path} was changed {_day(changed)}, and it is {_day(now)} now: the clock was wrong then, or is"
            yield Finding(Grade.WARNING, "clock", text, hint)
            return
    match synchronised():
        case True:
            yield Finding(Grade.OK, "clock", f"{_day(now)}, kept by NTP")
        case False:
            yield Finding(Grade.WARNING, "clock", f"{_day(now)}, not kept by NTP", "run chrony or systemd-timesyncd")
        case None:
            yield Finding(Grade.OK, "clock", _day(now))


def synchronised() -> bool | None:
    """What the kernel says about NTP; None when it does not say."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is None or ctypes.sizeof(ctypes.c_long) != 8:
        return None
    timex = ctypes.create_string_buffer(_TIMEX_OCTETS)  # modes = 0: nothing is set
    if adjtimex(timex) < 0:
        return None
    status = int.from_bytes(timex.raw[_TIMEX_STATUS : _TIMEX_STATUS + 4], "little")
    return not status & _STA_UNSYNC


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
