"""Message data: where it ends, what becomes of bare CR and LF, and that what is held stays small.

``_reference`` is the rule of the receiver's docstring written a second time, one octet after the other, with the whole
message before it; the receiver has to agree with it however the octets are cut into packets.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.config.schema import Config, LineEndings
from relay.inbound.receiver import END, Limits, Receiver
from relay.mail import reply
from relay.mail.content import MEMORY_OCTETS, Content
from relay.mail.reply import Kind
from relay.policy.content import HeaderRules
from relay.queue.store import QueueFull

TRACE = b"Received: by mx.example.com\r\n"
ROOMY = 64 * 1024 * 1024


def rules(content: dict[str, object] | None = None, hops: int = 100) -> HeaderRules:
    return HeaderRules(
        Config.model_validate(
            {
                "server": {"hostname": "mx.example.com"},
                "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
                "limits": {"hops": hops},
                "content": content or {},
            }
        )
    )


PLAIN = rules({"header_firewall": "off"})


def limits(
    message: int = ROOMY,
    header: int = ROOMY,
    endings: LineEndings = LineEndings.NORMALIZE,
    header_rules: HeaderRules = PLAIN,
) -> Limits:
    return Limits(message, header, endings, header_rules)


class Files:
    """Where bodies go; remembers the descriptors it gave out."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def open(self) -> int:
        with tempfile.TemporaryFile() as file:
            self.given.append(os.dup(file.fileno()))
        return self.given[-1]

    def still_open(self) -> list[int]:
        return [descriptor for descriptor in self.given if _is_open(descriptor)]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.fixture
def files() -> Iterator[Files]:
    made = Files()
    yield made
    for descriptor in made.still_open():
        os.close(descriptor)


def no_file() -> int:
    raise AssertionError("a small message asked for a file")


def receive(packets: list[bytes], receiver: Receiver) -> int:
    """Feed packets until the message ends; how many octets of all packets belong to it, -1 when it did not end."""
    taken = 0
    for packet in packets:
        end = receiver.feed(packet)
        if end >= 0:
            return taken + end
        taken += len(packet)
    return -1


