"""Owns: asking a next hop whether it takes a recipient, without sending anything (row R13): MAIL FROM:<>, RCPT, RSET, QUIT.

===========================================  ========================================================================
the next hop                                 then
===========================================  ========================================================================
takes a random address of the domain         it takes anything: not asked any more for ``probe_s``, every recipient is
                                             taken, an alarm says so
takes the recipient                          valid, remembered for ``valid_s``
says that there is no such mailbox           unknown, remembered for ``unknown_s``
says anything else, or nothing in time       not known: 451
===========================================  ========================================================================

Only for domains with ``recipients = "callout"``; the caller sees to that. Bounded: questions a minute, questions under way, what is
remembered. Must not decide what a client is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiosmtplib import SMTP, SMTPException

from relay.config.schema import Config
from relay.directory.answers import Answers
from relay.mail.address import Mailbox, ascii_form, domain_of
from relay.mail.answer import Answer
from relay.outbound.client import split_text
from relay.outbound.connect import ConnectFailed, open_client
from relay.outbound.lane import Lane
from relay.outbound.lanes import Lanes
from relay.policy.route import Action
from relay.telemetry.maillog import MailLog
from relay.telemetry.metrics import Metrics

UNDER_WAY: Final = 64
"""Recipients asked about at once by a worker: each is a connection. More are told 451."""
PROBES: Final = 4096
"""Pairs of next hop and domain whose probe is remembered; more are probed again."""
PAUSE_S: Final = 5.0
"""A next hop that could not be asked is left alone for this long: clients meanwhile hear 451 at once."""
NO_SUCH_MAILBOX: Final = ("5.1.1", "5.1.0", "5.1.3", "5.1.6", "5.1.10", "5.2.1")
"""Enhanced codes (RFC 3463) that speak of the mailbox; 5.7.x speaks of us, and proves nothing."""
_FULL: Final = ("4.2.2", "5.2.2")

Told = Callable[[bool | None], None]
"""Hears True (valid), False (unknown), None (not known: 451). Called once, at once or later."""


class NoAnswer(Exception):
    """The next hop was not asked, or did not say. The text is for the log."""


class Unreachable(NoAnswer):
    """It could not be asked at all, so that the next question would fare no better."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What one connection brought. ``anything``: a random address was taken; None when it was not tried."""

    anything: bool | None
    valid: bool
    said: str


