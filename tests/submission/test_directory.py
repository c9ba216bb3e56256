"""Logins that stand in a directory: every kind of store with a real slapd, and every way to write a name."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.config.ldap import LdapProfile
from relay.directory import lockout
from relay.directory.link import connect
from relay.directory.lockout import Lockout
from tests.bed.certificates import Authority
from tests.bed.relay import ROOT as REPOSITORY
from tests.bed.relay import toml
from tests.bed.slapd import PASSWORD as RELAY_PASSWORD
from tests.bed.slapd import SERVICE
from tests.bed.waiting import PATIENCE_S
from tests.bed.wire import letter
from tests.submission.directory_world import PASSWORD, ROOT, STORES, Directory
from tests.submission.test_login import FAILED, OK, by_cram, by_plain, by_scram, by_scram_plus

pytestmark = pytest.mark.needs("slapd", "slapadd", "slappasswd")


@pytest.fixture(scope="module")
def world(authority: Authority) -> Iterator[Directory]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-logins-"))
    folder.chmod(0o755)
    found = Directory(folder, authority)
    yield found
    found.close()
    shutil.rmtree(folder)


HASHES = ["ssha", "ssha256", "ssha512", "crypt", "argon2"]
OFFERS = {
    **dict.fromkeys(("people", "right", "fast", "hash", "strip", "add", "ad", "fastad", "chain"), "PLAIN LOGIN"),
    "cram": "CRAM-MD5 PLAIN LOGIN",
    "scram": "SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN",
    "clear": "SCRAM-SHA-256-PLUS SCRAM-SHA-256 CRAM-MD5 PLAIN LOGIN",
}
CELLS = [
    *((listener, user, mechanism)
      for listener, user in (("people", "ann"), ("fast", "ann"), ("ad", "dora"), *(("hash", name) for name in HASHES))
      for mechanism in ("PLAIN", "LOGIN")),
    *(("cram", "carl", mechanism) for mechanism in ("PLAIN", "LOGIN", "CRAM-MD5")),
    *(("clear", "clea", mechanism) for mechanism in ("PLAIN", "LOGIN", "CRAM-MD5")),
    *(("scram", "sam", mechanism) for mechanism in ("PLAIN", "LOGIN")),
]  # fmt: skip


def curl(world: Directory, listener: str, user: str, password: str, mechanism: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["curl", f"smtp://localhost:{world.relay.ports[listener]}", "--ssl-reqd", "--cacert", str(world.slapd.ca_file),
         "--user", f"{user}:{password}", "--login-options", f"AUTH={mechanism}", "--request", "NOOP", "--verbose"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


@pytest.mark.needs("curl")
@pytest.mark.parametrize(("listener", "user", "mechanism"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_curl_logs_in(world: Directory, listener: str, user: str, mechanism: str) -> None:
    done = curl(world, listener, user, PASSWORD, mechanism)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"> AUTH {mechanism}" in done.stderr


@pytest.mark.needs("curl")
@pytest.mark.parametrize("mechanism", ["PLAIN", "CRAM-MD5"])
def test_dovecot_s_example_logs_in_from_an_attribute(world: Directory, mechanism: str) -> None:
    assert curl(world, "cram", "test", "test", mechanism).returncode == 0
    assert curl(world, "cram", "test", "Test", mechanism).returncode == 67, "login denied"


@pytest.mark.parametrize(
    ("way", "listener", "user"),
    [(way, *cell) for way in (by_scram, by_scram_plus) for cell in (("scram", "sam"), ("clear", "clea"), ("clear", "both"))],
)  # fmt: skip
def test_scram_from_an_attribute(world: Directory, way, listener: str, user: str) -> None:
    with world.client(listener) as client:
        assert way(client, user, "wrong") == FAILED
        assert way(client, "nobody", PASSWORD) == FAILED
        assert way(client, user, PASSWORD) == OK
        client.quit()


@pytest.mark.needs("msmtp")
def test_msmtp_by_scram(world: Directory) -> None:
    done = subprocess.run(
        ["msmtp", "--host=localhost", f"--port={world.relay.ports['scram']}", "--tls=on",
         f"--tls-trust-file={world.slapd.ca_file}", "--auth=scram-sha-256", "--user=sam",
         f"--passwordeval=printf %s '{PASSWORD}'", "--from=sam@example.com", "user@example.com"],
        input=letter(), capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    if b"not supported" in done.stderr or b"not available" in done.stderr:
        pytest.skip("this msmtp has no SCRAM")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("listener", [*STORES, "chain"])
def test_a_listener_offers_what_its_store_can_verify(world: Directory, listener: str) -> None:
    with world.client(listener) as client:
        assert client.extensions["AUTH"] == OFFERS[listener]
        assert by_plain(client, "nobody", PASSWORD) == FAILED
        assert by_plain(client, "ann", "wrong") == FAILED
        client.quit()


SPELLINGS = [
    *(("people", name) for name in ("ann", "ANN", " ann ", "ann@example.com", "Ann@Example.COM", "\uff41nn")),
    *(("strip", name) for name in ("ann", "ann@example.com", "CORP\\ann", "corp\\Ann")),
    *(("add", name) for name in ("ann", "ann@example.com")),
    *(("fast", name) for name in ("ann", "ANN", "ann@whatever.example")),
    *(("ad", name) for name in ("dora", "dora@corp.test", "d@example.com", "dora@partner.example", "DORA@EXAMPLE.COM")),
    ("people", "a*b(c)\\d"),
]


@pytest.mark.parametrize("listener", sorted({listener for listener, _ in SPELLINGS}))
def test_an_account_is_one_account_in_every_spelling(world: Directory, listener: str) -> None:
    for store, name in SPELLINGS:
        if store == listener:
            with world.client(listener) as client:
                assert by_plain(client, name, PASSWORD) == OK, name
                client.quit()
    named = {line.rpartition("=")[2] for line in world.relay.wait_for_log(r"login from .*sasl_username=")}
    assert not named & {name for _, name in SPELLINGS if "@" in name or name.isupper()}, (
        "the account's own name is logged"
    )


@pytest.mark.parametrize(
    ("listener", "name"),
    [
        ("people", "*"), ("people", "an*"), ("people", "ann)(uid=*"), ("people", "a\\2ab(c)\\d"), ("people", "x)(|(uid=ann)"),
        ("people", "twin@example.com"), ("right", "bob"), ("strip", "ann@elsewhere.example"), ("strip", "OTHER\\ann"),
        ("fast", "ann,ou=People"), ("fast", "uid=ann"), ("fast", "ann "), ("fast", "an\\6e"), ("ad", "X400:c=de;"),
        ("ad", "room"), ("fastad", "dora@corp.test"), ("fastad", "OTHER\\dora"),
    ],
)  # fmt: skip
def test_names_that_are_no_way_in(world: Directory, listener: str, name: str) -> None:
    before = binds(world)
    with world.client(listener) as client:
        assert by_plain(client, name, PASSWORD) == (OK if name == "ann " else FAILED)
        client.quit()
    assert binds(world) - before == (name == "ann "), "no password is shown to the directory"


def binds(world: Directory) -> int:
    """Passwords of accounts that were shown to the directory, not the relay's own."""
    log = (world.slapd.folder / "slapd.log").read_text(errors="replace")
    return len(re.findall(r'BIND dn="[^"]*,ou=(?:People|AD|Stored),[^"]*" method=128', log, re.IGNORECASE))


