"""What is shipped for service managers and containers is what these understand, as far as it can be asked without them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
MOST_EXPOSED = 3.0


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.needs("systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    program = tmp_path / "relay"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS.iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/dmz-relay/bin/relay", str(program)))
    said = run("systemd-analyze", "verify", *sorted(tmp_path.glob("dmz-relay.*")))
    assert [line for line in said.splitlines() if "dmz-relay" in line] == []


@pytest.mark.needs("systemd-analyze")
def test_the_unit_is_hardened() -> None:
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", UNITS / "dmz-relay.service")
    found = re.search(r"Overall exposure level for dmz-relay.service: ([\d.]+)", said)
    assert found is not None
    assert float(found[1]) <= MOST_EXPOSED


def test_the_image_takes_locked_packages_drops_root_and_asks_for_health() -> None:
    steps = (ROOT / "Dockerfile").read_text()
    assert "--require-hashes -r requirements.lock" in steps
    last = steps.rpartition("\nFROM ")[2]
    assert re.search(r"^USER relay$", last, re.MULTILINE)
    assert "HEALTHCHECK" in last
    copied = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    wanted = re.search(r"^COPY (.*) \./$", steps, re.MULTILINE)
    assert wanted is not None
    assert set(wanted[1].split()) | {"relay"} == copied
    assert all((ROOT / name).exists() for name in copied)
