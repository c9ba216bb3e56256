"""A message in chunks is the message that DATA would have brought, however it is cut into chunks and packets."""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config.schema import Config, LineEndings
from relay.inbound.chunks import Assembly, Chunk, announced
from relay.inbound.receiver import Limits, Receiver
from relay.mail import reply
from relay.mail.content import Content
from relay.mail.reply import Kind
from relay.policy.content import HeaderRules

RULES = HeaderRules(
    Config.model_validate(
        {
            "server": {"hostname": "mx.example.com"},
            "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
            "content": {"header_firewall": "off"},
        }
    )
)
PIECES = (b".", b"\r\n", b"\r", b"\n", b"x", b"\r\n.\r\n", b"..", b"A: b\r\n", b"\r\n\r\n", b" ", b"\xff")
bodies = st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join)


def receiver(endings: LineEndings, most: int = 10**9) -> Receiver:
    def open_body() -> int:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())

    return Receiver(Limits(most, 10**6, endings, RULES), b"T: x\r\n", False, open_body)


def octets_of(content: Content | Kind) -> bytes | Kind:
    if isinstance(content, Kind):
        return content
    octets = b"".join(content.chunks())
    content.close()
    return octets


def by_data(message: bytes, endings: LineEndings) -> bytes | Kind:
    """What DATA makes of it, dots doubled by the client."""
    wire = message.replace(b"\r\n.", b"\r\n..")
    wire = (b"." if wire[:1] == b"." else b"") + wire
    if message and not message.endswith(b"\r\n"):
        wire += b"\r\n"
    one = receiver(endings)
    assert one.feed(wire + b".\r\n") == len(wire) + 3
    return octets_of(one.finish())


def by_chunks(message: bytes, endings: LineEndings, cuts: list[int], packets: list[int]) -> bytes | Kind:
    one = receiver(endings)
    assembly = Assembly(None, one)  # type: ignore[arg-type] # not asked here
    places = sorted({0, len(message), *(cut % (len(message) + 1) for cut in cuts)})
    for start, stop in pairwise(places):
        chunk = Chunk(stop - start, stop == len(message), assembly, None)
        ends = sorted({start, stop, *(start + packet % (stop - start) for packet in packets)})
        for at, until in pairwise(ends):
            behind = b"NEXT" if until == stop else b""
            assert chunk.feed(message[at:until] + behind) == (until - at if until == stop else -1)
    one.end()
    return octets_of(one.finish())


@pytest.mark.parametrize("endings", LineEndings)
@given(
    message=bodies, cuts=st.lists(st.integers(0, 500), max_size=6), packets=st.lists(st.integers(0, 500), max_size=6)
)
def test_chunks_and_packets_make_no_difference(
    endings: LineEndings, message: bytes, cuts: list[int], packets: list[int]
) -> None:
    if message.endswith(b"\n") and not message.endswith(b"\r\n"):
        message += b"x"  # the end in a bare LF is the next test's
    assert by_chunks(message, endings, cuts, packets) == by_data(message, endings)


def test_a_message_that_ends_in_a_bare_lf_gets_no_empty_line() -> None:
    assert by_chunks(b"A: b\r\n\r\nx\n", LineEndings.NORMALIZE, [9], []) == b"T: x\r\nA: b\r\n\r\nx\r\n"
    assert by_chunks(b"A: b\r\n\r\nx\n", LineEndings.REFUSE, [9], []) is reply.BARE_NEWLINE_DATA


def test_a_large_message_lies_in_a_file_and_a_larger_one_is_refused() -> None:
    message = b"A: b\r\n\r\n" + b".x\r\n" * 100_000
    assert by_chunks(message, LineEndings.NORMALIZE, [1000, 70_000], [333]) == by_data(message, LineEndings.NORMALIZE)
    one = receiver(LineEndings.NORMALIZE, 1000)
    chunk = Chunk(len(message), True, Assembly(None, one), None)  # type: ignore[arg-type]
    assert chunk.feed(message + b"NOOP\r\n") == len(message)
    assert one.refusal is reply.MESSAGE_TOO_BIG


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (b"0", (0, False)),
        (b"0 LAST", (0, True)),
        (b"007  last", (7, True)),
        (b"9" * 20, (int("9" * 20), False)),
        *(
            (wrong, None)
            for wrong in (b"", b"LAST", b"-1", b"+1", b"1 2", b"1 LAST x", b"1LAST", b"0x10", b"1_0", b"9" * 21, b"1\tLAST", b"\xb2")
        ),
    ],
)  # fmt: skip
def test_the_size_is_a_number_and_nothing_else(argument: bytes, expected: tuple[int, bool] | None) -> None:
    assert announced(argument) == expected
