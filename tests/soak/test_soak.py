"""Nothing acknowledged is lost and no duplicate goes unexplained, whatever dies. `make soak` does the same for longer.

RELAY_SOAK sets the number of moments per mode, RELAY_SOAK_SEED the dice.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from soak.run import line_of, soak
from soak.victims import Mode

MOMENTS = int(os.environ.get("RELAY_SOAK", "10"))
CLIENTS = 16


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", list(Mode))
def test_whatever_dies_everything_acknowledged_arrives_and_every_duplicate_is_explained(
    bed_folder: Path, capsys: pytest.CaptureFixture[str], mode: Mode
) -> None:
    seed = int(os.environ.get("RELAY_SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    outcome = soak(bed_folder, mode, MOMENTS, seed, CLIENTS, lambda line: print(line, file=sys.stderr))
    with capsys.disabled():
        print(f"\nsoak, {mode} (seed {seed}): {line_of(outcome)}")
    assert outcome.moments == MOMENTS
    assert [failure.what for failure in outcome.failures] == []
    # What was not struck while it mattered proves nothing.
    assert outcome.account.delivered
    assert outcome.account.queued
    if mode is not Mode.HUB:
        assert outcome.account.no_reply
    assert outcome.account.by_journal
