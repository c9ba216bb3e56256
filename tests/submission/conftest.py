"""Fixtures of submission."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.submission.world import Submission


@pytest.fixture(scope="module")
def bed(authority: Authority) -> Iterator[Submission]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-submission-"))
    folder.chmod(0o755)
    found = Submission(folder, authority)
    yield found
    found.close()
    shutil.rmtree(folder)
