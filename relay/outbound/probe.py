"""Owns: trying whether next hops take a connection, the way a delivery would open it, and leaving again with QUIT.

Nothing is delivered and no state of a running relay is touched: the lanes are this module's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from aiosmtplib import SMTP, SMTPException

from relay.config.schema import Config
from relay.control import HopSecret
from relay.mail.address import Mailbox
from relay.mail.answer import Answer, Stage
from relay.outbound.callout import Heard, NoAnswer, hear
from relay.outbound.client import Capabilities, Connection, split_text
from relay.outbound.connect import ConnectFailed, open_client
from relay.outbound.lane import Lane
from relay.outbound.peer import NO_SECRETS
from relay.policy.route import NextHop, RouteTable
from relay.telemetry.maillog import MailLog

CLOSE_S: Final = 1.0
"""A next hop that does not close its side after QUIT is left by then."""
TRY_S: Final = 10.0
"""Longest wait for each step with a next hop; the whole of one is given twice as long. An operator waits for the answer."""
AT_ONCE: Final = 8
"""Next hops that are tried at the same time."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of it: ``offers`` of one that took the connection, else ``answer``.

    ``tls_failed``: STARTTLS was offered and did not work, and the connection went on in clear.
    """

    next_hop: NextHop
    offers: Capabilities | None
    answer: Answer | None
    tls_failed: bool = False


async def try_all(
    next_hops: Sequence[NextHop],
    config: Config,
    seconds: float = TRY_S,
    secrets: Mapping[str, HopSecret] = NO_SECRETS,
) -> list[Tried]:
    """Each of them once, a few at a time. Never raises for what a next hop does."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(next_hop: NextHop) -> Tried:
        async with room:
            return await _try(next_hop, config, seconds, secrets)

    return await asyncio.gather(*map(one, next_hops))


def _lane(next_hop: NextHop, config: Config, seconds: float, secrets: Mapping[str, HopSecret], notes: _Notes) -> Lane:
    lane = Lane(next_hop, config, 1, MailLog(notes, "json", config.server.hostname), secrets=secrets)
    lane.connect_timeout_s = min(seconds, lane.connect_timeout_s)
    lane.command_timeout_s = min(seconds, lane.command_timeout_s)
    return lane


@dataclass(frozen=True, slots=True)
class Asked:
    """A walk through the commands of a delivery, without DATA. ``steps``: what was done and answered, in order.

    ``answer``: the first refusal; None when everything was taken.
    """

    steps: tuple[tuple[str, str], ...]
    answer: Answer | None


async def walk(
    next_hop: NextHop,
    config: Config,
    secrets: Mapping[str, HopSecret],
    sender: str,
    recipient: str,
    seconds: float = TRY_S,
) -> Asked:
    """Connect, TLS, AUTH as a delivery would; then MAIL, RCPT, RSET, QUIT. Never raises for what a next hop does."""
    lane = _lane(next_hop, config, seconds, secrets, _Notes())
    steps: list[tuple[str, str]] = []
    try:
        client = await asyncio.wait_for(open_client(lane, next_hop.host, lane.peer), 3 * seconds)
    except ConnectFailed as error:
        return Asked(tuple(steps), error.answer)
    except TimeoutError:
        return Asked(tuple(steps), Answer(Stage.CONNECT, 0, "", f"no connection within {3 * seconds:.0f} s"))
    try:
        steps.append(("connect", f"{next_hop.name}, EHLO is answered"))
        steps.append(("tls", _tls_of(client)))
        if lane.peer.login is not None:
            steps.append(("auth", f"logged in as {lane.peer.login.user}"))
        for stage, words in (
            (Stage.MAIL, (b"MAIL", f"FROM:<{sender}>".encode())),
            (Stage.RCPT, (b"RCPT", f"TO:<{recipient}>".encode())),
        ):
            response = await client.execute_command(*words, timeout=seconds)
            enhanced, text = split_text(response.message)
            steps.append((stage, f"{response.code} {enhanced} {text}".replace("  ", " ")))
            if response.code >= 300:
                return Asked(tuple(steps), Answer(stage, response.code, enhanced, text))
        await client.execute_command(b"RSET", timeout=seconds)
        return Asked(tuple(steps), None)
    except (SMTPException, OSError) as error:
        return Asked(tuple(steps), Answer(Stage.MAIL, 0, "", str(error) or type(error).__name__))
    finally:
        with contextlib.suppress(SMTPException, OSError):
            await client.quit(timeout=seconds)
        client.close()


async def ask_about(
    mailbox: Mailbox, config: Config, secrets: Mapping[str, HopSecret], seconds: float = TRY_S
) -> tuple[NextHop, Heard]:
    """What the next hop of a mailbox says of it, and of a random address of its domain (row R13). Raises NoAnswer."""
    route = RouteTable(config).find(mailbox)
    if route is None or not route.static or not route.next_hops:
        raise NoAnswer("its next hop is found by MX, or there is none: not asked here")
    next_hop = route.next_hops[0]
    try:
        async with asyncio.timeout(3 * seconds):
            return next_hop, await hear(_lane(next_hop, config, seconds, secrets, _Notes()), mailbox, probe=True)
    except TimeoutError:
        raise NoAnswer(f"{next_hop.name}: no answer within {3 * seconds:.0f} s") from None


def _tls_of(client: SMTP) -> str:
    tls: ssl.SSLObject | None = client.transport.get_extra_info("ssl_object") if client.transport is not None else None
    if tls is None:
        return "none: mail goes on readable"
    der = tls.getpeercert(binary_form=True)
    seen = tls.getpeercert() or {}
    until = f", good until {seen['notAfter']}" if "notAfter" in seen else ""
    pin = f", SHA-256 {hashlib.sha256(der).hexdigest()}" if der else ""
    return f"{tls.version()}{', certificate verified' if seen else ', certificate not looked at'}{until}{pin}"


async def _try(next_hop: NextHop, config: Config, seconds: float, secrets: Mapping[str, HopSecret]) -> Tried:
    notes = _Notes()
    lane = _lane(next_hop, config, seconds, secrets, notes)
    try:
        opened = await asyncio.wait_for(lane.try_connection(), 2 * seconds)
    except TimeoutError:
        opened = Answer(Stage.CONNECT, 0, "", f"no connection within {2 * seconds:.0f} s")
    tls_failed = any("next_hop_tls_failed" in line for line in notes.lines)
    if isinstance(opened, Answer):
        return Tried(next_hop, None, opened, tls_failed)
    await _leave(opened)
    return Tried(next_hop, opened.capabilities, None, tls_failed)


async def _leave(opened: Connection) -> None:
    """Say QUIT and see the connection closed: the event loop of a command ends right after."""
    gone = _Gone()
    opened.quit()
    opened.transport.set_protocol(gone)
    try:
        await asyncio.wait_for(gone.over.wait(), CLOSE_S)
    except TimeoutError:
        opened.transport.abort()
        await asyncio.sleep(0)


class _Gone(asyncio.Protocol):
    """Notices that a connection is over."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def connection_lost(self, error: Exception | None) -> None:
        self.over.set()


class _Notes:
    """A log that is a list."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str, /) -> None:
        self.lines.append(line)

    def flush(self) -> None: ...
