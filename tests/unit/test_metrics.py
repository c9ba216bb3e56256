from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram, values

from relay.mail import reply
from relay.telemetry import catalogue, valuefiles
from relay.telemetry.metrics import NAME_SETS, REPLY_SETS, SECONDS, SMALL_SETS, Metrics
from relay.telemetry.valuefiles import FILE_OCTETS, merged, observe_in_bulk, readable

Sample = dict[tuple[str, tuple[tuple[str, str], ...]], float]
MakeMember = Callable[[str], Metrics]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "metrics"
    valuefiles.empty(folder)
    return folder


@pytest.fixture
def member(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeMember]:
    """Makes members of one tree; the library's globals are put back afterwards."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    made: list[Metrics] = []

    def make(identifier: str) -> Metrics:
        made.append(Metrics(folder, identifier, clock=lambda: 1000.0))
        return made[-1]

    yield make
    for metrics in made:
        metrics.close()


def scrape(folder: Path) -> Sample:
    files, unreadable = readable(folder)
    assert unreadable == 0
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in merged(files)
        for sample in metric.samples
    }


def value(folder: Path, name: str, **labels: str) -> float | None:
    return scrape(folder).get((name, tuple(sorted(labels.items()))))


def test_what_two_workers_count_adds_up_on_one_page(folder: Path, member: MakeMember) -> None:
    first, second = member("worker-0"), member("worker-1")
    first.replied(reply.OK_MAIL)
    first.replied(reply.OK_MAIL, 2)
    second.replies[reply.OK_MAIL] += 4
    first.received("mx", 1000)
    second.received("mx", 24)
    for metrics in (first, second):
        metrics.flush()
    assert value(folder, "relay_replies_total", code="250", enhanced="2.1.0", reason="mail_ok") == 7
    assert value(folder, "relay_received_messages_total", listener="mx") == 2
    assert value(folder, "relay_received_bytes_total", listener="mx") == 1024


def test_flushing_twice_counts_once(folder: Path, member: MakeMember) -> None:
    metrics = member("worker-0")
    metrics.late()
    metrics.flush()
    metrics.flush()
    assert value(folder, "relay_late_answers_total") == 1


def test_a_replaced_worker_goes_on_counting_but_its_open_sessions_are_gone(folder: Path, member: MakeMember) -> None:
    killed = member("worker-0")
    killed.session_opened("mx")
    killed.session_opened("mx")
    killed.next_hop_state("exchange:25", "down")
    killed.flush()
    assert value(folder, "relay_open_sessions", listener="mx") == 2

    replacement = member("worker-0")
    replacement.session_opened("mx")
    replacement.flush()
    assert value(folder, "relay_sessions_total", listener="mx") == 3
    assert value(folder, "relay_open_sessions", listener="mx") == 1
    assert value(folder, "relay_next_hop_state", next_hop="exchange:25", state="down") is None


def test_a_retired_member_leaves_its_counters_and_takes_its_gauges(folder: Path, member: MakeMember) -> None:
    metrics = member("worker-0")
    metrics.session_opened("mx")
    metrics.close()
    valuefiles.retire(folder, "worker-0")
    assert value(folder, "relay_sessions_total", listener="mx") == 1
    assert value(folder, "relay_open_sessions", listener="mx") is None


def test_closed_sessions_leave_the_gauge(folder: Path, member: MakeMember) -> None:
    metrics = member("worker-0")
    metrics.session_opened("mx")
    metrics.session_closed("mx")
    metrics.flush()
    assert value(folder, "relay_open_sessions", listener="mx") == 0


def test_replies_a_next_hop_makes_up_share_series_by_codes(folder: Path, member: MakeMember) -> None:
    metrics = member("worker-0")
    metrics.replied(reply.from_next_hop(450, "4.2.1"))
    metrics.replied(reply.from_next_hop(450, "4.2.1"))
    metrics.flush()
    assert value(folder, "relay_replies_total", code="450", enhanced="4.2.1", reason="next_hop") == 2


def test_label_sets_are_bounded_over_all_processes_of_a_slot(folder: Path, member: MakeMember) -> None:
    def reply_with(number: int) -> reply.Kind:
        return reply.from_next_hop(450, f"4.{number // 1000}.{number % 1000}")

    for start in (0, REPLY_SETS):  # the second process of the slot meets other codes than the first
        metrics = member("worker-0")
        for number in range(start, start + REPLY_SETS + 10):
            metrics.replied(reply_with(number))
        metrics.close()
    replies = {labels: count for (name, labels), count in scrape(folder).items() if name == "relay_replies_total"}
    assert len(replies) == REPLY_SETS + 1
    assert sum(replies.values()) == 2 * (REPLY_SETS + 10)
    assert value(folder, "relay_replies_total", code="other", enhanced="other", reason="other") == REPLY_SETS + 20


def test_all_label_sets_at_their_bounds_fit_the_files_as_they_were_allocated(folder: Path, member: MakeMember) -> None:
    """A file that grows has holes, and a hole on a full disk is a SIGBUS."""
    metrics = member("worker-0")
    for number in range(REPLY_SETS + 1):
        metrics.replied(reply.Kind(450, f"4.{number % 999}.{number % 998}", "x", f"{number:0>80}"))
    for number in range(NAME_SETS + 1):
        name = f"{number:x>80}"
        metrics.session_opened(name)
        metrics.received(name, 1)
        metrics.sent(name, 1)
        for outcome in ("delivered", "deferred", "bounced", "our_fault"):
            metrics.delivery(name, outcome)
        metrics.delivery_seconds(name, 1.0)
        metrics.next_hop_state(name, "up")
        metrics.next_hop_connections(name, 1)
    for number in range(SMALL_SETS + 1):
        metrics.queued(f"{number:x>80}")
        metrics.shadow(reply.Kind(450, "4.0.0", "x", f"{number:0>80}"))
        metrics.restarted("worker", f"{number:x>80}")
    metrics.snapshot_in_use(1)
    metrics.flush()
    assert {path.name.removesuffix("_worker-0.db"): path.stat().st_size for path in folder.iterdir()} == FILE_OCTETS


def test_a_label_cannot_carry_line_ends_or_quotes(folder: Path, member: MakeMember) -> None:
    metrics = member("worker-0")
    metrics.sent('x"\n y\\é', 1)
    metrics.flush()
    assert value(folder, "relay_sent_messages_total", next_hop="x???y??") == 1


def test_next_hop_state_tells_how_many_workers_see_it_so(folder: Path, member: MakeMember) -> None:
    first, second = member("worker-0"), member("worker-1")
    first.next_hop_state("exchange:25", "down")
    second.next_hop_state("exchange:25", "up")
    first.flush()
    second.flush()
    second.next_hop_state("exchange:25", "misconfigured")
    second.flush()
    states = {state: value(folder, "relay_next_hop_state", next_hop="exchange:25", state=state) for state in
              ("up", "down", "misconfigured")}  # fmt: skip
    assert states == {"up": 0, "down": 1, "misconfigured": 1}


def test_the_oldest_generation_in_use_counts_and_members_without_a_snapshot_do_not(
    folder: Path, member: MakeMember
) -> None:
    first, second = member("worker-0"), member("worker-1")
    member("web").flush()
    first.snapshot_in_use(7)
    second.snapshot_in_use(8)
    assert value(folder, "relay_snapshot_generation_in_use") == 7


def test_every_loop_that_turns_says_when_and_the_supervisor_does_not(folder: Path, member: MakeMember) -> None:
    for identifier in ("worker-0", "supervisor"):
        member(identifier).flush()
    assert value(folder, "relay_member_alive_timestamp_seconds", member="worker-0") == 1000.0
    assert value(folder, "relay_member_alive_timestamp_seconds", member="supervisor") is None


def test_every_metric_of_the_members_is_fed_by_a_method(folder: Path, member: MakeMember) -> None:
    metrics = member("worker-0")
    metrics.replied(reply.OK_MAIL)
    metrics.session_opened("mx")
    metrics.received("mx", 1)
    metrics.accepted(0.01)
    metrics.login("PLAIN", "ok")
    metrics.shadow(reply.UNKNOWN_RECIPIENT)
    metrics.headers_removed(2)
    metrics.express()
    metrics.queued("no_slot")
    metrics.late()
    metrics.possible_duplicate(3)
    metrics.sent("exchange:25", 1)
    metrics.delivery("exchange:25", "delivered")
    metrics.delivery_seconds("exchange:25", 0.02)
    metrics.next_hop_state("exchange:25", "up")
    metrics.next_hop_connections("exchange:25", 4)
    metrics.snapshot_in_use(1)
    metrics.snapshot_refused()
    metrics.callout("valid")
    metrics.callouts_off(1)
    metrics.log_lines_lost(5)
    metrics.restarted("worker", "signal")
    metrics.flush()
    page = merged(readable(folder)[0])
    assert {(metric.name, metric.type) for metric in page} == {
        (family.name, family.type) for family in catalogue.MEMBERS
    }
    assert value(folder, "relay_possible_duplicates_total") == 3
    assert value(folder, "relay_log_lines_lost_total") == 5
    assert value(folder, "relay_accepted_total", way="express", reason="express") == 1
    assert value(folder, "relay_accepted_total", way="queue", reason="no_slot") == 1
    assert value(folder, "relay_accept_seconds_bucket", le="0.01") == 1
    assert value(folder, "relay_delivery_seconds_count", next_hop="exchange:25") == 1


@given(st.lists(st.one_of(st.sampled_from(SECONDS), st.floats(min_value=0, max_value=1000)), max_size=50))
def test_observing_in_bulk_is_what_the_library_does_one_by_one(durations: list[float]) -> None:
    from relay.telemetry.metrics import _Timing

    one_by_one = Histogram("one", "", registry=None, buckets=SECONDS)
    in_bulk = Histogram("bulk", "", registry=None, buckets=SECONDS)
    timing = _Timing()
    for seconds in durations:
        one_by_one.observe(seconds)
        timing.add(seconds)
    observe_in_bulk(in_bulk, timing.counts, timing.total)

    def samples(histogram: Histogram) -> list[tuple[str, dict[str, str], float]]:
        return [
            (sample.name.partition("_")[2], sample.labels, sample.value)
            for metric in histogram.collect()
            for sample in metric.samples
            if not sample.name.endswith("_created")
        ]

    assert samples(in_bulk) == samples(one_by_one)


def test_without_its_folder_a_member_counts_on_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    metrics = Metrics(tmp_path / "nowhere", "worker-0")
    assert isinstance(metrics.problem, FileNotFoundError)
    metrics.session_opened("mx")
    metrics.accepted(0.1)
    metrics.close()


FULL_DISK = """
import sys
from pathlib import Path
from relay.mail import reply
from relay.telemetry import valuefiles
from relay.telemetry.metrics import Metrics

