"""The process tree from outside: deaths, hangs, drain, reload, privileges. Real processes of the shipped program."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.client import Client
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner, children_of, is_alive
from tests.bed.waiting import wait_for
from tests.bed.wire import letter

PATIENT = {"process": {"heartbeat_timeout_s": 300.0}}
IMPATIENT = {"process": {"heartbeat_timeout_s": 0.8}}
TWO_WORKERS = {"server": {"workers": 2}}

Start = Callable[..., RelayRunner]


@pytest.fixture
def start(make_relay: MakeRelay, next_hop: NextHop) -> Start:
    """A relay in front of a next hop; each argument is a part of its configuration."""

    def start(*configs: dict, build: bool = True, **options) -> RelayRunner:
        relay = make_relay(next_hop, start=False, **options)
        for config in configs:
            relay.configure(config)
        return relay.start(build=build)

    return start


def deliver(relay: RelayRunner) -> None:
    with relay.client() as client:
        assert client.open().deliver("a@example.net", ["user@example.com"], letter()).code == 250


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)
    if number == signal.SIGKILL:
        wait_for(lambda: not is_alive(pid), f"end of {pid}")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def sockets(pid: int) -> set[str]:
    """Inodes of the process's sockets."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(fd)
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def listening(port: int) -> str:
    """Inode of the TCP socket that listens on the port."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":
            return fields[9]
    raise AssertionError(f"nobody listens on {port}")


# --- deaths ---
@pytest.mark.parametrize("which", ["worker", "hub", "web"])
def test_a_killed_process_is_replaced_and_mail_goes_on(start: Start, which: str) -> None:
    relay = start(TWO_WORKERS)
    find = {"worker": lambda: relay.workers()[0], "hub": relay.hub, "web": relay.web}[which]
    others = set(children_of(relay.supervisor)) - {find()}
    old = find()
    kill(old)
    wait_for(
        lambda: any(which in name for pid, name in children_of(relay.supervisor).items() if pid not in {old, *others}),
        f"new {which}",
    )
    assert others < set(children_of(relay.supervisor))
    [line] = relay.wait_for_log("process_died")
    assert f"process={which}" in line
    assert f"pid={old}" in line
    assert "killed by signal 9" in line
    relay.wait_for_metric("relay_process_restarts_total", 1, role=which, cause="signal")
    deliver(relay)


@pytest.mark.parametrize("which", ["worker", "hub"])
def test_a_process_that_hangs_is_killed_and_replaced(start: Start, which: str) -> None:
    relay = start(IMPATIENT)
    old = relay.hub() if which == "hub" else relay.workers()[0]
    kill(old, signal.SIGSTOP)
    wait_for(lambda: not is_alive(old), f"end of the hung {which}")
    [line] = relay.wait_for_log("process_killed")
    assert "no heartbeat for 0.8 s" in line
    relay.wait_for_metric("relay_process_restarts_total", 1, role=which, cause="heartbeat")
    deliver(relay)


def test_a_hub_that_comes_back_counts_what_was_open_before(start: Start) -> None:
    relay = start(TWO_WORKERS, {"limits": {"sessions_per_client": 4}})
    held = [relay.client().open() for _ in range(3)]
    old = relay.hub()
    kill(old)
    wait_for(lambda: any("hub" in n and pid != old for pid, n in children_of(relay.supervisor).items()), "new hub")
    held.append(wait_for(lambda: opened(relay), "fourth session"))
    # Its share alone would let each worker take two; all are refused when the hub knows of all four.
    wait_for(lambda: greetings(relay, 4) == [421] * 4, "refusal by whichever worker")
    held.pop().close()
    wait_for(lambda: opened(relay), "session in place of the one that ended").close()
    for client in held:
        client.expect("250", "NOOP")
        client.close()


def opened(relay: RelayRunner) -> Client | None:
    client = relay.client()
    if client.read().code == 220:
        return client
    client.close()
    return None


def test_a_tree_without_its_supervisor_is_gone_and_a_new_one_takes_over(start: Start) -> None:
    relay = start(TWO_WORKERS)
    children = set(children_of(relay.supervisor))
    assert len(children) == 4
    relay.may_fail = True
    kill_supervisor(relay)
    wait_for(lambda: not any(map(is_alive, children)), "end of all children")
    assert relay.pidfile.exists()
    relay.start(build=False)
    deliver(relay)


def kill_supervisor(relay: RelayRunner) -> None:
    os.kill(relay.supervisor, signal.SIGKILL)
    assert relay.wait_for_exit() == -signal.SIGKILL


def test_children_obey_only_their_supervisor(start: Start) -> None:
    relay = start()
    children = children_of(relay.supervisor)
    for pid in children:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    deliver(relay)
    assert children_of(relay.supervisor) == children


# --- start ---
def test_a_second_tree_on_the_same_spool_is_refused_by_name_of_the_first(start: Start) -> None:
    relay = start()
    second = relay.command("serve")
    assert second.returncode == 2
    assert f"in use by another relay (supervisor's pid {relay.supervisor})" in second.stderr
    deliver(relay)


def test_a_second_tree_waits_for_a_first_that_is_about_to_end(start: Start, make_relay: MakeRelay) -> None:
    relay = start(PATIENT, {"process": {"drain_timeout_s": 1.0}})
    stuck = relay.workers()[0]
    kill(stuck, signal.SIGSTOP)  # its drain takes the whole second
    relay.send_signal(signal.SIGTERM)
    second = make_relay("smtp:[127.0.0.1]:9", start=False)
    second.configure({"server": {"spool": relay.spool}})
    second.start(build=False)
    assert relay.wait_for_exit() == 0


@pytest.mark.parametrize(
    ("address", "advice"),
    [("127.0.0.1:{port}", "the port is in use"), ("198.51.100.7:2525", "this machine does not have the address")],
)
def test_an_address_that_cannot_be_had_ends_the_start(start: Start, address: str, advice: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        relay = start()
        assert relay.stop() == 0
        relay.configure({"web": {"listen": address.format(port=other.getsockname()[1])}})
        relay.log_file.unlink()
        refused = relay.command("serve", "--pidfile", relay.pidfile)
    assert refused.returncode == 2
    assert "web.listen: cannot listen on" in refused.stderr
    assert advice in refused.stderr
    assert not relay.pidfile.exists()
    assert relay.log_lines() == []


def test_the_service_manager_hears_of_start_reload_and_stop(start: Start, bed_folder: Path, monkeypatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(20)
        manager.bind(str(bed_folder / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(bed_folder / "notify"))
        relay = start()
        assert manager.recv(100) == b"READY=1"
        relay.send_signal(signal.SIGHUP)
        assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(100) == b"READY=1"
        relay.stop()
        assert manager.recv(100) == b"STOPPING=1"


# --- end ---
def test_a_drain_ends_with_code_0_and_leaves_nothing(start: Start) -> None:
    relay = start(TWO_WORKERS)
    assert relay.stop() == 0
    assert not relay.pidfile.exists()
    assert list((relay.spool / "run").iterdir()) == []
    assert relay.grep("process_killed|process_died") == []


def test_a_worker_that_does_not_drain_in_time_is_killed(start: Start) -> None:
    relay = start(PATIENT, {"process": {"drain_timeout_s": 0.5}})
    kill(relay.workers()[0], signal.SIGSTOP)
    assert relay.stop() == 0
    [line] = relay.grep("process_killed")
    assert "did not finish in process.drain_timeout_s" in line


def test_a_second_sigterm_ends_at_once(start: Start) -> None:
    relay = start(PATIENT, {"process": {"drain_timeout_s": 3600.0}})
    kill(relay.workers()[0], signal.SIGSTOP)
    relay.send_signal(signal.SIGTERM)
    relay.wait_for_log("supervisor_drains")
    assert relay.stop() == 0


def test_new_clients_are_refused_once_the_workers_drain(start: Start) -> None:
    relay = start()
    with relay.client() as client:
        client.open().envelope("a@example.net", ["user@example.com"])
        client.expect("354", "DATA")
        relay.send_signal(signal.SIGTERM)
        relay.wait_for_log("supervisor_drains")
        wait_for(lambda: not connects(relay), "refusal of new clients")
        client.send(letter() + b".\r\n")
        assert client.read().code == 250
    assert relay.wait_for_exit() == 0


def connects(relay: RelayRunner) -> bool:
    try:
        relay.client().close()
    except ConnectionRefusedError:
        return False
    return True


# --- reload ---
def reload(relay: RelayRunner, changes: dict, event: str) -> list[str]:
    before = len(relay.grep(event))
    relay.configure(changes)
    relay.send_signal(signal.SIGHUP)
    return relay.wait_for_log(event, before + 1)[before:]


def greetings(relay: RelayRunner, count: int) -> list[int]:
    """The codes that so many clients at once are greeted with."""
    clients = [relay.client() for _ in range(count)]
    codes = [client.read().code for client in clients]
    for client in clients:
        client.close()
    return sorted(codes)


def test_a_good_configuration_is_taken_by_everyone_without_a_restart(start: Start) -> None:
    relay = start(TWO_WORKERS)
    children = children_of(relay.supervisor)
    reload(relay, {"limits": {"sessions_per_client": 3}}, "configuration_taken")
    wait_for(lambda: greetings(relay, 5) == [220, 220, 220, 421, 421], "the new limit, from hub and workers")
    assert children_of(relay.supervisor) == children


def test_a_worker_born_after_a_reload_has_the_new_configuration(start: Start) -> None:
    relay = start()
    reload(relay, {"server": {"hostname": "new.example.com"}}, "configuration_taken")
    old = relay.workers()[0]
    kill(old)
    wait_for(lambda: relay.workers() not in ([], [old]), "new worker")
    with relay.client() as client:
        assert "new.example.com" in client.greeting().text


def test_every_problem_of_a_bad_configuration_is_logged_and_the_old_one_stays(start: Start) -> None:
    relay = start()
    relay.configure({"limits": {"recipients": 0}, "queue": {"retry_jitter": 7.0}})
    relay.send_signal(signal.SIGHUP)
    lines = "\n".join(relay.wait_for_log("configuration_refused", 2))
    assert "limits.recipients" in lines
    assert "queue.retry_jitter" in lines
    deliver(relay)
    reload(relay, {"limits": {"recipients": 200}, "queue": {"retry_jitter": 0.1}}, "configuration_taken")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("server.workers", {"server": {"workers": 3}}),
        ("server.spool", {"server": {"spool": "/var/spool/elsewhere"}}),
        ("web.listen", {"web": None}),
        ("listener", {"listener": [{"name": "mx", "address": "127.0.0.1:2"}]}),
        ("process.user", {"process": {"user": "daemon"}}),
    ],
)
def test_what_needs_a_restart_is_refused_by_name(start: Start, key: str, changes: dict) -> None:
    relay = start()
    lines = reload(relay, {**changes, "limits": {"sessions_per_client": 1}}, "configuration_refused")
    assert any(f"{key}: " in line and "restart needed" in line for line in lines), lines
    assert greetings(relay, 2) == [220, 220]


def test_when_one_cannot_take_a_configuration_nobody_does(start: Start) -> None:
    relay = start(TWO_WORKERS, {"process": {"heartbeat_timeout_s": 2.0}})
    stuck = relay.workers()[1]
    kill(stuck, signal.SIGSTOP)
    [line] = reload(relay, {"server": {"hostname": "new.example.com"}}, "configuration_refused")
    assert "worker-1 died while it prepared: no heartbeat" in line
    wait_for(lambda: len(relay.workers()) == 2, "second worker")
    for _ in range(6):
        with relay.client() as client:
            assert "mx.example.com" in client.greeting().text
    reload(relay, {}, "configuration_taken")


def test_a_rotated_log_is_opened_again_by_everyone(start: Start) -> None:
    relay = start()
    kept = relay.log_file.with_suffix(".1")
    relay.log_file.rename(kept)
    relay.configure({"limits": {"recipients": 0}})  # a broken configuration does not keep logs from rotating
    relay.send_signal(signal.SIGHUP)
    relay.wait_for_log("configuration_refused")
    wait_for(
        lambda: not any(kept.samefile(fd) for pid in members(relay) for fd in files(pid)), "release of the old log"
    )
    deliver(relay)
    relay.wait_for_log("status=sent")


def members(relay: RelayRunner) -> list[int]:
    return [relay.supervisor, *children_of(relay.supervisor)]


def files(pid: int) -> list[Path]:
    return [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd).startswith("/")]


def test_a_first_snapshot_and_its_key_reach_running_workers(start: Start) -> None:
    relay = start(build=False)
    with relay.client() as client:
        client.open().expect("250", "MAIL FROM:<a@example.net>")
        client.expect("451", "RCPT TO:<user@example.com>")
    relay.build_directory()
    wait_for(lambda: knows(relay), "recipient of the new snapshot")


def knows(relay: RelayRunner) -> bool:
    with relay.client() as client:
        client.open().expect("250", "MAIL FROM:<a@example.net>")
        return client.command("RCPT TO:<user@example.com>").code == 250


def test_a_renewed_certificate_is_taken_without_a_signal(start: Start, authority: Authority, bed_folder: Path) -> None:
    chain, key = authority.files(bed_folder)
    relay = start(certificate=(chain, key))
    assert handshake(relay, authority)
    renewed = Authority()
    renewed.files(bed_folder)
    wait_for(lambda: handshake(relay, renewed), "handshake with the renewed certificate")


def handshake(relay: RelayRunner, authority: Authority) -> bool:
    with relay.client() as client:
        try:
            client.open().starttls(authority.client())
        except OSError:
            return False
    return True


# --- privileges ---
DROPPED = {"process": {"user": "daemon", "hub_user": "nobody"}}
DAEMON, NOBODY = "1", "65534"


@pytest.mark.needs("root")
def test_children_are_other_users_for_good(start: Start) -> None:
    relay = start(DROPPED)
    assert status(relay.supervisor)["Uid"].split() == ["0"] * 4
    for pid, uid in ((relay.workers()[0], DAEMON), (relay.web(), DAEMON), (relay.hub(), NOBODY)):
        found = status(pid)
        assert found["Uid"].split() == [uid] * 4
        assert found["Gid"].split() == [uid] * 4
        assert "0" not in found["Groups"].split()
        assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0
        assert found["NoNewPrivs"] == "1"
    assert DAEMON in status(relay.hub())["Groups"].split()


@pytest.mark.needs("root")
def test_keys_stay_root_s_and_work_all_the_same(start: Start, authority: Authority, bed_folder: Path) -> None:
    relay = start(DROPPED, certificate=authority.files(bed_folder))
    for path in (relay.spool / "directory" / "key", bed_folder / "key.pem"):
        found = path.stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
    with relay.client() as client:
        client.open().starttls(authority.client())
        client.ehlo()
        assert client.deliver("a@example.net", ["user@example.com"], letter()).code == 250
    wait_for(lambda: relay.get("/readyz")[0] == 200, "readiness")


@pytest.mark.needs("root")
def test_a_worker_cannot_lay_links_where_root_writes(start: Start) -> None:
    relay = start(DROPPED)
    for folder in (relay.spool, relay.spool / "run", relay.spool / "directory"):
        found = folder.stat()
        assert (found.st_uid, found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) == (0, 0), folder
    queue = (relay.spool / "queue").stat()
    assert (str(queue.st_uid), stat.S_IMODE(queue.st_mode)) == (DAEMON, 0o700)
    hub = (relay.spool / "run" / "hub").stat()
    assert (str(hub.st_gid), stat.S_IMODE(hub.st_mode)) == (DAEMON, 0o660)


@pytest.mark.needs("root")
def test_a_queue_of_root_s_is_handed_over(start: Start, next_hop: NextHop) -> None:
    relay = start({"delivery": {"express": False}, "queue": {"retry_s": [3600.0]}})
    next_hop.close()
    deliver(relay)
    relay.stop()
    relay.configure(DROPPED)
    relay.start(build=False)
    shown = relay.command("queue", "list")
    assert "user@example.com" in shown.stdout + shown.stderr
    assert {str(path.lstat().st_uid) for path in (relay.spool / "queue").rglob("*")} == {DAEMON}


@pytest.mark.needs("root")
def test_a_replaced_worker_is_the_same_user(start: Start) -> None:
    relay = start(DROPPED)
    old = relay.workers()[0]
    kill(old)
    wait_for(lambda: relay.workers() not in ([], [old]), "new worker")
    deliver(relay)
    assert status(relay.workers()[0])["Uid"].split() == [DAEMON] * 4


def test_each_child_has_only_its_own_sockets(start: Start) -> None:
    relay = start(TWO_WORKERS)
    mail, web = listening(relay.ports["mx"]), listening(relay.web_port)
    with relay.client() as client:
        client.open()
        one, two = map(sockets, relay.workers())
        assert mail in one & two
        assert not {mail, web} & sockets(relay.hub())
        assert web in sockets(relay.web())
        assert mail not in sockets(relay.web())
        # Control sockets, hub connections and sessions are nobody else's.
        everyone = [one, two, sockets(relay.hub()), sockets(relay.web())]
        for number, mine in enumerate(everyone):
            for others in everyone[number + 1 :]:
                assert mine & others <= {mail} | standard_streams(relay)


def test_the_supervisor_has_one_thread_and_no_database(start: Start) -> None:
    relay = start()
    deliver(relay)
    assert status(relay.supervisor)["Threads"] == "1"
    assert not [fd for fd in files(relay.supervisor) if "queue" in os.readlink(fd)]


def test_children_do_not_keep_the_supervisor_s_files(start: Start) -> None:
    relay = start()
    for pid in children_of(relay.supervisor):
        names = [os.readlink(fd) for fd in files(pid)]
        assert names.count(str(relay.log_file)) == 1
        assert not [name for name in names if "supervisor" in name]
        assert str(relay.spool / "lock") in names


def standard_streams(relay: RelayRunner) -> set[str]:
    return {os.readlink(f"/proc/{relay.supervisor}/fd/{fd}")[8:-1] for fd in range(3)}


def test_an_unknown_user_ends_the_start(start: Start) -> None:
    relay = start()
    relay.stop()
    relay.configure({"process": {"user": "no-such-user"}})
    refused = relay.command("serve")
    assert refused.returncode == 2
    assert "no-such-user" in refused.stderr
