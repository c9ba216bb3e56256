"""The outgoing transaction against a server that says what a test tells it, octet by octet, on a real socket."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from relay.mail.answer import Answer, Stage
from relay.mail.content import Content
from relay.outbound.client import REPLY_OCTETS, split_text
from tests.bed.certificates import Authority
from tests.unit.scripted_hop import (
    ALL,
    Hop,
    Message,
    Script,
    Talk,
    brief,
    configuration,
    deliver,
    good,
    serve,
    wait_until,
)

# --- what goes out -----------------------------------------------------------------------------------------------


async def test_envelope_and_body_go_out_in_two_writes_and_the_body_as_it_is(hop: Hop) -> None:
    seen: list[bytes] = []

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        seen.append(await talk.reader.readuntil(b"DATA\r\n"))
        await talk.say(b"250 ok\r\n250 ok\r\n250 ok\r\n354 go\r\n")
        seen.append(await talk.hear_message())
        await talk.say("250 2.0.0 taken")
        await talk.until_closed()

    hop.scripts = [script]
    answers = await deliver(hop, Message("u", "v", body_8bit=True))
    assert answers == [Answer(Stage.FINAL, 250, "2.0.0", "taken")] * 2
    assert seen == [
        b"MAIL FROM:<a@example.net> SIZE=21 BODY=8BITMIME\r\n"
        b"RCPT TO:<u@example.com>\r\nRCPT TO:<v@example.com>\r\nDATA\r\n",
        b"Subject: x\r\n\r\n..dot\r\n.\r\n",
    ]


async def test_without_pipelining_each_command_waits_for_the_reply_to_the_last(hop: Hop) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello()
        for reply in ("250 ok", "250 ok", "550 5.1.1 no", "354 go"):
            await talk.hear()
            await asyncio.sleep(0)
            assert not talk.reader._buffer  # type: ignore[attr-defined]
            await talk.say(reply)
        await talk.hear_message()
        await talk.say("250 2.0.0 taken")

    hop.scripts = [script]
    answers = await deliver(hop, Message("u", "v", body_8bit=True))
    assert brief(answers) == [(Stage.FINAL, 250, "2.0.0"), (Stage.RCPT, 550, "5.1.1")]
    assert hop.talks[0].heard[1:] == [
        "MAIL FROM:<a@example.net>", "RCPT TO:<u@example.com>", "RCPT TO:<v@example.com>", "DATA",
    ]  # fmt: skip


async def test_a_body_file_is_sent_in_pieces_and_the_dot_asked_for_last(hop: Hop, tmp_path: Path) -> None:
    octets = b"".join(b"%08d line\r\n" % number for number in range(200_000))
    path = tmp_path / "body"
    path.write_bytes(octets)
    received: list[bytes] = []
    message = Message(content=Content(None, os.open(path, os.O_RDONLY), len(octets)))

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope("250 ok", "250 ok", "354 go")
        body = b""
        while not body.endswith(b"\r\n.\r\n"):
            body += await talk.reader.read(65536)
        assert message.asked == 1
        received.append(body)
        await talk.say("250 taken")

    hop.scripts = [script]
    [answer] = await deliver(hop, message)
    message.content.close()
    assert (answer.stage, answer.code) == (Stage.FINAL, 250)
    assert received == [octets + b".\r\n"]


@pytest.mark.parametrize("kept", ["memory", "file"])
async def test_a_message_that_may_not_finish_is_broken_off_before_the_dot(hop: Hop, tmp_path: Path, kept: str) -> None:
    heard: list[bytes] = []
    path = tmp_path / "body"
    path.write_bytes(b"x\r\n")
    content = Content(None, os.open(path, os.O_RDONLY), 3) if kept == "file" else None
    message = Message(content=content, finish=False)

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope("250 ok", "250 ok", "354 go")
        heard.append(await talk.until_closed())

    hop.scripts = [script]
    [answer] = await deliver(hop, message)
    message.content.close()
    assert (answer.stage, answer.code) == (Stage.DATA, 0)
    assert "lease" in answer.text
    await wait_until(lambda: heard)
    assert heard in ([b""], [b"x\r\n"])


async def test_a_body_that_is_shorter_than_it_should_be_is_never_finished(hop: Hop, tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"x\r\n")
    message = Message(content=Content(None, os.open(path, os.O_RDONLY), 30))
    hop.scripts = [good]
    [answer] = await deliver(hop, message)
    message.content.close()
    assert (answer.stage, answer.code) == (Stage.DATA, 0)
    assert "body" in answer.text
    assert message.asked == 0


# --- what comes back ---------------------------------------------------------------------------------------------


async def test_replies_may_come_octet_by_octet(hop: Hop) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.hear("MAIL")
        for octet in b"250-one\r\n250 two\r\n250 ok\r\n354 go\r\n":
            await talk.say(bytes([octet]))
            await asyncio.sleep(0)
        await talk.hear_message()
        for octet in b"250-2.0.0 it is\r\n250 2.0.0 taken\r\n":
            await talk.say(bytes([octet]))
            await asyncio.sleep(0)
        await talk.until_closed()

    hop.scripts = [script]
    assert await deliver(hop) == [Answer(Stage.FINAL, 250, "2.0.0", "it is taken")]


OK, GO = "250 ok", "354 go"


def answering(
    mail: str = OK, rcpt: Sequence[str] = (), data: str = GO, final: str = OK, extensions: Sequence[str] = ALL
) -> Script:
    """A server that answers so in the first transaction of a connection, and well ever after."""

    async def script(talk: Talk) -> None:
        await talk.hello(*extensions)
        recipients = list(rcpt)
        first = {"MAIL": mail, "DATA": data}
        while True:
            verb = (await talk.hear()).split()[0]
            if verb == "MAIL" and "MAIL" not in first:
                recipients, first, last[:] = [], {"MAIL": OK}, []
            reply = (
                recipients.pop(0) if verb == "RCPT" and recipients else first.pop(verb, GO if verb == "DATA" else OK)
            )
            await talk.say(reply)
            if reply.startswith("354"):
                await talk.hear_message()
                await talk.say(last.pop() if last else OK)

    last = [final]
    return script


@pytest.mark.parametrize("extensions", [ALL, ()], ids=["pipelining", "one-by-one"])
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ({"rcpt": [OK, "450 4.2.1 later", "550 5.1.1 no"]}, [(Stage.FINAL, 250), (Stage.RCPT, 450), (Stage.RCPT, 550)]),
        ({"rcpt": [OK, "450 later", "550 no"], "final": "554 bad"},
         [(Stage.FINAL, 554), (Stage.RCPT, 450), (Stage.RCPT, 550)]),
        ({"rcpt": ["550 no"] * 3, "data": "554 no valid recipients"}, [(Stage.RCPT, 550)] * 3),
        ({"rcpt": ["550 no", "450 no", "550 no"], "data": "503 no valid recipients"},
         [(Stage.RCPT, 550), (Stage.RCPT, 450), (Stage.RCPT, 550)]),
        ({"rcpt": ["550 no"] * 3, "final": "554 no valid recipients"}, [(Stage.RCPT, 550)] * 3),
        ({"rcpt": ["550 no"] * 3, "final": "250 an empty message for nobody"}, [(Stage.RCPT, 550)] * 3),
        ({"mail": "552 5.3.4 big", "rcpt": ["503 no"] * 3, "data": "503 no"}, [(Stage.MAIL, 552)] * 3),
        ({"rcpt": [OK, OK, "450 no"], "data": "451 4.3.0 no"},
         [(Stage.DATA, 451), (Stage.DATA, 451), (Stage.RCPT, 450)]),
    ],
)  # fmt: skip
async def test_each_recipient_has_its_own_answer_and_the_connection_serves_on(
    hop: Hop, script: dict[str, Any], expected: list[tuple[Stage, int]], extensions: tuple[str, ...]
) -> None:
    hop.scripts = [answering(**script, extensions=extensions)]
    answers = await deliver(hop, Message("u", "v", "w"))
    assert [(answer.stage, answer.code) for answer in answers] == expected
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "")]
    assert len(hop.talks) == 1


async def test_no_message_is_sent_to_nobody_but_the_lone_dot_that_ends_it(hop: Hop) -> None:
    """RFC 2920 §3.1: DATA was pipelined and got 354 although every recipient was refused."""
    heard: list[bytes] = []
    message = Message()

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope(OK, "550 no", GO)
        heard.append(await talk.hear_message())
        await talk.say("554 nothing to do")
        await serve(talk)

    hop.scripts = [script]
    assert brief(await deliver(hop, message)) == [(Stage.RCPT, 550, "")]
    assert heard == [b".\r\n"]
    assert message.asked == 0


@pytest.mark.parametrize(
    "reply",
    [
        b"hello\r\n", b"\r\n", b"25 ok\r\n", b"2500 ok\r\n", b"150 ok\r\n", b"650 ok\r\n", b"HTTP/1.1 400 Bad\r\n", b"250\tok\r\n",
        b"\xb2\xb5\xb0 ok\r\n", b"\x00\x01\x02\r\n", b"+50 ok\r\n",
        b"2" * (REPLY_OCTETS + 1000), b"250-" + b"x" * 300 + b"\r\n" + b"250-more\r\n" * 100_000,
        b"250 " + b"x" * (REPLY_OCTETS * 2),
    ],
    ids=lambda reply: repr(reply[:12]),
)  # fmt: skip
async def test_a_reply_that_is_none_ends_the_connection_and_nothing_is_taken_for_an_answer(
    hop: Hop, reply: bytes
) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.hear("MAIL")
        await talk.say(reply)
        await talk.until_closed()

    hop.scripts = [script, good]
    [answer] = await deliver(hop)
    assert (answer.stage, answer.code) == (Stage.MAIL, 0)
    assert "reply" in answer.text
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert len(hop.talks) == 2


@pytest.mark.parametrize("reply", [b"250\r\n", b"250 \r\n", b"250 ok\n", b"250-a\n250 b\r\n", b"250-\r\n250\r\n", b"250 " + b"x" * 60_000 + b"\r\n"])  # fmt: skip
async def test_a_reply_may_be_bare_long_or_badly_ended(hop: Hop, reply: bytes) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        for _ in range(2):
            await talk.hear()
            await talk.say(reply)
        await talk.hear("DATA")
        await talk.say(GO)
        await talk.hear_message()
        await talk.say(reply)

    hop.scripts = [script]
    [answer] = await deliver(hop)
    assert (answer.stage, answer.code) == (Stage.FINAL, 250)


async def test_one_reply_too_many_ends_the_connection_before_it_is_taken_for_another_messages(hop: Hop) -> None:
    hop.scripts = [answering(final="250 taken\r\n250 taken again"), answering(final="554 no")]
    first, second = Message(), Message()
    hop.lane.configure(configuration(concurrency=1), 1)
    answers = await asyncio.gather(deliver(hop, first), deliver(hop, second))
    assert [answer.code for [answer] in answers] == [250, 554]
    assert len(hop.talks) == 2


@pytest.mark.parametrize("data", ["250 ok", "221 bye", "334 ?"])
async def test_data_answered_with_anything_odd_ends_the_connection(hop: Hop, data: str) -> None:
    hop.scripts = [answering(data=data), good]
    assert brief(await deliver(hop)) == [(Stage.DATA, 0, "")]
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert len(hop.talks) == 2


@pytest.mark.parametrize(
    ("lines", "split"),
    [
        ("2.0.0 Ok", ("2.0.0", "Ok")),
        ("5.7.54 no", ("5.7.54", "no")),
        ("5.1.1", ("5.1.1", "")),
        ("5.1.1x no", ("", "5.1.1x no")),
        ("3.0.0 no", ("", "3.0.0 no")),
        ("5.1234.1 no", ("", "5.1234.1 no")),
        ("", ("", "")),
        ("a\r\nb\tc\x00d\xe9", ("", "a  b c?d?")),
        ("5.0.0 " + "x" * 300, ("5.0.0", "x" * 200)),
    ],
)
def test_the_text_of_a_reply_is_plain_and_short_and_its_enhanced_code_apart(lines: str, split: tuple[str, str]) -> None:
    assert split_text(lines) == split


# --- the connection ends -----------------------------------------------------------------------------------------

ENVELOPE = (OK, OK, GO)
STAGES = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.FINAL)


@pytest.mark.parametrize("extensions", [ALL, ()], ids=["pipelining", "one-by-one"])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_drop_says_at_which_stage_and_nothing_else(hop: Hop, stage: Stage, extensions: tuple[str, ...]) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello(*extensions)
        await talk.envelope(*ENVELOPE[: STAGES.index(stage)])
        if stage is Stage.FINAL:
            await talk.hear_message()
        else:
            await talk.hear()

    hop.scripts = [script]
    message = Message()
    [answer] = await deliver(hop, message)
    assert (answer.stage, answer.code) == (stage, 0)
    assert message.asked == (stage is Stage.FINAL)
    assert hop.lane.connections == 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("connection", ["new", "used"])
async def test_a_421_counts_for_the_message_unless_it_was_meant_for_the_idle_connection(
    hop: Hop, stage: Stage, connection: str
) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        if connection == "used":
            await talk.envelope(*ENVELOPE)
            await talk.hear_message()
            await talk.say("250 first")
        await talk.envelope(*ENVELOPE[: STAGES.index(stage)])
        if stage is Stage.FINAL:
            await talk.hear_message()
        else:
            await talk.hear()
        await talk.say("421 4.4.1 Connection timed out")
        await talk.until_closed()

    hop.scripts = [script, good]
    if connection == "used":
        assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "")]
    expected = (Stage.FINAL, 250, "2.0.0") if connection == "used" and stage is Stage.MAIL else (stage, 421, "4.4.1")
    assert brief(await deliver(hop)) == [expected]
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert len(hop.talks) == 2


@pytest.mark.parametrize("last_words", ["", "421 4.4.2 idle for too long"])
async def test_an_idle_connection_that_ended_costs_the_next_message_nothing(hop: Hop, last_words: str) -> None:
    closing = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope(*ENVELOPE)
        await talk.hear_message()
        await talk.say("250 taken")
        await closing.wait()
        if last_words:
            await talk.say(last_words)
            await talk.until_closed()

    hop.scripts = [script, good]
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "")]
    closing.set()
    await wait_until(lambda: hop.lane.connections == 0)
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert len(hop.talks) == 2


async def test_a_message_begun_on_a_connection_that_was_dying_takes_another(hop: Hop) -> None:
    """The drop crosses MAIL on its way; no reply came, so nothing of the message can have been done."""

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope(*ENVELOPE)
        await talk.hear_message()
        await talk.say("250 taken")
        await talk.hear("MAIL")

    hop.scripts = [script, good]
    await deliver(hop)
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert len(hop.talks) == 2


async def test_a_message_whose_body_is_under_way_is_never_sent_again_by_itself(hop: Hop) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        for final in ("250 taken", ""):
            await talk.envelope(*ENVELOPE)
            await talk.hear_message()
            if final:
                await talk.say(final)

    hop.scripts = [script, good]
    await deliver(hop)
    assert brief(await deliver(hop)) == [(Stage.FINAL, 0, "")]
    assert len(hop.talks) == 1


@pytest.mark.parametrize("mail", ["552 5.3.4 too big", "530 5.7.57 Client not authenticated"])
@pytest.mark.parametrize("after", ["", "421 4.7.0 go away"])
async def test_what_mail_was_answered_stands_though_the_connection_ends_behind_it(
    hop: Hop, mail: str, after: str
) -> None:
    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.hear("MAIL")
        await talk.say(mail)
        if after:
            await talk.hear("RCPT")
            await talk.say(after)

    hop.scripts = [script]
    [answer] = await deliver(hop)
    assert (answer.stage, f"{answer.code} {answer.enhanced} {answer.text}") == (Stage.MAIL, mail)


@pytest.mark.parametrize(
    ("early", "expected"),
    [
        ("552 5.3.4 too big", (Stage.FINAL, 552)),
        ("452 4.3.1 disk full", (Stage.FINAL, 452)),
        ("421 4.3.2 going down", (Stage.FINAL, 421)),
        ("250 2.0.0 taken", (Stage.DATA, 0)),
        ("354 more", (Stage.DATA, 0)),
        ("what", (Stage.DATA, 0)),
        ("", (Stage.DATA, 0)),
    ],
)
async def test_an_answer_in_the_middle_of_the_body_ends_the_connection_and_is_never_a_delivery(
    hop: Hop, tmp_path: Path, early: str, expected: tuple[Stage, int]
) -> None:
    size = 30_000_000  # more than the buffers of two sockets take
    path = tmp_path / "body"
    path.write_bytes(b"0123456789abc\r\n" * (size // 15))
    message = Message(content=Content(None, os.open(path, os.O_RDONLY), size))

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope(*ENVELOPE)
        await talk.reader.read(1000)
        if early:
            await talk.say(early)
            await talk.until_closed()

    hop.scripts = [script, good]
    [answer] = await deliver(hop, message)
    message.content.close()
    assert (answer.stage, answer.code) == expected
    assert message.asked == 0
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]


# --- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
async def test_silence_is_waited_for_as_long_as_the_stage_allows_and_not_longer(hop: Hop, stage: Stage) -> None:
    reached = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope(*ENVELOPE[: STAGES.index(stage)])
        if stage is Stage.FINAL:
            await talk.hear_message()
        else:
            await talk.hear()
        reached.set()
        await talk.until_closed()

    hop.scripts = [script]
    hop.stop_the_clock()
    message = Message()
    hop.lane.submit(message, express=True)
    await reached.wait()
    await asyncio.sleep(0.05)  # the last reply has to be there before the clock goes on
    hop.clock += (600 if stage is Stage.FINAL else 300) - 1
    hop.lane.sweep()
    assert not message.result.done()
    hop.clock += 2
    hop.lane.sweep()
    [answer] = await message.result
    assert (answer.stage, answer.code) == (stage, 0)
    assert "timed out" in answer.text


async def test_each_reply_has_a_time_of_its_own(hop: Hop) -> None:
    """A next hop that takes its time over each of many recipients is slow, not silent."""
    names = [f"u{number}" for number in range(20)]
    heard, go_on = asyncio.Event(), asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.hello(*ALL)
        await talk.envelope(OK)
        for _ in names:
            await talk.hear("RCPT")
            heard.set()
            await go_on.wait()
            go_on.clear()
            await talk.say(OK)
        await talk.hear("DATA")
        await talk.say(GO)
        await talk.hear_message()
        await talk.say("250 taken")

    hop.scripts = [script]
    hop.stop_the_clock()
    message = Message(*names)
    hop.lane.submit(message, express=True)
    connection = None
    for _ in names:
        await heard.wait()
        heard.clear()
        connection = connection or next(iter(hop.lane._connections))
        hop.clock += 200
        before = connection.deadline
        hop.lane.sweep()
        go_on.set()
        await wait_until(lambda before=before, c=connection: c.deadline != before)
    assert {answer.code for answer in await message.result} == {250}


# --- opening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([b"554 5.7.1 no\r\n"], (Stage.BANNER, 554, "5.7.1")),
        ([b"421 4.3.2 busy\r\n"], (Stage.BANNER, 421, "4.3.2")),
        ([b"250 hello\r\n"], (Stage.BANNER, 250, "")),
        ([b"999 hello\r\n"], (Stage.BANNER, 0, "")),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], (Stage.CONNECT, 0, "")),
        ([b"\xff\xfe\x00\r\n"], (Stage.CONNECT, 0, "")),
        ([b"2" * 100_000], (Stage.CONNECT, 0, "")),
        ([b"220-x\r\n" * 50_000], (Stage.CONNECT, 0, "")),
        ([b""], (Stage.CONNECT, 0, "")),
        ([b"220 hop\r\n", b""], (Stage.EHLO, 0, "")),
        ([b"220 hop\r\n", b"550 5.7.1 no\r\n"], (Stage.EHLO, 550, "5.7.1")),
        ([b"220 hop\r\n", b"451 4.3.0 no\r\n"], (Stage.EHLO, 451, "4.3.0")),
        ([b"220 hop\r\n", b"421 4.3.0 no\r\n"], (Stage.EHLO, 421, "4.3.0")),
        ([b"220 hop\r\n", b"what\r\n"], (Stage.EHLO, 0, "")),
        ([b"220 hop\r\n", b"250 hop\r\n", b""], (Stage.EHLO, 0, "")),
        ([b"220 hop\r\n", b"502 no\r\n", b"550 5.7.1 no\r\n"], (Stage.EHLO, 550, "5.7.1")),
    ],
    ids=repr,
)  # fmt: skip
async def test_a_connection_that_does_not_come_about_says_where_it_ended(
    hop: Hop, said: list[bytes], expected: tuple[Stage, int, str]
) -> None:
    async def script(talk: Talk) -> None:
        await talk.say(said[0])
        for reply in said[1:]:
            if not reply and said[-2].startswith(b"250"):
                return
            await talk.hear()
            await talk.say(reply)
        if said[-1]:
            await talk.until_closed()

    hop.scripts = [script]
    answers = await deliver(hop, Message("u", "v"))
    assert brief(answers) in ([expected] * 2, [(Stage.MAIL, *expected[1:])] * 2)
    assert hop.lane.connections == 0


@pytest.mark.parametrize("code", [500, 502])
async def test_helo_is_tried_where_ehlo_is_unknown(hop: Hop, code: int) -> None:
    async def script(talk: Talk) -> None:
        await talk.say("220 old")
        await talk.hear("EHLO")
        await talk.say(f"{code} what")
        await talk.hear("HELO mx.example.com")
        await talk.say("250 PIPELINING is not offered by saying so here")
        await serve(talk)

    hop.scripts = [script]
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert hop.talks[0].heard[2] == "MAIL FROM:<a@example.net>"


# --- TLS ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trusted(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that the relay trusts as it trusts those of the system."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle(tmp_path)))
    return authority


def upgrading(context: ssl.SSLContext | None, starttls: str = "220 go", injected: bytes = b"") -> Script:
    """A server with STARTTLS; without a context it breaks the connection behind its 220."""

    async def script(talk: Talk) -> None:
        await talk.say("220 hop")
        await talk.hear("EHLO")
        await talk.say("250-hop\r\n250 STARTTLS")
        line = await talk.hear()
        if line == "STARTTLS":
            talk.writer.write(starttls.encode() + b"\r\n" + injected)
            if not starttls.startswith("2"):
                await talk.until_closed()
                return
            if context is None:
                return
            await talk.writer.start_tls(context)
            await talk.hear("EHLO")
            await talk.say("250-hop\r\n250 PIPELINING")
            await serve(talk)
        await talk.say("250 ok")
        await serve(talk)

    return script


def tls_version(hop: Hop) -> str | None:
    found = hop.talks[-1].writer.get_extra_info("ssl_object")
    return found.version() if found is not None else None


async def test_tls_is_used_where_it_is_offered_whatever_the_certificate(hop: Hop, authority: Authority) -> None:
    hop.lane.configure(configuration(tls="opportunistic"), 1)
    hop.scripts = [upgrading(authority.server_expired())]
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert tls_version(hop) == "TLSv1.3"
    assert hop.talks[0].heard[:3] == ["EHLO mx.example.com", "STARTTLS", "EHLO mx.example.com"]


async def test_what_was_said_in_clear_behind_starttls_is_forgotten(hop: Hop, authority: Authority) -> None:
    """RFC 3207 §6 and the injection of 2011: a plain reply must not be read as one from inside."""
    hop.lane.configure(configuration(tls="opportunistic"), 1)
    hop.scripts = [upgrading(authority.server(), injected=b"250-evil\r\n250 SIZE 1\r\n"), good]
    answers = await deliver(hop)
    assert [answer.code for answer in answers] == [250]
    assert not any("SIZE=" in line for talk in hop.talks[:1] for line in talk.heard)


@pytest.mark.parametrize("starttls", ["454 4.7.0 not now", "554 5.7.0 no", "220 go"])
async def test_opportunistic_tls_that_fails_goes_on_in_clear_and_says_so_once(hop: Hop, starttls: str) -> None:
    hop.lane.configure(configuration(tls="opportunistic"), 1)
    hop.scripts = [upgrading(None, starttls)]
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert len(hop.talks) == 2
    hop.lane._connections.copy().pop().quit()
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert len(hop.talks) == 3, "STARTTLS was not left alone after it had failed"
    assert len([line for line in hop.lines if "next_hop_tls_failed" in line]) == 1


@pytest.mark.parametrize(
    ("starttls", "code"), [("454 4.7.0 not now", 454), ("554 5.7.0 no", 554), ("220 go", 0)]
)  # fmt: skip
async def test_verified_tls_that_fails_is_no_connection(hop: Hop, trusted: Authority, starttls: str, code: int) -> None:
    hop.lane.configure(configuration(tls="verified"), 1)
    hop.scripts = [upgrading(None, starttls)]
    [answer] = await deliver(hop)
    assert (answer.stage, answer.code) == (Stage.STARTTLS, code)
    assert not any(line.startswith("MAIL") for talk in hop.talks for line in talk.heard)


async def test_verified_tls_that_is_not_offered_is_no_connection(hop: Hop, trusted: Authority) -> None:
    hop.lane.configure(configuration(tls="verified"), 1)
    hop.scripts = [good]
    [answer] = await deliver(hop)
    assert (answer.stage, answer.code, answer.text) == (Stage.STARTTLS, 0, "TLS is required and not offered")


async def test_verified_tls_takes_a_good_certificate_and_no_other(hop: Hop, trusted: Authority) -> None:
    hop.lane.configure(configuration(tls="verified"), 1)
    for bad in (trusted.server_of_a_stranger(), trusted.server_expired(), trusted.server("other.example.com")):
        hop.scripts = [upgrading(bad)]
        [answer] = await deliver(hop)
        assert (answer.stage, answer.code) == (Stage.STARTTLS, 0)
        hop.lane.configure(configuration(tls="verified", failures=1000), 1)
    hop.scripts = [upgrading(trusted.server("127.0.0.1"))]
    assert brief(await deliver(hop)) == [(Stage.FINAL, 250, "2.0.0")]
    assert tls_version(hop) == "TLSv1.3"
