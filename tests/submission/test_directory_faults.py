"""A directory that is killed, hangs, is slow or lies while people log in: 454 and never 535, and by itself back to normal."""

from __future__ import annotations

import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.ldap_faults import BIND, DONE, ENTRY, Break, FaultProxy, answer, silent, trickle
from tests.bed.relay import RelayRunner
from tests.bed.slapd import Slapd, openldap_tree
from tests.bed.waiting import wait_for
from tests.submission.directory_world import ROOT, person
from tests.submission.test_login import FAILED, OK, by_plain

pytestmark = pytest.mark.needs("slapd", "slapadd")

AWAY = "454 4.7.0 Temporary authentication failure"
PASSWORD = "right"
TIMEOUT_S = 2.0


class World:
    """One slapd, two proxies before it, and listeners: alone (one proxy), pair (both)."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.authority = authority
        (folder / "slapd").mkdir()
        people = [
            person(f"user{number}", mail=f"user{number}@example.com", userPassword=PASSWORD) for number in range(40)
        ]
        self.slapd = Slapd(folder / "slapd", "openldap", [*openldap_tree(0)[0], *people], authority)
        self.proxies = [FaultProxy(self.slapd.port), FaultProxy(self.slapd.port)]
        (folder / "relay").mkdir()
        self.relay = RelayRunner(
            folder / "relay",
            "smtp:[127.0.0.1]:1",
            listeners={"mx": "mx", "alone": "submission", "pair": "submission"},
            certificate=authority.files(folder),
            config={
                "auth": {
                    "stores": [
                        {"name": name, "type": "ldap", "directory": name, "timeout_s": TIMEOUT_S, "connections": 4}
                        for name in ("alone", "pair")
                    ],
                    "failure_delay_s": 0.0,
                    "account_failures": 1000,
                    "client_failures": 10_000,
                    "network_failures": 10_000,
                },
            },
        )
        urls = [proxy.url for proxy in self.proxies]
        self.relay.config["directory"]["ldap"] = [
            self.slapd.profile(name=name, servers=servers, insecure=True, ca_file=None, base=f"ou=People,{ROOT}",
                               recipients=False)
            for name, servers in (("alone", urls[:1]), ("pair", urls))
        ]  # fmt: skip
        for listener in self.relay.config["listener"][1:]:
            listener["stores"] = [listener["name"]]
        self.relay.configure({})
        self.relay.start()

    def login(self, listener: str, user: str, password: str = PASSWORD) -> str:
        """The reply; the session ends in good order, so none is stuck."""
        with self.relay.client(listener) as client:
            client.open()
            client.starttls(self.authority.client())
            client.ehlo()
            said = by_plain(client, user, password)
            client.expect("250", "RSET")
            client.quit()
        return said

    def ends(self, listener: str, user: str, password: str, wanted: str) -> None:
        """Log in until the reply is ``wanted``; on a busy machine a deadline may pass, and then it is 454, never another."""

        def tried() -> bool:
            said = self.login(listener, user, password)
            assert said in {wanted, AWAY}
            return said == wanted

        wait_for(tried, f"{wanted} for {user} at {listener}; {self.relay.complaints()}")

    def well(self, listener: str) -> None:
        """Wait until logins work there."""
        self.ends(listener, "user0", PASSWORD, OK)

    def binds(self, user: str) -> int:
        return self.slapd.binds(f"uid={user},ou=People,{ROOT}")

    def close(self) -> None:
        try:
            self.relay.close()
        finally:
            for proxy in self.proxies:
                proxy.close()
            self.slapd.close()


@pytest.fixture(scope="module")
def broken(authority: Authority) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-broken-"))
    folder.chmod(0o755)
    found = World(folder, authority)
    yield found
    found.close()
    shutil.rmtree(folder)


@pytest.fixture
def world(broken: World) -> Iterator[World]:
    broken.well("alone")
    broken.well("pair")
    yield broken
    for proxy in broken.proxies:
        proxy.act = proxy.act_now = proxy.greeting = None


def test_a_directory_that_was_killed(world: World) -> None:
    world.slapd.stop()
    said = [
        world.login("alone", user, word) for user, word in (("user1", PASSWORD), ("user1", "wrong"), ("nobody", "x"))
    ]
    assert said == [AWAY] * 3
    world.relay.wait_for_log("auth_directory_failed store=alone server=ldap://127.0.0.1:")
    world.slapd.start()
    world.well("alone")
    world.relay.wait_for_log("auth_directory_back store=alone")
    world.ends("alone", "user1", "wrong", FAILED)


def test_a_directory_that_hangs(world: World) -> None:
    world.slapd.hang()
    users = [f"user{number}" for number in range(2, 14)]
    with ThreadPoolExecutor(len(users)) as pool:
        assert list(pool.map(lambda user: world.login("alone", user), users)) == [AWAY] * len(users)
    world.slapd.hang(signal.SIGCONT)
    world.well("alone")
    assert [world.login("alone", user) for user in users] == [OK] * len(users), (
        "what was left open is held against nobody"
    )


def test_a_directory_that_is_slow(world: World) -> None:
    def late(message: bytes, _: int, __: int) -> bytes:
        time.sleep(0.2)
        return message

    world.proxies[0].act_now = late
    world.ends("alone", "user20", PASSWORD, OK)
    world.ends("alone", "user20", "wrong", FAILED)


def bind_code(code: int, text: str = "") -> Callable[[bytes, int, int], bytes]:
    def act(message: bytes, operation: int, _: int) -> bytes:
        return answer(message, BIND, code, text) if operation == BIND else message

    return act


def search_code(code: int) -> Callable[[bytes, int, int], bytes]:
    def act(message: bytes, operation: int, _: int) -> bytes:
        return answer(message, DONE, code) if operation == DONE else b"" if operation == ENTRY else message

    return act


@pytest.mark.parametrize(
    "act",
    [*map(bind_code, (1, 2, 3, 8, 10, 13, 51, 52, 53, 80)), *map(search_code, (1, 3, 10, 32, 50, 51, 52, 80))],
    ids=[*(f"bind-{code}" for code in (1, 2, 3, 8, 10, 13, 51, 52, 53, 80)),
         *(f"search-{code}" for code in (1, 3, 10, 32, 50, 51, 52, 80))],
)  # fmt: skip
def test_answers_that_say_nothing_about_the_password(world: World, act) -> None:
    world.proxies[0].act_now = act
    assert world.login("alone", "user21") == AWAY
    assert world.login("alone", "user21", "wrong") == AWAY
    world.proxies[0].act_now = None
    world.well("alone")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("52e", "wrong password (or no such user)"), ("525", "there is no such user"), ("530", "at this hour"),
        ("531", "from this computer"), ("532", "the password has expired"), ("533", "the account is disabled"),
        ("701", "the account has expired"), ("773", "must be changed first"), ("775", "locked after too many failed logins"),
    ],
)  # fmt: skip
def test_active_directory_s_reasons_reach_the_log_and_not_the_client(world: World, data: str, told: str) -> None:
    text = f"80090308: LdapErr: DSID-0C090439, comment: AcceptSecurityContext error, data {data}, v4563"
    world.proxies[0].act_now = bind_code(49, text)
    world.ends("alone", "user22", f"wrong {data}", FAILED)
    world.relay.wait_for_log(rf"SASL PLAIN authentication failed: .*{told[-30:].replace('(', '.').replace(')', '.')}")


def breaking(how: str, operation: int) -> Callable[[bytes, int, int], bytes]:
    def act(message: bytes, found: int, _: int) -> bytes:
        if found == operation:
            raise Break(how)
        return message

    return act


@pytest.mark.parametrize("how", ["reset", "close", "hang"])
def test_a_password_is_shown_to_one_server_only(world: World, how: str) -> None:
    user = {"reset": "user23", "close": "user24", "hang": "user25"}[how]
    before = world.binds(user)
    for proxy in world.proxies:
        proxy.act_now = breaking(how, BIND)
    assert world.login("pair", user, "wrong") == AWAY
    assert world.binds(user) - before == 1
    for proxy in world.proxies:
        proxy.act_now = None


@pytest.mark.parametrize("how", ["reset", "close", "hang"])
def test_a_search_is_asked_of_the_next_server(world: World, how: str) -> None:
    world.proxies[0].act_now = breaking(how, DONE)
    world.ends("pair", "user26", PASSWORD, OK)
    world.ends("pair", "user26", f"wrong {how}", FAILED)


def garbage(client: socket.socket) -> None:
    client.sendall(b"220 this is no directory\r\n")
    silent(client)


@pytest.mark.parametrize("greeting", [garbage, silent, trickle, lambda client: client.close()],
                         ids=["garbage", "silent", "trickle", "closes"])  # fmt: skip
def test_a_server_that_cannot_be_used_from_the_start(world: World, greeting) -> None:
    world.proxies[0].greeting = greeting
    world.proxies[0].act_now = breaking("close", DONE)  # the connections that stand end with their next answer
    world.ends("pair", "user27", PASSWORD, OK)  # the second server does it
    assert world.login("alone", "user27") == AWAY
    assert world.login("alone", "user27", "wrong") == AWAY
    world.proxies[0].greeting = world.proxies[0].act_now = None
    world.well("alone")


def test_the_relay_s_own_password_was_changed(world: World) -> None:
    def refusing(message: bytes, operation: int, _: int) -> bytes:
        if operation == DONE:
            raise Break("close")
        return answer(message, BIND, 49) if operation == BIND else message

    world.proxies[0].act_now = refusing
    assert world.login("alone", "user28") == AWAY
    world.relay.wait_for_log("auth_directory_failed store=alone .*reason=credentials")
    assert world.login("alone", "user28") == AWAY, "the server is not asked again at once"