@pytest.mark.parametrize(("user", "password"), [("ann", ""), ("ann", "a\x01b"), ("", "x"), ("a\x00b", "x")])
def test_what_cannot_be_a_login_is_never_asked(world: Directory, user: str, password: str) -> None:
    before = binds(world), world.slapd.searches()
    with world.client("people") as client:
        assert by_plain(client, user, password)[:3] in {"535", "501"}
        client.quit()
    assert (binds(world), world.slapd.searches()) == before


def test_who_logs_in_owns_the_addresses_of_the_entry(world: Directory) -> None:
    with world.client("people") as client:
        assert by_plain(client, "ann", PASSWORD) == OK
        for sender in ("ann@example.com", "ANN.Smith@example.com"):
            client.expect("250", f"MAIL FROM:<{sender}>")
            client.expect("250", "RSET")
        for sender in ("bob@example.com", "ann@partner.example", "ann@other.example"):
            client.expect("553 5.7.1", f"MAIL FROM:<{sender}>")
        client.quit()
    with world.client("fast") as client:
        assert by_plain(client, "bob", PASSWORD) == OK
        client.expect("250", "MAIL FROM:<bob@example.com>")
        client.expect("250", "RSET")
        client.expect("553 5.7.1", "MAIL FROM:<ann@example.com>")
        client.quit()
    with world.client("ad") as client:
        assert by_plain(client, "dora", PASSWORD) == OK
        client.expect("250", "MAIL FROM:<d@example.com>")
        client.quit()
    with world.client("people") as client:
        assert by_plain(client, "mute", PASSWORD) == OK
        client.expect("250", "MAIL FROM:<mute@example.com>")
        client.expect("554 5.7.1", "RCPT TO:<user@example.com>")
        client.quit()


