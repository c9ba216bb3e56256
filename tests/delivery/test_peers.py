"""Next hops that want TLS of their own kind and a login: a second relay is the server, every mechanism a client of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.bed.certificates import Authority
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.waiting import wait_for
from tests.bed.wire import letter

PASSWORD: Final = "a secret that must not be logged"
GOOD: Final[dict[str, dict[str, Any]]] = {
    "plain": {"tls": "verified", "user": "relay", "mechanisms": ["PLAIN"]},
    "login": {"tls": "verified", "user": "relay", "mechanisms": ["LOGIN"]},
    "cram": {"tls": "verified", "user": "relay", "mechanisms": ["CRAM-MD5"]},
    "scram": {"tls": "verified", "user": "relay", "mechanisms": ["SCRAM-SHA-256", "LOGIN"]},
    "required": {"tls": "required", "user": "relay"},
    "implicit": {"tls": "verified", "implicit": True, "user": "relay"},
    "pinned": {"tls": "pinned", "user": "relay"},
}
BAD: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "otherpin": ({"tls": "pinned", "pins": ["00" * 32], "user": "relay"}, "its certificate is none of those pinned"),
    "stranger": ({"tls": "verified", "authorities": None, "user": "relay"}, "certificate verify failed"),
    "wrong": ({"tls": "verified", "user": "nobody"}, "Authentication credentials invalid"),
    "nothing": ({"tls": "verified", "user": "relay", "mechanisms": ["SCRAM-SHA-256"]}, "no mechanism in common"),
}
METHODS: Final = {"plain": "PLAIN", "login": "LOGIN", "cram": "CRAM-MD5", "scram": "SCRAM-SHA-256"}


class World:
    """The relay under test, the relay it logs in at, and where that one delivers."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        (folder / "server").mkdir()
        (folder / "front").mkdir()
        self.hop = NextHop()
        certificate = authority.files(folder)
        users, hashed = folder / "users", folder / "hashed"
        users.write_text(f"relay:{PASSWORD}:*\n")
        hashed.write_text("other:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=:*\n")
        names = [*GOOD, *BAD]
        self.server = RelayRunner(
            folder / "server",
            self.hop.route,
            listeners={name: "submissions" if name == "implicit" else "submission" for name in names},
            certificate=certificate,
            default_next_hop=self.hop.route,
            config={
                "auth": {
                    "stores": [
                        {"name": "users", "type": "file", "path": users},
                        {"name": "hashed", "type": "file", "path": hashed},
                    ],
                    "failure_delay_s": 0.0,
                    "account_failures": 1000,
                    "client_failures": 1000,
                }
            },
        )
        for listener in self.server.config["listener"]:
            listener["stores"] = ["hashed" if listener["name"] == "nothing" else "users"]
        self.server.configure({})
        self.server.start()
        self.password_file = folder / "password"
        self.password_file.write_text(f"{PASSWORD}\n")
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(_first(certificate[0].read_text()))).hexdigest()
        tables = []
        for name in names:
            said = GOOD.get(name) or BAD[name][0]
            table = {
                "host": "localhost", "port": self.server.ports[name], "password_file": self.password_file,
                "authorities": authority.bundle(folder), **({"pins": [pin]} if name == "pinned" else {}), **said,
            }  # fmt: skip
            tables.append({key: value for key, value in table.items() if value is not None})
        self.front = RelayRunner(
            folder / "front",
            self.hop.route,
            recipients=[f"user@{name}.example.com" for name in names],
            config={
                "domain": [{"names": [f"{name}.example.com" for name in names]}],
                "route": [
                    {"domains": [f"{name}.example.com"], "next_hops": [f"smtp:[localhost]:{self.server.ports[name]}"]}
                    for name in names
                ],
                "next_hop": tables,
            },
        )
        self.front.start()

    def send(self, name: str) -> str:
        with self.front.client().open() as client:
            said = client.deliver("someone@elsewhere.example", f"user@{name}.example.com", letter(subject=name))
            client.quit()
        return str(said)

    def close(self) -> None:
        self.front.close()
        self.server.close()
        self.hop.close()


def _first(pem: str) -> str:
    end = "-----END CERTIFICATE-----"
    return pem[: pem.index(end) + len(end)]


@pytest.fixture(scope="module")
def world(authority: Authority) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-peers-"))
    folder.chmod(0o755)
    made = World(folder, authority)
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", GOOD)
def test_mail_goes_through_tls_and_login_as_written(world: World, name: str) -> None:
    assert world.send(name).startswith("250")
    wait_for(
        lambda: [one for one in world.hop.accepted if f"user@{name}.example.com" in one.recipients],
        lambda: f"the message; {world.front.complaints()}",
    )
    method = METHODS.get(name, "SCRAM-SHA-256")
    [received] = world.server.wait_for_log(rf"proto=ESMTPSA, .*listener={name}$")
    assert received
    assert world.server.grep(rf"sasl_method={method}, sasl_username=relay")


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_waits_in_the_queue_and_says_why(world: World, name: str) -> None:
    assert world.send(name).startswith("250 2.0.0 Ok: queued")
    world.front.wait_for_log(rf"to=<user@{name}\.example\.com>, .*status=deferred .*{BAD[name][1]}")


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_probe_says_the_same_and_sends_nothing(world: World, name: str) -> None:
    before = len(world.hop.accepted)
    done = world.front.command("probe", f"localhost:{world.server.ports[name]}", "--to", "user@example.com", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == (1 if name in BAD else 0)
    assert (said["refused"] is None) == (name in GOOD)
    if name in BAD:
        assert BAD[name][1] in said["refused"]["text"]
        assert said["refused"]["advice"]
    else:
        steps = [one["step"] for one in said["steps"]]
        assert steps == ["connect", "tls", "auth", "mail", "rcpt"]
    assert PASSWORD not in done.stdout + done.stderr
    assert len(world.hop.accepted) == before


def test_a_new_password_is_taken_from_its_file(world: World) -> None:
    world.password_file.write_text("not this one\n")
    world.front.wait_for_log("keys_changed")
    world.front.wait_for_log("configuration_taken")
    world.password_file.write_text(f"{PASSWORD}\n")
    world.front.wait_for_log("configuration_taken", 2)
    assert world.send("plain").startswith("250")


def test_the_password_is_in_no_log(world: World) -> None:
    for relay in (world.front, world.server):
        assert PASSWORD not in relay.complaints() + "\n".join(relay.log_lines())
