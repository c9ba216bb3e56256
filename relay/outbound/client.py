"""Owns: the SMTP transaction towards a next hop, pipelined (RFC 2920), on a connection that is already open.

One message at a time. It returns one answer for each recipient and never raises for a refusal; after any error the
connection is closed. It must not judge answers (``policy.outcome`` does) nor choose what to send next (the lane does).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from relay.mail.answer import Answer, Stage
from relay.mail.content import Content
from relay.mail.terms import PLAIN
from relay.outbound.attempt import Attempt
from relay.outbound.fitting import Fitted, fitted, in_seven_bits, with_content, words_of

if TYPE_CHECKING:
    from relay.outbound.lane import Lane

REPLY_OCTETS: Final = 64 * 1024
"""A next hop that says more than this in one reply is cut off."""
TEXT_OCTETS: Final = 200

_ENHANCED: Final = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?:\s+|$)")
_ALL_TAKEN: Final = re.compile(rb"2\d\d [^\n]*\n2\d\d [^\n]*\n354 [^\n]*\n").fullmatch
"""MAIL, the only RCPT and DATA are taken, each in a line: what nearly every group is answered with."""
_FINAL_TAKEN: Final = re.compile(rb"2\d\d [^\n]*\n").fullmatch
"""One line that takes the message, and nothing behind it."""
_ENVELOPE: Final = ((Stage.MAIL, b""), (Stage.RCPT, b""), (Stage.DATA, b""))
"""The steps of one recipient, sent as one group."""


class Capabilities(NamedTuple):
    """What the next hop offered in EHLO. ``size``: largest message in octets, 0 when it named none."""

    pipelining: bool
    size_extension: bool
    size: int
    eight_bit: bool
    tls: str
    dsn: bool = False
    utf8: bool = False


def split_text(lines: str) -> tuple[str, str]:
    """The text of a reply as (enhanced code or "", rest as printable ASCII of at most 200 octets)."""
    enhanced = ""
    found = _ENHANCED.match(lines)
    if found is not None:
        enhanced, lines = found[1], lines[found.end() :]
    lines = lines[:TEXT_OCTETS]
    if not (lines.isascii() and lines.isprintable()):
        lines = "".join(c if " " <= c <= "~" else " " if c in "\r\n\t" else "?" for c in lines)
    return enhanced, lines


def _unreadable(error: OSError) -> Answer:
    return Answer(Stage.DATA, 0, "", f"message body cannot be read: {error.strerror or error}")


class Connection(asyncio.Protocol):
    """An open connection that has said EHLO (and STARTTLS)."""

    __slots__ = (
        "_accepted",
        "_answers",
        "_brief",
        "_buffer",
        "_lines",
        "_mail",
        "_next",
        "_paused",
        "_pieces",
        "_reset",
        "_steps",
        "_unanswered",
        "_whole",
        "attempt",
        "capabilities",
        "deadline",
        "idle_since",
        "lane",
        "opened",
        "transport",
        "uses",
    )

    def __init__(self, lane: Lane, transport: Any, capabilities: Capabilities, now: float) -> None:
        self.lane = lane
        self.transport = transport
        self.capabilities = capabilities
        self.opened = now
        self.idle_since = now
        self.deadline = float("inf")
        self.uses = 0
        self.attempt: Attempt | None = None
        self._buffer = b""
        self._lines: list[str] = []
        self._steps: Sequence[tuple[Stage, bytes]] = ()
        self._brief = capabilities.pipelining
        self._whole = False
        """A group of one recipient was sent, and nothing of its answers has come."""
        self._next = 0
        self._answers: list[Answer | None] = []
        self._accepted = 0
        self._mail: Answer | None = None
        self._unanswered = False
        self._reset = False
        self._pieces: Iterator[bytes] | None = None
        self._paused = False

    # --- one transaction -----------------------------------------------------------------------------------------------

    def start(self, attempt: Attempt, now: float) -> None:
        """Send the envelope; the rest follows from the replies."""
        capabilities = self.capabilities
        if (attempt.terms is not PLAIN or not capabilities.eight_bit) and not isinstance(attempt, Fitted):
            fit = self._fit(attempt)
            if fit is None:
                return
            attempt = fit
        self.attempt = attempt
        self.uses += 1
        self._unanswered = True
        self._accepted = 0
        self._mail = None
        self._next = 0
        self._answers = [None] * len(attempt.recipients)
        self.deadline = now + self.lane.command_timeout_s
        if self._brief and len(attempt.recipients) == 1 and attempt.terms is PLAIN and not self._reset:
            size = f" SIZE={attempt.content.size}" if capabilities.size_extension else ""
            body = " BODY=8BITMIME" if capabilities.eight_bit and attempt.body_8bit else ""
            self._steps = _ENVELOPE
            self._whole = True
            self.transport.write(
                f"MAIL FROM:<{attempt.sender}>{size}{body}\r\nRCPT TO:<{attempt.recipients[0]}>\r\nDATA\r\n".encode(
                    "ascii"
                )
            )
            return
        mail = f"MAIL FROM:<{attempt.sender}>"
        if capabilities.size_extension:
            mail += f" SIZE={attempt.content.size}"
        if capabilities.eight_bit and attempt.body_8bit:
            mail += " BODY=8BITMIME"
        steps = [(Stage.MAIL, f"{mail}\r\n".encode())]
        steps += [(Stage.RCPT, f"RCPT TO:<{recipient}>\r\n".encode()) for recipient in attempt.recipients]
        if attempt.terms is not PLAIN:
            steps = self._on_terms(attempt, steps)
        steps.append((Stage.DATA, b"DATA\r\n"))
        if self._reset:
            self._reset = False
            steps.insert(0, (Stage.EHLO, b"RSET\r\n"))
        self._steps = steps
        if capabilities.pipelining:
            self.transport.write(b"".join([octets for _, octets in steps]))
        else:
            self.transport.write(steps[0][1])

    def _fit(self, attempt: Attempt) -> Attempt | None:
        """The attempt as this next hop can take it; None when it is refused, or comes back later."""
        loop = asyncio.get_running_loop()
        policy = self.lane.eight_bit
        try:
            fit = fitted(attempt, self.capabilities)
            if isinstance(fit, Answer) or self.capabilities.eight_bit or policy == "pass":
                found: Attempt | Answer = fit
            elif fit.content.memory is None:
                work = partial(in_seven_bits, fit.content, may_convert=policy == "convert")
                loop.run_in_executor(None, work).add_done_callback(partial(self._read, attempt, fit))
                return None
            else:
                content = in_seven_bits(fit.content, may_convert=policy == "convert")
                found = content if isinstance(content, Answer) else with_content(fit, content)
        except OSError as error:
            found = _unreadable(error)
        if isinstance(found, Answer):
            loop.call_soon(self._refuse, attempt, found)
            return None
        return found

    def _read(self, attempt: Attempt, fit: Attempt, future: asyncio.Future[Content | Answer]) -> None:
        """A body file was read in a thread; nothing was said to the next hop meanwhile."""
        error = future.exception()
        if error is None:
            found = future.result()
        elif isinstance(error, OSError):
            found = _unreadable(error)
        else:
            self.lane.log.alarm("next_hop_fault", next_hop=self.lane.name, cause=repr(error))
            found = Answer(Stage.DATA, 0, "", "local error")
        if self.transport.is_closing():
            self.lane.again(attempt)
        elif isinstance(found, Answer):
            self._refuse(attempt, found)
        else:
            self.start(with_content(fit, found), self.lane.now())

    def _refuse(self, attempt: Attempt, answer: Answer) -> None:
        """The next hop cannot have this message at all; the connection is free again."""
        attempt.done([answer] * len(attempt.recipients), self.lane.name)
        self.lane.released(self)

    def _on_terms(self, attempt: Attempt, steps: list[tuple[Stage, bytes]]) -> list[tuple[Stage, bytes]]:
        """MAIL and RCPT with what the client said, as far as the next hop knows it (RFC 3461 §5.2.1, RFC 6531 §3.4)."""
        attempt.told = self.capabilities.dsn
        words = words_of(attempt.terms, self.capabilities, len(attempt.recipients))
        return [
            (stage, b"%b %b\r\n" % (line[:-2], said.encode()) if said else line)
            for (stage, line), said in zip(steps, words, strict=True)
        ]

    def data_received(self, data: bytes) -> None:
        """Octets from the next hop: whole replies are handled, the rest waits."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        if self._whole:
            self._whole = False
            if _ALL_TAKEN(data) is not None:  # the same as below, reply by reply
                self._unanswered = False
                self._accepted, self._next = 1, len(_ENVELOPE)
                self._send_body()
                return
        elif self._next == len(self._steps) and self._awaits_one() and _FINAL_TAKEN(data) is not None:
            self._unanswered = False
            self._finish(self._answer(Stage.FINAL, int(data[:3]), data[4:].decode("ascii", "replace").strip()))
            return
        position = 0
        while True:
            end = data.find(b"\n", position)
            if end < 0:
                break
            line = data[position:end]
            position = end + 1
            if not self._line(line, len(data) - position):
                return
        self._buffer = data[position:]
        if len(self._buffer) > REPLY_OCTETS:
            self._fail("reply too long")

    def _awaits_one(self) -> bool:
        """The whole message was sent, and the one reply to its dot has not begun."""
        return self.attempt is not None and self._pieces is None and not self._lines

    def _line(self, line: bytes, rest: int) -> bool:
        """One line of a reply, ``rest`` octets behind it; False when the connection is not to be read any more."""
        if self.attempt is None:  # unsolicited, e.g. 421 before an idle connection is closed (RFC 5321 §3.8)
            self.close()
            return False
        if line[3:4] == b"-":
            if len(self._lines) * TEXT_OCTETS > REPLY_OCTETS:
                self._fail("reply too long")
                return False
            self._lines.append(line[4 : 4 + TEXT_OCTETS].decode("ascii", "replace").strip())
            return True
        digits = line[:3]
        if not (digits.isdigit() and len(digits) == 3 and b"2" <= digits[:1] <= b"5" and line[3:4] in b" \r"):
            self._fail("malformed reply")
            return False
        text = line[4:].decode("ascii", "replace").strip()
        if self._lines:
            first = _ENHANCED.match(self._lines[0])
            more = [x.removeprefix(first[0]) if first else x for x in (*self._lines[1:], text)]
            text = " ".join((self._lines[0], *more))
            self._lines = []
        return self._reply(int(digits), text, rest)

    def _reply(self, code: int, text: str, rest: int) -> bool:
        stage = self._stage()
        if code == 421:
            return self._goodbye(self._answer(stage, code, text))
        self._unanswered = False
        match stage:
            case Stage.MAIL:
                if not 200 <= code <= 299:
                    self._mail = self._answer(stage, code, text)
            case Stage.RCPT:
                index = self._next - (len(self._steps) - 1 - len(self._answers))
                if 200 <= code <= 299:
                    self._accepted += 1
                elif self._mail is None:  # else it says 503 or the like; MAIL's refusal is the reason
                    self._answers[index] = self._answer(stage, code, text)
            case Stage.DATA:
                return self._data_reply(code, text)
            case Stage.FINAL if self._pieces is not None:
                return self._early(code, text)
            case Stage.FINAL:
                answer = self._answer(stage, code, text)
                if rest or 300 <= code <= 399:  # more replies than commands: the next one could not be told apart
                    return self._abandon(self._mail or answer)
                self._finish(answer)
                return self.attempt is not None or not self.transport.is_closing()
            case _:
                pass
        self._next += 1
        return self._go_on()

    def _stage(self) -> Stage:
        """The step whose reply is awaited."""
        return self._steps[self._next][0] if self._next < len(self._steps) else Stage.FINAL

    def _goodbye(self, answer: Answer) -> bool:
        """421: the session is over, whatever was asked. Where it came instead of any answer on a connection that had
        served before, it was meant for the idle connection (RFC 5321 §3.8), and the message takes another one.
        """
        if self._unanswered and self.uses > 1:
            self._again()
            self.transport.abort()
            return False
        return self._abandon(self._mail or answer, answer)

    def _abandon(self, answer: Answer, health: Answer | None = None) -> bool:
        """The transaction is over, and so is the connection; ``health`` is what it says of the next hop, if not that."""
        self._pieces = None
        self._settle(answer, health)
        self.lane.forget(self)
        self.transport.abort()
        return False

    def _again(self) -> None:
        """Nothing of this message was answered: it takes another connection."""
        attempt, self.attempt = self.attempt, None
        self.deadline = float("inf")
        self.lane.forget(self)
        if attempt is not None:
            self.lane.again(attempt.original if isinstance(attempt, Fitted) else attempt)

    def _go_on(self) -> bool:
        """The next command, when the next hop takes one at a time; or the end when there is no point in it."""
        if self.capabilities.pipelining:
            self.deadline = self.lane.now() + self.lane.command_timeout_s  # each reply has its own (RFC 5321 §4.5.3.2)
            return True
        if self._mail is not None:
            self._finish(self._mail)
            return True
        stage, octets = self._steps[self._next]
        if stage is Stage.DATA and not self._accepted:
            self._reset = True
            self._finish(Answer(Stage.RCPT, 0, "", "no recipient was accepted"))
            return True
        self.deadline = self.lane.now() + self.lane.command_timeout_s
        self.transport.write(octets)
        return True

    def _data_reply(self, code: int, text: str) -> bool:
        self._next += 1
        answer = self._mail or self._answer(Stage.DATA, code, text)
        if code < 400 and code != 354:  # replies and commands are out of step
            return self._abandon(self._mail or Answer(Stage.DATA, 0, "", f"unexpected reply {code} to DATA"))
        if code != 354:
            self._reset = True
            self._finish(answer)
            return True
        if self._mail is not None:  # refused, yet it wants data: nothing that follows could be trusted
            return self._abandon(self._mail)
        if not self._accepted:  # RFC 2920 §3.1: DATA was sent along, the lone dot ends it
            self._mail = Answer(Stage.RCPT, 0, "", "no recipient was accepted")
            self.transport.write(b".\r\n")
            return True
        return self._send_body()

    def _early(self, code: int, text: str) -> bool:
        """It answered before the dot was sent. A refusal counts; but what it takes the rest of the body for is unknown."""
        answer = self._answer(Stage.FINAL, code, text)
        if code < 400:
            answer = Answer(Stage.DATA, 0, "", f"unexpected reply {code} before the final dot")
        return self._abandon(answer)

    def _send_body(self) -> bool:
        attempt = self.attempt
        assert attempt is not None
        memory = attempt.content.memory
        self.deadline = self.lane.now() + self.lane.final_reply_timeout_s
        if memory is not None:
            if not attempt.may_finish():
                return self._break_off()
            self.transport.write(memory + b".\r\n")
            return True
        self._pieces = attempt.content.chunks()
        return self._pump()

    def _pump(self) -> bool:
        """Send pieces of a body file as long as the transport takes them."""
        attempt, pieces = self.attempt, self._pieces
        assert attempt is not None
        assert pieces is not None
        try:
            while not (self._paused or self.transport.is_closing()):  # a broken one takes everything, dot included
                piece = next(pieces, None)
                if piece is None:
                    self._pieces = None
                    if not attempt.may_finish():
                        return self._break_off()
                    self.transport.write(b".\r\n")
                    return True
                self.transport.write(piece)
        except OSError as error:
            self._fail(_unreadable(error).text)
            return False
        return True

    def pause_writing(self) -> None:
        """The next hop takes no more for now."""
        self._paused = True

    def resume_writing(self) -> None:
        """It takes more."""
        self._paused = False
        if self._pieces is not None:
            self.deadline = self.lane.now() + self.lane.final_reply_timeout_s
            self._pump()

    def _answer(self, stage: Stage, code: int, text: str) -> Answer:
        enhanced, words = split_text(text)
        return Answer(stage, code, enhanced, words)

    def _finish(self, answer: Answer) -> None:
        """The transaction is over and the connection can be used again."""
        self._settle(self._mail or answer)
        self.lane.released(self)

    def _settle(self, answer: Answer, health: Answer | None = None) -> None:
        """Give the attempt its answers: ``answer`` for every recipient that has none of its own."""
        attempt, self.attempt = self.attempt, None
        self.deadline = float("inf")
        if attempt is not None:
            self.lane.answered(health or answer)
            attempt.done([given or answer for given in self._answers], self.lane.label)

    def _fail(self, text: str) -> None:
        """Nothing can be said any more: code 0 for whoever has no answer yet."""
        stage = self._stage()
        if stage is Stage.FINAL and self._pieces is not None:
            stage = Stage.DATA  # the dot was not sent
        answer = Answer(stage, 0, "", text)
        self._abandon(self._mail or answer, answer)

    def _break_off(self) -> bool:
        """The dot must not leave: another worker may own the message before the reply comes."""
        return self._abandon(Answer(Stage.DATA, 0, "", "broken off: the lease is lost or ends too soon"))

    # --- the connection ------------------------------------------------------------------------------------------------

    def connection_lost(self, error: Exception | None) -> None:
        """The next hop is gone. On a reused connection that said nothing, the message simply takes another one."""
        self.lane.forget(self)
        if self.attempt is None:
            return
        if self._unanswered and self.uses > 1:
            self._again()
            return
        self._fail(f"connection lost: {error}" if error else "connection lost")

    def expire(self) -> None:
        """The lane's sweep found no answer by the deadline."""
        self._fail("timed out waiting for an answer")

    def close(self) -> None:
        """Leave without ceremony."""
        self.lane.forget(self)
        self.transport.close()

    def quit(self) -> None:
        """Leave an idle connection as RFC 5321 §4.1.1.10 asks."""
        self.lane.forget(self)
        if not self.transport.is_closing():
            self.transport.write(b"QUIT\r\n")
            self.transport.close()