def octets(result: Content | Kind) -> bytes:
    assert isinstance(result, Content), result
    try:
        return b"".join(result.chunks())
    finally:
        result.close()


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """``stream`` as packets, cut at ``places``."""
    edges = [0, *sorted({place for place in places if 0 < place < len(stream)}), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


# --- the rule, a second time -------------------------------------------------------------------------------------------


def _end(stream: bytes) -> int:
    """Position behind CR LF . CR LF; the line end of DATA itself stands before the first octet."""
    return (b"\r\n" + stream).index(b"\r\n.\r\n") + 5 - 2


def _reference(stream: bytes) -> bytes:
    body = stream[: _end(stream) - 3]
    out = bytearray()
    at = 0
    while at < len(body):
        if body[at : at + 2] == b"\r\n":
            out += b"\r\n"
            at += 2
        elif body[at] == 0x0A:
            out += b"\r\n"
            at += 1
            if body[at : at + 1] == b".":
                out += b"."
        elif body[at] == 0x0D:
            out += b" "
            at += 1
        else:
            out.append(body[at])
            at += 1
    return b"\r\n".join(b".." if line == b"." else line for line in bytes(out).split(b"\r\n"))


def _is_clean(stream: bytes) -> bool:
    body = stream[: _end(stream) - 3]
    return not re.search(rb"\r(?!\n)|(?<!\r)\n", body)


LINE_ENDS = (b"\r", b"\n", b"\r\n", b"\r\r\n", b"\n\n", b"\r\n\r\n")
DOTS = (b".", b"..", b"\r\n.", b"\n.", b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r.\r", b"\r\n.\r")
REST = (b"a", b" ", b"\t", b":", b"\x00", b"\xe4", b"Subject: x")
PIECES = st.sampled_from([*LINE_ENDS, *DOTS, *REST])
STREAMS = st.lists(PIECES, max_size=14).map(b"".join).map(lambda octets: octets + b"\r\n.\r\nQUIT\r\n")
PLACES = st.lists(st.integers(min_value=0, max_value=60), max_size=12)


@settings(max_examples=1500, deadline=None)
@given(STREAMS, PLACES)
@example(b"\r\r\r\r\r\r\r\n.\r\n", [7])
@example(b"a\n.\r\n.\r\n", [2, 3])
@example(b".\n\r\n.\r\n", [1])
@example(b".\r\r\n.\r\n", [1, 2])
def test_the_receiver_agrees_with_the_rule_however_the_octets_come(stream: bytes, places: list[int]) -> None:
    receiver = Receiver(limits(), TRACE, False, no_file)
    assert receive(cut(stream, places), receiver) == _end(stream)
    message = _reference(stream)
    assert octets(receiver.finish()) == TRACE + (b"\r\n" if message[:1] in (b" ", b"\t") else b"") + message


@settings(max_examples=500, deadline=None)
@given(STREAMS, PLACES)
def test_what_goes_on_has_neither_a_bare_cr_nor_a_bare_lf_nor_an_end(stream: bytes, places: list[int]) -> None:
    receiver = Receiver(limits(), b"", False, no_file)
    receive(cut(stream, places), receiver)
    message = octets(receiver.finish())
    rest = message.replace(b"\r\n", b"")
    assert b"\r" not in rest
    assert b"\n" not in rest
    assert END not in b"\r\n" + message + b".\r"
    assert not message or message.endswith(b"\r\n")


@settings(max_examples=500, deadline=None)
@given(STREAMS, PLACES)
def test_what_goes_on_is_not_changed_by_a_second_relay(stream: bytes, places: list[int]) -> None:
    first = Receiver(limits(), b"", False, no_file)
    receive([stream], first)
    once = octets(first.finish())
    second = Receiver(limits(), b"", False, no_file)
    receive(cut(once + b".\r\n", places), second)
    assert octets(second.finish()) == once


@settings(max_examples=500, deadline=None)
@given(STREAMS, PLACES)
@example(b"\r\r\r\r\r\r\r\n.\r\n", [7])
def test_refuse_refuses_exactly_what_normalize_would_change(stream: bytes, places: list[int]) -> None:
    receiver = Receiver(limits(endings=LineEndings.REFUSE), b"", False, no_file)
    assert receive(cut(stream, places), receiver) == _end(stream)
    result = receiver.finish()
    if _is_clean(stream):
        assert octets(result) == stream[: _end(stream) - 3]
    else:
        assert result is reply.BARE_NEWLINE_DATA


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5])
def test_every_way_to_write_an_end_is_no_end_but_one(block: int) -> None:
    for before in (b"", b"\r", b"\n", b"\r\n", b"\n\r", b"\r\r", b"\n\n"):
        for after in (b"", b"\r", b"\n", b"\n\r", b"\r\r"):
            for dot in (b".", b"..", b". ", b" .", b".\x00"):
                stream = b"text" + before + dot + after + b"more\r\n.\r\n"
                receiver = Receiver(limits(), b"", False, no_file)
                packets = [stream[at : at + block] for at in range(0, len(stream), block)]
                assert receive(packets, receiver) == len(stream), stream
                octets(receiver.finish())


# --- large messages ----------------------------------------------------------------------------------------------------

BORDERS = (MEMORY_OCTETS, 256 * 1024)
CORE = (b"\r\n..\r\n", b"\r\n..", b".\r\n", b"\r\n", b"\r\n..\r\n..\r\n")


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("core", CORE)
def test_dots_and_line_ends_at_a_border_pass_unchanged(border: int, core: bytes, files: Files) -> None:
    for shift in range(-len(core) - 1, 3):
        message = b"Subject: x\r\n\r\n"
        message += b"a" * (border + shift - len(message)) + core + b"b" * 300_000 + b"\r\n"
        for packets in (
            [message + b".\r\n"],
            cut(message + b".\r\n", [border]),
            cut(message + b".\r\n", [border + shift]),
        ):
            receiver = Receiver(limits(), TRACE, False, files.open)
            assert receive(packets, receiver) == len(message) + 3
            assert octets(receiver.finish()) == TRACE + message
    assert files.still_open() == []


