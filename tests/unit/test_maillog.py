from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail import reply
from relay.mail.address import Mailbox
from relay.mail.reply import operator_text
from relay.telemetry import maillog
from relay.telemetry.logs import LogWriter
from relay.telemetry.maillog import LINE_OCTETS, Form, MailLog

NOW = 1795376561.25  # 22 November 2026, 19:42:41 UTC
CLIENT = "unknown[192.0.2.1]"
SENDER = Mailbox("robot@example.com")
RESTRICTED = reply.SENDER_RESTRICTED.line(SENDER, operator_text("This account is not allowed to send emails"))

EXAMPLES: dict[str, Callable[[MailLog], None]] = {
    "connect": lambda log: log.connect(CLIENT, "mx"),
    "disconnect": lambda log: log.disconnect(CLIENT, "mx", 5, 1, 0),
    "tls": lambda log: log.tls(CLIENT, "TLSv1.3", "TLS_AES_256_GCM_SHA384"),
    "tls_failed": lambda log: log.tls_failed(CLIENT, "wrong version number"),
    "login": lambda log: log.login(CLIENT, "ann", "SCRAM-SHA-256"),
    "login_failed": lambda log: log.login_failed(CLIENT, "ann", "PLAIN", "wrong password"),
    "reject": lambda log: log.reject(
        CLIENT, "RCPT", RESTRICTED, "sender_restricted", "senders.restricted", SENDER, "boss@example.org", "ESMTP",
        "mail.example.com",
    ),
    "header_removed": lambda log: log.header_removed("4dK2xW7Q", ["X-MS-Exchange-Organization-SCL"], 1),
    "header_warning": lambda log: log.header_warning("4dK2xW7Q", ["X-MS-Exchange-Organization-SCL"], 1),
    "received": lambda log: log.received(
        "4dK2xW7Q", CLIENT, "mx", "ann@example.net", 2, 1834, "ESMTPS", "mail.example.net", "TLSv1.3"
    ),
    "result": lambda log: log.result(
        "4dK2xW7Q", "boss@example.org", "exchange.example.org:25", "sent", 250, "2.6.0", "Queued mail for delivery",
        0.1234, "express", 1,
    ),
    "queued": lambda log: log.queued("4dK2xW7Q", "next_hop_down", 1834),
    "removed": lambda log: log.removed("4dK2xW7Q"),
    "report": lambda log: log.report("4dK2y0AB", "4dK2xW7Q", "ann@example.net"),
    "possible_duplicate": lambda log: log.possible_duplicate("4dK2xW7Q"),
    "alarm": lambda log: log.alarm(
        "next_hop_down", next_hop="exchange.example.org:25", stage="connect", code=0, cause="Connection refused"
    ),
    "note": lambda log: log.note("info", "supervisor_ready", workers=2, listeners=3),
}  # fmt: skip


class Lines(list[str]):
    def write(self, line: str, /) -> None:
        self.append(line)

    def flush(self) -> None:
        pass


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def said(event: Callable[[MailLog], None], form: Form = "postfix", clock: Callable[[], float] = lambda: NOW) -> str:
    """The one line of an event."""
    lines = Lines()
    event(MailLog(lines, form, "mx.example.org", clock))
    (line,) = lines
    return line


def text(event: Callable[[MailLog], None]) -> str:
    """The line in Postfix's form without its prefix."""
    return said(event).partition("]: ")[2]


def test_a_refusal_is_the_line_that_postfix_writes() -> None:
    prefix = f"Nov 22 19:42:41 mx.example.org dmz-relay/smtpd[{os.getpid()}]: "
    assert said(EXAMPLES["reject"]) == prefix + (
        "NOQUEUE: reject: RCPT from unknown[192.0.2.1]: 554 5.7.1 <robot@example.com>: Sender address rejected: "
        "This account is not allowed to send emails; from=<robot@example.com> to=<boss@example.org> proto=ESMTP "
        "helo=<mail.example.com>"
    )


def test_a_refusal_in_json_has_the_fields_and_the_same_line_as_message() -> None:
    found = json.loads(said(EXAMPLES["reject"], "json"))
    assert found["message"] == text(EXAMPLES["reject"])
    assert found["event"] == "reject"
    assert found["time"] == "2026-11-22T19:42:41.250Z"
    assert (found["reason"], found["rule"]) == ("sender_restricted", "senders.restricted")
    assert (found["sender"], found["recipient"], found["client"]) == (SENDER, "boss@example.org", CLIENT)


