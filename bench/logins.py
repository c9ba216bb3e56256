"""Logins: STARTTLS sessions, AUTH PLAIN from a local store and by LDAP binds, CRAM-MD5, guessing, and what time tells.

usage: run.py --part auth, which starts the servers: Postfix with Cyrus SASL (sasldb) and the relay, each with the user
bench@bench (password secret); a relay whose accounts stand in a slapd. Clients take up no earlier
TLS session, but for LDAP; each session has EHLO, STARTTLS, EHLO, QUIT and, where that is measured, AUTH PLAIN with an initial response.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import select
import socket
import ssl
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import benchlib as b
import uvloop

from relay.auth import md5

USER, PASSWORD = "bench@bench", "secret"
MANY: Final = 1000
"""Accounts user0, user1, … and other0, …: so many that no account's budget is what is measured."""
CLIENTS: Final = 8
PROCESSES: Final = 2
LDAP_CLIENTS: Final = 50
GUESSERS: Final = 200
PAIRS: Final = 1000
PAIRS_AT_ONCE: Final = 100

Mode = Literal["tls", "tls-auth", "resumed-auth"]
"""The last one takes up its earlier TLS session where it meets the same worker again, as mail clients do."""


def accounts() -> list[str]:
    """Those besides USER."""
    return [f"{kind}{number}" for kind in ("user", "other") for number in range(MANY)]


def plain(user: str, password: str) -> bytes:
    """The command with its initial response."""
    return b"AUTH PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()) + b"\r\n"