disk = Path(sys.argv[1])
valuefiles.empty(disk / "metrics")
early = Metrics(disk / "metrics", "worker-0")
try:
    with (disk / "filling").open("wb", buffering=0) as filling:
        while filling.write(bytes(4096)):
            pass
except OSError:
    pass
for number in range(300):
    early.replied(reply.from_next_hop(450, f"4.{number}.0"))
    early.sent(str(number), 1)
    early.delivery_seconds(str(number), 1.0)
early.flush()
late = Metrics(disk / "metrics", "worker-1")
late.replied(reply.OK_MAIL)
late.flush()
print(early.problem, late.problem.strerror, sep=", ")
"""


@pytest.mark.needs("root")
def test_on_a_full_disk_members_count_on(tmp_path: Path) -> None:
    """A value written into a hole of a mapped file would end the process with SIGBUS."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(disk)], check=True, stdout=subprocess.PIPE, text=True
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.stdout == "None, No space left on device\n"


def test_value_files_are_readable_for_the_group_whatever_the_umask(folder: Path, member: MakeMember) -> None:
    """Web reads the files of the hub, which runs as another user."""
    before = os.umask(0o077)
    try:
        member("hub")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {valuefiles.FILE_MODE}


def test_a_damaged_file_is_left_out_and_counted(folder: Path, member: MakeMember) -> None:
    member("worker-0").flush()
    (folder / "counter_worker-1.db").write_bytes(b"\xff" * 64)
    (folder / "counter_worker-2.db").write_bytes(b"")
    files, unreadable = readable(folder)
    assert unreadable == 2
    assert len(files) == len(FILE_OCTETS)


