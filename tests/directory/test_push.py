"""Signed snapshots from inside (row R12): signed there, checked here, taken while the relay runs. No directory in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.cli.main import main
from relay.directory.snapshot import ACCEPT, RESTRICTED
from relay.directory.sync import Purpose
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner, toml
from tests.bed.waiting import wait_for
from tests.directory.conftest import Site

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Command:
    """``relay ARGUMENTS`` in this process."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["relay", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return run


class Inside:
    """The machine inside: a list of addresses, a key, ``push`` as an operator would do it."""

    def __init__(self, folder: Path, command: Command) -> None:
        self.folder, self.command = folder, command
        folder.mkdir()
        self.valid, self.restricted = folder / "valid", folder / "restricted"
        self.valid.write_text("Ann@example.org\nbob@example.org\nx@foreign.example\n")
        self.restricted.write_text("bob@example.org Ask us first\nold@gone.example\n")
        (folder / "map").write_text("left@example.org 550 5.1.1 Has left\n")
        self.config = folder / "relay.toml"
        self.config.write_text(
            toml({
                "server": {"hostname": "inside.example.org", "spool": folder / "spool"},
                "process": {"user": "", "hub_user": ""},
                "listener": [{"name": "mx", "address": "127.0.0.1:2526"}],
                "domain": [{"names": ["example.org", "foreign.example"]}],
                "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
                "directory": {
                    "sources": [
                        {"type": "list", "path": self.valid},
                        {"type": "restricted", "path": self.restricted},
                        {"type": "map", "path": folder / "map"},
                    ]
                },
            })
        )  # fmt: skip
        self.key = folder / "key.pem"
        code, out, err = command("directory", "keygen", self.key)
        assert code == 0, err
        self.public = out.strip()

    def push(
        self, drop: Path, *more: str, name: str = "inside", file: str = "a.push", readable_to: Path | None = None
    ) -> Path:
        if readable_to is not None:  # as what copies it would do: under another name first
            whole = self.push(self.folder, *more, name=name, file=file)
            shutil.copyfile(whole, drop / f".{file}")
            shutil.chown(drop / f".{file}", readable_to.stat().st_uid)
            return (drop / f".{file}").rename(drop / file)
        arguments = ("--signed", "--key", self.key, "--name", name, "--output", drop / file, "--config", self.config)
        code, _, err = self.command("directory", "export", *arguments, *more)
        assert code == 0, err
        return drop / file


@pytest.fixture
def inside(tmp_path: Path, command: Command) -> Inside:
    return Inside(tmp_path / "inside", command)


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    made = tmp_path / "drop"
    made.mkdir(mode=0o750)
    return made


@pytest.fixture
def dmz(tmp_path: Path, inside: Inside, drop: Path) -> Site:
    push = [{"name": "inside", "folder": drop, "keys": [inside.public]}]
    return Site(tmp_path / "dmz", domains=("example.org",), push=push)


def test_what_is_pushed_is_served_and_lies_nowhere_in_plain_text(dmz: Site, inside: Inside, drop: Path) -> None:
    inside.push(drop)
    assert dmz.good().counts["recipients"] == 2
    lookup = dmz.snapshot.lookup
    assert lookup("ann@example.org") & ACCEPT
    assert lookup("bob@example.org") & RESTRICTED
    assert lookup("old@gone.example") == RESTRICTED
    assert not lookup("x@foreign.example")  # of no domain here
    assert dmz.snapshot.entry("bob@example.org").text == "Ask us first"
    assert dmz.snapshot.entry("left@example.org").ruling.text == "Has left"
    assert list(drop.iterdir()) == []
    spool = dmz.config.server.spool
    assert not any(b"ann@" in file.read_bytes().lower() for file in spool.rglob("*") if file.is_file())
    # A restart, a reload, another source: what was pushed is there still.
    assert dmz.good().unchanged
    assert dmz.snapshot.lookup("ann@example.org") & ACCEPT


def test_the_age_of_a_snapshot_is_that_of_the_file(dmz: Site, inside: Inside, drop: Path) -> None:
    """A relay that reads the same file again and again must not take it for news."""
    before = time.time()
    inside.push(drop)
    dmz.good()
    after = time.time()
    dmz.good()
    assert before <= dmz.snapshot.created <= after


def changed(file: Path) -> None:
    octets = bytearray(file.read_bytes())
    octets[-100] ^= 1
    file.write_bytes(octets)