def test_a_large_message_with_bare_line_ends_follows_the_rule_too(files: Files) -> None:
    rng = random.Random(7)
    words = (b"\r", b"\n", b".", b"\r\n", b"\n.", b"x" * 50, b"\r\n..")
    stream = b"a" + re.sub(rb"(?<=\r\n)\.(?=\r\n)", b"..", b"".join(rng.choices(words, k=20_000))) + END
    places = [rng.randrange(len(stream)) for _ in range(200)]
    receiver = Receiver(limits(), TRACE, False, files.open)
    assert receive(cut(stream, places), receiver) == _end(stream)
    content = receiver.finish()
    assert isinstance(content, Content)
    assert content.memory is None
    assert octets(content) == TRACE + _reference(stream)


def test_a_message_over_the_memory_limit_is_in_a_file_and_not_in_memory(files: Files) -> None:
    block = b"x" * 998 + b"\r\n"
    receiver = Receiver(limits(), TRACE, False, files.open)
    tracemalloc.start()
    try:
        receiver.feed(b"Subject: big\r\n\r\n")
        for _ in range(16):
            receiver.feed(block * 1000)
        assert receiver.feed(b".\r\n") == 3
        content = receiver.finish()
        assert tracemalloc.get_traced_memory()[1] < 6 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert isinstance(content, Content)
    assert (content.memory, content.size) == (None, len(TRACE) + 16 + 16_000_000)
    assert content.descriptor == files.given[0]
    content.close()
    assert files.still_open() == []


@pytest.mark.parametrize("line_ends", [b"x" * 1000, b"\r\n", b"\n", b"\r", b"."])
def test_what_is_too_big_is_read_to_its_end_without_being_kept(line_ends: bytes, files: Files) -> None:
    receiver = Receiver(limits(message=100_000), TRACE, False, files.open)
    block = (line_ends * 65_536)[:65_536].replace(b"\r\n.\r\n", b"\r\n..\r\n")
    tracemalloc.start()
    try:
        receiver.feed(b"Subject: x\r\n\r\n")
        for _ in range(300):
            assert receiver.feed(block) == -1
        assert tracemalloc.get_traced_memory()[1] < 2 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert receiver.feed(b"\r\n.\r\n") > 0
    assert receiver.finish() is reply.MESSAGE_TOO_BIG
    assert files.still_open() == []


# --- limits and faults -------------------------------------------------------------------------------------------------


def outcome(message: bytes, limit: Limits, *, trusted: bool = False) -> Content | Kind:
    """The result of one message in one packet and in packets of one octet, which must be the same."""
    results = []
    for packets in ([message + b".\r\n"], cut(message + b".\r\n", list(range(len(message) + 3)))):
        receiver = Receiver(limit, TRACE, trusted, no_file)
        assert receive(packets, receiver) == len(message) + 3
        results.append(receiver.finish())
    one, many = results
    if isinstance(one, Content):
        assert octets(one) == octets(many)
        return Content.of(octets(one))
    assert one is many
    return one


