"""Owns: the answer to "is this login right?": stores, throttle, slow hashes and the moment of the answer. In the hub.

Every refusal leaves at the same time after its question, whatever the reason, so that time tells nothing about accounts
(row A8). It must not know SMTP or sockets. A wrong password is never tried on another store or spelling.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from scramp import ScramException, ScramMechanism

from relay.auth.abilities import Ambiguous, Answer, Entry, StoreAway
from relay.auth.filestore import Accounts, fold
from relay.auth.mechanism import NAME_OCTETS
from relay.auth.question import Question, Reply, Result, Step
from relay.auth.secret import Scram, Secret, as_scram, check, cram_digest, is_slow
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

SPELLINGS_MAX: Final = 20_000
"""Names that an account of a directory logged in by, and what its guesses are counted under."""

_RIGHT: Final = Answer(right=True)
_WRONG: Final = Answer(right=False, why="wrong password")
_UNKNOWN: Final = Answer(right=False, why="no such account")
_SCRAM_NAME: Final = re.compile(r"[^,]*,[^,]*,(?:m=[^,]*,)?n=([^,]*),")
"""The name in a client's first message (RFC 5802 §7)."""
_UNAVAILABLE: Final = Reply(Result.UNAVAILABLE)


@dataclass(slots=True)
class Exchange:
    """SCRAM between its two questions. ``entry`` is None for an account that does not exist."""

    server: Any = field(repr=False)
    user: str
    account: str
    """What its guesses are counted under."""
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
        self._spellings: OrderedDict[str, str] = OrderedDict()
        self._room: dict[str, asyncio.Event] = {}

    def configure(self, config: Config, stores: Stores) -> None:
        """Take a new configuration; what was counted stays."""
        self._rules = config.auth
        self.stores.close()
        self.stores = stores
        self.throttle.configure(config.auth)
        self.throttle.forget_failed_passwords()

    def close(self) -> None:
        """Let the threads end, hang up on directories."""
        self._slots.close()
        self.stores.close()

    @property
    def delay(self) -> float:
        """How long after its question a refusal leaves that ``answer_now`` gave."""
        return self._rules.failure_delay_s

    def answer_now(self, question: Question, client: str, listener: str) -> Reply | None:
        """The answer where no store, no slow hash and nobody else has to be waited for; None where ``answer`` has to do it.

        Most logins end here: a task for each costs more than looking. A refusal is to be held back for ``delay``.
        """
        plain = question.step is Step.PLAIN
        chain = self.stores.chain(listener)
        if chain is None or not (plain or question.step is Step.CRAM):
            return None
        name = fold(question.user)
        entry = None
        for store in chain:
            if not isinstance(store, Accounts):
                return None
            entry = store.entries.get(name)
            if entry is not None:
                break
        if entry is not None and entry.barred:
            return None
        throttle, account, now = self.throttle, name[:NAME_OCTETS], time.monotonic()
        if (
            throttle.waits(account)
            or throttle.client_blocked(client, now)
            or throttle.account_full(account, client, now)
        ):
            return None
        mark = b""
        if plain:
            stored = () if entry is None else entry.secrets
            slow = any(map(is_slow, stored))
            mark = self._mark(account, entry, question) if slow or throttle.has_failures else b""
            if slow and now - self._successes.get(mark, -SUCCESS_S) >= SUCCESS_S:
                return None
            if mark and throttle.just_failed(mark, now):
                return None
            right = slow or any(check(secret, question.proof) for secret in stored)
            if not right:
                mark = mark or self._mark(account, entry, question)
            answer = _RIGHT if right else _UNKNOWN if entry is None else _WRONG
        else:
            answer = _UNKNOWN if entry is None else self._cram(entry, question)
        return self._judged(entry, answer, account, question.user, client, mark)

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
        found = await self._find(user, client, listener)
        if isinstance(found, Reply):
            return found
        entry = found
        account = fold(user if entry is None else entry.account.name)[:NAME_OCTETS]
        mark = self._mark(account, entry, question) if question.step is Step.PLAIN else b""
        blocked = await self._admitted(account, client, mark)
        if blocked is not None:
            return Reply(blocked.result, user=user, why=blocked.why)
        try:
            answer = await self._is_right(entry, question, account, client, mark)
        except SlotsFull:
            return Reply(Result.UNAVAILABLE, user=user, why="too many logins at once")
        except StoreAway as away:
            if away.shown:
                self.throttle.uncertain(account, mark, time.monotonic())
            return Reply(Result.UNAVAILABLE, user=user, why=str(away))
        finally:
            self._leave(account)
        return self._judged(entry, answer, account, user, client, mark)

    async def _find(self, user: str, client: str, listener: str) -> Entry | Reply | None:
        """The account that a name means, None when there is none; or why nobody may ask for it now."""
        chain = self.stores.chain(listener)
        if chain is None:
            return Reply(Result.UNAVAILABLE, user=user, why="no store can be read")
        name = fold(user)
        now = time.monotonic()
        if self.throttle.client_blocked(client, now) and not self.throttle.knows(
            self._spellings.get(name, name)[:NAME_OCTETS], client, now
        ):
            return Reply(Result.BLOCKED, user=user, why="too many failures of this client")
        try:
            for store in chain:
                if isinstance(store, Accounts):
                    entry = store.entries.get(name)
                else:
                    entry = await store.find(user)
                    self.throttle.obey(self.stores.lockout())
                if entry is not None:
                    return entry
        except StoreAway as away:
            return Reply(Result.UNAVAILABLE, user=user, why=str(away))
        except Ambiguous as problem:
            self.throttle.failed(name[:NAME_OCTETS], client, b"", time.monotonic())
            return Reply(Result.REFUSED, user=user, why=str(problem))
        return None

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
            if mark and throttle.just_failed(mark, now):  # the same one, sent twice at once
                return Reply(Result.REFUSED, why="this password failed a moment ago")
        throttle.begin(account)
        return None

    def _leave(self, account: str) -> None:
        self.throttle.end(account)
        event = self._room.pop(account, None)
        if event is not None:
            event.set()

    async def _is_right(
        self, entry: Entry | None, question: Question, account: str, client: str, mark: bytes
    ) -> Answer:
        if entry is None:
            return _UNKNOWN
        if entry.barred:
            return Answer(right=False, why=entry.barred)
        if question.step is Step.CRAM:
            return self._cram(entry, question)
        if entry.bind is not None:
            return await entry.bind(question.proof)
        slow = [secret for secret in entry.secrets if is_slow(secret)]
        if any(check(secret, question.proof) for secret in entry.secrets if not is_slow(secret)):
            return _RIGHT
        if not slow:
            return _WRONG
        now = time.monotonic()
        if now - self._successes.get(mark, -SUCCESS_S) < SUCCESS_S:
            return _RIGHT
        turn = Turn.KNOWN if self.throttle.knows(account, client, now) else Turn.STRANGER
        if not await self._slots.run(turn, lambda: any(check(secret, question.proof) for secret in slow)):
            return _WRONG
        self._successes[mark] = now
        if len(self._successes) > SUCCESSES_MAX:
            self._successes.popitem(last=False)
        return _RIGHT

    @staticmethod
    def _cram(entry: Entry, question: Question) -> Answer:
        for secret in entry.secrets:
            wanted = cram_digest(secret, question.challenge)
            if wanted is not None:
                return _RIGHT if hmac.compare_digest(wanted.encode(), question.proof) else _WRONG
        return Answer(right=False, why="its stored password cannot be used for CRAM-MD5")

    def _judged(self, entry: Entry | None, answer: Answer, account: str, user: str, client: str, mark: bytes) -> Reply:
        now = time.monotonic()
        if answer.right and entry is not None:
            self.throttle.succeeded(account, client, now)
            name = fold(user)
            if name != account:
                self._spellings[name] = account
                if len(self._spellings) > SPELLINGS_MAX:
                    self._spellings.popitem(last=False)
            who = answer.account or entry.account
            return Reply(Result.OK, account=who, user=who.name)
        self.throttle.failed(account, client, mark, now)
        return Reply(Result.REFUSED, user=user, why=answer.why)

    def _mark(self, account: str, entry: Entry | None, question: Question) -> bytes:
        """A keyed hash of account, stored and given password: another as soon as one of them is."""
        made = hashlib.blake2b(key=self._key, digest_size=16)
        stored = b"" if entry is None else self._stored(entry)
        for part in (account.encode(), stored, question.proof):
            made.update(len(part).to_bytes(4, "big") + part)
        return made.digest()

    @staticmethod
    def _stored(entry: Entry) -> bytes:
        return entry.stamp + b"\0".join(
            value if isinstance(value, bytes) else str(value).encode()
            for secret in entry.secrets
            for value in (getattr(secret, name) for name in secret.__slots__)
        )

    # --- SCRAM -----------------------------------------------------------------------------------------------------
    async def _scram_first(self, question: Question, client: str, listener: str, exchange: list[Exchange]) -> Reply:
        try:
            message = question.proof.decode()
        except UnicodeDecodeError:
            message = ""
        named = _SCRAM_NAME.match(message)
        if named is None:
            self.throttle.guessed(client, time.monotonic())
            return Reply(Result.REFUSED, why="malformed SCRAM message")
        user = named[1].replace("=2C", ",").replace("=3D", "=")
        found = await self._find(user, client, listener)
        if isinstance(found, Reply):
            return found
        entry = found
        salt = hmac.digest(self.stores.digest(listener), fold(user).encode(), "sha256")[:16]

        def look_up(_: str) -> tuple[bytes, bytes, bytes, int]:
            nonlocal entry
            made = None
            if entry is not None and not entry.barred:
                scrams = (as_scram(secret, salt) for secret in sorted(entry.secrets, key=_is_other))
                made = next((one for one in scrams if one is not None), None)
            if made is None:  # an account that does not exist looks like one that does (RFC 5802 §9)
                entry = None
                made = Scram(4096, salt, secrets.token_bytes(32), secrets.token_bytes(32))
            return made.salt, made.stored_key, made.server_key, made.iterations

        account = fold(user if entry is None else entry.account.name)
        binding = ("tls-server-end-point", question.binding) if question.binding else None
        server = ScramMechanism(question.mechanism).make_server(look_up, channel_binding=binding)
        try:
            await self._slots.run(Turn.STRANGER, lambda: server.set_client_first(message))
            first = server.get_server_first()
        except ScramException:
            self.throttle.guessed(client, time.monotonic())
            return Reply(Result.REFUSED, user=user[:NAME_OCTETS], why="malformed SCRAM message")
        except SlotsFull:
            return _UNAVAILABLE
        exchange[:] = [Exchange(server, user[:NAME_OCTETS], account[:NAME_OCTETS], entry)]
        return Reply(Result.GO_ON, first.encode())

    async def _scram_final(self, question: Question, client: str, exchange: list[Exchange]) -> Reply:
        if not exchange:
            return Reply(Result.UNAVAILABLE, why="the exchange was forgotten")
        now = exchange.pop()
        account = now.account
        blocked = await self._admitted(account, client, b"")
        if blocked is not None:
            return Reply(blocked.result, user=now.user, why=blocked.why)
        try:
            now.server.set_client_final(question.proof.decode())
            octets = now.server.get_server_final().encode()
            answer = _RIGHT
        except (ScramException, UnicodeDecodeError):
            octets, answer = b"", _WRONG if now.entry is not None else _UNKNOWN
        finally:
            self._leave(account)
        reply = self._judged(now.entry, answer, account, now.user, client, b"")
        return Reply(reply.result, octets, reply.account, reply.user, reply.why)


def _is_other(secret: Secret) -> bool:
    """Sorts what is made for SCRAM before what it would have to be made from."""
    return not isinstance(secret, Scram)
