"""What DNS answers mean for mail, and how long they are remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest

from relay.config.schema import Config
from relay.mail.answer import Answer, Stage
from relay.net import dns as net_dns
from relay.net.dns import ABSENT_MOST_S, SILENT, TTL_LEAST_S, TTL_MOST_S, UNKNOWN_S, Resolver, system_servers
from relay.outbound.mx import Exchanges
from relay.policy.exchange import HOSTS, Exchanger, Own, exchangers, hosts, in_turn, is_unusable
from relay.policy.lookup import Addresses, Found, MailExchangers
from relay.policy.outcome import Outcome, classify, classify_foreign, client_reply

OWN = Own(frozenset({"mx.example.com"}), frozenset({"198.51.100.1"}))
A = Addresses(Found.RECORDS, ("192.0.2.7",), 60)
NONE = Addresses(Found.NXDOMAIN, ttl=60)
DOUBT = Addresses(Found.UNKNOWN, ttl=2, why="SERVFAIL")


def mx(*records: tuple[int, str]) -> MailExchangers:
    return MailExchangers(Found.RECORDS, records, 60)


def judged(domain: str, *found: tuple[int, str, Sequence[Addresses]]):
    return exchangers(domain, found, OWN, lambda address: address == "203.0.113.1", is_unusable)


def codes(answer: object) -> tuple[int, str]:
    assert isinstance(answer, Answer)
    assert answer.stage is Stage.ROUTE
    return answer.code, answer.enhanced


def test_only_the_best_hosts_are_looked_at():
    named = hosts("d.test", mx(*((number, f"h{number}.test") for number in range(40))), OWN)
    assert named == tuple((number, f"h{number}.test") for number in range(HOSTS))


def test_doubt_about_one_host_is_no_refusal_of_the_domain():
    assert codes(judged("d.test", (1, "a.test", [NONE]), (2, "b.test", [DOUBT]))) == (451, "4.4.3")
    assert codes(judged("d.test", (1, "a.test", [NONE]), (2, "b.test", [NONE]))) == (550, "5.4.4")


def test_doubt_about_one_family_leaves_the_other():
    assert judged("d.test", (1, "a.test", [DOUBT, A])) == (Exchanger(1, "a.test", ("192.0.2.7",)),)


def test_an_address_of_this_machine_cuts_off_what_is_no_better():
    ours = Addresses(Found.RECORDS, ("203.0.113.1",), 60)
    behind = Addresses(Found.RECORDS, ("198.51.100.1",), 60)
    for own in (ours, behind):
        assert judged("d.test", (1, "a.test", [A]), (2, "us.test", [own]), (2, "b.test", [A]), (3, "c.test", [A])) == (
            Exchanger(1, "a.test", ("192.0.2.7",)),
        )
        assert codes(judged("d.test", (1, "us.test", [own]), (1, "b.test", [A]))) == (554, "5.4.6")


@pytest.mark.parametrize("text", ["127.0.0.1", "127.9.9.9", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "224.0.0.1",
                                  "169.254.1.1", "fe80::1", "255.255.255.255", "ff02::1"])  # fmt: skip
def test_addresses_that_are_nobody_elses(text):
    assert is_unusable(text)


@pytest.mark.parametrize("text", ["192.0.2.1", "10.0.0.1", "192.168.1.1", "2001:db8::1", "fd00::1", "8.8.8.8"])
def test_addresses_that_can_be_reached_somewhere(text):
    assert not is_unusable(text)


def test_equal_hosts_take_turns_and_worse_ones_stay_behind():
    found = (Exchanger(1, "a", ()), Exchanger(1, "b", ()), Exchanger(1, "c", ()), Exchanger(2, "d", ()))
    dice = Random(3)
    orders = [[one.host for one in in_turn(found, [dice.random() for _ in found])] for _ in range(300)]
    assert all(order[3] == "d" for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("answer", "ours", "strangers"),
    [
        (Answer(Stage.BANNER, 554, "", "no"), Outcome.OUR_FAULT, Outcome.DEFERRED),
        (Answer(Stage.MAIL, 550, "5.7.1", "no"), Outcome.OUR_FAULT, Outcome.REFUSED),
        (Answer(Stage.RCPT, 550, "5.7.54", "no"), Outcome.OUR_FAULT, Outcome.REFUSED),
        (Answer(Stage.RCPT, 450, "4.2.1", "no"), Outcome.DEFERRED, Outcome.DEFERRED),
        (Answer(Stage.RCPT, 552, "5.5.3", "no"), Outcome.DEFERRED, Outcome.DEFERRED),
        (Answer(Stage.FINAL, 250, "2.0.0", "ok"), Outcome.DELIVERED, Outcome.DELIVERED),
        (Answer(Stage.ROUTE, 550, "5.1.2", "no"), Outcome.REFUSED, Outcome.REFUSED),
        (Answer(Stage.ROUTE, 451, "4.4.3", "no"), Outcome.DEFERRED, Outcome.DEFERRED),
        (Answer(Stage.ROUTE, 550, "5.7.57", "no"), Outcome.REFUSED, Outcome.REFUSED),
    ],
)
def test_a_strangers_refusal_is_not_the_relays_fault(answer, ours, strangers):
    assert (classify(answer), classify_foreign(answer)) == (ours, strangers)


def test_a_clients_reply_goes_by_the_host_it_came_from():
    answer = Answer(Stage.MAIL, 550, "5.7.1", "no")
    assert client_reply([answer], classify_foreign).code == 550
    with pytest.raises(ValueError, match="refused for good"):
        client_reply([answer])


# --- the resolver, its exchange with a server replaced -----------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Answers(Resolver):
    """A resolver whose servers answer by a table: name and type → zone lines, or a response code."""

    def __init__(self, table: dict[tuple[str, str], list[str] | int], servers=(("192.0.2.53", 53),)) -> None:
        self.table = table
        self.asked: list[str] = []
        self.clock = Clock()
        self.told: list[str] = []
        super().__init__(servers, 1.0, self.clock, lambda level, event, **fields: self.told.append(event))

    async def _exchange(self, server, name, kind, timeout_s):
        await asyncio.sleep(0)
        text = name.to_text(omit_final_dot=True)
        self.asked.append(text)
        query = dns.message.make_query(name, kind)
        response = dns.message.make_response(query)
        found = self.table.get((text, dns.rdatatype.to_text(kind)), dns.rcode.NXDOMAIN)
        if isinstance(found, int):
            if found < 0:
                raise TimeoutError
            response.set_rcode(found)
            found = []
        for line in found:
            owner, ttl, rtype, data = line.split(" ", 3)
            section = response.authority if rtype == "SOA" else response.answer
            section.append(dns.rrset.from_text(owner, int(ttl), "IN", rtype, data))
        return dns.message.from_wire(response.to_wire())


@pytest.mark.parametrize(("ttl", "kept"), [(0, TTL_LEAST_S), (60, 60.0), (2**31 - 1, TTL_MOST_S)])
async def test_a_ttl_is_honoured_within_bounds(ttl, kept):
    resolver = Answers({("h.test", "A"): [f"h.test. {ttl} A 192.0.2.1"]})
    assert (await resolver.addresses("h.test", "A")).ttl == kept
    resolver.clock.now += kept - 0.1
    await resolver.addresses("H.test.", "A")
    assert resolver.asked == ["h.test"]
    resolver.clock.now += 0.2
    await resolver.addresses("h.test", "A")
    assert resolver.asked == ["h.test"] * 2


async def test_the_shortest_ttl_of_a_chain_counts():
    resolver = Answers({("a.test", "A"): ["a.test. 30 CNAME b.test.", "b.test. 900 A 192.0.2.1"]})
    found = await resolver.addresses("a.test", "A")
    assert (found.ttl, found.aliases, found.records) == (30, ("b.test",), ("192.0.2.1",))


@pytest.mark.parametrize(("minimum", "kept"), [(7, 7.0), (86400, ABSENT_MOST_S), (0, TTL_LEAST_S)])
async def test_no_is_remembered_as_the_zone_says_within_bounds(minimum, kept):
    soa = f"test. 86400 SOA ns.test. h.test. 1 2 3 4 {minimum}"
    found = await Answers({("n.test", "MX"): [soa]}).exchangers("n.test")
    assert (found.found, found.ttl) == (Found.NODATA, kept)


async def test_a_failure_is_remembered_shortly_and_is_no_answer():
    resolver = Answers({("s.test", "MX"): dns.rcode.SERVFAIL})
    found = await resolver.exchangers("s.test")
    assert (found.found, found.why) == (Found.UNKNOWN, "192.0.2.53: SERVFAIL")
    await resolver.exchangers("s.test")
    assert len(resolver.asked) == 1
    resolver.clock.now += UNKNOWN_S + 0.1
    resolver.table["s.test", "MX"] = ["s.test. 60 MX 5 h.test."]
    assert (await resolver.exchangers("s.test")).records == ((5, "h.test"),)


async def test_many_who_want_the_same_ask_once():
    resolver = Answers({("h.test", "A"): ["h.test. 60 A 192.0.2.1"]})
    await asyncio.gather(*(resolver.addresses("h.test", "A") for _ in range(50)))
    assert resolver.asked == ["h.test"]


async def test_whoever_gives_up_takes_the_answer_from_nobody():
    resolver = Answers({("h.test", "A"): ["h.test. 60 A 192.0.2.1"]})
    first, second = (asyncio.create_task(resolver.addresses("h.test", "A")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).records == ("192.0.2.1",)


async def test_the_cache_is_bounded_and_keeps_what_is_used(monkeypatch):
    monkeypatch.setattr(net_dns, "CACHED", 3)
    resolver = Answers({})
    for name in ("a", "b", "c", "a", "d", "a"):
        await resolver.addresses(f"{name}.test", "A")
    assert resolver.asked == ["a.test", "b.test", "c.test", "d.test"]
    await resolver.addresses("b.test", "A")
    assert resolver.asked[-1] == "b.test"


async def test_when_nobody_answers_no_more_is_asked_for_a_while_and_one_alarm_raised():
    resolver = Answers({(f"h{n}.test", "A"): -1 for n in range(50)} | {(".", "NS"): -1})
    for number in range(SILENT + 5):
        assert (await resolver.addresses(f"h{number}.test", "A")).found is Found.UNKNOWN
    assert len(resolver.asked) == SILENT * net_dns.ROUNDS + 1, "and whether anybody is there"
    assert resolver.told == ["dns_down"]
    resolver.clock.now += net_dns.SILENT_S + 0.1
    del resolver.table[".", "NS"]
    resolver.table["up.test", "A"] = ["up.test. 60 A 192.0.2.1"]
    assert (await resolver.addresses("up.test", "A")).found is Found.RECORDS
    assert resolver.told == ["dns_down", "dns_up"]


async def test_many_domains_without_an_answer_are_no_dead_server():
    resolver = Answers({(f"h{n}.test", "A"): -1 for n in range(50)} | {("up.test", "A"): ["up.test. 60 A 192.0.2.1"]})
    for number in range(20):
        assert (await resolver.addresses(f"h{number}.test", "A")).found is Found.UNKNOWN
    assert (await resolver.addresses("up.test", "A")).found is Found.RECORDS
    assert resolver.told == []


@pytest.mark.parametrize("name", ["x" * 64 + ".test", ".".join(["x" * 60] * 5), "a..test"])
async def test_a_name_that_cannot_exist_is_not_asked_for(name):
    resolver = Answers({})
    assert (await resolver.exchangers(name)).found is Found.NXDOMAIN
    assert resolver.asked == []


async def test_an_unforeseen_fault_is_unknown_and_told():
    class Broken(Answers):
        async def _exchange(self, server, name, kind, timeout_s):
            raise ZeroDivisionError

    resolver = Broken({})
    assert (await resolver.exchangers("a.test")).found is Found.UNKNOWN
    assert resolver.told == ["dns_fault"]


def test_the_machines_resolvers_are_those_of_resolv_conf(tmp_path):
    file = tmp_path / "resolv.conf"
    file.write_text("search example.com\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n")
    assert system_servers(file) == (("192.0.2.53", 53), ("2001:db8::53", 53))
    assert system_servers(tmp_path / "absent") == (("127.0.0.1", 53),)


# --- a domain's exchangers ---------------------------------------------------------------------------------------


def configuration() -> Config:
    return Config.model_validate(
        {"server": {"hostname": "mx.example.com"}, "listener": [{"name": "mx", "address": "127.0.0.1:2525"}]}
    )


async def test_what_is_known_of_a_domain_needs_no_waiting_and_ends_with_its_ttl():
    resolver = Answers(
        {
            ("d.test", "MX"): ["d.test. 600 MX 5 h.test."],
            ("h.test", "A"): ["h.test. 60 A 192.0.2.1"],
            ("h.test", "AAAA"): [],
        }
    )
    exchanges = Exchanges(configuration(), resolver, resolver.clock)
    assert exchanges.known("d.test", "public") is None
    found = await exchanges.find("d.test", "public")
    assert found == (Exchanger(5, "h.test", ("192.0.2.1",)),)
    assert exchanges.known("d.test", "public") == found
    resolver.clock.now += 61
    assert exchanges.known("d.test", "public") is None


async def test_an_address_without_a_domain_has_no_exchanger():
    answer = await Exchanges(configuration(), Answers({})).find("", "public")
    assert codes(answer) == (550, "5.1.2")


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "172.31.0.1", "192.168.0.9", "100.64.0.1", "fd00::7", "::ffff:10.0.0.1"]
)
async def test_a_domain_of_a_strangers_choice_leads_to_no_host_inside(address):
    """A report to a sender whose MX is an internal server would open a connection there."""
    family = "AAAA" if ":" in address else "A"
    table = {("d.test", "MX"): ["d.test. 600 MX 5 h.test."], ("h.test", family): [f"h.test. 60 {family} {address}"]}
    exchanges = Exchanges(configuration(), Answers(table))
    assert codes(await exchanges.find("d.test", "public")) == (550, "5.4.4")
    assert await exchanges.find("d.test", "anywhere") == (Exchanger(5, "h.test", (address,)),)
    literal = f"[IPv6:{address}]" if ":" in address else f"[{address}]"
    assert codes(await exchanges.find(literal, "public")) == (550, "5.4.4")
    permitted = configuration().model_copy(update={"dns": configuration().dns.model_copy(update={"private": True})})
    assert await Exchanges(permitted, Answers(table)).find("d.test", "public") == (Exchanger(5, "h.test", (address,)),)