REFUSED = {
    "changed on its way": (lambda inside, drop: changed(inside.push(drop)), "signature"),
    "cut off": (lambda inside, drop: cut(inside.push(drop)), "truncated"),
    "for somebody else": (lambda inside, drop: inside.push(drop, name="other"), "'other'"),
    "no snapshot at all": (
        lambda inside, drop: (drop / "a.push").write_text("hello, this is no snapshot"),
        "is not a signed",
    ),
    "the same again": (lambda inside, drop: inside.push(drop, "--serial", "5"), "in use already"),
    "older": (lambda inside, drop: inside.push(drop, "--serial", "4"), "serial number 4"),
    "a link": (lambda inside, drop: (drop / "a.push").symlink_to(inside.push(inside.folder)), "cannot be read"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    os.utime(file, (1, 1))


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_with_its_reason_and_set_aside(name: str, dmz: Site, inside: Inside, drop: Path) -> None:
    inside.push(drop, "--serial", "5")
    dmz.good()
    generation = dmz.snapshot.generation
    inside.valid.write_text("eve@example.org\n")
    spoil, why = REFUSED[name]
    spoil(inside, drop)
    assert why in dmz.sync(Purpose.DRY_RUN).why
    assert (drop / "a.push").is_symlink() or (drop / "a.push").exists()
    outcome = dmz.sync()
    assert (outcome.reason, outcome.generation) == ("push", 0)
    assert why in outcome.why
    assert dmz.snapshot.generation == generation
    assert why in (drop / "refused" / "a.push.reason").read_text()
    assert [one.name for one in drop.iterdir()] == ["refused"]
    dmz.good()  # it is out of the way
    assert dmz.snapshot.lookup("ann@example.org") & ACCEPT
    inside.push(drop, "--serial", "6")
    dmz.good()
    assert dmz.snapshot.lookup("eve@example.org") & ACCEPT


def test_age_clocks_and_rights_are_looked_at(tmp_path: Path, inside: Inside, drop: Path) -> None:
    push = [{"name": "inside", "folder": drop, "keys": [inside.public], "max_age_s": 1.0}]
    site = Site(tmp_path / "dmz", domains=("example.org",), push=push)
    inside.push(drop)
    from relay.directory.sync import synchronise

    for later, why in ((60.0, "s ago"), (-900.0, "in the future")):
        outcome = synchronise(site.config, {}, Purpose.DRY_RUN, time.time() + later, lambda _, __: None)
        assert (outcome.reason, why in outcome.why) == ("push", True), outcome.why
    (drop / "a.push").chmod(0o644)
    drop.chmod(0o755)
    assert "every user may read it" in site.sync(Purpose.DRY_RUN).why
    drop.chmod(0o777)
    assert "every user may write" in site.sync(Purpose.DRY_RUN).why


def test_a_stranger_cannot_sign_and_a_new_key_takes_over_beside_the_old_one(
    tmp_path: Path, inside: Inside, drop: Path, command: Command
) -> None:
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", other], check=True, capture_output=True)
    other.chmod(0o600)
    public = command("directory", "keygen", "--public", other)[1].strip()
    site = Site(tmp_path / "dmz", domains=("example.org",), push=[{"name": "inside", "folder": drop, "keys": [public]}])
    inside.push(drop)
    assert "signature" in site.sync().why
    both = [{"name": "inside", "folder": drop, "keys": [public, inside.public]}]
    site = Site(tmp_path / "dmz", domains=("example.org",), push=both)
    inside.push(drop)
    site.good()
    inside.key = other
    inside.push(drop)
    site.good()


def test_a_loss_is_held_back_until_it_is_accepted(tmp_path: Path, inside: Inside, drop: Path) -> None:
    push = [{"name": "inside", "folder": drop, "keys": [inside.public]}]
    site = Site(tmp_path / "dmz", domains=("example.org",), push=push, shrink_floor=2)
    inside.valid.write_text("".join(f"user{number}@example.org\n" for number in range(50)))
    inside.push(drop)
    site.good()
    inside.valid.write_text("user1@example.org\n")
    inside.push(drop)
    assert site.sync().reason == "shrunk"
    assert (drop / "a.push").exists()
    assert site.snapshot.recipients > 40
    assert site.sync(Purpose.ACCEPT).reason == ""
    assert site.snapshot.recipients < 5
    assert not (drop / "a.push").exists()


def test_files_join_with_what_is_pushed_and_overrides_stand_over_it(tmp_path: Path, inside: Inside, drop: Path) -> None:
    over = tmp_path / "over"
    over.write_text("ann@example.org 550 5.1.1 Not here\n")
    local = tmp_path / "local"
    local.write_text("dmz@example.org\n")
    push = [{"name": "inside", "folder": drop, "keys": [inside.public]}]
    sources = [{"type": "list", "path": local}, {"type": "overrides", "path": over}]
    site = Site(tmp_path / "dmz", domains=("example.org",), push=push, sources=sources)
    inside.push(drop)
    site.good()
    assert site.snapshot.entry("ann@example.org").ruling.text == "Not here"
    assert site.snapshot.lookup("dmz@example.org") & ACCEPT
    assert site.snapshot.lookup("bob@example.org") & ACCEPT


def test_a_domain_of_files_alone_takes_nothing_from_directories(tmp_path: Path, inside: Inside, drop: Path) -> None:
    local = tmp_path / "local"
    local.write_text("dmz@foreign.example\n")
    push = [{"name": "inside", "folder": drop, "keys": [inside.public]}]
    sources = [{"type": "list", "path": local}]
    site = Site(tmp_path / "dmz", domains=("example.org",), push=push, sources=sources)
    tables = site.config.model_dump(exclude_defaults=True)
    tables["domain"].append({"names": ["foreign.example"], "recipients": "static"})
    site.config = type(site.config).model_validate(tables)
    inside.push(drop)
    site.good()
    assert site.snapshot.lookup("ann@example.org") & ACCEPT
    assert site.snapshot.lookup("dmz@foreign.example") & ACCEPT
    assert not site.snapshot.lookup("x@foreign.example")


def test_wrong_use_is_told(tmp_path: Path, inside: Inside, command: Command) -> None:
    config = ("--config", inside.config)
    assert "need" in command("directory", "export", "--signed", *config)[2]
    assert "belong to --signed" in command("directory", "export", "--name", "x", *config)[2]
    assert "there is a file already" in command("directory", "keygen", inside.key)[2]
    inside.key.chmod(0o644)
    arguments = ("--signed", "--key", inside.key, "--name", "x", "--output", tmp_path / "a.push")
    code, _, err = command("directory", "export", *arguments, *config)
    assert (code, "chmod 600" in err) == (1, True)


@pytest.fixture
def place() -> Iterator[Path]:
    """Where users that are not root may enter."""
    made = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_a_running_relay_takes_a_file_as_soon_as_it_is_there(place: Path, inside: Inside) -> None:
    hop = NextHop()
    drop, folder = place / "drop", place / "relay"
    drop.mkdir(mode=0o750)
    folder.mkdir()
    root = os.geteuid() == 0
    if root:
        shutil.chown(drop, "nobody")
    inside.push(drop, readable_to=drop)
    config = {
        "domain": [{"names": ["example.org"]}],
        "route": [{"domains": ["*"], "next_hops": [hop.route]}],
        "directory": {"sources": None, "push": [{"name": "inside", "folder": drop, "keys": [inside.public]}]},
        "process": {"user": "daemon", "hub_user": "nobody"} if root else {},
    }
    relay = RelayRunner(folder, hop.route, config=config)
    try:
        relay.start(build=False)

        def said(recipient: str) -> str:
            with relay.client().open() as client:
                client.command("MAIL FROM:<x@elsewhere.example>")
                return str(client.command(f"RCPT TO:<{recipient}>"))

        wait_for(lambda: said("ann@example.org").startswith("250"), "the first file in use")
        assert said("new@example.org").startswith("550 5.1.1")
        inside.valid.write_text("ann@example.org\nbob@example.org\nnew@example.org\n")
        inside.push(drop, file="b.push", readable_to=drop)
        wait_for(lambda: said("new@example.org").startswith("250"), "the second file in use")
        (drop / "c.push").write_text("this is no signed snapshot")
        relay.wait_for_log("directory_not_read reason=push")
        assert said("new@example.org").startswith("250")
        assert "inside: 5 entries" in relay.command("directory", "status").stdout
        assert f"files are taken from {drop}" in relay.command("check").stdout
    finally:
        relay.close()
        hop.close()
