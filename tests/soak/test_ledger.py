"""The books of the soak notice what they are kept for."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from soak.ledger import Ledger, Sent, Told, Transmission
from soak.message import Mill, read, read_report
from tests.bed.wire import letter

TO = ("a@example.com", "b@example.com")


class Books:
    """One message for two recipients."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.sent: Sent = self.ledger.send("m", TO)
        self.named: set[str] = set()

    def told(self, told: Told, queue_id: str = "") -> Books:
        self.sent.transmissions.append(Transmission(0.0, told, "", queue_id))
        return self

    def came(self, queue_id: str, to: tuple[str, ...] = TO, *, kept: bool = True, whole: bool = True) -> Books:
        self.ledger.arrived("m", queue_id, to, kept=kept, answer="", whole=whole)
        return self

    def reported(self, queue_id: str, for_id: str, to: tuple[str, ...]) -> Books:
        self.ledger.reported(queue_id, for_id, to)
        return self

    def journal(self, *queue_ids: str) -> Books:
        self.named.update(queue_ids)
        return self


def books() -> Books:
    return Books()


BALANCED: dict[str, tuple[Callable[[], Books], tuple[int, int]]] = {
    "delivered": (lambda: books().told(Told.DELIVERED, "1").came("1"), (0, 0)),
    "delivered to each by itself": (
        lambda: books().told(Told.QUEUED, "1").came("1", TO[:1]).came("1", TO[1:]),
        (0, 0),
    ),
    "refused by the next hop first": (lambda: books().told(Told.QUEUED, "1").came("1", kept=False).came("1"), (0, 0)),
    "reported for one": (
        lambda: books().told(Told.QUEUED, "1").came("1", TO[:1]).reported("R", "1", TO[1:]),
        (0, 0),
    ),
    "refused": (lambda: books().told(Told.REFUSED), (0, 0)),
    "never told, never came": (lambda: books().told(Told.NO_REPLY), (0, 0)),
    "named by the journal": (lambda: books().told(Told.QUEUED, "1").came("1").came("1").journal("1"), (2, 0)),
    "sent again without reply": (
        lambda: books().told(Told.NO_REPLY).told(Told.QUEUED, "2").came("1").came("2", TO),
        (0, 2),
    ),
    "both": (
        lambda: books().told(Told.NO_REPLY).told(Told.QUEUED, "2").came("1").came("2").came("2", TO[:1]).journal("2"),
        (1, 2),
    ),
    "came, and a later attempt was refused": (
        lambda: books().told(Told.QUEUED, "1").came("1").reported("R", "1", TO).journal("1"),
        (2, 0),
    ),
}


@pytest.mark.parametrize("name", BALANCED)
def test_what_adds_up_is_counted(name: str) -> None:
    make, (by_journal, by_missing_reply) = BALANCED[name]
    made = make()
    account = made.ledger.balance(made.named)
    assert account.balanced, account
    assert (account.by_journal, account.by_missing_reply) == (by_journal, by_missing_reply)


LOST: dict[str, Callable[[], Books]] = {
    "never came": lambda: books().told(Told.DELIVERED, "1"),
    "came for one only": lambda: books().told(Told.QUEUED, "1").came("1", TO[:1]),
    "came damaged": lambda: books().told(Told.QUEUED, "1").came("1", whole=False),
    "only the copy before came": lambda: books().told(Told.NO_REPLY).told(Told.QUEUED, "2").came("1"),
    "came, and was not kept": lambda: books().told(Told.QUEUED, "1").came("1", kept=False),
    "the report is about another": lambda: books().told(Told.QUEUED, "1").reported("R", "2", TO),
}


@pytest.mark.parametrize("name", LOST)
def test_a_loss_is_noticed(name: str) -> None:
    made = LOST[name]()
    assert made.ledger.balance(made.named).lost


UNEXPLAINED: dict[str, Callable[[], Books]] = {
    "twice, unnamed": lambda: books().told(Told.QUEUED, "1").came("1").came("1"),
    "twice for one of two": lambda: books().told(Told.QUEUED, "1").came("1").came("1", TO[1:]),
    "another was named": lambda: books().told(Told.QUEUED, "1").came("1").came("1").journal("2"),
    "a copy nobody was left without reply for": lambda: books().told(Told.QUEUED, "2").came("1").came("2"),
    "two such, one missing reply": (
        lambda: books().told(Told.NO_REPLY).told(Told.QUEUED, "3").came("1").came("2").came("3")
    ),
    "refused, and it came": lambda: books().told(Told.REFUSED).came("1"),
    "put off, and it came": lambda: books().told(Told.LATER).told(Told.QUEUED, "2").came("1").came("2"),
    "it ended before the dot, and it came": lambda: books().told(Told.NOT_SENT).told(Told.QUEUED, "2").came("1").came("2"),
    "delivered and reported": lambda: books().told(Told.QUEUED, "1").came("1").reported("R", "1", TO),
    "one report twice": (
        lambda: books().told(Told.QUEUED, "1").reported("R", "1", TO).reported("R", "1", TO)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_a_copy_without_reason_is_noticed(name: str) -> None:
    made = UNEXPLAINED[name]()
    account = made.ledger.balance(made.named)
    assert account.unexplained


def test_a_message_that_nobody_sent_is_noticed() -> None:
    made = books().told(Told.DELIVERED, "1").came("1")
    made.ledger.arrived("other", "2", TO, kept=True, answer="", whole=True)
    assert made.ledger.balance(()).unexplained


TRACE = b"Received: from c (unknown [127.0.0.1])\r\n\tby mx.example.com with ESMTP id 1A2B;\r\n\tTue, 14 Nov 2023\r\n"


def test_a_message_tells_who_it_is_and_whether_it_is_whole() -> None:
    made = Mill(random.Random(1)).make("worker-0-17", "s@example.net", 5_000)
    assert 4_900 < len(made) < 5_600
    assert read(TRACE + made) == ("worker-0-17", "1A2B", True)
    assert read(TRACE + made[:-80]) == ("worker-0-17", "1A2B", False)
    assert read(TRACE + made.replace(b"Subject", b"subject")) == ("worker-0-17", "1A2B", False)
    assert not read(made).whole
    assert not read(TRACE + letter()).whole
    assert read_report(TRACE + made) is None
