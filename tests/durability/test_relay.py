"""The whole relay syncs before it says 250, and loses nothing when the power goes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relay.mail.content import MEMORY_OCTETS
from tests.bed.fixtures import MakeNextHop, MakeRelay
from tests.bed.next_hop import Hold, NextHop, Say, Step
from tests.bed.relay import children_of
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter
from tests.durability.dialogue import answers
from tests.durability.driver import TUNING
from tests.durability.load import LARGE, QUEUED, REPORT, Run, in_front_of, next_hops, reported_in, traced_run
from tests.durability.power import Disk, dice, reopened
from tests.durability.proof import Acknowledgement, acknowledgements, proofs, unproved
from tests.durability.trace import CALLS, HEARS, SYNCS, WRITES, attached, read, strace

pytestmark = pytest.mark.needs("strace", "root")  # strace on a process that runs already

ROOT = Path(__file__).parents[2]
CUTS = 200
TORN_CUTS = 60
RELAY_CUTS = 3
TAKE_OVER_CUTS = 40
END = 1 << 60  # a line behind all others


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
    assert len({each.thread for each in run.calls if re.search("-wal$|/intake-", each.path)}) > 1, "both workers wrote"
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
    assert run.lost(END, found) == []
    return found


@pytest.mark.parametrize(
    ("missing", "problem", "large_only"),
    [
        ("-wal|/intake-", "the log was not synced between its", False),
        ("/bodies$", "the folder was not synced between the link of", True),
        (r"\(deleted\)$", "was not synced between its last octet and its row", True),
    ],
)
def test_the_proof_fails_on_a_trace_that_lacks_a_sync(run, missing, problem, large_only):
    kept = [c for c in run.calls if not (c.name in SYNCS and re.search(missing, c.path))]
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


def after_each_cut(run, cuts, chance):
    """The disk at so many moments after the first 250, and the line of each."""
    return some_moments(run.spool, run.before, run.calls, run.moments(), cuts, chance)


def some_moments(spool, before, calls, lines, cuts, chance):
    numbers = [n for n, line in enumerate(Disk.of(spool, before).watch(calls)) if line in lines]
    wanted = set(chance.sample(numbers, cuts))
    disk = Disk.of(spool, before)
    for number, line in enumerate(disk.watch(calls)):
        if number in wanted:
            yield disk, line


@pytest.mark.parametrize(("cuts", "torn"), [(CUTS, False), (TORN_CUTS, True)], ids=["synced-only", "torn"])
def test_after_a_power_cut_every_acknowledged_message_is_there_whole(run, fast_folder, cuts, torn):
    chance = dice()
    checked = 0
    for disk, line in after_each_cut(run, cuts, chance):
        folder = fast_folder / "spool"
        disk.write_to(folder, chance if torn else None)
        assert run.lost(line, reopened(folder, "after-the-cut", TUNING)) == [], f"cut after line {line + 1}"
        shutil.rmtree(folder)
        checked += 1
    assert checked == cuts


def test_a_power_cut_while_the_queue_is_taken_over_loses_nothing_either(run, tmp_path, fast_folder):
    spool = tmp_path / "spool"
    disk = Disk.of(run.spool, run.before)
    for _ in disk.watch(run.calls):
        pass
    disk.write_to(spool)
    shutil.copytree(spool, tmp_path / "before")
    program = "import sys; from pathlib import Path; from relay.queue.prepare import prepare; "
    program += "from tests.durability.driver import TUNING; prepare(Path(sys.argv[1]), boot='next', tuning=TUNING)"
    subprocess.run(strace(tmp_path / "trace", [sys.executable, "-c", program, spool]), cwd=ROOT, check=True)
    calls = read(tmp_path / "trace")
    lines = {line for each in calls if each.path.startswith(str(spool)) for line in (each.begin, each.end)}
    for disk, line in some_moments(spool, tmp_path / "before", calls, lines, TAKE_OVER_CUTS, dice()):
        folder = fast_folder / "spool"
        disk.write_to(folder)
        assert run.lost(END, reopened(folder, "after-the-cut", TUNING)) == [], f"cut after line {line + 1}"
        shutil.rmtree(folder)


@pytest.mark.parametrize("missing", ["-wal$|/intake-", r"\(deleted\)$"], ids=["logs", "bodies"])
def test_the_model_does_lose_what_was_not_synced(run, fast_folder, missing):
    kept = [c for c in run.calls if not (c.name in SYNCS and re.search(missing, c.path))]
    # Behind the last worker's copying of the log into the database the log no longer matters. And now and then nobody is
    # owed anything: a cut at such a moment loses nothing, whatever was synced.
    copied = min(c.begin for c in run.calls if c.path.endswith("queue.db") and c.name in WRITES)
    moments = [each for each in sorted(run.moments()) if each < copied and run.lost(each, {})]
    lost = {}
    for moment in moments[len(moments) // 8 :: len(moments) // 8]:
        disk = Disk.of(run.spool, run.before)
        for line in disk.watch(kept):
            if line > moment:
                break
        folder = fast_folder / str(moment)
        disk.write_to(folder)
        problems = run.lost(moment, reopened(folder, "after-the-cut", TUNING, broken=[]))
        lost[moment] = [each for each in problems if "neither message nor report" in each]
        shutil.rmtree(folder)
    assert any(lost.values())
    if "wal" in missing:
        assert all(lost.values()), lost


def test_the_relay_itself_delivers_after_a_power_cut_what_was_acknowledged(run, fast_folder):
    for number, (disk, line) in enumerate(after_each_cut(run, RELAY_CUTS, dice())):
        folder = fast_folder / str(number)
        folder.mkdir()
        with next_hops() as (hop, outside), in_front_of(folder, hop, outside) as relay:
            disk.write_to(relay.spool)
            relay.start()
            wait_for_all(run, line, hop, outside)
            assert relay.stop() == 0
        for each in hop.accepted:
            for recipient in each.recipients:
                [sent] = [one for one in run.letters.values() if recipient in one.recipients]
                assert after_trace(each.message) == sent.octets


def wait_for_all(run, line, hop, outside):
    """Until everybody has a message or a report who is owed one."""
    owed = run.owed(line)
    silent = {recipient for recipient in run.may_be_reported(line) & set(owed) if not owed[recipient].sender}
    wanted = set(owed) - silent - run.reported(line)

    def missing():
        by_mail = {recipient for each in hop.accepted for recipient in each.recipients}
        return wanted - by_mail - reported_in(each.wire for each in outside.accepted)

    wait_for(lambda: not missing(), lambda: f"message for {missing()} after a cut after line {line + 1}")


# --- express: 250 with something on the disk ---------------------------------------------------------------------------


def test_in_express_too_what_is_left_over_late_or_reported_is_synced_before_its_250(
    make_relay: MakeRelay, next_hop: NextHop, make_next_hop: MakeNextHop, tmp_path: Path
):
    outside = make_next_hop()
    recipients = [f"{name}@example.com" for name in ("user", "greylisted", "refused", "late")]
    never = {"delivery": {"express": True, "express_deadline_s": 60.0}}
    relay = make_relay(next_hop, default_next_hop=outside, recipients=recipients, config=never)
    next_hop.on(Step.RCPT, Say("450 4.2.1 later"), only="<greylisted")
    next_hop.on(Step.RCPT, Say("550 5.1.1 no such user"), only="<refused")
    told: dict[str, list[str]] = {}
    processes = [relay.supervisor, *children_of(relay.supervisor)]
    with attached(processes, tmp_path / "trace", calls=f"{CALLS},{HEARS}") as threads:
        with relay.client() as client:
            client.open()
            for octets in (letter("small"), LARGE):
                for others in ([], ["greylisted"], ["refused"]):
                    to = [f"{name}@example.com" for name in ["user", *others]]
                    reply = client.deliver(f"{len(octets)}{''.join(others)}@example.net", to, octets)
                    told.setdefault("".join(others), []).append(reply.text)
            next_hop.behave()
            next_hop.wait_for_accepted(8)
            relay.configure({"delivery": {"express_deadline_s": 0.2}})
            assert relay.command("reload").returncode == 0
            relay.wait_for_log(r"\breloaded\b", 1)
            hold = next_hop.on(Step.FINAL, Hold()).hold
            for octets in (letter("small"), LARGE):
                told.setdefault("late", []).append(client.deliver("s@example.net", "late@example.com", octets).text)
            hold.release()
        outside.wait_for_accepted(2)
        assert relay.stop() == 0
    words = {what: {text.rpartition(" ")[0] for text in texts} for what, texts in told.items()}
    queued, delivered = {"2.0.0 Ok: queued as"}, {"2.0.0 Ok: delivered as"}
    assert words == {"": delivered, "greylisted": queued, "refused": delivered, "late": queued}
    calls = read(tmp_path / "trace", threads)
    at = {each.id: each.line for each in acknowledgements(calls, rb"250 2\.0\.0 Ok: (?:queued|delivered) as (\w+)\r\n")}
    ids = {what: [text.split()[-1].encode() for text in texts] for what, texts in told.items()}
    rows = [Acknowledgement(at[name], name) for what in ("greylisted", "late") for name in ids[what]]
    reports = [Acknowledgement(at[name], REPORT.encode() + name) for name in ids["refused"]]
    assert unproved(calls, relay.spool, rows + reports) == []
    assert sum("the body: synced" in dict(proof.steps) for proof in proofs(calls, relay.spool, rows)) == 2
    heard = answers(calls)
    for others in ("", "refused"):
        for name, octets in zip(ids[others], (letter("small"), LARGE), strict=True):
            known = {
                each.recipient: each.code
                for each in heard
                if each.line < at[name] and each.sender == f"{len(octets)}{others}@example.net"
            }
            assert known == {"user@example.com": 250, **({"refused@example.com": 550} if others else {})}
    on_nothing = [Acknowledgement(at[name], name) for name in ids[""]]
    assert len(unproved(calls, relay.spool, on_nothing)) == 2, "what the next hop has needs no disk"
    without = [c for c in calls if not (c.name in SYNCS and c.path.endswith("-wal"))]
    assert len(unproved(without, relay.spool, rows + reports)) == 6
