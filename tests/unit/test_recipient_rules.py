"""Recipients: the rules as one list, overrides before sources, tags, spelling, whole domains."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from relay.config.schema import Config, Mode
from relay.directory import build as builder
from relay.directory.key import read_key
from relay.directory.snapshot import Directory
from relay.inbound.transaction import Rules, Transaction
from relay.mail.address import NULL_SENDER, Mailbox, is_relay_form, without_tag
from relay.mail.reply import RELAY_DENIED, UNKNOWN_RECIPIENT, OperatorText
from relay.mail.ruling import Ruling, parse_ruling
from relay.policy.recipient import RecipientFacts, asked, decide
from relay.policy.verdict import Verdict

DAY = 86400.0
NOW = 1_800_000_000.0  # 2027-01-15


def test_the_shortcuts_of_the_decision_say_what_the_list_of_rules_says() -> None:
    refusal = Ruling(UNKNOWN_RECIPIENT, OperatorText(""))
    count = 0
    for facts in itertools.starmap(
        RecipientFacts,
        itertools.product(
            ("directory", "any", ""),
            (True, False, None),
            (True, False),
            (True, False),
            (True, False),
            Mode,
            (None, Verdict(RELAY_DENIED, "route x")),
            (None, refusal, Ruling(None, OperatorText(""))),
            ("directory.overrides",),
            (NULL_SENDER, Mailbox("other@example.com")),
        ),
    ):
        if facts.known is not None and facts.verified_by != "directory":
            continue  # nobody asked the snapshot
        *passed, (_, last) = asked(facts)
        assert decide(facts) == last
        assert all(verdict is None for _, verdict in passed)
        assert all(rule.why(facts) for rule, _ in passed)
        count += 1
    assert count == 5 * 8 * 3 * 2 * 3 * 2


@pytest.mark.parametrize(
    ("action", "line"),
    [
        ("OK", ""),
        ("ok", ""),
        ("x", ""),
        ("RELAY", ""),
        ("550 5.1.1 Has left", "550 5.1.1 <a@b>: Recipient address rejected: Has left"),
        ("550 Has left", "550 5.7.1 <a@b>: Recipient address rejected: Has left"),
        ("450", "450 4.7.1 <a@b>: Recipient address rejected: Try again later"),
        ("554 5.7.1", "554 5.7.1 <a@b>: Recipient address rejected: Access denied"),
        ("REJECT", "554 5.7.1 <a@b>: Recipient address rejected: Access denied"),
        ("reject not here", "554 5.7.1 <a@b>: Recipient address rejected: not here"),
        ("DEFER", "450 4.7.1 <a@b>: Recipient address rejected: Try again later"),
        ("550 5.1.1 {mailbox} {text} Grüße\t", "550 5.1.1 <a@b>: Recipient address rejected: {mailbox} {text} Gr??e"),
    ],
)
def test_actions_are_read_as_postfix_writes_them(action: str, line: str) -> None:
    ruling = parse_ruling(action)
    assert ruling is not None
    assert (ruling.kind.line(Mailbox("a@b"), ruling.text) if ruling.kind else "") == line


@pytest.mark.parametrize(
    "action",
    ["", "maybe", "OKAY", "250 Ok", "421 4.3.2 Bye", "500 5.5.2 What", "550 4.1.1 Left", "5501", "FILTER smtp:x"],
)
def test_other_words_are_no_action(action: str) -> None:
    assert parse_ruling(action) is None


@pytest.mark.parametrize(
    ("address", "delimiters", "bare"),
    [
        ("user+tag@example.com", "+", "user@example.com"),
        ("user+a+b@example.com", "+", "user@example.com"),
        ("user-a+b@example.com", "+-", "user@example.com"),
        ("user@example.com", "+", ""),
        ("+tag@example.com", "+", ""),
        ('"user+tag"@example.com', "+", ""),
        ("user@a+b.example", "+", ""),
        ("user+tag@example.com", "", ""),
    ],
)
def test_a_tag_ends_a_local_part_and_never_is_all_of_it(address: str, delimiters: str, bare: str) -> None:
    assert without_tag(address, delimiters) == bare


class Site:
    """A snapshot built from files, and what a session would be told about recipients with it."""

    def __init__(self, folder: Path, sources: dict[str, str], domain: dict[str, Any], overrides: list[Any]) -> None:
        listed = []
        for number, (kind, text) in enumerate(sources.items()):
            path = folder / f"source{number}"
            path.write_text(text)
            listed.append({"type": kind.partition("-")[0], "path": path})
        self.config = Config.model_validate(
            {
                "server": {"hostname": "mx.example.com", "spool": folder / "spool"},
                "process": {"user": "", "hub_user": ""},
                "listener": [{"name": "mx", "address": "127.0.0.1:25"}],
                "domain": [
                    {"names": ["example.com", "example.net"], **domain},
                    {"names": ["open.example"], "recipients": "any"},
                ],
                "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
                "directory": {"sources": listed, "overrides": overrides},
            }
        )
        self.built = builder.build(self.config, NOW)
        self.directory = Directory(self.config.snapshot_path, read_key(self.config.key_path))

    def judge(self, address: str) -> str:
        """The reply, or where mail goes: OK, or another mailbox."""
        transaction = Transaction(Mailbox("a@b.example"), False, False, Rules.of(self.config), self.directory)
        mailbox = Mailbox(address)
        verdict = transaction.judge_recipient(mailbox, is_relay_form(mailbox))
        *passed, last = transaction.questions(mailbox, is_relay_form(mailbox))
        assert last.verdict == verdict
        assert passed
        assert transaction.quick(mailbox) in (None, verdict)
        if verdict.kind is not None:
            return verdict.kind.line(mailbox, verdict.text)
        return verdict.instead or "OK"

    def restricted(self, sender: str) -> bool:
        rules = Rules.of(self.config)
        return Transaction(Mailbox(sender), False, False, rules, self.directory).restriction is not None


def site(folder: Path, sources: dict[str, str], overrides: list[Any] | None = None, **domain: Any) -> Site:
    return Site(folder, sources, domain, overrides or [])


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.inbound.transaction.time.time", lambda: NOW)


def rejected(address: str, codes: str, text: str) -> str:
    return f"{codes} <{address}>: Recipient address rejected: {text}"


def unknown(address: str) -> str:
    return rejected(address, "550 5.1.1", "User unknown")


def test_a_map_accepts_refuses_and_speaks_for_whole_domains(tmp_path: Path) -> None:
    there = site(
        tmp_path,
        {"map": "a@example.com OK\nleft@example.com 550 5.1.1 Has left\n@example.net OK\nb@example.net 450 Moving\n"},
    )
    assert there.judge("A@example.com") == "OK"
    assert there.judge("left@example.com") == rejected("left@example.com", "550 5.1.1", "Has left")
    assert there.judge("nobody@example.com") == unknown("nobody@example.com")
    assert there.judge("whoever@example.net") == "OK"
    assert there.judge("B@Example.net") == rejected("B@Example.net", "450 4.7.1", "Moving")
    assert there.judge("whoever@open.example") == "OK"


def test_of_two_sources_the_earlier_one_counts_and_overrides_before_both(tmp_path: Path) -> None:
    there = site(
        tmp_path,
        {
            "map-1": "first@example.com OK\nsecond@example.com 550 One\nthird@example.com OK\n",
            "map-2": "first@example.com 550 Two\nsecond@example.com OK\n@example.com 450 Two\n",
            "overrides": "third@example.com 554 Three\n",
        },
    )
    assert there.judge("first@example.com") == "OK"
    assert there.judge("second@example.com") == rejected("second@example.com", "550 5.7.1", "One")
    assert there.judge("third@example.com") == rejected("third@example.com", "554 5.7.1", "Three")
    assert there.judge("fourth@example.com") == rejected("fourth@example.com", "450 4.7.1", "Two")
    assert there.built.skipped["an earlier source says otherwise"] == 1


def test_the_word_of_an_override_about_a_domain_stands_over_addresses_of_sources(tmp_path: Path) -> None:
    there = site(
        tmp_path,
        {
            "list": "a@example.com\nb@example.com\nc@example.net\n",
            "overrides": "example.com 550 Closed\nb@example.com OK\n",
        },
        [
            {"address": "example.net", "action": "450 Moving"},
            {"address": "d@example.net", "action": "OK"},
            {"address": "e@open.example", "action": "550 5.1.1 Has left"},
        ],
    )
    assert there.judge("a@example.com") == rejected("a@example.com", "550 5.7.1", "Closed")
    assert there.judge("b@example.com") == "OK"
    assert there.judge("c@example.net") == rejected("c@example.net", "450 4.7.1", "Moving")
    assert there.judge("D@example.net") == "OK"
    assert there.judge("e@open.example") == rejected("e@open.example", "550 5.1.1", "Has left")
    assert there.judge("f@open.example") == "OK"
    assert there.judge("postmaster@example.com") == "OK"


@pytest.mark.parametrize("day", ["2027-01-14", "2027-01-15"])
def test_after_its_last_day_an_entry_says_nothing(tmp_path: Path, day: str) -> None:
    over = day < "2027-01-15"
    there = site(
        tmp_path,
        {"list": "a@example.com\nb@example.com\n", "overrides": f"a@example.com until={day} 550 On leave\n"},
        [{"address": "b@example.com", "action": "450 On leave", "expires": day}],
    )
    assert there.judge("a@example.com") == ("OK" if over else rejected("a@example.com", "550 5.7.1", "On leave"))
    assert there.judge("b@example.com") == ("OK" if over else rejected("b@example.com", "450 4.7.1", "On leave"))
    assert there.built.skipped["expired"] == (1 if over else 0)


def test_an_entry_in_the_snapshot_ends_without_a_new_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = site(
        tmp_path,
        {
            "list": "a@example.com\n",
            "overrides": "a@example.com until=2027-01-15 550 On leave\nb@example.com until=2027-01-15 OK\n",
        },
    )
    assert there.judge("b@example.com") == "OK"
    monkeypatch.setattr("relay.inbound.transaction.time.time", lambda: NOW + DAY)
    assert there.judge("a@example.com") == "OK"
    assert there.judge("b@example.com") == unknown("b@example.com")


def test_a_tag_is_taken_off_where_the_address_with_it_is_unknown(tmp_path: Path) -> None:
    sources = {
        "map": "user@example.com OK\nodd+name@example.com OK\nleft@example.com 550 Has left\nuser+spam@example.com 550 Spam\n"
    }
    kept = site(tmp_path, sources, delimiter="+")
    assert kept.judge("user+news@example.com") == "OK"
    assert kept.judge("odd+name@example.com") == "OK"
    assert kept.judge("odd+other@example.com") == unknown("odd+other@example.com")
    assert kept.judge("left+tag@example.com") == rejected("left+tag@example.com", "550 5.7.1", "Has left")
    assert kept.judge("user+spam@example.com") == rejected("user+spam@example.com", "550 5.7.1", "Spam")
    removed = site(tmp_path, sources, delimiter="+-", tag="remove")
    assert removed.judge("user+news@example.com") == "user@example.com"
    assert removed.judge("User-news@Example.com") == "User@Example.com"
    assert removed.judge("odd+name@example.com") == "OK"


def test_a_tag_is_no_way_round_a_restriction(tmp_path: Path) -> None:
    there = site(tmp_path, {"list": "user@example.com\n", "restricted": "user@example.com\n"}, delimiter="+")
    assert there.restricted("user+tag@example.com")
    assert there.restricted("USER+x@EXAMPLE.com")
    assert not there.restricted("other+user@example.com")
    assert not there.restricted("user+tag@elsewhere.example")


def test_where_case_counts_the_spelling_of_the_directory_is_the_address(tmp_path: Path) -> None:
    sources = {"list": "Bob@example.com\neve@example.com\n", "restricted": "Eve@example.com\n"}
    there = site(tmp_path, sources, case="sensitive")
    assert there.judge("Bob@EXAMPLE.com") == "OK"
    assert there.judge("bob@example.com") == unknown("bob@example.com")
    assert there.judge("POSTMASTER@example.com") == "OK"
    assert there.restricted("eve@example.com")
    assert there.restricted("eVE@example.com")
    assert there.directory.snapshot is not None
    assert there.directory.snapshot.recipients == 2


def test_a_change_of_case_before_the_next_build_refuses_nobody_who_is_there(tmp_path: Path) -> None:
    there = site(tmp_path, {"list": "Bob@example.com\n"})
    sensitive = site(tmp_path, {"list": "Bob@example.com\n"}, case="sensitive")
    there.config, sensitive.config = sensitive.config, there.config
    assert there.judge("bob@example.com") == "OK"
    assert sensitive.judge("bob@example.com") == "OK"


def test_postmaster_goes_to_its_mailbox_in_every_spelling(tmp_path: Path) -> None:
    there = site(
        tmp_path,
        {"list": "postmaster@example.com\n", "overrides": "@example.net 550 Closed\n"},
        postmaster="admin@example.com",
    )
    for name in ("postmaster@example.com", "PostMaster@Example.NET", '"postmaster"@example.net'):
        assert there.judge(name) == "admin@example.com"
    assert there.judge("postmaster@open.example") == "OK"


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("sources", [("list",), ("list", "map")])
@pytest.mark.parametrize("domain", [{}, {"delimiter": "+"}, {"postmaster": "hm@example.com"}])
def test_the_short_way_of_a_recipient_ends_where_the_rules_do(
    tmp_path: Path, mode: Mode, stale: object, sources: tuple[str, ...], domain: dict[str, Any]
) -> None:
    texts = {
        "list": "a@example.com\nbad@example.com\n",
        "map": "left@example.com 550 Has left\n",
        "restricted": "bad@example.com\n",
    }
    there = site(tmp_path, {kind: texts[kind] for kind in (*sources, "restricted")}, **domain)
    there.directory.stale = bool(stale)
    rest = {"recipients": {"unknown": mode}, "limits": {"recipients": 2}}
    quick = 0
    for route in ("smtp:[127.0.0.1]:26", "error:no"):
        config = Config.model_validate(
            {**there.config.model_dump(), **rest, "route": [{"domains": ["*"], "next_hops": [route]}]}
        )
        rules = Rules.of(config)
        for sender, trusted in itertools.product(
            ("", "a@b.example", "bad@example.com", "a@example.com"), (False, True)
        ):
            transaction = Transaction(Mailbox(sender), False, trusted, rules, there.directory)
            for address in (
                "a@example.com", "A@example.com", "nobody@example.com", "left@example.com", "postmaster@example.com",
                "PostMaster@example.net", "a+b@example.com", "a@open.example", "a@elsewhere.example", "a@EXAMPLE.com",
                "a@example.com", "nobody@example.com",
            ):  # fmt: skip
                mailbox = Mailbox(address)
                verdict = transaction.judge_recipient(mailbox, is_relay_form(mailbox))
                short = transaction.quick(mailbox)
                assert short in (None, verdict)
                quick += short is not None
                if verdict.kind is None and address[0] == "A":
                    transaction.recipients.append(mailbox)
    assert bool(quick) == (sources == ("list",) and not domain and mode is Mode.ENFORCE)
