"""How far a reading is (row R20): a bar on a terminal, lines elsewhere and in the log."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from relay.cli import progress
from relay.directory import schedule
from relay.directory.passwords import read_passwords
from relay.directory.sync import Outcome
from tests.bed.certificates import Authority
from tests.bed.relay import ROOT, toml
from tests.bed.slapd import Slapd, openldap_tree
from tests.directory.conftest import Site

pytestmark = pytest.mark.needs("slapd")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Slapd]:
    made = Slapd(tmp_path_factory.mktemp("slapd"), "openldap", openldap_tree(50)[0], authority)
    yield made
    made.close()


def on_a_terminal(config: Path) -> str:
    """What ``relay directory sync --full`` writes to its terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "relay", "directory", "sync", "--full", "--config", config],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as running:  # fmt: skip
        os.close(theirs)
        said = b""
        with suppress(OSError):  # a terminal without a program behind it ends so
            while more := os.read(ours, 4096):
                said += more
        os.close(ours)
        assert running.wait(60) == 0, said
    return said.decode()


def test_a_terminal_shows_a_bar_with_an_end_from_the_second_reading_on(
    tmp_path: Path, server: Slapd, make_site: Callable[..., Site]
) -> None:
    site = make_site(server)
    tables = json.loads(site.config.model_dump_json(include={"server", "process", "listener", "domain", "route"}))
    for domain in tables["domain"]:
        domain.pop("postmaster", None)
    config = tmp_path / "relay.toml"
    config.write_text(toml({**{k: v for k, v in tables.items() if v}, "directory": {"ldap": [server.profile()]}}))
    first = on_a_terminal(config)
    assert "reading openldap" in first
    assert "50 entries" in first
    assert "50 of about 50 entries" in on_a_terminal(config)


def test_elsewhere_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    show = progress.ReadingProgress({"ad": 4000})
    show.told("", 0)
    show.told("ad", 990)
    show.told("ad", 990)
    show.told("other", 5)
    show.end()
    assert capsys.readouterr().err.splitlines() == [
        "reading ad: 990 of about 4000 entries",
        "reading other: 5 entries",
    ]


def test_a_scheduled_reading_that_takes_long_is_heard_of(
    monkeypatch: pytest.MonkeyPatch, server: Slapd, make_site: Callable[..., Site]
) -> None:
    monkeypatch.setattr(schedule, "PROGRESS_S", 0.0)
    config = make_site(server).config
    heard: list[tuple[str, int]] = []

    async def read() -> Outcome:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Outcome] = loop.create_future()
        made = schedule.Schedule(
            loop, lambda one: None if done.done() else done.set_result(one), lambda *one: heard.append(one)
        )
        made.configure(config, read_passwords(config, {}), b"")
        try:
            return await asyncio.wait_for(done, 60)
        finally:
            made.stop()

    assert asyncio.run(read()).reason == ""
    assert all(name == "openldap" for name, _ in heard)
    assert heard
