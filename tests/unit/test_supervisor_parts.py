"""The supervisor's parts: places and pauses, what a reload may change, sockets, spool, keys, users."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relay.config.schema import Config, Process
from relay.control import HUB_SLOT, WEB_SLOT, Link, Secrets, pair
from relay.supervisor import keys, members, sockets, spool
from relay.supervisor.errors import Refusal
from relay.supervisor.members import Part, Slot, places, secrets_for
from relay.supervisor.notify import notify
from relay.supervisor.privileges import Identity, identities
from relay.supervisor.reload import needs_restart
from tests.bed.ports import free_port


def config(folder: Path, **tables: Any) -> Config:
    whole = {
        "server": {"hostname": "mx.example.com", "spool": folder / "spool"},
        "listener": [{"name": "mx", "address": f"127.0.0.1:{free_port()}"}],
    }
    return Config.model_validate({**whole, **tables})


# --- places ---
@pytest.fixture
def slot():
    ours, theirs = pair()
    slot = Slot(Part.WORKER, 1)
    slot.process = members.Process(1, Link(ours), started=100.0, heard=100.0)
    yield slot
    ours.close()
    theirs.close()


def test_places_have_names_and_numbers_of_their_own() -> None:
    assert [(place.name, place.number) for place in places(2, web=True)] == [
        ("hub", HUB_SLOT),
        ("web", WEB_SLOT),
        ("worker-0", 0),
        ("worker-1", 1),
    ]
    assert [place.name for place in places(1, web=False)] == ["hub", "worker-0"]


def test_pauses_grow_to_ten_seconds_and_end_with_a_stable_life(slot: Slot) -> None:
    process = slot.process
    pauses = []
    for _ in range(9):
        slot.process = process
        pauses.append(slot.died(now=101.0))
    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 10.0, 10.0]
    assert slot.due == 111.0
    slot.process = process
    process.ready = True
    assert slot.died(now=100.0 + members.STABLE_S + 1) == 0.0


def test_a_death_the_supervisor_brought_about_costs_nothing(slot: Slot) -> None:
    process = slot.process
    process.blameless = True
    assert slot.died(now=101.0) == 0.0
    slot.process = process
    process.blameless = False
    assert slot.died(now=101.0) == 0.0


def test_a_process_is_stuck_when_its_time_is_over(slot: Slot) -> None:
    process = slot.process
    assert slot.deadline(5.0) == 100.0 + members.START_TIMEOUT_S
    process.ready = True
    process.heard = 200.0
    assert slot.deadline(5.0) == 205.0
    process.lost = True
    assert slot.deadline(300.0) == 200.0 + members.LOST_TIMEOUT_S
    process.killed_because = "it was stuck"
    assert slot.deadline(5.0) is None
    slot.process = None
    assert slot.deadline(5.0) is None


def test_each_part_gets_its_own_secrets_and_no_other() -> None:
    secrets = Secrets("certificate", "key", b"snapshot", {"ad": "password"})
    assert secrets_for(Part.WORKER, secrets) == Secrets("certificate", "key", b"snapshot")
    assert secrets_for(Part.HUB, secrets) == Secrets(snapshot_key=b"snapshot", directory_passwords={"ad": "password"})
    assert secrets_for(Part.WEB, secrets) == Secrets()


# --- reload ---
@pytest.mark.parametrize(
    ("key", "tables"),
    [
        ("server.spool", {"server": {"hostname": "mx.example.com", "spool": "/elsewhere"}}),
        ("server.workers", {"server": {"hostname": "mx.example.com", "spool": "/spool", "workers": 9}}),
        ("process.user", {"process": {"user": "other"}}),
        ("process.hub_user", {"process": {"hub_user": "other"}}),
        ("listener", {"listener": [{"name": "mx", "address": "[::]:25"}, {"name": "more", "address": "[::]:26"}]}),
        ("listener", {"listener": [{"name": "renamed", "address": "[::]:25"}]}),
        ("listener", {"listener": [{"name": "mx", "address": "[::1]:25"}]}),
        ("web.listen", {"web": {"listen": "[::1]:8080"}}),
        ("log.file", {"log": {"file": "/var/log/relay"}}),
        ("log.format", {"log": {"format": "json"}}),
    ],
)
def test_what_is_fixed_for_the_life_of_a_tree_is_named(key: str, tables: dict[str, Any]) -> None:
    base = {
        "server": {"hostname": "mx.example.com", "spool": "/spool"},
        "listener": [{"name": "mx", "address": "[::]:25"}],
    }
    old, new = Config.model_validate(base), Config.model_validate({**base, **tables})
    [line] = needs_restart(old, new)
    assert line.startswith(f"{key}: ")
    assert line.endswith("restart needed")


def test_everything_else_may_change_and_listeners_may_change_places() -> None:
    listeners = [{"name": "mx", "address": "[::]:25"}, {"name": "in", "address": "[::1]:26"}]
    base = {"server": {"hostname": "mx.example.com", "spool": "/spool"}, "listener": listeners}
    changed = {
        **base,
        "server": {"hostname": "new.example.com", "spool": "/spool", "soft_bounce": True},
        "listener": [{**listeners[1], "role": "submission"}, listeners[0]],
        "limits": {"sessions": 7},
        "process": {"heartbeat_timeout_s": 9.0},
    }
    assert needs_restart(Config.model_validate(base), Config.model_validate(changed)) == []


# --- sockets ---
def test_all_addresses_that_cannot_be_had_are_named_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        wanted = config(
            tmp_path,
            listener=[
                {"name": "one", "address": f"127.0.0.1:{port}"},
                {"name": "two", "address": "198.51.100.1:25"},
                {"name": "three", "address": f"127.0.0.1:{free_port()}"},
            ],
            web={"listen": f"198.51.100.1:{port}"},
        )
        with pytest.raises(Refusal) as refused:
            sockets.open_all(wanted, tmp_path, None)
    starts = [problem.split(":")[0] for problem in refused.value.problems]
    assert starts == ["listener one", "listener two", "web.listen"]
    assert not (tmp_path / "hub").exists()


def test_listening_sockets_are_made_for_asyncio_and_workers(tmp_path: Path) -> None:
    port = free_port()
    wanted = config(
        tmp_path,
        listener=[{"name": "four", "address": f"0.0.0.0:{port}"}, {"name": "six", "address": f"[::]:{port}"}],
    )
    opened = sockets.open_all(wanted, tmp_path, None)
    for _, sock in opened.listeners(wanted):
        assert sock.proto == socket.IPPROTO_TCP  # or asyncio leaves TCP_NODELAY off
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not sock.getblocking()
    four, six = opened.mail.values()
    assert six.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    assert four.family == socket.AF_INET
    assert stat.S_IMODE(os.stat(opened.hub_address).st_mode) == 0o600
    opened.close()


def test_a_spool_too_deep_for_the_hub_s_socket_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with pytest.raises(Refusal, match="too long for a Unix socket"):
        sockets.open_all(config(tmp_path), deep, None)


# --- spool ---
HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, b"%d\\n" % os.getpid())
print(flush=True)
sys.stdin.read()
"""


