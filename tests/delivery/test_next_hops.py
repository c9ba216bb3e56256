"""Next hops that are down, slow to come back, few in connections, or particular about TLS; and when mail is tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.bed.certificates import Authority
from tests.bed.client import Client
from tests.bed.next_hop import Drop, Hold, Say, Step
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter
from tests.delivery.conftest import Bed, MakeBed, Spot

SPOTS = 12


# --- down and up -------------------------------------------------------------------------------------------------


def test_mail_for_a_next_hop_that_is_down_is_queued_at_once_and_flows_when_it_is_back(bed: Bed, way: str) -> None:
    spot = bed.spot()
    spot.hop.stop()
    first = [spot.send() for _ in range(3)]
    [down] = spot.relay.wait_for_log(rf"error: next_hop_down next_hop={spot.name} ")
    assert 'stage=connect code=0 cause="Connection refused"' in down
    later = [spot.send() for _ in range(3)]
    sent = [*first, *later]
    assert all(one.queued for one in sent)
    for one in later:
        spot.relay.wait_for_log(rf"{one.id}: queued, reason={'down' if way == 'express' else 'durable'}")
    spot.metric("relay_next_hop_state", 1, state="down")
    waiting = bed.wait_for_queued(sent[-1].id, lambda message: message["recipients"][0]["attempts"])
    [recipient] = waiting["recipients"]
    assert (recipient["last_code"], recipient["last_text"]) == (0, "Connection refused")
    assert recipient["last_host"] == spot.name

    spot.hop.start()
    for one in sent:
        spot.delivered(one.id)
    assert sorted(after_trace(one.message) for one in spot.taken(6)) == [letter()] * 6
    assert len(spot.relay.wait_for_log(rf"next_hop_up next_hop={spot.name}$")) == 1
    spot.metric("relay_next_hop_state", 1, state="up")
    assert len(spot.relay.grep(rf"next_hop_down next_hop={spot.name} ")) == 1
    if way == "express":
        assert spot.send().delivered


def test_a_next_hop_without_mail_is_found_to_be_back(bed: Bed) -> None:
    """The probe is the relay's own: a status that needed mail to change would alarm for nothing all night."""
    spot = bed.spot()
    rule = spot.hop.on(Step.RCPT, Say("550 5.1.1 no"))
    spot.hop.on(Step.BANNER, Drop())
    sent = spot.send(sender="")
    spot.relay.wait_for_log(rf"error: next_hop_down next_hop={spot.name} ")
    spot.hop.behave()
    spot.relay.wait_for_log(rf"next_hop_up next_hop={spot.name}$")
    spot.metric("relay_next_hop_state", 1, state="up")
    spot.bed.wait_until_gone(sent.id)
    assert rule.used == 0


def test_clients_never_wait_for_a_next_hop_that_is_down_and_hangs(make_bed: MakeBed) -> None:
    """Neither the first probe nor any later one is a client's."""
    bed = make_bed(1, delivery={"failures": 1, "connect_timeout_s": 1.0, "express_deadline_s": 0.3})
    spot = bed.spot()
    rule = spot.hop.on(Step.BANNER, Hold())
    first = spot.send()
    spot.relay.wait_for_log(f"{first.id}: queued, reason=slow")
    spot.relay.wait_for_log(rf"error: next_hop_down next_hop={spot.name} ")
    sent = [first]
    while rule.used < 4:
        sent.append(spot.send())
        spot.relay.wait_for_log(f"{sent[-1].id}: queued, reason=down")
    spot.hop.behave()
    for one in sent:
        spot.delivered(one.id)
    spot.taken(len(sent))


# --- how many connections ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(_module_beds: MakeBed) -> Callable[[str], Bed]:
    made: dict[str, Bed] = {}

    def get(way: str) -> Bed:
        if way not in made:
            made[way] = _module_beds(2, server={"workers": 2}, delivery={"express": way == "express", "concurrency": 4})
        return made[way]

    return get


def deliver_together(spot: Spot, clients: int, each: int) -> None:
    """That many clients at once, with ``each`` messages on one connection; all must hear 250."""
    replies: list[int] = []

    def work() -> None:
        with spot.relay.client(timeout=60) as client:
            client.open()
            replies.extend(one_after_another(client, spot, each))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [250] * (clients * each)


def one_after_another(client: Client, spot: Spot, count: int) -> list[int]:
    return [client.deliver(spot.sender, [spot.to()], letter()).code for _ in range(count)]


