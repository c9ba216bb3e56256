"""Owns: one run of the whole relay, every call on record: mail of all kinds, next hops that refuse, delay and go away.

``traced_run`` is what the tests of evidence and of power cuts look at; ``Run.lost`` says what a spool lacks.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bed.next_hop import Drop, NextHop, Say, Step
from tests.bed.relay import RelayRunner, children_of
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace, letter, unstuffed
from tests.durability.dialogue import Answered, answers
from tests.durability.power import Found
from tests.durability.proof import acknowledgements
from tests.durability.trace import CALLS, HEARS, Call, attached, read

QUEUED: Final = rb"250 2\.0\.0 Ok: queued as (\w+)\r\n"
SESSIONS: Final = 6
MESSAGES: Final = 100
REPORT: Final = "report on "
"""How a report's envelope names the message it is about, in place of a client."""

LARGE: Final = letter("large", b"a line of a body that lies in a file\r\n" * 3000)
"""For tests that send single messages."""

_REPORTED: Final = re.compile(rb"^Final-Recipient: rfc822; (\S+)\r$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Letter:
    """A message of the load; every recipient stands in one message only."""

    sender: str
    recipients: tuple[str, ...]
    octets: bytes

    @classmethod
    def number(cls, number: int) -> Letter:
        """Every sixth is too large for the database; bobs are refused, carols greylisted; some have no sender."""
        line = b".%06d begins with a dot and is one of many\r\n" % number
        octets = 70_000 + number * 700 if number % 6 == 5 else 100 + number % 7 * 400
        names = {1: ["bob"], 2: ["carol"], 3: ["bob", "carol"]}.get(number % 4, [])
        return cls(
            "" if number % 10 == 7 else f"sender{number}@example.net",
            tuple(f"{name}{number}@example.com" for name in ["user", *names]),
            letter(f"number {number}", line * (octets // len(line) + 1)),
        )


@dataclass(frozen=True, slots=True)
class Run:
    """``before``: the spool when the trace began; ``letters`` by the identifier their client was told."""

    spool: Path
    before: Path
    calls: list[Call]
    letters: Mapping[str, Letter]
    acked: Mapping[str, int]
    """The line at which the client was told."""
    answers: list[Answered]

    def moments(self) -> set[int]:
        """Lines at which a cut makes a difference: something reaches the disk, a client is told, the relay is told."""
        names = {"link", "linkat", "unlink", "unlinkat"}
        lines = {line for each in self.calls if self._on_disk(each, names) for line in (each.begin, each.end)}
        lines |= {*self.acked.values(), *(each.line for each in self.answers)}
        return {line for line in lines if line >= min(self.acked.values())}

    def _on_disk(self, call: Call, names: set[str]) -> bool:
        return call.path.startswith(str(self.spool / "queue")) or call.name in names

    def owed(self, cut: int) -> dict[str, Letter]:
        """The recipients whom the relay owes something at a cut: acknowledged, and not known to be served."""
        served = {each.recipient for each in self.answers if each.line <= cut and each.code < 300}
        return {
            recipient: each
            for name, each in self.letters.items()
            if self.acked[name] <= cut
            for recipient in each.recipients
            if recipient not in served
        }

    def may_be_reported(self, cut: int) -> set[str]:
        """Recipients refused for good before the cut: a report may stand in their place."""
        return {each.recipient for each in self.answers if each.line <= cut and each.code >= 500}

    def reported(self, cut: int) -> set[str]:
        """Recipients whose report has reached its addressee before the cut."""
        return reported_in(
            each.message for each in self.answers if each.line <= cut and each.code < 300 and not each.sender
        )

    def lost(self, cut: int, found: Mapping[str, Found]) -> list[str]:
        """What is wrong with a queue that was found after a cut; empty when nothing is."""
        problems = [
            f"{name} is not whole"
            for name, each in found.items()
            if not each.envelope.client.startswith(REPORT)
            and after_trace(unstuffed(each.octets), name) != self.letters[name].octets
        ]
        there = {recipient for each in found.values() for recipient in each.envelope.recipients}
        reports = [each.octets for each in found.values() if each.envelope.client.startswith(REPORT)]
        told = reported_in(reports) | self.reported(cut)
        refused = self.may_be_reported(cut)
        problems += [
            f"{recipient} has neither message nor report"
            for recipient, each in self.owed(cut).items()
            if recipient not in there and not (recipient in refused and (recipient in told or not each.sender))
        ]
        return problems


def reported_in(messages: Iterable[bytes]) -> set[str]:
    """The recipients whom reports are about."""
    return {name.decode() for each in messages for name in _REPORTED.findall(each)}


@contextmanager
def in_front_of(folder: Path, hop: NextHop, outside: NextHop) -> Iterator[RelayRunner]:
    """A relay for the load, not started; ``outside`` gets the reports."""
    recipients = {recipient for number in range(MESSAGES) for recipient in Letter.number(number).recipients}
    relay = RelayRunner(
        folder,
        hop.route,
        default_next_hop=outside.route,
        recipients=sorted(recipients),
        config={
            "server": {"workers": 2},
            "delivery": {"express": False},
            "queue": {"retry_s": [0.3], "retry_jitter": 0.0},
        },
    )
    try:
        yield relay
    finally:
        relay.close()


@contextmanager
def next_hops() -> Iterator[tuple[NextHop, NextHop]]:
    """Exchange's stand-in and the outside's."""
    hop, outside = NextHop(), NextHop()
    try:
        yield hop, outside
    finally:
        hop.close()
        outside.close()
    assert hop.violations + outside.violations == []


def traced_run(folder: Path) -> Run:
    """Start a relay, trace all its processes, send the load, stop it with mail and reports left in its queue."""
    with next_hops() as (hop, outside), in_front_of(folder, hop, outside) as relay:
        relay.start()
        shutil.copytree(relay.spool / "queue", folder / "before" / "queue")
        processes = [relay.supervisor, *children_of(relay.supervisor)]
        with attached(processes, folder / "trace", calls=f"{CALLS},{HEARS}") as threads:
            letters = _load(relay, hop, outside)
            assert relay.stop() == 0
    calls = read(folder / "trace", threads)
    acked = {each.id.decode(): each.line for each in acknowledgements(calls, QUEUED)}
    return Run(relay.spool, folder / "before", calls, letters, acked, answers(calls))


def _load(relay: RelayRunner, hop: NextHop, outside: NextHop) -> dict[str, Letter]:
    letters: dict[str, Letter] = {}

    def session(first: int, last: int) -> None:
        with relay.client() as client:
            client.open()
            for each in map(Letter.number, range(first, last)):
                reply = client.deliver(each.sender, each.recipients, each.octets)
                assert reply.text.startswith("2.0.0 Ok: queued as"), reply
                letters[reply.text.split()[-1]] = each

    def send(first: int, last: int) -> None:
        step = (last - first) // SESSIONS + 1
        with ThreadPoolExecutor(SESSIONS) as pool:
            list(pool.map(lambda start: session(start, min(start + step, last)), range(first, last, step)))

    def all_settled() -> bool:
        over = {r for t in hop.transactions if t.reply[:1] in {"2", "5"} for r in t.recipients}
        return all({r for r in each.recipients if not r.startswith("bob")} <= over for each in letters.values())

    hop.on(Step.RCPT, Say("550 5.1.1 no such user"), only="<bob")
    hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="<carol", times=8)
    hop.on(Step.FINAL, Say("451 4.3.0 later"), times=3)
    hop.on(Step.FINAL, Drop(), times=2)
    hop.on(Step.FINAL, Say("554 5.7.1 no"), times=2)
    outside.on(Step.RCPT, Say("450 4.2.1 greylisted"), times=2)
    send(0, 50)
    hop.stop()
    send(50, 65)
    hop.start()
    wait_for(all_settled, "end of the deliveries")
    outside.wait_for_accepted(3)
    outside.stop()
    send(65, 85)
    wait_for(all_settled, "end of the deliveries")
    hop.stop()
    send(85, MESSAGES)
    return letters
