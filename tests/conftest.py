"""Owns: what all tests share: programs of other packages that may be absent, and naming them at the end.

A test that uses such a program is marked ``@pytest.mark.needs("swaks")``; ``needs("root")`` asks for the superuser.
Absent means skipped, and under CI=true failed. Fixtures of one kind of test stand beside those tests, not here.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter

import pytest
from hypothesis import settings

# A busy machine takes its time; nothing here measures it.
settings.register_profile("dmz-relay", deadline=None)
settings.load_profile("dmz-relay")

pytest_plugins = ["tests.bed.fixtures"]

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""smtp-sink, smtp-source and postfix live here; an unprivileged user's PATH often leaves it out."""

_PREFIX = "absent: "


def pytest_configure() -> None:
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*path, *(folder for folder in SBIN if folder not in path)])


def _is_absent(program: str) -> bool:
    return os.geteuid() != 0 if program == "root" else shutil.which(program) is None


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
    absent = sorted({program for program in wanted if _is_absent(program)})
    if not absent:
        return
    why = _PREFIX + ", ".join(absent)
    if os.environ.get("CI") == "true":
        pytest.fail(f"{why} (CI=true: not skipped). `make install` as root installs what the tests use.", pytrace=False)
    pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Read from the reports, not from what setup saw: with xdist that happened in another process."""
    absent: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        before, prefix, programs = reason.partition(_PREFIX)
        if prefix and before in {"", "Skipped: "}:
            absent.update(programs.split(", "))
    if absent:
        terminalreporter.section("absent on this machine")
        for program, tests in sorted(absent.items()):
            terminalreporter.line(f"{program}: {tests} test{'s' if tests > 1 else ''} skipped")