def test_the_first_store_that_has_a_name_decides(world: Directory) -> None:
    before = world.slapd.binds(f"uid=ann,ou=People,{ROOT}")
    with world.client("chain") as client:
        assert by_plain(client, "ann", PASSWORD) == FAILED, "the file has an ann: the directory is not asked for her"
        assert by_plain(client, "ann", "of the file") == OK
        client.quit()
    assert world.slapd.binds(f"uid=ann,ou=People,{ROOT}") == before
    with world.client("chain") as client:
        assert by_plain(client, "bob", PASSWORD) == OK
        client.quit()


def test_a_password_that_failed_is_not_shown_again_until_it_changes(world: Directory) -> None:
    dn = f"uid=phone,ou=People,{ROOT}"
    with world.client("people") as client:
        assert [by_plain(client, name, "new one") for name in ("phone", "phone@example.com", "PHONE")] == [FAILED] * 3
        assert world.slapd.binds(dn) == 1
        world.slapd.modify(f"dn: {dn}\nchangetype: modify\nreplace: userPassword\nuserPassword: new one\n")
        assert by_plain(client, "phone", "new one") == OK
        client.quit()


def test_cram_md5_where_an_account_cannot(world: Directory) -> None:
    with world.client("clear") as client:
        assert by_cram(client, "both", PASSWORD) == OK
        client.quit()
    matrix = world.relay.command("auth", "matrix").stdout
    assert "store people, a directory\n" in matrix
    assert "CRAM-MD5            no: bind: the directory checks the password itself and has to be shown it" in matrix
    assert "listener clear (clear) offers SCRAM-SHA-256-PLUS SCRAM-SHA-256 CRAM-MD5 PLAIN LOGIN" in matrix


def test_a_reload_takes_new_connections_and_new_keys(world: Directory) -> None:
    store = next(one for one in world.relay.config["auth"]["stores"] if one["name"] == "people")
    with world.client("people") as client:
        assert by_plain(client, "bob", PASSWORD) == OK
        client.quit()
    store["filter"] = "(ritSmtpMailAccess=TRUE)"
    world.relay.configure({})
    assert world.relay.command("reload").returncode == 0
    world.relay.wait_for_log("reloaded")
    with world.client("people") as client:
        assert by_plain(client, "bob", PASSWORD) == FAILED, "he lacks the right"
        assert by_plain(client, "ann@example.com", PASSWORD) == OK
        client.quit()
    del store["filter"]
    world.relay.configure({})
    assert world.relay.command("reload").returncode == 0
    world.relay.wait_for_log("reloaded", 2)


def test_no_password_is_in_a_log(world: Directory) -> None:
    told = world.relay.complaints() + "\n".join(world.relay.log_lines())
    assert PASSWORD not in told
    assert "Relay-Passw0rd" not in told


def relay_login(world: Directory, *arguments: str, password: str = PASSWORD) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", "login", *arguments, "--config", world.relay.config_file],
        input=f"{password}\n", capture_output=True, text=True, cwd=REPOSITORY, timeout=PATIENCE_S * 3, check=False,
    )  # fmt: skip


