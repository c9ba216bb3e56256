"""The SMTP library's own tests, with the relay's session in the place of the library's class.

They are taken from where the library is installed; none of them lies here. Which do not apply, and why: ``not_ours``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import aiosmtpd.tests

from tests.library.not_ours import MODULES, OTHER_MODULES

ROOT = Path(__file__).parents[2]
AT_LEAST = 110
"""So many of them pass today: fewer means that they were not run."""


def test_the_librarys_own_tests_pass_but_for_those_that_do_not_apply(tmp_path: Path) -> None:
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\nmarkers =\n    controller_data\n    handler_data\n    client_data\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", settings, "--rootdir", tmp_path, "-p", "tests.library.stand"),
            *("-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-rfE", "--tb=short", "--timeout", "60", "--pyargs"),
            *(f"aiosmtpd.tests.{name}" for name in MODULES),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= AT_LEAST


def test_every_module_of_the_librarys_tests_is_run_or_has_a_reason_why_not() -> None:
    [folder] = aiosmtpd.tests.__path__
    there = {path.stem for path in Path(folder).glob("test_*.py")}
    assert there == {*MODULES, *OTHER_MODULES}
