"""The whole relay syncs before it says 250, loses nothing when the power goes, and says 451 when the disk fails."""

from __future__ import annotations

import os
import random
import re
import sys
from pathlib import Path

import pytest

from relay.directory.key import read_key
from relay.directory.snapshot import Snapshot
from relay.mail.content import MEMORY_OCTETS
from tests.bed.fixtures import MakeNextHop, MakeRelay
from tests.bed.next_hop import Hold, NextHop, Say, Step
from tests.bed.relay import RelayRunner, children_of
from tests.bed.waiting import wait_for
from tests.bed.wire import END_OF_DATA, after_trace, letter, stuffed
from tests.durability.driver import TUNING
from tests.durability.load import QUEUED, REPORT, Run, in_front_of, next_hops, reported_in, traced_run
from tests.durability.power import Disk, reopened
from tests.durability.proof import Acknowledgement, acknowledgements, proofs, unproved, unsafe_renames
from tests.durability.trace import SYNCS, WRITES, attached, read, strace

pytestmark = pytest.mark.needs("strace", "root")  # strace on a process that runs already

ROOT = Path(__file__).parents[2]
CUTS = 200
TORN_CUTS = 60
RELAY_CUTS = 3
LARGE = letter("large", b"a line of a body that lies in a file\r\n" * 3000)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return traced_run(tmp_path_factory.mktemp("run"))


# --- evidence ----------------------------------------------------------------------------------------------------------


def test_every_250_comes_after_the_syncs_of_body_folder_and_log(run):
    told = list(acknowledgements(run.calls, QUEUED))
    assert sorted(each.id.decode() for each in told) == sorted(run.letters)
    assert unproved(run.calls, run.spool, told) == []
    large = {name for name, each in run.letters.items() if len(each.octets) > MEMORY_OCTETS}
    with_body = {
        proof.told.id.decode()
        for proof in proofs(run.calls, run.spool, told)
        if {"the body: synced", "the folder: synced"} <= {what for what, _ in proof.steps}
    }
    assert with_body == large != set()


def test_the_load_met_every_kind_of_answer_and_left_mail_and_reports(run, tmp_path):
    assert {each.code for each in run.answers} == {250, 450, 451, 550, 554}
    assert {each.recipient[0] for each in run.answers if each.code == 250} == set("ucs"), "users, carols, reports"
    assert len({each.thread for each in run.calls if each.path.endswith("queue.db-wal")}) > 1, "both workers wrote"
    left = final_spool(run, tmp_path)
    assert any(each.envelope.client.startswith(REPORT) for each in left.values())
    assert {each.envelope.recipients[0] for each in left.values()} >= {"user99@example.com", "user90@example.com"}


def final_spool(run, folder):
    """What the stopped relay left, all of which it had synced."""
    disk = Disk.of(run.spool, run.before)
    for _ in disk.watch(run.calls):
        pass
    disk.write_to(folder)
    found = reopened(folder, "after-the-end", TUNING)
    assert run.lost(run.calls[-1].end, found) == []
    return found


@pytest.mark.parametrize(
    ("missing", "problem", "large_only"),
    [
        ("-wal", "the log was not synced between its frame and the acknowledgement", False),
        ("/bodies", "the folder was not synced between the link of", True),
        ("(deleted)", "was not synced between its last octet and its row", True),
    ],
)
def test_the_proof_fails_on_a_trace_that_lacks_a_sync(run, missing, problem, large_only):
    kept = [c for c in run.calls if not (c.name in SYNCS and c.path.endswith(missing))]
    problems = unproved(kept, run.spool, acknowledgements(kept, QUEUED))
    large = [each for each in run.letters.values() if len(each.octets) > MEMORY_OCTETS]
    assert len(problems) == len(large if large_only else run.letters)
    assert all(problem in each for each in problems)


def test_the_proof_fails_when_each_250_is_told_before_its_sync_ended(run):
    told = list(acknowledgements(run.calls, QUEUED))
    synced = [dict(proof.steps)["the log: synced"].end for proof in proofs(run.calls, run.spool, told)]
    early = [Acknowledgement(line, each.id) for line, each in zip(synced, told, strict=True)]
    assert len(unproved(run.calls, run.spool, early)) == len(told)


# --- power cuts --------------------------------------------------------------------------------------------------------


def dice() -> random.Random:
    seed = random.randrange(1 << 32)
    sys.stdout.write(f"seed {seed}\n")
    return random.Random(seed)


@pytest.mark.parametrize(("cuts", "torn"), [(CUTS, False), (TORN_CUTS, True)], ids=["synced-only", "torn"])
def test_after_a_power_cut_every_acknowledged_message_is_there_whole(run, fast_folder, cuts, torn):
    chance = dice()
    wanted = set(chance.sample(run.moments(), cuts))
    disk = Disk.of(run.spool, run.before)
    for line in disk.watch(run.calls):
        if line in wanted:
            folder = fast_folder / str(line)
            disk.write_to(folder, chance if torn else None)
            assert run.lost(line, reopened(folder, "after-the-cut", TUNING)) == [], f"cut after line {line + 1}"
            wanted.remove(line)
    assert wanted == set()


def test_the_model_does_lose_what_was_not_synced(run, fast_folder):
    for part in ("-wal", "(deleted)"):
        disk = Disk.of(run.spool, run.before)
        middle = run.moments()[len(run.moments()) // 2]
        kept = [c for c in run.calls if not (c.name in SYNCS and c.path.endswith(part))]
        for line in disk.watch(kept):
            if line >= middle:
                break
        disk.write_to(fast_folder / part)
        try:
            problems = run.lost(middle, reopened(fast_folder / part, "after-the-cut", TUNING))
        except AssertionError:
            problems = ["set aside"]
        assert problems