def test_a_locked_spool_is_refused_with_the_holder_s_pid(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(Refusal, match=f"supervisor's pid {holder.pid}"):
            spool.lock(tmp_path, wait_s=0.0)
    os.close(spool.lock(tmp_path))


def test_the_lock_is_not_followed_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("do not touch")
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(Refusal, match="cannot use"):
        spool.lock(tmp_path)
    assert precious.read_text() == "do not touch"


def test_a_spool_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="cannot use"):
        spool.lock(tmp_path / "file")


DAEMON = Identity("daemon", 1, 1, (1,))


@pytest.mark.needs("root")
def test_folders_of_root_s_are_handed_over_with_what_is_in_them(bed_folder: Path) -> None:
    queue = bed_folder / "queue"
    (queue / "bodies").mkdir(parents=True)
    (queue / "bodies" / "1").touch()
    (queue / "link").symlink_to(bed_folder / "precious")
    (bed_folder / "precious").touch()
    assert spool.furnish(bed_folder, DAEMON) == bed_folder / "run"
    assert {path.lstat().st_uid for path in (queue, *queue.rglob("*"))} == {1}
    assert (bed_folder / "precious").stat().st_uid == 0
    spool.furnish(bed_folder, DAEMON)  # again: nothing to do


@pytest.mark.needs("root")
def test_a_folder_of_somebody_else_s_is_refused(bed_folder: Path) -> None:
    (bed_folder / "queue").mkdir()
    os.chown(bed_folder / "queue", 65534, 65534)
    with pytest.raises(Refusal, match="belongs to uid 65534, not to daemon: chown -R daemon"):
        spool.furnish(bed_folder, DAEMON)


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ["queue", "run", "directory"])
def test_a_link_in_place_of_a_folder_is_refused(bed_folder: Path, name: str) -> None:
    elsewhere = bed_folder / "elsewhere"
    elsewhere.mkdir()
    (bed_folder / name).symlink_to(elsewhere)
    with pytest.raises(Refusal, match="cannot prepare"):
        spool.furnish(bed_folder, DAEMON)
    assert elsewhere.stat().st_uid == 0


@pytest.mark.needs("root")
def test_a_spool_the_workers_cannot_reach_is_refused(bed_folder: Path) -> None:
    closed = bed_folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "spool").mkdir()
    with pytest.raises(Refusal, match=f"daemon may not enter {closed};"):
        spool.furnish(closed / "spool", DAEMON)