class Callout:
    """The questions of one worker."""

    def __init__(self, config: Config, lanes: Lanes, answers: Answers, log: MailLog, metrics: Metrics) -> None:
        self._lanes = lanes
        self._answers = answers
        self._log = log
        self._metrics = metrics
        self._waiting: dict[str, list[Told]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._probed: dict[tuple[str, str], tuple[bool, float]] = {}
        self._paused: dict[str, float] = {}
        self._off: set[tuple[str, str]] = set()
        self._tokens = 0.0
        self._counted = time.monotonic()
        self.configure(config)
        self._tokens = self._share

    def configure(self, config: Config) -> None:
        """Take over a (new) configuration; what other next hops said does not count any more."""
        self._rules = config.callout
        self._answers.forget()
        self._probed.clear()
        self._paused.clear()

    @property
    def _share(self) -> float:
        """This worker's part of the questions a minute."""
        return max(1.0, self._rules.per_minute / max(1, self._lanes.live_workers))

    @property
    def busy(self) -> bool:
        """Whether anything is being asked."""
        return bool(self._tasks)

    def ask(self, mailbox: Mailbox, told: Told) -> None:
        """Find out about a recipient."""
        now = time.monotonic()
        known = self._answers.get(mailbox, now)
        if known is not None:
            told(known)
            return
        key = mailbox.lower()
        others = self._waiting.get(key)
        if others is not None:
            others.append(told)
            return
        if len(self._waiting) >= UNDER_WAY or not self._spend(now):
            self._metrics.callout("budget")
            told(None)
            return
        self._waiting[key] = [told]
        task = asyncio.get_running_loop().create_task(self._ask(mailbox, key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spend(self, now: float) -> bool:
        share = self._share
        self._tokens = min(share, self._tokens + (now - self._counted) * share / 60.0)
        self._counted = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    async def _ask(self, mailbox: Mailbox, key: str) -> None:
        valid: bool | None = None
        try:
            async with asyncio.timeout(self._rules.timeout_s):
                valid = await self._found_out(mailbox)
            self._metrics.callout("valid" if valid else "unknown")
        except TimeoutError:
            self._failed(mailbox, f"no answer within {self._rules.timeout_s:g} s")
        except NoAnswer as why:
            self._failed(mailbox, str(why))
        finally:
            for told in self._waiting.pop(key):
                told(valid)

    def _failed(self, mailbox: Mailbox, why: str) -> None:
        self._metrics.callout("no_answer")
        self._log.note("warning", "callout_failed", recipient=mailbox, why=why)

    async def _found_out(self, mailbox: Mailbox) -> bool:
        """Raises NoAnswer."""
        lane = await self._lane(mailbox)
        domain = domain_of(mailbox)
        place = lane.name, domain
        now = time.monotonic()
        anything, until = self._probed.get(place, (False, 0.0))
        fresh = now < until
        if fresh and anything:
            self._answers.put(mailbox, until, valid=True)
            return True
        if now < self._paused.get(lane.name, 0.0):
            raise NoAnswer(f"{lane.name} could not be asked a moment ago")
        try:
            heard = await hear(lane, mailbox, probe=not fresh)
        except (Unreachable, asyncio.CancelledError):
            if len(self._paused) < PROBES:
                self._paused[lane.name] = time.monotonic() + PAUSE_S
            raise
        now = time.monotonic()
        if heard.anything is not None:
            if len(self._probed) >= PROBES:
                self._probed.clear()
            self._probed[place] = (heard.anything, now + self._rules.probe_s)
            self._tell(place, off=heard.anything)
        kept_s = (
            self._rules.probe_s if heard.anything else self._rules.valid_s if heard.valid else self._rules.unknown_s
        )
        self._answers.put(mailbox, now + kept_s, valid=heard.valid)
        return heard.valid

    def _tell(self, place: tuple[str, str], *, off: bool) -> None:
        name, domain = place
        if off and place not in self._off:
            self._off.add(place)
            self._log.alarm(
                "callout_off", next_hop=name, domain=domain,
                why="it takes a random address, so it would take any: every recipient of the domain is taken now",
                cure='let it refuse unknown recipients at RCPT, or write recipients = "directory"',
            )  # fmt: skip
        elif not off and place in self._off:
            self._off.discard(place)
            self._log.alarm("callout_on", next_hop=name, domain=domain)
        self._metrics.callouts_off(len(self._off))

    async def _lane(self, mailbox: Mailbox) -> Lane:
        route = self._lanes.of(mailbox)
        if route is None or route.action is not Action.DELIVER:
            raise NoAnswer("no route leads to a next hop")
        found = await self._lanes.find(route, mailbox)
        if isinstance(found, Answer):
            raise NoAnswer(found.text)
        if not found[0].up:  # those that are up come first
            raise NoAnswer(f"{found[0].name} is down")
        return found[0]


async def hear(lane: Lane, mailbox: Mailbox, *, probe: bool) -> Heard:
    """Ask a next hop about a mailbox, with ``probe`` about a random one of its domain first. Raises NoAnswer."""
    try:
        client = await open_client(lane, (lane.addresses or (lane.next_hop.host,))[0], lane.peer)
    except ConnectFailed as failed:
        raise Unreachable(f"{lane.name}: {failed.answer.text}") from None
    try:
        spelt, words = _spelt(client, lane, mailbox)
        code, enhanced, text = await _say(client, lane, b"MAIL", b"FROM:<>", *words)
        if code >= 300:
            raise Unreachable(f"{lane.name} refuses the null sender: {code} {enhanced} {text}")
        if probe:
            stranger = f"relay-callout-{secrets.token_hex(8)}@{domain_of(mailbox)}"
            said = await _say(client, lane, b"RCPT", f"TO:<{stranger}>".encode())
            if _verdict(lane, said):
                return Heard(anything=True, valid=True, said=f"{said[0]} {said[2]}")
        said = await _say(client, lane, b"RCPT", f"TO:<{spelt}>".encode())
        return Heard(False if probe else None, valid=_verdict(lane, said), said=f"{said[0]} {said[2]}")
    except (SMTPException, OSError) as error:
        raise Unreachable(f"{lane.name}: {str(error) or type(error).__name__}") from None
    finally:
        with contextlib.suppress(SMTPException, OSError, TimeoutError):
            await client.execute_command(b"RSET", timeout=lane.command_timeout_s)
            await client.quit(timeout=lane.command_timeout_s)
        client.close()


def _spelt(client: SMTP, lane: Lane, mailbox: Mailbox) -> tuple[Mailbox, tuple[bytes, ...]]:
    """The address as a delivery would write it, and what MAIL says for it (RFC 6531 §3.4). Raises NoAnswer."""
    if mailbox.isascii():
        return mailbox, ()
    if client.supports_extension("smtputf8"):
        return mailbox, (b"SMTPUTF8",)
    plain = ascii_form(mailbox)
    if plain is None:
        raise NoAnswer(f"{lane.name} knows no SMTPUTF8, and the address needs it")
    return plain, ()


async def _say(client: SMTP, lane: Lane, *words: bytes) -> tuple[int, str, str]:
    response = await client.execute_command(*words, timeout=lane.command_timeout_s)
    return response.code, *split_text(response.message)


def _verdict(lane: Lane, said: tuple[int, str, str]) -> bool:
    """Whether a reply to RCPT says that the mailbox is there. Raises NoAnswer when it says neither."""
    code, enhanced, text = said
    if 200 <= code < 300 or enhanced in _FULL:
        return True
    if code in {550, 551, 553, 554} and (enhanced in NO_SUCH_MAILBOX or not enhanced):
        return False
    raise NoAnswer(f"{lane.name} says {code} {enhanced} {text}, which is not about the mailbox")
