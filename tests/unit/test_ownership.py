"""Who may send as whom, as a table."""

from __future__ import annotations

import pytest

from relay.config.schema import Mode
from relay.mail.address import Mailbox
from relay.policy.ownership import Account, Grant, OwnershipRules, decide, spoofed

DOMAINS = frozenset({"example.com", "example.org"})


def rules(sender: Mode = Mode.ENFORCE, *, null_sender: bool = False, spoofing: Mode = Mode.ENFORCE) -> OwnershipRules:
    return OwnershipRules(DOMAINS, sender, null_sender, frozenset({"any"}), frozenset({"ours"}), spoofing)


def account(name: str = "ann", *addresses: str, grant: Grant = Grant.OWN) -> Account:
    return Account(name, frozenset(map(Mailbox, addresses)), grant)


ANN = account("ann", "ann@example.com", "@team.example.com")


@pytest.mark.parametrize(
    ("who", "sender", "refused"),
    [
        (ANN, "ann@example.com", ""),
        (ANN, "ANN@Example.COM", ""),
        (ANN, '"ann"@example.com', ""),
        (ANN, "whoever@team.example.com", ""),
        (ANN, "bob@example.com", "not_owner"),
        (ANN, "ann@example.org", "not_owner"),
        (ANN, "ann@sub.team.example.com", "not_owner"),
        (ANN, "ann@example.com.evil.example", "not_owner"),
        (ANN, "ann%example.com@evil.example", "not_owner"),
        (ANN, "", "null_not_allowed"),
        (account("bob"), "bob@example.com", "not_owner"),
        (account("bob", grant=Grant.DOMAINS), "whoever@example.org", ""),
        (account("bob", grant=Grant.DOMAINS), "whoever@elsewhere.example", "not_owner"),
        (account("bob", grant=Grant.ANY), "whoever@elsewhere.example", ""),
        (account("Any"), "whoever@elsewhere.example", ""),
        (account("ours"), "whoever@Example.com", ""),
        (account("ours"), "whoever@elsewhere.example", "not_owner"),
        (account("any"), "", "null_not_allowed"),
    ],
)
def test_a_login_sends_as_what_it_owns_or_was_granted(who: Account, sender: str, refused: str) -> None:
    verdict = decide(Mailbox(sender), who, rules())
    assert (verdict.kind.reason if verdict.kind else "") == refused
    watched = decide(Mailbox(sender), who, rules(Mode.LOG))
    assert watched.kind is None
    assert [shadow.kind and shadow.kind.reason for shadow in watched.shadow] == ([refused] if refused else [])
    assert decide(Mailbox(sender), who, rules(Mode.OFF)).kind is None


def test_the_null_sender_is_a_choice() -> None:
    assert decide(Mailbox(""), ANN, rules(null_sender=True)).kind is None


@pytest.mark.parametrize(
    ("sender", "ours"),
    [
        ("bob@example.com", True), ("bob@EXAMPLE.ORG", True), ("bob@sub.example.com", False), ("", False),
        ("bob@elsewhere.example", False), ("example.com@elsewhere.example", False),
    ],
)  # fmt: skip
def test_a_stranger_does_not_speak_in_our_name(sender: str, *, ours: bool) -> None:
    verdict = spoofed(Mailbox(sender), rules())
    assert (verdict.kind is not None) == ours
    assert spoofed(Mailbox(sender), rules(spoofing=Mode.OFF)).kind is None
    assert bool(spoofed(Mailbox(sender), rules(spoofing=Mode.LOG)).shadow) == ours