def test_two_workers_together_keep_the_limit_of_connections(narrow: Callable[[str], Bed], way: str) -> None:
    bed = narrow(way)
    busy, back = bed.spot(), bed.spot()
    deliver_together(busy, 10, 5)
    busy.hop.wait_for_accepted(50)
    assert 2 <= busy.hop.most_at_once <= 4
    assert busy.hop.sessions <= 4, "connections are not used again"

    back.hop.stop()
    for _ in range(20):
        assert back.send().queued
    back.hop.start()
    back.hop.wait_for_accepted(20)
    wait_for(lambda: not bed.queue(), lambda: f"an empty queue; {bed.queue()}")
    assert back.hop.most_at_once <= 4
    busy.taken(50)
    back.taken(20)


def test_messages_of_all_clients_share_a_connection_that_ends_with_quit(make_bed: MakeBed, way: str) -> None:
    bed = make_bed(2, delivery={"express": way == "express", "idle_s": 1.5, "reuse_s": 300.0})
    idle, old = bed.spot(), bed.spot()
    for _ in range(10):
        sent = idle.send()
        idle.wait_for_result(sent.id, "sent")
    idle.hop.wait_until(lambda hop: hop.said("QUIT"), "QUIT after being idle")
    assert idle.hop.sessions == 1 or len(idle.hop.said("QUIT")) == idle.hop.sessions
    idle.taken(10)
    bed.relay.configure({"delivery": {"idle_s": 300.0, "reuse_s": 1.0}})
    assert bed.relay.command("reload").returncode == 0
    bed.relay.wait_for_log("reloaded")
    sent = old.send()
    old.wait_for_result(sent.id, "sent")
    old.hop.wait_until(lambda hop: hop.said("QUIT"), "QUIT after reuse_s")
    wait_for(lambda: set(bed.by_next_hop("relay_next_hop_connections").values()) == {0.0}, "end of all connections")


def test_a_next_hop_that_takes_few_connections_gets_all_mail_over_these(bed: Bed) -> None:
    """Exchange answers 421 4.3.2 to the connections above its limit per source; that is no outage."""
    spot = bed.spot()
    hold = spot.hop.on(Step.FINAL, Hold(), times=2).hold
    clients = [threading.Thread(target=spot.send) for _ in range(2)]
    for client in clients:
        client.start()
    spot.hop.wait_until(lambda hop: len(hop.said("DATA")) == 2, "two messages under way")
    refusals = spot.hop.on(Step.BANNER, Say("421 4.3.2 The maximum number of concurrent connections"), Drop())
    sent = []
    more = [threading.Thread(target=lambda: sent.append(spot.send())) for _ in range(6)]
    for client in more:
        client.start()
    spot.hop.wait_until(lambda _: refusals.used >= 1, "a connection too many")
    hold.release()
    for client in [*clients, *more]:
        client.join()
    assert [one.code for one in sent] == [250] * 6
    spot.hop.wait_for_accepted(8)
    wait_for(lambda: not bed.queue(), lambda: f"an empty queue; {bed.queue()}")
    spot.taken(8)
    assert not spot.relay.grep(rf"relay={spot.name}, .*status=deferred")
    assert not spot.relay.grep(rf"next_hop_down next_hop={spot.name} ")


# --- when mail is tried again ------------------------------------------------------------------------------------


def test_retries_follow_the_waits_configured_one_after_the_other(make_bed: MakeBed, way: str) -> None:
    bed = make_bed(2, delivery={"express": way == "express"}, queue={"retry_s": [0.3, 0.3, 500.0]})
    spot, down = bed.spot(), bed.spot()
    rule = spot.hop.on(Step.RCPT, Say("450 4.2.1 later"))
    down.hop.stop()
    start = time.time()
    sent, other = spot.send(spot.to("a"), spot.to("b")), down.send()
    for queue_id in (sent.id, other.id):
        waiting = bed.wait_for_queued(queue_id, lambda message: message["recipients"][0]["attempts"] == 3)
        dues = {recipient["due"] for recipient in waiting["recipients"]}
        assert max(dues) - min(dues) < 0.001, "recipients that failed together are due together"
        assert start + 0.6 + 500 <= min(dues) + 0.01
        assert max(dues) <= time.time() + 500
    assert rule.used == 6


