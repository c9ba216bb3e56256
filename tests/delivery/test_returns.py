"""Mail that waited for a next hop alone goes when that is back, whatever its own date; other mail keeps its date."""

from __future__ import annotations

from tests.bed.next_hop import Say, Step
from tests.delivery.conftest import Bed, MakeBed, Spot

HOUR = {"retry_s": [3600]}


def parked(bed: Bed, spot: Spot, ids: list[str]) -> None:
    """Wait until these wait for the next hop."""
    for each in ids:
        message = bed.wait_for_queued(each, lambda found: found["waits_for"] and not found["owner"])
        assert message["waits_for"] == spot.name


def test_after_an_outage_mail_goes_at_once_and_not_at_its_own_date(make_bed: MakeBed, way: str) -> None:
    bed = make_bed(2, queue=HOUR, delivery={"express": way == "express"})
    spot, other = bed.spot(), bed.spot()
    other.hop.on(Step.RCPT, Say("450 4.2.1 mailbox busy"), times=1)
    spot.hop.stop()
    sent = [spot.send(spot.to(f"u{number}")).id for number in range(6)]
    parked(bed, spot, sent)
    busy = other.send().id
    other.wait_for_result(busy, "deferred")
    assert other.send().code == 250
    other.taken(1)
    spot.hop.start()
    spot.taken(6)
    for each in sent:
        bed.wait_until_gone(each)
    assert bed.wait_for_queued(busy, lambda found: not found["owner"])["waits_for"] == "", "it was the mailbox's turn"


def test_after_a_start_what_was_parked_before_goes_as_soon_as_the_next_hop_is_there(make_bed: MakeBed) -> None:
    bed = make_bed(1, queue=HOUR)
    spot = bed.spot()
    spot.hop.stop()
    sent = [spot.send(spot.to(f"u{number}")).id for number in range(3)]
    parked(bed, spot, sent)
    assert bed.relay.stop() == 0
    spot.hop.start()
    bed.relay.start(build=False)
    spot.taken(3)


def test_with_two_next_hops_away_the_one_that_is_back_first_gets_what_waited(make_bed: MakeBed) -> None:
    bed = make_bed(1, second=True, queue=HOUR)
    spot = bed.spot()
    assert spot.second is not None
    spot.hop.stop()
    spot.second.stop()
    sent = [spot.send(spot.to(f"u{number}")).id for number in range(4)]
    for each in sent:
        bed.wait_for_queued(each, lambda found: found["waits_for"] and not found["owner"])
    spot.second.start()
    spot.second.wait_for_accepted(4)


def test_mail_whose_route_was_changed_meanwhile_waits_for_the_old_next_hop_no_longer(make_bed: MakeBed) -> None:
    bed = make_bed(1, queue=HOUR)
    spot = bed.spot()
    spot.hop.stop()
    parked(bed, spot, [spot.send().id])
    bed.relay.configure({"route": [{"domains": ["*"], "next_hops": [bed.outside.route]}]})
    assert bed.relay.command("reload").returncode == 0
    bed.outside.wait_for_accepted(1)