def context() -> ssl.SSLContext:
    """Takes any certificate: who serves is known here."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no authorities: loading them takes longer than ten handshakes
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    return made


# ------------------------------------------------------------------------------------------------- sessions a second
Steps = Generator[tuple[socket.socket, int], None, None]
"""A client: what it waits for, again and again."""


def _reply(sock: socket.socket, wanted: bytes) -> Steps:
    heard = b""
    while True:
        try:
            more = sock.recv(4096)
        except (BlockingIOError, ssl.SSLWantReadError):
            yield sock, select.EPOLLIN
            continue
        heard += more
        if not more:
            raise ConnectionError("closed")
        if heard.endswith(b"\n") and heard.rstrip().rsplit(b"\n", 1)[-1][3:4] != b"-":
            if not heard.startswith(wanted):
                raise ConnectionError(repr(heard))
            return


def _session(
    address: tuple[str, int], mode: Mode, tls: ssl.SSLContext, login: bytes, earlier: list[ssl.SSLSession] | None = None
) -> Steps:
    """One session from the greeting to QUIT. ``earlier`` is where a TLS session is taken from and left."""
    sock = socket.socket()
    try:
        sock.settimeout(0)
        sock.connect_ex(address)
        yield sock, select.EPOLLOUT
        yield from _reply(sock, b"220")
        sock.sendall(b"EHLO c.test\r\n")
        yield from _reply(sock, b"250")
        sock.sendall(b"STARTTLS\r\n")
        yield from _reply(sock, b"220")
        known = earlier.pop() if earlier else None
        sock = secure = tls.wrap_socket(sock, do_handshake_on_connect=False, server_hostname="localhost", session=known)
        while True:
            try:
                secure.do_handshake()
                break
            except ssl.SSLWantReadError:
                yield sock, select.EPOLLIN
        sock.sendall(b"EHLO c.test\r\n")
        yield from _reply(sock, b"250")
        if mode != "tls":
            sock.sendall(login)
            yield from _reply(sock, b"235")
        if mode == "resumed-auth" and earlier is not None and secure.session is not None:
            earlier.append(secure.session)
        sock.sendall(b"QUIT\r\n")
        yield from _reply(sock, b"221")
    finally:
        sock.close()


def session(address: tuple[str, int], mode: Mode, tls: ssl.SSLContext, login: bytes) -> None:
    """The same, alone."""
    for sock, mask in _session(address, mode, tls, login):
        select.select([sock] if mask == select.EPOLLIN else [], [sock] if mask == select.EPOLLOUT else [], [])


class Clients:
    """Some clients of one process, each one session after the other."""

    FAILED_MAX: Final = 50

    def __init__(self, target: b.Target, mode: Mode, logins: Sequence[bytes]) -> None:
        self._target, self._mode = target, mode
        self._logins = itertools.cycle(logins)
        self._tls = context()
        self._sessions: list[ssl.SSLSession] = []
        self._poll = select.epoll()
        self._waiting: dict[int, tuple[Steps, int]] = {}
        self.done = self.failed = 0

    def run(self, clients: int, seconds: float) -> int:
        """Sessions that ended well within the time."""
        end = time.monotonic() + seconds
        for _ in range(clients):
            self._step(self._new())
        while self._waiting and time.monotonic() < end and self.failed < self.FAILED_MAX:
            for number, _ in self._poll.poll(1):
                steps, _ = self._waiting.pop(number)
                self._step(steps, number)
        return self.done

    def _new(self) -> Steps:
        address = (self._target.host, self._target.port)
        return _session(address, self._mode, self._tls, next(self._logins), self._sessions)

    def _step(self, steps: Steps, before: int = -1) -> None:
        while True:
            try:
                sock, mask = next(steps)
            except (OSError, StopIteration) as error:
                if isinstance(error, OSError):
                    self.failed += 1
                    if self.failed == 1:
                        b.say(f"  {self._target.name} {self._mode}: {error}")
                else:
                    self.done += 1
                steps, before = self._new(), -1
                continue
            number = sock.fileno()
            if number == before:
                self._poll.modify(number, mask)
            else:
                self._poll.register(number, mask)
            self._waiting[number] = steps, mask
            return


def rate(target: b.Target, mode: Mode, seconds: float, clients: int, users: Sequence[str]) -> float:
    """Sessions a second of some clients, in ``PROCESSES`` processes."""
    children: list[tuple[int, int]] = []
    logins = [plain(user, PASSWORD) for user in users]
    waiting, go = os.pipe()
    for number in range(PROCESSES):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go)
            mine = Clients(target, mode, logins[number::PROCESSES] or logins)
            os.write(writing, b"r")
            os.read(waiting, 1)  # ends when all are there
            os.write(writing, b"%d" % mine.run(clients // PROCESSES, seconds))
            os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    for _, reading in children:
        os.read(reading, 1)
    start = time.monotonic()
    os.close(go)
    os.close(waiting)
    done = 0
    for pid, reading in children:
        done += int(os.read(reading, 20) or b"0")
        os.close(reading)
        os.waitpid(pid, 0)
    return done / (time.monotonic() - start)


def compare(targets: Sequence[b.Target], reps: int, seconds: float) -> Iterator[b.Figure]:
    """Both modes, interleaved between the targets."""
    modes: tuple[tuple[Mode, str], ...] = (("tls", "STARTTLS"), ("tls-auth", "STARTTLS, AUTH PLAIN"))
    for mode, name in modes:
        for target in targets:
            rate(target, mode, 0.5, CLIENTS, [USER])
        rounds, cpu = [], []
        for _ in range(reps):
            row, spent = {}, {}
            for target in targets:
                before = b.cpu_seconds(target.roots)
                row[target.name] = rate(target, mode, seconds, CLIENTS, [USER])
                spent[target.name] = (b.cpu_seconds(target.roots) - before) / (row[target.name] * seconds) * 1000
            rounds.append(row)
            cpu.append(spent)
        yield b.figure(name, "sessions/s", rounds)
        yield b.figure(f"{name} CPU", "s/1000", cpu)


def by_bind(target: b.Target, reps: int, seconds: float, slapd: int) -> Iterator[b.Figure]:
    """Logins a second whose password a directory checks, and what they cost relay and slapd."""
    users = [f"user{number}" for number in range(MANY)]
    rate(target, "resumed-auth", 0.5, LDAP_CLIENTS, users)
    rounds, cpu = [], []
    for _ in range(reps):
        before = b.cpu_seconds([*target.roots, slapd])
        found = rate(target, "resumed-auth", seconds, LDAP_CLIENTS, users)
        rounds.append({target.name: found})
        cpu.append({target.name: (b.cpu_seconds([*target.roots, slapd]) - before) / (found * seconds) * 1000})
    yield b.figure(f"LDAP-bind logins, {LDAP_CLIENTS} clients", "logins/s", rounds)
    yield b.figure("the same, CPU of relay and slapd", "s/1000", cpu)


def cram_md5(name: str) -> b.Figure:
    """One check of a CRAM-MD5 answer from dovecot's context, without the session."""
    stored = md5.context(b"test")
    challenge = b"<0123456789abcdef0123456789abcdef@relay.bench.test>"
    rounds = []
    for _ in range(7):
        began = time.process_time()
        for _ in range(500):
            md5.hmac_md5(stored, challenge)
        rounds.append({name: (time.process_time() - began) / 500 * 1e6})
    return b.figure("CRAM-MD5 from a context", "µs CPU", rounds)


