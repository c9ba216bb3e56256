"""Owns: the answer to "is this login right?": stores, throttle, slow hashes and the moment of the answer. In the hub.

Every refusal leaves at the same time after its question, whatever the reason, so that time tells nothing about accounts
(row A8). It must not know SMTP or sockets. A wrong password is never tried on another store or spelling.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from scramp import ScramException, ScramMechanism

from relay.auth.filestore import Entry, fold
from relay.auth.mechanism import NAME_OCTETS
from relay.auth.question import Question, Reply, Result, Step
from relay.auth.secret import Scram, as_scram, check, cram_digest, is_slow
from relay.auth.slots import Slots, SlotsFull, Turn
from relay.auth.stores import Stores
from relay.auth.throttle import Throttle
from relay.config.auth import Auth
from relay.config.schema import Config

SUCCESSES_MAX: Final = 20_000
"""Logins whose slow hash need not be computed again, as keyed hashes."""
SUCCESS_S: Final = 300.0
"""How long; a changed password is another hash, so that it counts at once."""
ROOM_WAIT_S: Final = 5.0
"""A login waits this long for others of its account that are being checked."""

_UNAVAILABLE: Final = Reply(Result.UNAVAILABLE)


@dataclass(slots=True)
class Exchange:
    """SCRAM between its two questions. ``entry`` is None for an account that does not exist."""

    server: Any = field(repr=False)
    user: str
    entry: Entry | None = field(repr=False)


class Verifier:
    """Everything that logins are checked with. One event loop; the clock is monotonic."""

    def __init__(self, config: Config, stores: Stores) -> None:
        self._rules: Auth = config.auth
        self.stores = stores
        self.throttle = Throttle(config.auth)
        self._slots = Slots()
        self._key = secrets.token_bytes(32)
        self._successes: OrderedDict[bytes, float] = OrderedDict()
        self._room: dict[str, asyncio.Event] = {}

    def configure(self, config: Config, stores: Stores) -> None:
        """Take a new configuration; what was counted stays."""
        self._rules = config.auth
        self.stores = stores
        self.throttle.configure(config.auth)
        self.throttle.forget_failed_passwords()

    def close(self) -> None:
        """Let the threads end."""
        self._slots.close()

    async def answer(self, question: Question, client: str, listener: str, exchange: list[Exchange]) -> Reply:
        """Look at one question. ``exchange`` holds SCRAM's state between its two; never raises."""
        asked = time.monotonic()
        match question.step:
            case Step.PLAIN | Step.CRAM:
                reply = await self._check(question, client, listener)
            case Step.SCRAM_FIRST:
                reply = await self._scram_first(question, client, listener, exchange)
            case _:
                reply = await self._scram_final(question, client, exchange)
        if reply.result in {Result.REFUSED, Result.BLOCKED}:
            await self._until_due(asked)
        return reply

    async def _until_due(self, asked: float) -> None:
        """Failures leave a whole number of delays after their question."""
        delay = self._rules.failure_delay_s
        if delay:
            passed = time.monotonic() - asked
            await asyncio.sleep(max(1, math.ceil(passed / delay)) * delay - passed)

    # --- password and CRAM-MD5 -------------------------------------------------------------------------------------
    async def _check(self, question: Question, client: str, listener: str) -> Reply:
        user = question.user
        accounts = self.stores.accounts(listener)
        if accounts is None:
            return Reply(Result.UNAVAILABLE, user=user, why="no store can be read")
        entry = accounts.get(fold(user))
        account = fold(user)[:NAME_OCTETS]
        mark = self._mark(account, entry, question) if question.step is Step.PLAIN else b""
        blocked = await self._admitted(account, client, mark)
        if blocked is not None:
            return Reply(blocked.result, user=user, why=blocked.why)
        try:
            right = await self._is_right(entry, question, account, client, mark)
        except SlotsFull:
            return Reply(Result.UNAVAILABLE, user=user, why="too many logins at once")
        finally:
            self._leave(account)
        return self._judged(entry, account, user, client, mark, right=right)

    async def _admitted(self, account: str, client: str, mark: bytes) -> Reply | None:
        """None when a store may be asked, which is noted as under way; else why not."""
        throttle = self.throttle
        now = time.monotonic()
        if mark and throttle.just_failed(mark, now):
            return Reply(Result.REFUSED, why="this password failed a moment ago")
        if throttle.client_blocked(client, now) and not throttle.knows(account, client, now):
            return Reply(Result.BLOCKED, why="too many failures of this client")
        until = now + ROOM_WAIT_S
        while throttle.account_full(account, client, now):
            if not throttle.waits(account) or now >= until:
                return Reply(Result.BLOCKED, why="too many failures of this account")
            event = self._room.setdefault(account, asyncio.Event())
            try:
                async with asyncio.timeout(until - now):
                    await event.wait()
            except TimeoutError:
                pass
            now = time.monotonic()
        throttle.begin(account)
        return None

    def _leave(self, account: str) -> None:
        self.throttle.end(account)
        event = self._room.pop(account, None)
        if event is not None:
            event.set()

    async def _is_right(self, entry: Entry | None, question: Question, account: str, client: str, mark: bytes) -> bool:
        if entry is None:
            return False
        secret = entry.secret
        if question.step is Step.CRAM:
            wanted = cram_digest(secret, question.challenge)
            return wanted is not None and hmac.compare_digest(wanted.encode(), question.proof)
        if not is_slow(secret):
            return check(secret, question.proof)
        now = time.monotonic()
        if now - self._successes.get(mark, -SUCCESS_S) < SUCCESS_S:
            return True
        turn = Turn.KNOWN if self.throttle.knows(account, client, now) else Turn.STRANGER
        right = await self._slots.run(turn, lambda: check(secret, question.proof))
        if right:
            self._successes[mark] = now
            if len(self._successes) > SUCCESSES_MAX:
                self._successes.popitem(last=False)
        return right

    def _judged(self, entry: Entry | None, account: str, user: str, client: str, mark: bytes, *, right: bool) -> Reply:
        now = time.monotonic()
        if right and entry is not None:
            self.throttle.succeeded(account, client, now)
            return Reply(Result.OK, account=entry.account, user=entry.account.name)
        self.throttle.failed(account, client, mark, now)
        return Reply(Result.REFUSED, user=user, why="wrong password" if entry is not None else "no such account")

    def _mark(self, account: str, entry: Entry | None, question: Question) -> bytes:
        """A keyed hash of account, stored and given password: another as soon as one of them is."""
        made = hashlib.blake2b(key=self._key, digest_size=16)
        stored = b"" if entry is None else self._stored(entry)
        for part in (account.encode(), stored, question.proof):
            made.update(len(part).to_bytes(4, "big") + part)
        return made.digest()

    @staticmethod
    def _stored(entry: Entry) -> bytes:
        secret = entry.secret
        return b"\0".join(
            value if isinstance(value, bytes) else str(value).encode()
            for value in (getattr(secret, name) for name in secret.__slots__)
        )

    # --- SCRAM -----------------------------------------------------------------------------------------------------
    async def _scram_first(self, question: Question, client: str, listener: str, exchange: list[Exchange]) -> Reply:
        accounts = self.stores.accounts(listener)
        if accounts is None:
            return Reply(Result.UNAVAILABLE, why="no store can be read")
        if self.throttle.client_blocked(client, time.monotonic()):
            return Reply(Result.BLOCKED, why="too many failures of this client")
        seen: list[Exchange] = []

        def look_up(user: str) -> tuple[bytes, bytes, bytes, int]:
            entry = accounts.get(fold(user))
            seen.append(Exchange(None, user, entry))
            salt = hmac.digest(self.stores.digest(listener), fold(user).encode(), "sha256")[:16]
            found = None if entry is None else as_scram(entry.secret, salt)
            if found is None:  # an account that does not exist looks like one that does (RFC 5802 §9)
                seen[0].entry = None
                found = Scram(4096, salt, secrets.token_bytes(32), secrets.token_bytes(32))
            return found.salt, found.stored_key, found.server_key, found.iterations

        binding = ("tls-server-end-point", question.binding) if question.binding else None
        server = ScramMechanism(question.mechanism).make_server(look_up, channel_binding=binding)
        try:
            message = question.proof.decode()
            await self._slots.run(Turn.STRANGER, lambda: server.set_client_first(message))
            first = server.get_server_first()
        except (ScramException, UnicodeDecodeError):
            self.throttle.guessed(client, time.monotonic())
            return Reply(Result.REFUSED, user=seen[0].user if seen else "", why="malformed SCRAM message")
        except SlotsFull:
            return _UNAVAILABLE
        exchange[:] = [Exchange(server, seen[0].user[:NAME_OCTETS], seen[0].entry)]
        return Reply(Result.GO_ON, first.encode())

    async def _scram_final(self, question: Question, client: str, exchange: list[Exchange]) -> Reply:
        if not exchange:
            return Reply(Result.UNAVAILABLE, why="the exchange was forgotten")
        now = exchange.pop()
        account = fold(now.user)
        blocked = await self._admitted(account, client, b"")
        if blocked is not None:
            return Reply(blocked.result, user=now.user, why=blocked.why)
        try:
            now.server.set_client_final(question.proof.decode())
            octets = now.server.get_server_final().encode()
            right = True
        except (ScramException, UnicodeDecodeError):
            octets, right = b"", False
        finally:
            self._leave(account)
        reply = self._judged(now.entry, account, now.user, client, b"", right=right)
        return Reply(reply.result, octets, reply.account, reply.user, reply.why)
