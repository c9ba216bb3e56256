"""Questions about logins and their answers on the wire: they come out as they went in, and anything else is told apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.auth.question import (
    QUESTION,
    REPLY,
    FrameError,
    Question,
    Reply,
    Result,
    Step,
    Unpacker,
    pack,
    question_in,
    question_out,
    reply_in,
    reply_out,
    unpacked,
)
from relay.config.auth import Mechanism
from relay.mail.address import Mailbox
from relay.policy.ownership import Account, Grant

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60)
MAILBOXES = st.frozensets(
    st.builds(Mailbox, st.from_regex(r"[a-z]{1,8}@[a-z]{1,8}\.example", fullmatch=True)), max_size=5
)
QUESTIONS = st.builds(
    Question, st.sampled_from(Step), st.sampled_from(Mechanism), TEXT, st.binary(max_size=9300), st.binary(max_size=80),
    st.binary(max_size=64),
)  # fmt: skip
REPLIES = st.builds(
    Reply, st.sampled_from(Result), st.binary(max_size=200),
    st.none() | st.builds(Account, TEXT, MAILBOXES, st.sampled_from(Grant)), TEXT, TEXT,
)  # fmt: skip


@given(st.integers(0, 0xFFFFFFFF), TEXT, TEXT, QUESTIONS, REPLIES, st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_what_is_sent_arrives_however_it_is_cut(
    tag: int, client: str, listener: str, question: Question, reply: Reply, step: int
) -> None:
    stream = question_out(tag, client, listener, question) + pack({"tell": "offers"}) + reply_out(tag, reply)
    unpacker = Unpacker()
    frames = [frame for at in range(0, len(stream), step) for frame in unpacker.feed(stream[at : at + step])]
    assert [frames[0][0], frames[2][0]] == [QUESTION, REPLY]
    assert question_in(frames[0]) == (tag, client, listener, question)
    assert unpacked(frames[1]) == {"tell": "offers"}
    assert reply_in(frames[2]) == (tag, reply)


@given(st.binary(max_size=80))
@settings(deadline=None, max_examples=100)
def test_other_octets_are_told_apart(octets: bytes) -> None:
    for read in (question_in, reply_in, unpacked):
        with pytest.raises(FrameError):
            read(octets + b"\xff{")


def test_a_frame_that_is_too_long_is_refused_before_it_is_there() -> None:
    for size in (0, 1024 * 1024 + 1):
        with pytest.raises(FrameError):
            list(Unpacker().feed(size.to_bytes(4, "little") + b"x"))