# ---------------------------------------------------------------------------------------------- guesses and their time
@dataclass(slots=True)
class Line:
    """A session inside TLS of an event loop."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, command: bytes) -> bytes:
        """The last line of the reply."""
        self.writer.write(command)
        while True:
            line = await self.reader.readline()
            if line[3:4] != b"-":
                return line


async def opened(target: b.Target, tls: ssl.SSLContext, source: str = "127.0.0.1") -> Line:
    reader, writer = await asyncio.open_connection(target.host, target.port, local_addr=(source, 0))
    line = Line(reader, writer)
    await line.ask(b"")
    await line.ask(b"EHLO c.test\r\n")
    await line.ask(b"STARTTLS\r\n")
    await writer.start_tls(tls, server_hostname="localhost")
    await line.ask(b"EHLO c.test\r\n")
    return line


async def _guess(target: b.Target, tls: ssl.SSLContext, number: int) -> None:
    line = await opened(target, tls, f"127.0.{1 + number}.1")
    while True:
        guess = plain(f"user{(number * 37 + time.monotonic_ns()) % MANY}", f"wrong{time.monotonic_ns()}")
        if not await line.ask(guess):
            return


def _guessers(target: b.Target) -> int:
    """A process of guessers, each from a network of its own; returns its pid."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)

        async def all_at_once() -> None:
            tls = context()
            await asyncio.gather(*(_guess(target, tls, number) for number in range(GUESSERS)), return_exceptions=True)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(all_at_once())
        os._exit(0)
    return pid


def under_attack(target: b.Target, reps: int, seconds: float) -> Iterator[b.Figure]:
    """How long others' logins take while 200 guess: one client, one login after the other."""
    tls = context()

    def times() -> float:
        taken, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            session((target.host, target.port), "tls-auth", tls, plain(USER, PASSWORD))
            taken.append(time.perf_counter() - began)
        return statistics.median(taken) * 1000

    times()
    rounds = []
    for _ in range(reps):
        calm = times()
        pid = _guessers(target)
        time.sleep(3)  # until all 200 are through their handshakes
        stormy = times()
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        time.sleep(1.5)
        rounds.append({"calm": calm, target.name: stormy})
    found = b.figure(f"a login, while {GUESSERS} guess", "ms", rounds)
    yield b.Figure("a login", "ms", {target.name: found.values["calm"]})
    yield b.Figure(found.measure, "ms", {target.name: found.values[target.name]})
    yield b.Figure(f"the same, while {GUESSERS} guess", "times", {target.name: found.ratios[target.name]})


def pairs(target: b.Target, store: str) -> Iterator[b.Figure]:
    """Unknown user and wrong password, one after the other, on sessions that stand."""
    unknown: list[float] = []
    wrong: list[float] = []

    async def one(start: int) -> None:
        line = await opened(target, context())
        for number in range(start, PAIRS, PAIRS_AT_ONCE):
            for name, taken in ((f"nobody{number}", unknown), (f"other{number}", wrong)):
                began = time.perf_counter()
                said = await line.ask(plain(name, f"wrong{number}"))
                taken.append(time.perf_counter() - began)
                if not said.startswith(b"535"):
                    b.say(f"  {name}: {said!r}")
        line.writer.close()

    async def everybody() -> None:
        await asyncio.gather(*map(one, range(PAIRS_AT_ONCE)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(everybody())
    apart = abs(statistics.median(unknown) - statistics.median(wrong)) * 1000
    yield b.figure(f"unknown user, {store}", "ms", [{target.name: statistics.median(unknown) * 1000}])
    yield b.figure(f"wrong password, {store}", "ms", [{target.name: statistics.median(wrong) * 1000}])
    yield b.figure(f"the two apart, {store}", "ms", [{target.name: apart}])
