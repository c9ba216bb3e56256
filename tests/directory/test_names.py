"""The names behind generations: off by default, for nobody else's eyes, gone after a while (rows R9 and R17)."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from relay.cli.main import main
from relay.directory.names import folder_of, known
from relay.directory.sync import Purpose
from tests.bed.relay import toml
from tests.directory.conftest import Site

WEEK_S = 604800.0


class World:
    """A list and a restricted list, synchronised in this process, and the commands about them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, captured: Any) -> None:
        self.folder, self.patch, self.captured = folder, patch, captured
        self.valid, self.restricted = folder / "valid", folder / "restricted"
        self.restricted.write_text("")
        self.site(WEEK_S)

    def site(self, names_s: float) -> None:
        sources = [{"type": "list", "path": self.valid}, {"type": "restricted", "path": self.restricted}]
        self.now = Site(self.folder, domains=("example.org",), sources=sources, names_max_age_s=names_s)
        tables = {
            "server": {"hostname": "mx.example.com", "spool": self.folder / "spool"},
            "process": {"user": "", "hub_user": ""},
            "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
            "domain": [{"names": ["example.org"]}],
            "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
            "directory": {"sources": sources, "names_max_age_s": names_s},
        }
        (self.folder / "relay.toml").write_text(toml(tables))

    def says(self, *users: str, restricted: str = "") -> int:
        self.valid.write_text("".join(f"{user}@example.org\n" for user in users))
        self.restricted.write_text(restricted)
        return self.now.good().generation

    def command(self, *arguments: str) -> tuple[int, str, str]:
        self.patch.setattr(sys, "argv", ["relay", *arguments, "--config", str(self.folder / "relay.toml")])
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *self.captured.readouterr()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> World:
    return World(tmp_path, monkeypatch, capfd)


def test_what_was_added_removed_and_changed_is_named(world: World) -> None:
    first = world.says("ann", "bob", "carol")
    second = world.says("ann", "bob", "dora", restricted="bob@example.org Ask first\n")
    code, out, _ = world.command("directory", "diff")
    assert code == 0
    assert out.splitlines() == [
        f"generation {first} to {second}: 1 added, 1 removed, 1 changed",
        "+ dora@example.org (recipient)",
        "- carol@example.org (recipient)",
        '~ bob@example.org (recipient -> recipient, restricted sender, text "Ask first")',
    ]
    third = world.says("ann")
    found = json.loads(world.command("directory", "diff", str(first), str(third), "--json")[1])
    assert (found["added"], sorted(found["removed"])) == ({}, ["bob@example.org", "carol@example.org"])
    assert "1 removed, 1 changed" in world.command("directory", "history")[1]


def test_a_dry_run_and_a_rollback_name_what_goes_and_comes(world: World) -> None:
    first = world.says("ann", "bob")
    world.says("ann", "dora")
    world.valid.write_text("dora@example.org\n")
    assert world.now.sync(Purpose.DRY_RUN).difference["removed_names"] == ["ann@example.org"]
    assert "- ann@example.org" in world.command("directory", "sync", "--dry-run")[1]
    code, out, err = world.command("directory", "rollback", str(first))
    assert (code, err) == (0, "")
    assert "+ bob@example.org" in out
    assert "- dora@example.org" in out
    # What is in place again has its names, too.
    world.says("ann", "bob", "eve")
    assert "+ eve@example.org (recipient)\n" in world.command("directory", "diff")[1]


def test_they_are_off_by_default_and_go_when_switched_off(world: World) -> None:
    world.says("ann")
    assert known(world.now.config)
    world.site(0.0)
    world.says("ann", "bob")
    assert known(world.now.config) == []
    code, _, err = world.command("directory", "diff")
    assert (code, "names_max_age_s" in err) == (1, True)
    spool = world.now.config.server.spool
    assert not any(b"ann@" in file.read_bytes() for file in spool.rglob("*") if file.is_file())


def test_they_are_for_their_owner_alone_and_go_with_their_age_or_generation(world: World) -> None:
    first = world.says("ann", "bob")
    second = world.says("ann")
    folder = folder_of(world.now.config.snapshot_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()} == {0o600}
    assert known(world.now.config) == [second, first]
    os.utime(folder / str(first), (1, 1))  # replaced long ago
    world.now.good()
    assert known(world.now.config) == [second + 1]
    for number in range(10):
        world.says("ann", f"user{number}")
    assert len(known(world.now.config)) == world.now.config.directory.history + 1


def test_a_build_from_files_keeps_them_as_well(world: World) -> None:
    world.valid.write_text("ann@example.org\nbob@example.org\n")
    assert world.command("directory", "build")[0] == 0
    world.valid.write_text("ann@example.org\n")
    assert world.command("directory", "build")[0] == 0
    assert "- bob@example.org (recipient)" in world.command("directory", "diff")[1]


def test_a_damaged_list_is_told(world: World) -> None:
    world.says("ann")
    generation = world.says("bob")
    (folder_of(world.now.config.snapshot_path) / str(generation)).write_bytes(b"nonsense")
    code, _, err = world.command("directory", "diff")
    assert (code, "is damaged; remove it" in err) == (1, True)
    assert world.command("directory", "diff", "98", "99")[0] == 1
    world.says("carol")  # and it hinders nothing