def test_a_member_whose_own_file_is_damaged_starts_a_new_one(folder: Path, member: MakeMember) -> None:
    (folder / "counter_worker-0.db").write_bytes(b"\xff" * 4096)
    metrics = member("worker-0")
    metrics.late()
    metrics.flush()
    assert value(folder, "relay_late_answers_total") == 1


def test_emptying_the_folder_forgets_the_earlier_run(folder: Path, member: MakeMember) -> None:
    metrics = member("worker-0")
    metrics.late()
    metrics.close()
    (folder / "counter_worker-1.new").touch()
    valuefiles.empty(folder)
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o7777 == valuefiles.FOLDER_MODE


@pytest.mark.parametrize("identifier", ["", "worker_0", "../worker-0"])
def test_a_name_that_the_library_would_misread_is_refused(folder: Path, identifier: str) -> None:
    with pytest.raises(ValueError, match="cannot name value files"):
        Metrics(folder, identifier)


def test_the_documentation_lists_every_metric_with_its_type_and_labels_and_no_other() -> None:
    text = Path("docs/metrics.md").read_text("utf-8")
    documented = {
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(r"^\| `(relay_\w+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE)
    }
    families = (*catalogue.MEMBERS, *catalogue.SCRAPED)
    assert documented == {(family.scraped, family.type, family.labels) for family in families}
