"""``relay check`` of this machine and of the next hops: each fault is met for real, told with its place and its remedy."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from relay.cli import machine, reachable
from relay.cli.findings import findings
from relay.cli.grade import Finding, Grade, mark
from relay.config.schema import Config
from relay.outbound import probe
from relay.policy.route import RouteTable
from tests.bed.certificates import Authority
from tests.bed.fixtures import MakeNextHop, MakeRelay
from tests.bed.next_hop import NextHop, Say, Step
from tests.bed.ports import free_port


def configuration(folder: Path, next_hops: list[str] | None = None, **tables: Any) -> Config:
    return Config.model_validate(
        {
            "server": {"hostname": "mx.example.com", "spool": folder / "spool"},
            "process": {"user": "", "hub_user": ""},
            "listener": [{"name": "mx", "address": f"127.0.0.1:{free_port()}"}],
            "domain": [{"names": ["example.com"], "recipients": "any"}],
            "route": [{"domains": ["*"], "next_hops": next_hops or ["smtp:[127.0.0.1]:26"]}],
            **tables,
        }
    )


def told(found: list[Finding], grade: Grade) -> list[str]:
    return [f"{one.topic}: {one.text}; {one.hint}" for one in found if one.grade is grade]


# --- ports ---------------------------------------------------------------------------------------------------------------


def test_a_free_port_is_nothing_to_speak_of_and_stays_free(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    assert list(machine.ports(config)) == []
    assert list(machine.ports(config)) == []


def test_a_port_that_another_program_has_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = configuration(tmp_path, listener=[{"name": "mx", "address": f"127.0.0.1:{port}"}])
        (text,) = told(list(machine.ports(config)), Grade.ERROR)
        name = Path("/proc/self/comm").read_text().strip()
        assert text == (
            f"listener mx: 127.0.0.1:{port} is taken by {name} (pid {os.getpid()}); "
            "stop it, or give the relay another address"
        )


def test_an_address_of_no_interface_is_an_error(tmp_path: Path) -> None:
    config = configuration(
        tmp_path, listener=[{"name": "mx", "address": "192.0.2.77:2525"}], web={"listen": "[2001:db8::77]:9125"}
    )
    first, second = told(list(machine.ports(config)), Grade.ERROR)
    assert first == "listener mx: no interface of this machine has 192.0.2.77; write one that it has, or 0.0.0.0"
    assert second.startswith("web: no interface of this machine has 2001:db8::77") or "cannot be opened" in second


def test_the_ports_and_the_spool_of_a_running_relay_are_its_own(make_relay: MakeRelay, next_hop: NextHop) -> None:
    relay = make_relay(next_hop)
    assert machine.running(relay.spool) == relay.supervisor
    done = relay.command("check", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["mark"] in "ABCD", found["grade"]) == (0, True, "warning")
    texts = [one["text"] for one in found["findings"] if one["grade"] == "ok"]
    assert f"127.0.0.1:{relay.ports['mx']} is taken by the relay that runs (pid {relay.supervisor})" in texts
    (hop,) = [one for one in found["findings"] if one["topic"].startswith("next hop ") and one["grade"] == "ok"]
    assert hop["text"].startswith("takes a connection: no TLS")
    relay.stop()
    assert machine.running(relay.spool) == 0
    people = relay.command("check", "--offline")
    assert people.stdout.splitlines()[-1].startswith(f"{relay.config_file}: 0 errors, ")
    assert "next hop " not in people.stdout


# --- the disk ------------------------------------------------------------------------------------------------------------


def test_the_spool_is_tried_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.server.spool.mkdir()
    found = list(machine.spool(config))
    assert told(found, Grade.ERROR) == []
    assert list(config.server.spool.iterdir()) == []


@pytest.mark.needs("root")
def test_a_spool_that_everybody_may_write_to_is_an_error(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.server.spool.mkdir()
    config.server.spool.chmod(0o777)
    os.chown(config.server.spool, 65534, -1)
    found = list(machine.spool(config))
    assert told(found, Grade.ERROR) == [
        f"spool: every user may write to {config.server.spool}; chmod o-w {config.server.spool}"
    ]
    assert any("belongs to uid 65534" in text for text in told(found, Grade.WARNING))


def test_memory_and_other_machines_disks_are_warned_of_and_a_full_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path)
    assert machine.file_system(Path("/proc")) == "proc"
    monkeypatch.setattr(machine, "file_system", lambda folder: "tmpfs")
    assert any(
        "a restart of this machine loses the queue" in text for text in told(list(machine.spool(config)), Grade.WARNING)
    )
    monkeypatch.setattr(machine, "file_system", lambda folder: "nfs4")
    assert any(
        "another machine's disk; use a local disk" in text for text in told(list(machine.spool(config)), Grade.WARNING)
    )
    monkeypatch.setattr(machine, "RESERVE_OCTETS", 1 << 60)
    assert any("new mail is answered 452" in text for text in told(list(machine.spool(config)), Grade.ERROR))


def test_a_disk_that_does_not_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(machine.os, "fsync", broken)
    (text,) = told(list(machine.spool(configuration(tmp_path))), Grade.ERROR)
    assert (
        text
        == f"spool: {tmp_path} does not keep what is written: Input/output error; look at the disk: mail is acknowledged only after this"
    )


# --- the clock -----------------------------------------------------------------------------------------------------------


def test_a_clock_that_was_never_set_or_stands_before_its_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path)
    queue = config.server.spool / "queue"
    queue.mkdir(parents=True)
    monkeypatch.setattr(machine, "synchronised", lambda: True)
    assert told(list(machine.clock(config)), Grade.WARNING) == []
    monkeypatch.setattr(machine, "synchronised", lambda: False)
    (text,) = told(list(machine.clock(config)), Grade.WARNING)
    assert text.endswith("not kept by NTP; run chrony or systemd-timesyncd")
    os.utime(queue, (2**33, 2**33))
    (text,) = told(list(machine.clock(config)), Grade.WARNING)
    assert text.startswith(f"clock: {queue} was changed 2242-03-16 12:56 UTC, and it is ")
    monkeypatch.setattr(machine.time, "time", lambda: 86400.0)
    (text,) = told(list(machine.clock(config)), Grade.ERROR)
    assert text.startswith("clock: it is 1970-01-02 00:00 UTC by this machine's clock; set the clock")


def test_the_kernel_says_whether_the_time_is_kept() -> None:
    assert machine.synchronised() in (True, False, None)


# --- next hops -----------------------------------------------------------------------------------------------------------


def hops(config: Config) -> list[Finding]:
    return list(reachable.next_hops(config))


def test_next_hops_are_greeted_side_by_side_and_left_with_quit(
    tmp_path: Path, make_next_hop: MakeNextHop, authority: Authority
) -> None:
    secure, plain, busy = make_next_hop(certificate=authority.server("localhost")), make_next_hop(), make_next_hop()
    busy.on(Step.BANNER, Say("554 5.7.1 not you"))
    closed = f"smtp:[127.0.0.1]:{free_port()}"
    found = hops(configuration(tmp_path, [secure.route, plain.route, busy.route, closed]))
    ok, warnings = told(found, Grade.OK), told(found, Grade.WARNING)
    assert ok[0].startswith(f"next hop 127.0.0.1:{secure.port}: takes a connection: TLSv1.3, ")
    assert ok[1].startswith(f"next hop 127.0.0.1:{plain.port}: takes a connection: no TLS, ")
    assert (
        f"next hop 127.0.0.1:{plain.port}: offers no STARTTLS: mail goes on readable; give it a certificate, if the way there is not yours alone"
        in warnings
    )
    assert (
        f"next hop 127.0.0.1:{busy.port}: refuses the connection: 554 5.7.1 not you; it refuses this relay: allow its address there"
        in warnings
    )
    (refused,) = [text for text in warnings if "Connection refused" in text or "Connect call failed" in text]
    assert refused.endswith("Mail for it waits in the queue")
    assert told(found, Grade.ERROR) == []
    assert [hop.accepted for hop in (secure, plain, busy)] == [[], [], []]


def test_a_certificate_that_does_not_verify_is_told_where_it_must(
    tmp_path: Path, make_next_hop: MakeNextHop, authority: Authority
) -> None:
    hop = make_next_hop(certificate=authority.server_of_a_stranger("localhost"))
    (text,) = told(hops(configuration(tmp_path, [hop.route], delivery={"tls": "verified"})), Grade.WARNING)
    assert text.startswith(f"next hop 127.0.0.1:{hop.port}: STARTTLS fails: ")
    assert text.endswith('mend its certificate or write delivery.tls = "opportunistic"')


def test_a_next_hop_that_says_nothing_costs_its_time_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reachable, "TRY_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        route = f"smtp:[127.0.0.1]:{silent.getsockname()[1]}"
        (text,) = told(hops(configuration(tmp_path, [route])), Grade.WARNING)
    assert "Mail for it waits in the queue" in text or "refuses" in text


# --- what the configuration will come to -----------------------------------------------------------------------------------


def test_overrides_that_end_soon_or_have_ended_are_told_with_their_place(tmp_path: Path) -> None:
    today = dt.datetime.now(dt.UTC).date()
    soon, over, far = (today + dt.timedelta(days=days) for days in (3, -2, 60))
    (tmp_path / "overrides").write_text(f"# HR\nb@example.com until={over} 550 Gone\nc@example.com until={soon} OK\n")
    config = configuration(
        tmp_path,
        directory={
            "sources": [{"type": "overrides", "path": tmp_path / "overrides"}],
            "overrides": [
                {"address": "a@example.com", "action": "OK", "expires": soon, "comment": "ticket 1"},
                {"address": "d@example.com", "action": "OK", "expires": far},
            ],
        },
    )
    found = [one for one in findings(config, [], offline=True) if one.topic == "overrides"]
    assert told(found, Grade.WARNING) == [
        f"overrides: b@example.com (HR) has ended on {over}; remove it from {tmp_path}/overrides:2",
        f"overrides: a@example.com (ticket 1) ends in 3 days, on {soon}; give it another day in the configuration, or let it go",
        f"overrides: c@example.com ends in 3 days, on {soon}; give it another day in {tmp_path}/overrides:3, or let it go",
    ]


def test_the_mark_is_a_for_nothing_to_say_and_f_for_any_error() -> None:
    ok, warning, error = (Finding(grade, "x", "y") for grade in (Grade.OK, Grade.WARNING, Grade.ERROR))
    counted = {count: mark([ok, *[warning] * count]) for count in (0, 1, 2, 3, 5, 6, 10, 11)}
    assert counted == {0: "A", 1: "B", 2: "B", 3: "C", 5: "C", 6: "D", 10: "D", 11: "E"}
    assert mark([ok, error]) == "F"


def test_more_next_hops_than_are_asked_at_once_are_all_asked(tmp_path: Path, make_next_hop: MakeNextHop) -> None:
    hop = make_next_hop()
    config = configuration(tmp_path, [hop.route])
    tried = asyncio.run(probe.try_all(RouteTable(config).next_hops() * 20, config))
    assert [one.answer for one in tried] == [None] * 20
    assert hop.most_at_once <= probe.AT_ONCE


def test_resolvers_that_do_not_answer_are_told_where_a_route_needs_them(tmp_path: Path) -> None:
    silent = f"127.0.0.1:{free_port()}"
    config = configuration(tmp_path, ["smtp:"], dns={"servers": [silent], "timeout_s": 0.2})
    (text,) = told(list(reachable.name_service(config)), Grade.WARNING)
    assert text.startswith(f"dns: no answer from {silent}: ")
    assert list(reachable.name_service(configuration(tmp_path))) == []
    named = configuration(tmp_path, ["smtp:mail.example.net"], dns={"servers": [silent], "timeout_s": 0.2})
    (text,) = told(list(reachable.name_service(named)), Grade.WARNING)
    assert text.startswith("dns: no way to mail.example.net: ")