def test_a_rule_in_mode_log_says_reject_warning_as_postfix_does() -> None:
    def event(log: MailLog) -> None:
        log.reject(CLIENT, "MAIL", "550 5.7.1 no", "x", "x", "", None, "SMTP", "h", enforced=False)

    assert text(event) == f"NOQUEUE: reject_warning: MAIL from {CLIENT}: 550 5.7.1 no; from=<> proto=SMTP helo=<h>"
    assert json.loads(said(event, "json"))["event"] == "reject_warning"


@pytest.mark.parametrize(
    ("status", "code", "enhanced", "shown"),
    [
        ("sent", 250, "2.6.0", "dsn=2.6.0, status=sent (250 2.6.0 words)"),
        ("sent", 250, "", "dsn=2.0.0, status=sent (250 words)"),
        ("deferred", 0, "", "dsn=4.0.0, status=deferred (words)"),
        ("deferred", 451, "4.7.1", "dsn=4.7.1, status=deferred (451 4.7.1 words)"),
        ("bounced", 550, "5.1.1", "dsn=5.1.1, status=bounced (550 5.1.1 words)"),
        ("expired", 451, "", "dsn=4.4.7, status=expired (451 words)"),
    ],
)
def test_a_result_reads_like_postfix_smtp_client(status: maillog.Status, code: int, enhanced: str, shown: str) -> None:
    line = text(
        lambda log: log.result("Q1", "r@example.org", "ex:25", status, code, enhanced, "words", 1.005, "queue", 2)
    )
    assert line == f"Q1: to=<r@example.org>, relay=ex:25, delay=1.00, {shown}"


def test_the_day_of_the_month_is_padded_as_syslog_does() -> None:
    assert said(EXAMPLES["removed"], clock=lambda: NOW - 20 * 86400).startswith("Nov  2 19:42:41 ")


def test_the_time_of_a_line_is_its_own_and_not_that_of_the_line_before() -> None:
    lines, now = Lines(), [NOW]
    for form in ("postfix", "json"):
        log = MailLog(lines, form, "mx", lambda: now[0])
        log.removed("A")
        now[0] += 1.5
        log.removed("B")
    assert [line[:15] for line in lines[:2]] == ["Nov 22 19:42:41", "Nov 22 19:42:42"]
    assert [json.loads(line)["time"][-8:] for line in lines[2:]] == [":42.750Z", ":44.250Z"]


hostile = st.text(st.sampled_from("a<>\"'\\ ;=,()\r\n\x00\x1b\x7f\x85é\u2028\ud800"), max_size=60)


@given(hostile)
def test_no_foreign_text_makes_a_second_line_or_leaves_its_brackets(foreign: str) -> None:
    events: list[Callable[[MailLog], None]] = [
        lambda log: log.reject(
            CLIENT, "RCPT", "550 5.1.1 no", "x", "x", "s@example.com", "r@example.com", "ESMTP", foreign
        ),
        lambda log: log.received("Q", CLIENT, "mx", "s@example.com", 1, 1, "ESMTP", foreign, ""),
        lambda log: log.result("Q", "r@example.com", "h", "deferred", 451, foreign, foreign, 0.0, "queue", 1),
        lambda log: log.tls_failed(CLIENT, foreign),
        lambda log: log.alarm("x", cause=foreign),
        lambda log: log.header_removed("Q", [foreign], 1),
        lambda log: log.connect(foreign, "mx"),
    ]
    for event in events:
        line = said(event)
        assert line.isprintable()
        structured = said(event, "json")
        assert structured.isascii()
        assert structured.isprintable()
        json.loads(structured)
    for event in events[:2]:
        (shown,) = re.findall(r"helo=<(.*?)>", said(event))
        assert "<" not in shown


@pytest.mark.parametrize("form", ["postfix", "json"])
def test_a_quoted_local_part_cannot_pretend_to_be_another_sender(form: Form) -> None:
    forged = '"a> to=<victim@example.org"@example.com'
    refusal = reply.SENDER_RESTRICTED.line(Mailbox(forged), operator_text("no"))

    def rejected(log: MailLog) -> None:
        log.reject(CLIENT, "RCPT", refusal, "x", "x", forged, forged, "ESMTP", "h")

    def taken(log: MailLog) -> None:
        log.received("Q", CLIENT, "mx", forged, 1, 1, "ESMTP", "h", "")

    def delivered(log: MailLog) -> None:
        log.result("Q", forged, "h:25", "sent", 250, "2.0.0", "ok", 0.0, "express", 1)

    for event in (rejected, taken, delivered, lambda log: log.report("R", "Q", forged)):
        assert "<victim@" not in said(event, form)


