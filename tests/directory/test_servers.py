"""Which servers are asked, and in which order: SRV records, and a memory of those that failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.config.ldap import parse_server
from relay.directory.failure import LdapFailure, Reason
from relay.directory.servers import REST_MOST_S, REST_S, VARIES, Memory, servers_of, shuffled
from relay.directory.state import read_state, state_path
from relay.net.services import Service
from tests.bed.dns import Nsd
from tests.bed.ports import free_port
from tests.bed.slapd import Slapd, Truth
from tests.directory.conftest import Site, agrees

DOWN = LdapFailure(Reason.REFUSED, "connection refused")


def test_a_server_that_failed_rests_longer_each_time_and_an_answer_ends_it() -> None:
    one, two = parse_server("ldaps://dc1.example.com"), parse_server("ldaps://dc2.example.com")
    now, failed, before = 1000.0, {}, 0.0
    for times in range(1, 10):
        memory = Memory(failed, now, lambda: 0.5)
        memory.note(one, DOWN)
        rest = memory.failed[one.url][1] - now
        assert rest == min(REST_S * 2 ** (times - 1), REST_MOST_S) >= before
        failed, before = memory.plain(), rest
    assert Memory(failed, now + 1).in_turn([one, two]) == [two, one]
    assert Memory(failed, now + REST_MOST_S).in_turn([one, two]) == [one, two]
    memory.note(one, None)
    assert memory.plain() == {}


def test_rests_differ_so_that_relays_do_not_come_back_in_step() -> None:
    server = parse_server("ldaps://dc1.example.com")
    rests = []
    for roll in (0.0, 0.999):
        memory = Memory({}, 0.0, lambda roll=roll: roll)
        memory.note(server, DOWN)
        rests.append(memory.failed[server.url][1])
    assert rests[0] == REST_S * (1 - VARIES)
    assert REST_S < rests[1] < REST_S * (1 + VARIES)


def test_records_come_by_priority_and_among_equals_by_weight() -> None:
    last = Service(20, 100, "c", 389)
    light, heavy = Service(10, 0, "a", 389), Service(10, 60, "b", 389)
    assert shuffled([last, heavy, light], lambda: 0.5) == [heavy, light, last]
    x, y = Service(1, 1, "x", 1), Service(1, 1, "y", 1)
    assert [shuffled([x, y], lambda roll=roll: roll)[0] for roll in (0.1, 0.9)] == [x, y]


@pytest.mark.needs("slapd")
def test_a_reading_asks_a_server_that_failed_last_time_after_the_others(
    ad: tuple[Slapd, Truth], make_site: Callable[..., Site]
) -> None:
    server, truth = ad
    dead = f"ldaps://127.0.0.1:{free_port()}"
    site = make_site(server, {"servers": [dead, server.tls_url]})
    first = site.good().readings[0]
    assert dead in first["failed"][0]
    assert dead in read_state(state_path(site.config.snapshot_path)).bad
    second = site.good().readings[0]
    assert second["failed"] == ()
    assert second["server"] == server.tls_url
    agrees(site.snapshot, truth)


@pytest.mark.needs("slapd", "nsd")
def test_srv_records_name_the_servers(ad: tuple[Slapd, Truth], tmp_path: Path, make_site: Callable[..., Site]) -> None:
    """``localhost`` is a name that the certificate has and this machine resolves without the DNS."""
    server, truth = ad
    port = free_port()
    nsd = Nsd(tmp_path, "127.0.0.1", {
        "localhost": f"_ldap._tcp SRV 0 0 {server.port} localhost.\n"
                     "_ldap._tcp.dc._msdcs SRV 5 1 389 dc1.localhost.\n_ldap._tcp.dc._msdcs SRV 0 1 389 dc2.localhost.\n"
                     "_ldap._tcp.gc._msdcs SRV 0 1 3268 dc1.localhost.\n"
                     "_ldap._tcp.astray SRV 0 0 389 dc1.evil.example.\n",
    }, port)  # fmt: skip
    try:

        def site_of(url: str) -> Site:
            made = make_site(server, {"servers": [url]})
            made.config = made.config.model_copy(
                update={"dns": made.config.dns.model_copy(update={"servers": [f"127.0.0.1:{port}"]})}
            )
            return made

        site = site_of("ldap://_ldap._tcp.localhost")
        outcome = site.good()
        assert outcome.readings[0]["server"] == f"ldap://localhost:{server.port}"
        agrees(site.snapshot, truth)

        def named(url: str, last: str = "") -> list[str]:
            made = site_of(url).config
            return [one.url for one in servers_of(made, made.directory.ldap[0], last)]

        both = "ldaps://_ldap._tcp.dc._msdcs.localhost"
        assert named(both) == ["ldaps://dc2.localhost:636", "ldaps://dc1.localhost:636"]
        assert named(both, "ldaps://dc1.localhost:636")[0] == "ldaps://dc1.localhost:636"
        assert named("ldaps://_ldap._tcp.gc._msdcs.localhost") == ["ldaps://dc1.localhost:3269"]
        astray = site_of("ldaps://_ldap._tcp.astray.localhost").sync()
        assert astray.reason == "dns"
        assert "dc1.evil.example, none of them in astray.localhost" in astray.why
        absent: Any = site_of("ldaps://_ldap._tcp.nowhere.localhost").sync()
        assert (absent.reason, "no such name" in absent.why) == ("dns", True)
    finally:
        nsd.close()
