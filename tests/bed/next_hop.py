"""Owns: a next hop that fails on command: an SMTP server in threads whose every step can be scripted.

A *step* is a place in the dialogue (``Step``). A *rule* says what happens there, how often and for which command; the
first rule that fits is used, and without one the server does what a good server does::

    hop.on(Step.RCPT, Say("450 4.2.1 greylisted"), only="bob@", times=1)   # greylists one of two recipients
    hop.on(Step.FINAL, Say("554 5.7.1 spam"))                              # 5xx after the message
    hop.on(Step.FINAL, Drop())                                             # takes the dot, drops before the reply
    hold = hop.on(Step.FINAL, Hold()).hold                                 # hangs until released, then answers 250
    hop.on(Step.MAIL, Say("421 4.3.2 going down"), Drop())

Whatever the client does that RFC 5321 forbids is noted in ``violations``; the fixture fails the test on any.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from tests.bed.ports import free_port
from tests.bed.script import Action, Drop, Hold, Rule, Say, Step, Transaction
from tests.bed.waiting import PATIENCE_S, wait_for

__all__ = ["Drop", "Hold", "NextHop", "Rule", "Say", "Step", "Transaction"]

IDLE_S: Final = 60.0
"""A thread never waits longer for its client or for a release: a test that forgot to end is the only reason."""


class _Ended(Exception):
    """The connection is over."""


class NextHop:
    """The server. ``extensions`` are EHLO's lines, to be changed at will between sessions."""

    def __init__(
        self,
        *,
        extensions: tuple[str, ...] = ("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES", "SIZE 52428800"),
        certificate: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        protocol: str = "smtp",
    ) -> None:
        """Listens at once. ``protocol`` lmtp: LHLO, and one reply, one ``Transaction`` for each recipient of a message. With ``certificate`` (a server's context) it offers STARTTLS."""
        self.extensions = extensions
        self.certificate = certificate
        self.host = host
        self.port = port or free_port()
        self.protocol = protocol
        self.transactions: list[Transaction] = []
        """Every message whose final dot came, in that order."""
        self.commands: list[tuple[int, str]] = []
        """Session number and line, in order of arrival."""
        self.violations: list[str] = []
        self.sessions = 0
        self.most_at_once = 0
        self._rules: deque[Rule] = deque()
        self._lock = threading.Lock()
        self._open: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.start()

    # --- the test's side ---
    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self.host, self.port

    @property
    def route(self) -> str:
        """As a configuration names it."""
        return f"{self.protocol}:[{self.host}]:{self.port}"

    @property
    def accepted(self) -> list[Transaction]:
        """The messages it took over."""
        with self._lock:
            return [transaction for transaction in self.transactions if transaction.accepted]

    def on(self, step: Step, *actions: Action, only: str = "", times: int = 1_000_000) -> Rule:
        """Script a step: for commands that contain ``only``, the next ``times`` times. Later rules come after earlier."""
        rule = Rule(step, actions, only, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def behave(self) -> None:
        """Forget all rules and release whoever is held."""
        with self._lock:
            rules, self._rules = list(self._rules), deque()
        for rule in rules:
            for action in rule.actions:
                if isinstance(action, Hold):
                    action.release()

    def wait_for_accepted(self, count: int = 1) -> list[Transaction]:
        """The messages it took over, once there are ``count``."""
        return wait_for(
            lambda: accepted if len(accepted := self.accepted) >= count else [],
            lambda: f"{count} accepted messages at the next hop, only {len(self.accepted)}; {self.story()}",
        )

    def wait_until(self, condition: Callable[[NextHop], object], what: str) -> None:
        """Wait for anything else."""
        wait_for(lambda: condition(self), lambda: f"{what}; {self.story()}")

    def said(self, verb: str) -> list[str]:
        """The command lines that began so."""
        with self._lock:
            return [line for _, line in self.commands if line.upper().startswith(verb.upper())]

    def story(self) -> str:
        """What clients said, for the message of a failing test."""
        with self._lock:
            lines = [f"{session}: {line}" for session, line in self.commands[-40:]]
        return f"sessions: {self.sessions}, last commands: {lines}"

    def start(self) -> None:
        """Listen (again), on the same port."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, self.port), family=family, backlog=128)
        self._listener = listener
        self._spawn(self._accept, listener)

    def stop(self) -> None:
        """Be down: the port refuses, open connections break."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Break every open connection, and go on listening."""
        with self._lock:
            connections = list(self._open.values())
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The end: stop, release everyone, wait for the threads."""
        self.behave()
        self.stop()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a thread of the next hop does not end"

    # --- the server's side ---
    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self.sessions += 1
                number = self.sessions
                self._open[number] = connection
                self.most_at_once = max(self.most_at_once, len(self._open))
            self._spawn(self._serve, number, connection)

    def _serve(self, number: int, connection: socket.socket) -> None:
        connection.settimeout(IDLE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        session = _Session(self, number, connection)
        try:
            session.run()
        except (_Ended, OSError):
            pass
        finally:
            with self._lock:
                del self._open[number]
            session.connection.close()
            connection.close()

    def _rule_for(self, step: Step, argument: str) -> Rule | None:
        with self._lock:
            for rule in self._rules:
                if rule.step is step and rule.left > 0 and rule.only.lower() in argument.lower():
                    rule.left -= 1
                    rule.used += 1
                    return rule
        return None

    def _note(self, number: int, line: str) -> None:
        with self._lock:
            self.commands.append((number, line))

    def _violation(self, number: int, what: str) -> None:
        with self._lock:
            self.violations.append(f"session {number}: {what}")

    def _record(self, transaction: Transaction) -> None:
        with self._lock:
            self.transactions.append(transaction)


class _Session:
    """One connection; lives in its own thread."""

    def __init__(self, hop: NextHop, number: int, connection: socket.socket) -> None:
        self.hop = hop
        self.number = number
        self.connection = connection
        self.buffer = b""
        self.helo = ""
        self.tls = False
        self.reset_transaction()

    def reset_transaction(self) -> None:
        self.sender: str | None = None
        self.parameters = ""
        self.recipients: list[str] = []
        self.refused: list[str] = []

    def run(self) -> None:
        self.reply(Step.BANNER, "220 hop.example.com ESMTP")
        while True:
            line = self.line()
            self.hop._note(self.number, line)
            if self.buffer and "PIPELINING" not in self.hop.extensions:
                self.hop._violation(self.number, f"pipelined behind {line!r}, which was not offered")
            verb, _, argument = line.partition(" ")
            match verb.upper():
                case "EHLO" | "LHLO":
                    if (verb.upper() == "LHLO") != (self.hop.protocol == "lmtp"):
                        self.hop._violation(self.number, f"{verb} to a server that speaks {self.hop.protocol}")
                    self.ehlo(argument)
                case "HELO":
                    self.helo = argument
                    self.reply(Step.HELO, "250 hop.example.com")
                case "STARTTLS":
                    self.starttls()
                case "AUTH":
                    self.auth(argument)
                case "MAIL":
                    self.mail(line)
                case "RCPT":
                    self.rcpt(line)
                case "DATA":
                    self.data()
                case "RSET":
                    self.reset_transaction()
                    self.reply(Step.RSET, "250 2.0.0 Ok")
                case "NOOP":
                    self.reply(Step.NOOP, "250 2.0.0 Ok")
                case "QUIT":
                    self.reply(Step.QUIT, "221 2.0.0 Bye")
                    return
                case _:
                    self.hop._violation(self.number, f"unknown command {line!r}")
                    self.send("500 5.5.2 What?")

    # --- octets ---
    def receive(self) -> bytes:
        octets = self.connection.recv(262_144)
        if not octets:
            raise _Ended
        return octets

    def line(self) -> str:
        while (end := self.buffer.find(b"\n")) < 0:
            self.buffer += self.receive()
        line, self.buffer = self.buffer[: end + 1], self.buffer[end + 1 :]
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            self.hop._violation(self.number, f"a command without proper CR LF: {line!r}")
        if len(line) > 512 + 500:  # RFC 5321 §4.5.3.1.4 and what extensions add to MAIL and RCPT
            self.hop._violation(self.number, f"a command of {len(line)} octets")
        return line.rstrip(b"\r\n").decode(errors="surrogateescape")

    def send(self, reply: str) -> None:
        self.connection.sendall(reply.encode(errors="surrogateescape") + b"\r\n")

    def act(self, step: Step, argument: str, note: Callable[[str], None] | None = None) -> str:
        """Do what the rule for this step says; returns what it made the server say. Raises _Ended on a drop.

        ``note`` is told each reply before that is sent.
        """
        rule = self.hop._rule_for(step, argument)
        said = ""
        for action in rule.actions if rule is not None else ():
            match action:
                case Say(said):
                    if note:
                        note(said)
                    self.send(said)
                case Hold(reached, released):
                    reached.set()
                    if not released.wait(IDLE_S):
                        raise _Ended
                case Drop(reset):
                    if reset:
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    raise _Ended
        return said

    def reply(self, step: Step, usual: str, argument: str = "", note: Callable[[str], None] | None = None) -> str:
        """Do what the rule for this step says, and say the usual unless it said something; returns what was said."""
        said = self.act(step, argument, note)
        if said:
            return said
        if note:
            note(usual)
        self.send(usual)
        return usual

    # --- commands ---
    def ehlo(self, argument: str) -> None:
        if not argument:
            self.hop._violation(self.number, "EHLO without a name")
        self.helo = argument
        self.reset_transaction()
        lines = ["hop.example.com", *self.hop.extensions]
        if self.hop.certificate is not None and not self.tls:
            lines.append("STARTTLS")
        self.reply(Step.EHLO, "\r\n".join([*(f"250-{line}" for line in lines[:-1]), f"250 {lines[-1]}"]))

    def starttls(self) -> None:
        if self.tls or self.hop.certificate is None:
            self.hop._violation(self.number, "STARTTLS, which was not offered")
            self.send("503 5.5.1 No")
            return
        if self.buffer:
            self.hop._violation(self.number, f"pipelined behind STARTTLS: {self.buffer!r}")
        if not self.reply(Step.STARTTLS, "220 2.0.0 Go ahead").startswith("2"):
            return
        self.connection = self.hop.certificate.wrap_socket(self.connection, server_side=True)
        with self.hop._lock:
            self.hop._open[self.number] = self.connection
        self.tls = True
        self.helo = ""
        self.reset_transaction()

    def auth(self, argument: str) -> None:
        mechanism, _, initial = argument.partition(" ")
        if mechanism.upper() == "LOGIN":
            for prompt in ("VXNlcm5hbWU6", "UGFzc3dvcmQ6")[1 if initial else 0 :]:
                self.send(f"334 {prompt}")
                self.line()
        elif not initial:
            self.send("334 ")
            self.line()
        self.reply(Step.AUTH, "235 2.7.0 Ok", argument)

    def mail(self, line: str) -> None:
        if not self.helo:
            self.hop._violation(self.number, "MAIL before EHLO")
        if self.sender is not None:
            self.hop._violation(self.number, "MAIL within a transaction")
        path, _, parameters = line[len("MAIL FROM:") :].partition(" ")
        if not line.upper().startswith("MAIL FROM:<") or not path.endswith(">"):
            self.hop._violation(self.number, f"MAIL without a proper path: {line!r}")
        offered = {word.split(" ")[0] for word in self.hop.extensions}
        keys = [word.partition("=")[0].upper() for word in parameters.split()]
        lacking = {"BODY": "8BITMIME", "SIZE": "SIZE", "RET": "DSN", "ENVID": "DSN"}
        usual = "250 2.1.0 Ok"
        for key in keys:
            if lacking.get(key, key) not in offered:
                self.hop._violation(self.number, f"parameter {key}, which was not offered")
                usual = "555 5.5.4 Unsupported parameter"
        size = next((int(word[5:]) for word in parameters.upper().split() if word.startswith("SIZE=")), 0)
        if size > self.size_limit() > 0:
            usual = "552 5.3.4 Message too big"
        if self.reply(Step.MAIL, usual, line).startswith("2"):
            self.reset_transaction()
            self.sender, self.parameters = path[1:-1], parameters

    def size_limit(self) -> int:
        return next((int(word[5:]) for word in self.hop.extensions if word.startswith("SIZE ")), 0)

    def rcpt(self, line: str) -> None:
        path, _, parameters = line[len("RCPT TO:") :].partition(" ")
        if parameters and "DSN" not in self.hop.extensions:
            self.hop._violation(self.number, f"RCPT parameters, which were not offered: {parameters}")
        if not line.upper().startswith("RCPT TO:<") or not path.endswith(">") or path == "<>":
            self.hop._violation(self.number, f"RCPT without a proper path: {line!r}")
        # Behind a refused MAIL a pipelining client has its RCPTs out already.
        usual = "250 2.1.5 Ok" if self.sender is not None else "503 5.5.1 MAIL first"
        said = self.reply(Step.RCPT, usual, line)
        (self.recipients if said.startswith("2") and self.sender is not None else self.refused).append(path[1:-1])

    def data(self) -> None:
        usual = "354 Go ahead" if self.recipients else "554 5.5.1 No valid recipients"
        if not self.reply(Step.DATA, usual).startswith("3"):
            return
        wire = self.body()
        limit = self.size_limit()
        usual = "552 5.3.4 Message too big" if 0 < limit < len(wire) else "250 2.0.0 Ok: taken"
        if not self.recipients:
            usual = "554 5.5.1 No valid recipients"
        lmtp = self.hop.protocol == "lmtp"
        for served in [(one,) for one in self.recipients] if lmtp else [tuple(self.recipients)]:
            # Known before the client is: whoever has the reply finds the message noted.
            noted: list[str] = []
            note = functools.partial(self.over, wire, served, noted)
            try:
                self.reply(Step.FINAL, usual, served[0] if lmtp else "", note)
            finally:
                if not noted:
                    note("")
        self.reset_transaction()

    def over(self, wire: bytes, served: tuple[str, ...], noted: list[str], said: str) -> None:
        """The first reply to a final dot is what the message came to."""
        if not noted:
            noted.append(said)
            self.hop._record(
                Transaction(
                    self.number,
                    self.tls,
                    self.helo,
                    self.sender or "",
                    self.parameters,
                    served,
                    tuple(self.refused),
                    wire,
                    said,
                )
            )

    def body(self) -> bytes:
        """The wire octets up to the final dot: CR LF . CR LF and nothing else ends a message."""
        octets = bytearray(b"\r\n" + self.buffer)
        self.buffer = b""
        searched = 0
        if len(octets) == 2:
            octets += self.receive()
        self.act(Step.BODY, "")
        while (end := octets.find(b"\r\n.\r\n", searched)) < 0:
            searched = max(0, len(octets) - 4)
            octets += self.receive()
        self.buffer = bytes(octets[end + 5 :])
        wire = bytes(octets[2 : end + 2])
        if b"\n" in wire.replace(b"\r\n", b"") or b"\r" in wire.replace(b"\r\n", b""):
            self.hop._violation(self.number, "a bare CR or LF in a message")
        return wire