def test_long_values_are_cut_so_that_a_line_fits_one_write_to_a_pipe() -> None:
    endless = "x" * 100_000
    for event in (
        lambda log: log.reject(CLIENT, "RCPT", "550 " + endless, "x", "x", "", None, "ESMTP", endless),
        lambda log: log.result("Q", "r@example.org", "h", "deferred", 451, endless, endless, 0.0, "queue", 1),
        lambda log: log.header_removed("Q", [endless] * 1000, 1000),
        lambda log: log.alarm("x", why=endless),
    ):
        assert len(said(event)) <= LINE_OCTETS


def test_fields_of_notes_are_quoted_when_they_need_it() -> None:
    line = text(
        lambda log: log.note("warning", "process_died", process="worker 0", pid=12, why='exit "1" x=y', none=None)
    )
    assert line == 'warning: process_died process="worker 0" pid=12 why="exit \\"1\\" x=y" none=None'


def test_a_note_without_a_log_goes_to_standard_error_and_to_the_adopted_log_afterwards(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maillog, "_process_log", None)
    maillog.note("error", "early", why="no log yet")
    assert capfd.readouterr().err.endswith(': error: early why="no log yet"\n')
    lines = Lines()
    maillog.adopt(MailLog(lines, "json", "mx", lambda: NOW))
    maillog.note("info", "later", number=1)
    assert json.loads(lines[0])["event"] == "later"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("helo", ["mx.example.net", "<mx> \x1b[31m", "x" * 1000])
def test_many_refusals_are_written_as_each_alone_would_be(helo: str) -> None:
    reply, recipient = "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown", "nobody@example.com"
    lines = Lines()
    note = MailLog(lines, "postfix", "mx.example.org", lambda: NOW).refusals(
        CLIENT, "RCPT", "s@example.net", "ESMTP", helo
    )
    assert note is not None
    note(reply, recipient)
    alone = said(lambda log: log.reject(CLIENT, "RCPT", reply, "x", "x", "s@example.net", recipient, "ESMTP", helo))
    assert lines == [alone]


def test_where_a_refusal_has_more_to_it_than_its_line_it_is_written_alone() -> None:
    facts = (CLIENT, "RCPT", "s@example.net", "ESMTP", "mx.example.net")
    assert MailLog(Lines(), "json", "mx").refusals(*facts) is None
    assert MailLog(Lines(), "postfix", "mx").refusals(CLIENT, "RCPT", '"a>b"@example.net', "ESMTP", "h") is None
    copied = MailLog(Lines(), "postfix", "mx")
    copied.copy = lambda kind, said: None
    assert copied.refusals(*facts) is None


def test_every_event_stands_in_the_documentation_with_both_lines_as_they_are_written() -> None:
    events = {name for name, _ in inspect.getmembers(MailLog, inspect.isfunction) if not name.startswith("_")}
    assert events - {"refusals"} == set(EXAMPLES)  # another way to say reject
    sections = re.findall(
        r"^### (\w+)\n.*?^```\n(.*?)\n(.*?)\n```", Path("docs/log.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    pid = str(os.getpid())
    written = {
        name: (said(event).replace(f"[{pid}]", "[4711]"), said(event, "json").replace(f'"pid":{pid},', '"pid":4711,'))
        for name, event in EXAMPLES.items()
    }
    assert {name: (line, structured) for name, line, structured in sections} == written


def noted_events() -> Iterator[str]:
    """The names of all alarms and notes in the source."""
    for path in Path("relay").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call):
                function = getattr(call.func, "attr", getattr(call.func, "id", ""))
                place = {"alarm": 0, "note": 1, "_note": 1}.get(function)
                event = call.args[place] if place is not None and len(call.args) > place else None
                if isinstance(event, ast.Constant) and isinstance(event.value, str):
                    yield event.value


def test_every_alarm_and_note_stands_in_the_documentation_and_no_other() -> None:
    table = Path("docs/log.md").read_text("utf-8").partition("## Alarms and notes")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(noted_events())


async def test_a_possible_duplicate_outlives_a_process_that_is_killed_right_after(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    writer.start(asyncio.get_running_loop())
    log = MailLog(writer, "postfix", "mx")
    log.removed("A1")
    log.possible_duplicate("B2")
    assert [line.split("]: ")[1] for line in (tmp_path / "log").read_text().splitlines()] == [
        "A1: removed",
        "warning: B2: possible duplicate: an earlier final dot was not answered",
    ]
    writer.close()