def test_waits_vary_within_the_jitter_and_recipients_of_a_message_stay_together(make_bed: MakeBed) -> None:
    bed = make_bed(1, queue={"retry_s": [100.0], "retry_jitter": 0.5})
    spot = bed.spot()
    spot.hop.on(Step.RCPT, Say("450 4.2.1 later"))
    start = time.time()
    sent = [spot.send(*(spot.to(name) for name in "abc")) for _ in range(8)]
    end = time.time()
    queue = bed.queue()
    dues = [[recipient["due"] for recipient in queue[one.id]["recipients"]] for one in sent]
    assert all(max(those) - min(those) < 0.001 for those in dues)
    assert all(start + 50 <= those[0] + 0.01 and those[0] <= end + 150.01 for those in dues)
    assert len({round(those[0] - start) for those in dues}) > 1


# --- TLS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions", [(), (Say("454 4.7.0 TLS not available"),), (Say("220 go"), Drop()), (Drop(),)])
def test_tls_is_used_where_it_works_and_mail_goes_on_without_where_it_does_not(
    spot: Spot, authority: Authority, way: str, actions: tuple[Say | Drop, ...]
) -> None:
    spot.hop.certificate = authority.server_of_a_stranger()
    if actions:
        spot.hop.on(Step.STARTTLS, *actions)
    sent = [spot.send() for _ in range(2)]
    assert all(one.delivered if way == "express" else one.queued for one in sent)
    for one in sent:
        spot.delivered(one.id)
        assert not spot.relay.grep(f"{one.id}: .*status=deferred")
    assert [one.tls for one in spot.taken(2)] == [not actions] * 2
    alarms = spot.relay.grep(rf"error: next_hop_tls_failed next_hop={spot.name} ")
    assert len(alarms) == bool(actions)


def test_verified_tls_keeps_mail_back_until_the_certificate_is_good(
    make_bed: MakeBed, authority: Authority, bed_folder: object, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle(bed_folder)))  # type: ignore[arg-type]
    bed = make_bed(4, delivery={"express": way == "express", "tls": "verified", "failures": 1000})
    spots = [bed.spot() for _ in range(4)]
    stranger, expired, refused, clear = spots
    stranger.hop.certificate = authority.server_of_a_stranger()
    expired.hop.certificate = authority.server_expired()
    refused.hop.certificate = authority.server()
    rule = refused.hop.on(Step.STARTTLS, Say("554 5.7.0 no TLS for you"))
    sent = [spot.send() for spot in spots]
    assert all(one.queued for one in sent)
    for spot, one, said in zip(
        spots,
        sent,
        ("certificate", "expired", "554 5.7.0 no TLS for you", "TLS is required and not offered"),
        strict=True,
    ):
        assert said in spot.wait_for_result(one.id, "deferred")
        assert spot.hop.said("MAIL") == []
    refused.relay.wait_for_log(rf"next_hop_misconfigured next_hop={refused.name} stage=starttls .*delivery\.tls")
    for spot in spots:
        spot.hop.certificate = authority.server()
    rule.left = 0
    for spot, one in zip(spots, sent, strict=True):
        spot.delivered(one.id)
        assert [taken.tls for taken in spot.taken()] == [True]
    assert clear.send().delivered if way == "express" else clear.send().queued


def offered(relay, source: str = "127.0.0.1") -> int:
    with relay.client(source=source) as client:
        client.greeting()
        return int(client.ehlo()["SIZE"])


def test_no_more_is_offered_than_the_next_hops_take(make_relay, make_next_hop) -> None:
    """Known from the first connection on; whoever may send elsewhere is told the relay's own limit (row T6)."""
    small = make_next_hop(extensions=("PIPELINING", "SIZE 40000"))
    smaller = make_next_hop(extensions=("PIPELINING", "SIZE 30000"))
    relay = make_relay(
        [small, smaller],
        recipients=["user@example.com"],
        config={"limits": {"message_octets": 50_000}, "trusted": {"networks": ["127.0.0.2"]}},
    )
    assert offered(relay) == 50_000
    with relay.client() as client:
        assert client.open().deliver("a@example.net", "user@example.com", letter()).code == 250
    small.stop()
    with relay.client() as client:
        assert client.open().deliver("a@example.net", "user@example.com", letter()).code == 250
    smaller.wait_for_accepted()
    wait_for(lambda: offered(relay) == 40_000, "what the larger of the two takes")
    assert offered(relay, "127.0.0.2") == 50_000
    with relay.client() as client:
        client.open().expect("552 5.3.4", "MAIL FROM:<a@example.net> SIZE=40001")
        client.expect("250", "MAIL FROM:<a@example.net> SIZE=40000")
    with relay.client(source="127.0.0.2") as client:
        client.open().expect("250", "MAIL FROM:<a@example.net> SIZE=40001")
