"""The wall clock is set forward and back under a running relay: nothing is lost, given up, or tried in a rush."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bed import relay as relay_bed
from tests.bed.fixtures import MakeRelay
from tests.bed.next_hop import Hold, NextHop, Say, Step
from tests.bed.waiting import wait_for
from tests.bed.wire import letter

# libfaketime would be nearer to the kernel, but under it time.sleep() fails with EINVAL once its clock has jumped.
SEAM = """
import os, time

def offset():
    with open(os.environ["TEST_CLOCK"]) as file:
        return float(file.read() or 0)

real, real_ns, local, utc = time.time, time.time_ns, time.localtime, time.gmtime
time.time = lambda: real() + offset()
time.time_ns = lambda: real_ns() + int(offset() * 1e9)
time.localtime = lambda seconds=None: local(time.time() if seconds is None else seconds)
time.gmtime = lambda seconds=None: utc(time.time() if seconds is None else seconds)
"""
DAY = 86400


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the wall clock of relays started from now on, in days from today. Monotonic and boot clock go on."""
    (tmp_path / "sitecustomize.py").write_text(SEAM)
    file = tmp_path / "clock"
    file.write_text("0")
    environment = relay_bed._environment()
    environment |= {"PYTHONPATH": f"{tmp_path}:{relay_bed.ROOT}", "TEST_CLOCK": str(file)}
    monkeypatch.setattr(relay_bed, "_environment", lambda: environment)

    def set_to(days: int) -> None:
        new = file.with_suffix(".new")
        new.write_text(str(days * DAY))
        new.rename(file)

    return set_to


def test_a_clock_that_jumps_costs_no_mail_and_no_date(
    clock: Callable[[int], None], make_relay: MakeRelay, next_hop: NextHop
) -> None:
    next_hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"), only="<user")
    hold = next_hop.on(Step.FINAL, Hold(), only="").hold
    config = {"queue": {"retry_s": [1.0], "expire_after_s": 3600}, "delivery": {"express": False}}
    relay = make_relay(next_hop, config=config)

    def send(to: str) -> str:
        with relay.client() as client:
            reply = client.open().deliver("sender@example.net", to, letter())
        assert reply.code == 250
        return reply.text.split()[-1]

    waiting, in_flight = send("user@example.com"), send("bob@example.com")
    next_hop.wait_until(lambda hop: hop.said("DATA"), "DATA")
    clock(10)
    seen = len(relay.wait_for_log(f"{waiting}: to=.*status=deferred"))
    relay.wait_for_log(rf"{waiting}: to=.* delay=86\d{{4}}\.", 1)
    relay.wait_for_log(f"{waiting}: to=.*status=deferred", seen + 2)
    clock(-10)
    relay.wait_for_log(f"{waiting}: to=.*status=deferred", seen + 4)
    hold.release()
    relay.wait_for_log(f"{in_flight}: removed")
    assert not relay.grep("status=expired|lease_lost|possible duplicate")
    attempts = len(relay.grep(f"{waiting}: to=.*status=deferred"))
    assert relay.stop() == 0
    clock(30)
    relay.start(build=False)
    relay.wait_for_log(f"{waiting}: to=.*status=deferred", attempts + 1)
    next_hop.behave()
    relay.wait_for_log(f"{waiting}: removed")
    wait_for(lambda: len(next_hop.accepted) == 2, "both messages")
    assert not relay.grep("status=expired|lease_lost")
