"""Which entry decides for an address, and what the right side of one means (transport(5))."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from relay.config.destination import (
    Delay,
    Exchangers,
    Host,
    Loss,
    Refusal,
    parse_next_hop,
    parse_target,
    show,
)
from relay.config.invalid import Invalid
from relay.config.schema import Config
from relay.mail.address import Mailbox
from relay.policy.route import Action, Exchange, NextHop, RouteTable, shared_out

HOST = "192.0.2.9"


def table(lines: str, **routes: str) -> RouteTable:
    """The routes of a transport table, and of ``[[route]]`` tables ``pattern = next hop``."""
    return RouteTable(
        Config.model_validate(
            {
                "server": {"hostname": "mx.example.com"},
                "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
                "route": [{"domains": [k.replace("_", ".")], "next_hops": [v]} for k, v in routes.items()],
                "routing": {"table": lines},
            }
        )
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("smtp:[mail.example.com]", (Host("smtp", "mail.example.com", 25),)),
        ("smtp:[mail.example.com]:2525", (Host("smtp", "mail.example.com", 2525),)),
        ("SMTP:[mail.example.com]:submission", (Host("smtp", "mail.example.com", 587),)),
        ("relay:[192.0.2.1]", (Host("smtp", "192.0.2.1", 25),)),
        ("smtp:[2001:DB8::1]:26", (Host("smtp", "2001:db8::1", 26),)),
        ("smtp:[IPv6:2001:db8::1]", (Host("smtp", "2001:db8::1", 25),)),
        (":[gateway.example.com]", (Host("smtp", "gateway.example.com", 25),)),
        ("smtp:[a.example], [b.example]:26", (Host("smtp", "a.example", 25), Host("smtp", "b.example", 26))),
        ("smtp:[a.example]  [b.example]", (Host("smtp", "a.example", 25), Host("smtp", "b.example", 25))),
        ("lmtp:[dovecot.example]", (Host("lmtp", "dovecot.example", 24),)),
        ("lmtp:dovecot.example:2424", (Host("lmtp", "dovecot.example", 2424),)),
        ("lmtp:inet:dovecot.example:24", (Host("lmtp", "dovecot.example", 24),)),
        ("error:5.1.2 there is no such host", Refusal("5.1.2", "there is no such host")),
        (
            "error:mail for *.example.com is not deliverable",
            Refusal("5.0.0", "mail for *.example.com is not deliverable"),
        ),
        ("error:", Refusal("5.0.0", "mail to this address is not accepted")),
        ("error: 5.1.6", Refusal("5.1.6", "mail to this address is not accepted")),
        ("retry:4.4.1 being moved", Delay("4.4.1", "being moved")),
        ("retry:", Delay("4.0.0", "mail to this address waits")),
        ("discard:", Loss("discarded")),
        ("discard:spam trap", Loss("spam trap")),
        (":", None),
    ],
)
def test_the_right_side_means_what_transport_5_says(written, meant):
    assert parse_target(written) == meant


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("192.0.2.1", "write smtp:[192.0.2.1]"),
        ("192.0.2.1:25", "write smtp:[192.0.2.1]:25"),
        ("2001:db8::1", "write smtp:[2001:db8::1]"),
        ("smtp:192.0.2.1:26", "write smtp:[192.0.2.1]:26"),
        ("smtp:2001:db8::1", "write smtp:[2001:db8::1]"),
        ("lmtp:2001:db8::1", "write lmtp:[2001:db8::1]"),
        ("[mail.example.com]:25", "write smtp:[mail.example.com]:25"),
        ("mail.example.com:25", "write smtp:[mail.example.com]:25 for this host, smtp:mail.example.com:25 for its MX"),
    ],
)
def test_what_was_forgotten_is_named(written, remedy):
    with pytest.raises(Invalid) as caught:
        parse_next_hop(written)
    assert caught.value.hint == remedy


@pytest.mark.parametrize(
    "written", ["smtp:[mail.example.com]:2525", "smtp:[2001:db8::1]", "lmtp:[dovecot.example.com]"]
)
def test_a_destination_is_shown_as_it_is_written(written):
    [destination] = parse_next_hop(written)
    assert show(destination) == written


LAYERS = """\
user@example.com    error:5.1.6 address
example.com         error:5.1.6 domain
.example.com        error:5.1.6 below
.deep.example.com   error:5.1.6 deeper
[192.0.2.7]         error:5.1.6 literal
*                   error:5.1.6 rest
"""


@pytest.mark.parametrize(
    ("address", "entry"),
    [
        ("user@example.com", "address"),
        ("USER@Example.COM", "address"),
        ('"user"@example.com', "address"),
        ("user+tag@example.com", "domain"),
        ("other@example.com", "domain"),
        ("user@a.example.com", "below"),
        ("user@a.b.example.com", "below"),
        ("user@deep.example.com", "below"),
        ("user@x.deep.example.com", "deeper"),
        ("user@notexample.com", "rest"),
        ("user@com", "rest"),
        ("user@[192.0.2.7]", "literal"),
        ("user@[192.0.2.8]", "rest"),
        ("postmaster", "rest"),
    ],
)
def test_the_most_specific_entry_decides(address, entry):
    route = table(LAYERS).find(Mailbox(address))
    assert route is not None
    assert route.text == entry


@pytest.mark.parametrize(
    "address", ["user@example.com", "x@y.deep.example.com", "x@[192.0.2.7]", "x@[IPv6:::1]", "postmaster"]
)
def test_what_people_are_told_is_what_the_daemon_finds(address):
    routes = table(LAYERS)
    decision = routes.decide(Mailbox(address))
    assert decision.route is routes.find(Mailbox(address))
    assert decision.asked[-1] == decision.pattern


def test_a_tag_is_no_other_address_where_the_domain_has_tags():
    config = Config.model_validate(
        {
            "server": {"hostname": "mx.example.com"},
            "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
            "domain": [{"names": ["tags.example"], "delimiter": "+"}, {"names": ["plain.example"]}],
            "routing": {
                "table": "user@tags.example discard:user\nuser+x@tags.example discard:tagged\n"
                "user@plain.example discard:user\n* discard:rest"
            },
        }
    )
    routes = RouteTable(config)
    for address, text in (
        ("user+x@tags.example", "tagged"),
        ("user+y@tags.example", "user"),
        ("other+y@tags.example", "rest"),
        ("user+y@plain.example", "rest"),
    ):
        assert routes.find(Mailbox(address)).text == text
        assert routes.decide(Mailbox(address)).route is routes.find(Mailbox(address))
    assert routes.decide(Mailbox("User+y@tags.example")).asked == ("user+y@tags.example", "user@tags.example")


def test_entries_of_both_kinds_are_one_table():
    routes = table("user@example.com discard:\n* smtp:[192.0.2.2]", example_com=f"smtp:[{HOST}]")
    assert routes.find(Mailbox("user@example.com")).action is Action.DISCARD
    assert routes.find(Mailbox("other@example.com")).next_hops == (NextHop(HOST, 25),)
    assert routes.find(Mailbox("any@example.net")).next_hops == (NextHop("192.0.2.2", 25),)
    assert routes.next_hops() == (NextHop(HOST, 25), NextHop("192.0.2.2", 25))


def test_a_colon_alone_leaves_an_address_to_the_other_routes():
    routes = table(
        "my.example :\n.my.example :\nuser@my.example :\n* smtp:[192.0.2.2]", my_example=f"smtp:[{HOST}]",
        _example="smtp:[192.0.2.3]",
    )  # fmt: skip
    for address, host in (
        ("user@my.example", HOST),
        ("other@my.example", HOST),
        ("a@b.my.example", "192.0.2.3"),
        ("a@else.example", "192.0.2.3"),
        ("a@elsewhere.net", "192.0.2.2"),
    ):
        assert [hop.host for hop in routes.find(Mailbox(address)).next_hops] == [host]


def test_a_route_says_where_it_stands():
    routes = table("# comment\n\nexample.com discard:\n", example_net=f"smtp:[{HOST}]")
    assert routes.find(Mailbox("a@example.com")).at == ("routing", "table", 3)
    assert routes.find(Mailbox("a@example.net")).at == ("route", 0)


def test_without_an_entry_there_is_no_route():
    assert table("example.com discard:").find(Mailbox("a@example.net")) is None


def test_weights_are_shares_and_nothing_goes_to_weight_0_first():
    dice = Random(7)
    orders = [shared_out((3, 0, 1), [dice.random() for _ in range(3)]) for _ in range(4000)]
    first = Counter(order[0] for order in orders)
    assert 0.72 < first[0] / 4000 < 0.78
    assert first[1] == 0
    assert all(order[2] == 1 and sorted(order) == [0, 1, 2] for order in orders)


def test_mail_exchangers_are_told_from_hosts():
    routes = table("a.example smtp:\nb.example smtp:other.example:26\nc.example smtp:[192.0.2.1], other.example")
    assert routes.find(Mailbox("x@a.example")).goals == (Exchange("", 25),)
    assert routes.find(Mailbox("x@b.example")).goals == (Exchange("other.example", 26),)
    mixed = routes.find(Mailbox("x@c.example"))
    assert mixed.goals == (NextHop("192.0.2.1", 25), Exchange("other.example", 25))
    assert not mixed.static


@pytest.mark.parametrize(
    "exchangers", [Exchangers("example.com", 25), Exchangers("", 25), Exchangers("example.com", 26)]
)
def test_exchangers_are_shown_as_they_are_written(exchangers):
    assert parse_next_hop(show(exchangers)) == (exchangers,)


def test_only_what_the_route_for_all_others_reaches_is_of_strangers_choice():
    routes = table("a.example smtp:\nb.example smtp:other.example\n* smtp:")
    assert [routes.find(Mailbox(f"x@{name}.example")).goals[0].reach for name in "abc"] == [
        "anywhere",
        "anywhere",
        "public",
    ]
    fixed = table("* smtp:gateway.example")
    assert fixed.find(Mailbox("x@any.example")).goals[0].reach == "anywhere"