def test_relay_login_tells_mechanism_store_steps_and_result(world: Directory) -> None:
    done = relay_login(world, "bob@example.com", "--listener", "chain")
    assert done.stdout.splitlines() == [
        "listener chain, mechanism PLAIN",
        "store local (file): no such account",
        "store people (directory people, bind): account bob; the directory checks the password",
        "result: 235 logged in",
        "account bob may send as bob@example.com",
        "the relay has not counted this; a directory counts a wrong password all the same",
    ]
    assert done.returncode == 0
    for mechanism in ("CRAM-MD5", "SCRAM-SHA-256"):
        done = relay_login(world, "clea", "--listener", "clear", "--mechanism", mechanism, "--json")
        told = json.loads(done.stdout)
        assert (told["mechanism"], told["result"], told["account"], told["addresses"]) == (
            mechanism, "ok", "clea", ["clea@example.com"],
        )  # fmt: skip
    refused = relay_login(world, "ann", "--listener", "people", password="wrong")
    assert "result: 535 refused: wrong password\n" in refused.stdout
    assert refused.returncode == 1
    assert 'at the listener "mx"' in relay_login(world, "ann", "--listener", "mx").stderr


def test_what_a_store_cannot_verify_is_refused_at_load_with_the_reason(world: Directory) -> None:
    auth = {**world.relay.config["auth"], "mechanisms": ["CRAM-MD5", "SCRAM-SHA-256"]}
    broken = {**world.relay.config, "auth": auth}
    file = world.relay.config_file.with_name("broken.toml")
    file.write_text(toml(broken))
    done = subprocess.run(
        [sys.executable, "-m", "relay", "serve", "--config", file],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=PATIENCE_S * 3, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    shown = "the directory checks the password itself and has to be shown it"
    for cell in (
        f"people (bind: {shown})",
        f"fast (fastbind: {shown})",
        "hash (auth.stores hash does not list it in mechanisms)",
    ):
        assert done.stderr.count(cell) == 2, done.stderr
    assert re.search(r"CRAM-MD5 cannot be verified by .*scram \(auth\.stores scram does not list it", done.stderr)
    assert re.search(r"SCRAM-SHA-256 cannot be verified by .*cram \(auth\.stores cram does not list it", done.stderr)


def test_the_lock_out_of_an_active_directory_is_read_from_the_domain(world: Directory) -> None:
    profile = world.slapd.profile(
        name="ad", preset="active-directory", servers=[world.slapd.url], insecure=True, ca_file=None
    )
    server = LdapProfile.model_validate(profile).targets()[0]

    async def seen() -> Lockout | None:
        until = asyncio.get_running_loop().time() + PATIENCE_S
        link = await connect(server, LdapProfile.model_validate(profile), None, until)
        await link.bind(SERVICE["openldap"], RELAY_PASSWORD.encode(), until)
        found = await lockout.read(link, await lockout.head_of(link, until), until, is_ad=True)
        link.close()
        return found

    assert asyncio.run(seen()) is None
    ticks = -600_000_000 * 30
    world.slapd.modify(
        f"dn: {ROOT}\nchangetype: modify\nadd: objectClass\nobjectClass: samDomain\n-\n"
        f"add: lockoutThreshold\nlockoutThreshold: 10\n-\nadd: lockOutObservationWindow\nlockOutObservationWindow: {ticks}\n"
    )
    assert asyncio.run(seen()) == Lockout(10, 1800.0)
    system, settings = f"CN=System,{ROOT}", f"CN=Password Settings Container,CN=System,{ROOT}"
    for dn in (system, settings):
        world.slapd.modify(f"dn: {dn}\nchangetype: add\nobjectClass: device\n")
    world.slapd.modify(
        f"dn: CN=strict,{settings}\nchangetype: add\nobjectClass: msDS-PasswordSettings\nmsDS-LockoutThreshold: 4\n"
        "msDS-LockoutObservationWindow: 0\n"
    )
    assert asyncio.run(seen()) == Lockout(4, 86400.0), "a finer policy is stricter, and locks until somebody comes"
