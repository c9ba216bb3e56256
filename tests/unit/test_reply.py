from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail import reply
from relay.mail.address import Mailbox
from relay.mail.envelope import QueueId
from relay.mail.reply import LINE_OCTETS, TEXT_OCTETS, Kind, from_next_hop, operator_text

KINDS = {name: value for name, value in vars(reply).items() if isinstance(value, Kind)}
DOC = Path(__file__).parents[2] / "docs" / "replies.md"


@pytest.mark.parametrize("name", KINDS)
def test_every_reply_fits_one_line_with_the_longest_slots(name: str) -> None:
    wire = KINDS[name].wire(Mailbox("x" * 320), operator_text("y" * 500))
    assert len(wire) <= LINE_OCTETS
    assert re.fullmatch(rb"\d{3} [ -~]+\r\n", wire)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.code >= 400])
def test_every_refusal_has_an_enhanced_code_of_its_class(name: str) -> None:
    kind = KINDS[name]
    assert kind.line().startswith(f"{kind.code} {str(kind.code)[0]}.")


def test_reasons_tell_replies_apart() -> None:
    assert len({kind.reason for kind in KINDS.values()}) == len(KINDS)


def test_every_reply_is_in_the_documentation_as_it_is_said() -> None:
    rows = {
        tuple(cell.strip().strip("`") for cell in line.strip("|").split("|"))[:3]
        for line in DOC.read_text().splitlines()
        if re.match(r"\| `\d", line)
    }
    said = {(f"{kind.code} {kind.enhanced}".strip(), kind.wording, kind.reason) for kind in KINDS.values()}
    assert said - rows == set()
    assert rows - said == set()


@pytest.mark.parametrize(
    ("code", "enhanced", "wording", "reason"),
    [
        (99, "", "Ok", "x"),
        (600, "5.0.0", "No", "x"),
        (550, "4.1.1", "No", "x"),
        (450, "5.1.1", "No", "x"),
        (250, "5.1.1", "No", "x"),
        (550, "", "No", "x"),
        (550, "5.1", "No", "x"),
        (550, "5.1.1\r\n", "No", "x"),
        (550, "5.1.1", "No\r\n250 Ok", "x"),
        (550, "5.1.1", "Nö", "x"),
        (550, "5.1.1", "No", "Bad Reason"),
        (550, "5.1.1", "No {name}", "x"),
        (550, "5.1.1", "No {mailbox!r}", "x"),
        (550, "5.1.1", "No }", "x"),
        (550, "5.1.1", "x" * 512, "x"),
    ],
)
def test_a_reply_that_contradicts_itself_cannot_be_built(code: int, enhanced: str, wording: str, reason: str) -> None:
    with pytest.raises(ValueError, match="reply"):
        Kind(code, enhanced, wording, reason)


def test_slots_are_filled_wherever_they_stand() -> None:
    assert Kind(550, "5.1.1", "{text} for {mailbox}", "x").line(Mailbox("a@b"), operator_text("no")) == (
        "550 5.1.1 no for a@b"
    )
    assert reply.OK_QUEUED.line(text=QueueId("3Abc")) == "250 2.0.0 Ok: queued as 3Abc"


def test_a_mailbox_that_looks_like_a_slot_stays_as_it_is() -> None:
    line = reply.SENDER_RESTRICTED.line(Mailbox("{text}{0}@example.com"), operator_text("{mailbox}"))
    assert line == "554 5.7.1 <{text}{0}@example.com>: Sender address rejected: {mailbox}"


@given(st.text(max_size=400))
def test_operator_text_is_printable_and_bounded(text: str) -> None:
    clean = operator_text(text)
    assert len(clean) <= TEXT_OCTETS
    assert all(" " <= character <= "~" for character in clean)


@pytest.mark.parametrize(
    ("kind", "code", "enhanced"),
    [
        (reply.UNKNOWN_RECIPIENT, 450, "4.1.1"),
        (reply.RELAY_DENIED, 451, "4.7.1"),
        (reply.MESSAGE_TOO_BIG, 452, "4.3.4"),
        (reply.BAD_SENDER, 450, "4.1.7"),
        (reply.NEED_TLS, 451, "4.7.0"),
        (reply.BAD_PARAMETER, 451, "4.5.4"),
        (reply.TIMED_OUT, 421, "4.4.2"),
        (reply.OK_RCPT, 250, "2.1.5"),
    ],
)
def test_soft_bounce_makes_a_refusal_temporary_and_nothing_else(kind: Kind, code: int, enhanced: str) -> None:
    soft = kind.softened()
    assert (soft.code, soft.enhanced, soft.wording, soft.reason) == (code, enhanced, kind.wording, kind.reason)


@pytest.mark.parametrize("name", KINDS)
def test_no_reply_stays_permanent_under_soft_bounce(name: str) -> None:
    assert KINDS[name].softened().code < 500


@pytest.mark.parametrize(
    ("code", "enhanced", "line_start"),
    [
        (550, "5.1.1", "550 5.1.1 "),
        (550, "", "550 5.0.0 "),
        (550, "4.1.1", "550 5.0.0 "),
        (554, "5.7.1\r\n", "554 5.0.0 "),
        (450, "4.2.0", "450 4.2.0 "),
        (421, "4.3.2", "451 4.3.2 "),
        (0, "", "451 4.0.0 "),
        (250, "2.0.0", "451 4.0.0 "),
        (999, "9.9.9", "554 5.0.0 "),
    ],
)
def test_a_next_hop_is_quoted_by_its_codes_in_our_words(code: int, enhanced: str, line_start: str) -> None:
    kind = from_next_hop(code, enhanced)
    assert kind.line().startswith(line_start)
    assert kind.reason == reply.NEXT_HOP_REASON


@given(st.integers(), st.text(max_size=10))
def test_whatever_a_next_hop_says_makes_a_lawful_refusal(code: int, enhanced: str) -> None:
    assert 400 <= from_next_hop(code, enhanced).code <= 599