@pytest.mark.needs("root")
def test_the_log_is_the_workers_group_s_to_write(bed_folder: Path) -> None:
    log = bed_folder / "log"
    spool.share_log(log, DAEMON)
    found = log.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 1, 0o660)


@pytest.mark.needs("root")
def test_a_log_with_a_second_name_is_nobody_else_s_to_write(bed_folder: Path) -> None:
    precious = bed_folder / "precious"
    precious.touch(mode=0o600)
    (bed_folder / "log").hardlink_to(precious)
    spool.share_log(bed_folder / "log", DAEMON)
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600


def test_a_pidfile_of_another_process_is_left_alone(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    spool.write_pidfile(pidfile)
    assert pidfile.read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == [pidfile]
    pidfile.write_text("1\n")
    spool.remove_pidfile(pidfile)
    assert pidfile.exists()
    spool.remove_pidfile(pidfile, stale=True)
    assert not pidfile.exists()


# --- keys ---
def test_without_certificate_and_key_there_are_no_secrets(tmp_path: Path) -> None:
    assert keys.read_secrets(config(tmp_path)) == Secrets()


def test_secrets_are_read_and_their_change_is_seen(tmp_path: Path) -> None:
    (tmp_path / "cert").write_text("CERT")
    (tmp_path / "key").write_text("KEY")
    (tmp_path / "snap").write_bytes(bytes(32))
    (tmp_path / "snap").chmod(0o600)
    wanted = config(
        tmp_path,
        tls={"certificate": tmp_path / "cert", "key": tmp_path / "key"},
        directory={"key_file": tmp_path / "snap"},
    )
    assert keys.read_secrets(wanted) == Secrets("CERT", "KEY", bytes(32))
    before = keys.fingerprint(wanted)
    assert keys.fingerprint(wanted) == before
    (tmp_path / "new").write_text("KEY")
    (tmp_path / "new").rename(tmp_path / "key")
    assert keys.fingerprint(wanted) != before


def test_every_secret_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "cert").write_bytes(b"\x30\x82\xff")
    (tmp_path / "snap").write_bytes(bytes(31))
    wanted = config(
        tmp_path,
        tls={"certificate": tmp_path / "cert", "key": tmp_path / "missing"},
        directory={"key_file": tmp_path / "snap"},
    )
    with pytest.raises(Refusal) as refused:
        keys.read_secrets(wanted)
    one, two, three = refused.value.problems
    assert one.startswith("tls.certificate: ")
    assert "not a PEM file" in one
    assert two.startswith(f"tls.key: cannot read {tmp_path / 'missing'}: No such file")
    assert three.startswith("directory.key_file: ")


def test_a_huge_pem_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "cert").write_bytes(b"x" * (keys.PEM_MAX + 1))
    (tmp_path / "key").touch()
    wanted = config(tmp_path, tls={"certificate": tmp_path / "cert", "key": tmp_path / "key"})
    with pytest.raises(Refusal, match=f"more than {keys.PEM_MAX} octets"):
        keys.read_secrets(wanted)


# --- users ---
@pytest.mark.needs("root")
def test_the_hub_is_in_the_workers_group() -> None:
    found = identities(Process(user="daemon", hub_user="nobody"))
    assert (found.worker.uid, found.hub.uid) == (1, 65534)
    assert found.worker.gid in found.hub.groups
    assert found.hub.gid not in found.worker.groups


@pytest.mark.needs("root")
def test_unknown_users_and_root_are_refused_together() -> None:
    with pytest.raises(Refusal) as refused:
        identities(Process(user="no-such-user", hub_user="root"))
    one, two = refused.value.problems
    assert "no user 'no-such-user'; create it (useradd" in one
    assert "'root' is root" in two


@pytest.mark.needs("root")
def test_empty_names_keep_the_user() -> None:
    found = identities(Process(user="", hub_user=""))
    assert (found.worker, found.hub) == (None, None)


DROP = """
import os, sys
from relay.supervisor.privileges import Identity, become, die_with
become(Identity("daemon", 1, 1, (1, 2)))
assert os.getresuid() == os.getresgid() == (1, 1, 1) and os.getgroups() == [1, 2]
for attempt in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chown("/", 1, 1)):
    try:
        attempt()
    except PermissionError:
        continue
    sys.exit("root again")
try:
    die_with(1)
except ProcessLookupError:
    sys.exit(0)
sys.exit("a parent that is not there was accepted")
"""


@pytest.mark.needs("root")
def test_root_is_given_up_for_good() -> None:
    done = subprocess.run([sys.executable, "-c", DROP], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- service manager ---
def test_the_service_manager_may_use_an_abstract_address_or_be_absent() -> None:
    name = f"dmz-relay-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(5)
        notify(f"@{name}", "READY=1")
        assert manager.recv(100) == b"READY=1"
    notify(f"@{name}", "READY=1")
    notify("", "READY=1")