@pytest.mark.parametrize(
    ("message", "limit", "expected"),
    [
        (b"Subject: x\r\n\r\n" + b"a" * 84 + b"\r\n", limits(message=100), None),
        (b"Subject: x\r\n\r\n" + b"a" * 85 + b"\r\n", limits(message=100), reply.MESSAGE_TOO_BIG),
        (b"A: " + b"b" * 45 + b"\r\n\r\nbody\r\n", limits(header=50), None),
        (b"A: " + b"b" * 46 + b"\r\n\r\nbody\r\n", limits(header=50), reply.HEADER_TOO_BIG),
        (b"A: " + b"b" * 95 + b"\r\n", limits(header=50), reply.HEADER_TOO_BIG),
        (b"Received: x\r\n" * 2 + b"\r\nbody\r\n", limits(header_rules=rules(hops=3)), None),
        (b"Received: x\r\n" * 3 + b"\r\nbody\r\n", limits(header_rules=rules(hops=3)), reply.TOO_MANY_HOPS),
        (b"RECEIVED: x\r\n.received: x\r\n" * 2, limits(header_rules=rules(hops=4)), reply.TOO_MANY_HOPS),
        (b"A: b\r\n\r\n" + b"Received: x\r\n" * 9, limits(header_rules=rules(hops=3)), None),
    ],
    ids=[
        "fits",
        "over",
        "header fits",
        "header over",
        "header alone over",
        "hops fit",
        "loop",
        "loop in disguise",
        "body",
    ],
)
def test_limits_count_to_the_octet(message: bytes, limit: Limits, expected: Kind | None) -> None:
    result = outcome(message, limit)
    if expected is None:
        assert octets(result) == TRACE + message
    else:
        assert result is expected


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\r\n",
        b"\r\nbody\r\n",
        b"Subject: x\r\n",
        b"Subject: x\r\n\r\n",
        b"no header at all\r\n",
        b"..\r\n",
        b"\r\n\r\n",
    ],
    ids=["nothing", "empty line", "no header", "header only", "empty body", "one line", "a stuffed dot", "two lines"],
)
def test_odd_messages_pass_as_they_are(message: bytes) -> None:
    assert octets(outcome(message, limits(header_rules=rules()))) == TRACE + message


@pytest.mark.parametrize("message", [b" for x\r\n", b"\tx\r\nSubject: y\r\n\r\nbody\r\n", b" \r\n\r\n"])
def test_a_message_that_begins_with_a_continued_line_has_no_header_and_does_not_continue_the_trace(
    message: bytes,
) -> None:
    assert octets(outcome(message, limits(header_rules=rules()))) == TRACE + b"\r\n" + message


@pytest.mark.parametrize("end", [b"\r\n\r\nbody\r\n", b"\r\n"], ids=["with body", "header only"])
def test_fields_are_removed_and_named(end: bytes) -> None:
    message = b"Subject: x\r\nX-MS-Exchange-Organization-SCL: -1\r\n folded\r\nTo: y" + end
    receiver = Receiver(limits(header_rules=rules()), TRACE, False, no_file)
    receive([message + b".\r\n"], receiver)
    assert octets(receiver.finish()) == TRACE + b"Subject: x\r\nTo: y" + end
    assert receiver.removed == ("x-ms-exchange-organization-scl",)
    assert octets(outcome(message, limits(header_rules=rules()), trusted=True)) == TRACE + message


def test_a_field_made_by_a_bare_lf_is_removed_as_well() -> None:
    message = b"Subject: x\nX-MS-Exchange-Organization-SCL: -1\nTo: y\r\n\r\n"
    assert octets(outcome(message, limits(header_rules=rules()))) == TRACE + b"Subject: x\r\nTo: y\r\n\r\n"


def test_a_body_that_has_no_place_is_refused_and_the_rest_read() -> None:
    def full() -> int:
        raise QueueFull("no space left")

    receiver = Receiver(limits(), TRACE, False, full)
    assert receive([b"A: b\r\n\r\n" + b"x" * 200_000, b"y" * 100_000 + b"\r\n.\r\n"], receiver) == 300_013
    assert receiver.finish() is reply.QUEUE_FULL


def test_a_body_that_cannot_be_written_is_refused_and_its_file_closed() -> None:
    opened: list[int] = []

    def read_only() -> int:
        opened.append(os.open(os.devnull, os.O_RDONLY))
        return opened[0]

    receiver = Receiver(limits(), TRACE, False, read_only)
    assert receive([b"A: b\r\n\r\n" + b"x" * 200_000 + b"\r\n.\r\n"], receiver) > 0
    assert receiver.finish() is reply.QUEUE_FULL
    assert not _is_open(opened[0])


def test_discarding_half_a_message_closes_its_file(files: Files) -> None:
    receiver = Receiver(limits(), TRACE, False, files.open)
    receiver.feed(b"A: b\r\n\r\n" + b"x" * 200_000)
    assert files.still_open() == files.given != []
    receiver.discard()
    receiver.discard()
    assert files.still_open() == []
