"""Owns: the tour: real messages through the running relay, each step told and checked.

A step raises ``Unexpected`` when what it sees is not what it told. Must not start or end the relay.
"""

from __future__ import annotations

import re
import smtplib
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path
from typing import Final

import stage
import telling
from stage import Exchange, Plan, Relay, wait_for

CUSTOMER: Final = "customer@example.net"
RECEPTION: Final = "reception@example.com"
FIREWALLED: Final = "X-MS-Exchange-Organization-SCL"
RESTRICTED: Final = "554 5.7.1 <kiosk@example.com>: Sender address rejected: This account is not allowed to send emails"
_SHORT: Final = re.compile(r"^\w{3} [ \d]\d [\d:]{8} \S+ ")
"""Date and host in front of a log line: the same in all of them."""


class Unexpected(Exception):
    """What was seen is not what was told."""


class Client(smtplib.SMTP):
    """Python's own SMTP client, writing down the dialogue."""

    def __init__(self, address: str) -> None:
        self.dialogue: list[tuple[str, str]] = []
        host, _, port = address.rpartition(":")
        super().__init__(host, int(port), local_hostname="mail.example.net", timeout=stage.PATIENCE_S)

    def putcmd(self, cmd: str, args: str = "") -> None:
        self.dialogue.append(("client", f"{cmd.upper()} {args}".strip()))
        super().putcmd(cmd, args)

    def getreply(self) -> tuple[int, bytes]:
        if self.dialogue and self.dialogue[-1][1].startswith("354"):
            self.dialogue.append(("client", "(the message)"))
        code, text = super().getreply()
        self.dialogue += [("relay", f"{code} {line}") for line in text.decode("ascii", "replace").split("\n")]
        return code, text

    def excerpt(self) -> Iterator[tuple[str, str]]:
        """The dialogue without banner, EHLO and what follows it."""
        wanted = False
        for who, line in self.dialogue:
            if who == "client":
                wanted = not line.startswith("EHLO")
            if wanted:
                yield who, line


@dataclass(slots=True)
class Scene:
    """What the steps work with. ``read`` log lines and ``known`` mail are from before the present step."""

    plan: Plan
    relay: Relay
    exchange: Exchange
    read: int = 0
    known: set[Path] = field(default_factory=set)

    def begin(self) -> None:
        """A new step: what is there now is old."""
        self.read = len(self.relay.log())
        self.known = set(self.exchange.mail())

    def log(self, pattern: str) -> list[str]:
        """The step's log lines with ``pattern``, once there is one."""

        def look() -> list[str]:
            self.relay.must_run()
            return [line for line in self.relay.log()[self.read :] if re.search(pattern, line)]

        found = wait_for(look, f'a line with "{pattern}" in {self.plan.log}')
        return [_SHORT.sub("", line) for line in found]

    def arrived(self) -> tuple[str, str]:
        """The step's message, once it is in the Maildir: where, and what is in it."""

        def look() -> set[Path]:
            self.relay.must_run()
            return set(self.exchange.mail()) - self.known

        [path] = wait_for(look, f"the message in {self.exchange.maildir}/new")
        return str(path.relative_to(stage.ROOT)), path.read_text(encoding="utf-8", errors="replace")

    def nothing_arrived(self) -> None:
        """Raises Unexpected when mail came in this step."""
        if unwanted := set(self.exchange.mail()) - self.known:
            raise Unexpected(f"Exchange got mail that should have been refused: {sorted(map(str, unwanted))}")

    @contextmanager
    def client(self, listener: str = "mx") -> Iterator[Client]:
        """A session; its dialogue is told at its end, also when it ends badly."""
        with Client(self.plan.listeners[listener]) as client:
            try:
                client.ehlo()
                yield client
            finally:
                telling.dialogue(client.excerpt())


def letter(subject: str, **headers: str) -> bytes:
    """A message from outside."""
    message = EmailMessage()
    message["From"] = CUSTOMER
    message["To"] = RECEPTION
    message["Subject"] = subject
    message["Date"] = formatdate()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    message.set_content("A message of the demo.\n")
    return message.as_bytes()


def expect(begin: str, reply: tuple[int, bytes]) -> str:
    """The reply as one line, which must begin so. Raises Unexpected."""
    seen = f"{reply[0]} {reply[1].decode('ascii', 'replace')}"
    if not seen.startswith(begin):
        raise Unexpected(f'expected the answer "{begin}", got "{seen}"')
    return seen


def expect_in(part: str, text: str, where: str) -> str:
    """The line of ``text`` that contains ``part``. Raises Unexpected."""
    for line in text.splitlines():
        if part in line:
            return line
    raise Unexpected(f'expected "{part}" in {where}, saw:\n{text}')


def _hand_over(client: Client, recipient: str, message: bytes) -> str:
    """A whole transaction that must be acknowledged; the last reply."""
    expect("250", client.mail(CUSTOMER))
    expect("250", client.rcpt(recipient))
    return expect("250 2.0.0 Ok", client.data(message))


# ------------------------------------------------------------------------------------------------------------ the steps


def accepted(scene: Scene) -> None:
    """A message from the Internet for somebody who exists."""
    with scene.client() as client:
        reply = _hand_over(client, RECEPTION, letter("Good morning"))
    expect_in("delivered as", reply, "the last answer")
    scene.log("status=sent")
    path, text = scene.arrived()
    telling.shown("in the log", [*scene.log("client="), *scene.log("status=sent")])
    telling.shown(f"in {path}", text.splitlines()[:6])
    telling.good("The sender's 250 came after Exchange's own: the message was never only in the relay's hands.")


def encrypted(scene: Scene) -> None:
    """The same by STARTTLS, to an alias of that mailbox, in capitals."""
    with scene.client() as client:
        expect("220", client.starttls(context=ssl.create_default_context(cafile=str(stage.STATE / "authority.pem"))))
        client.ehlo()
        _hand_over(client, "Welcome@EXAMPLE.com", letter("Good morning, encrypted"))
    path, text = scene.arrived()
    telling.shown("in the log", [*scene.log("TLS connection"), *scene.log("client=")])
    telling.shown(f"in {path}", [expect_in("with ESMTPS", text, path).strip()])
    telling.good("The client verified the relay's certificate; the Received line says ESMTPS.")


def firewall(scene: Scene) -> None:
    """A spammer adds a header that tells Exchange "this is no spam, I have looked"."""
    message = letter("You have won", **{FIREWALLED: "-1"})
    telling.shown("in the message", [expect_in(FIREWALLED, message.decode(), "the message")])
    with scene.client() as client:
        _hand_over(client, RECEPTION, message)
    path, text = scene.arrived()
    if FIREWALLED.lower() in text.lower():
        raise Unexpected(f"{FIREWALLED} is still in {path}")
    expect_in("Subject: You have won", text, path)
    telling.shown("in the log", scene.log("header removed"))
    telling.good(f"The message arrived in {path}, {FIREWALLED} did not.")


def unknown(scene: Scene) -> None:
    """Mail for an address that does not exist."""
    with scene.client() as client:
        expect("250", client.mail(CUSTOMER))
        expect(
            "550 5.1.1 <nobody@example.com>: Recipient address rejected: User unknown",
            client.rcpt("nobody@example.com"),
        )
    _refused(scene, r"NOQUEUE: reject: RCPT .* 550 5\.1\.1")
    telling.good("Refused from the snapshot: neither Exchange nor a directory server was asked.")


def restricted(scene: Scene) -> None:
    """A sender who is not allowed to send."""
    with scene.client() as client:
        expect("250", client.mail("kiosk@example.com"))
        expect(RESTRICTED, client.rcpt(RECEPTION))
    _refused(scene, r"NOQUEUE: reject: RCPT .* 554 5\.7\.1 <kiosk@")
    telling.good("Refused when the recipient was named, so that the log tells whom the mail was for.")


def no_open_relay(scene: Scene) -> None:
    """A stranger tries to send to strangers."""
    with scene.client() as client:
        expect("250", client.mail(CUSTOMER))
        expect("554 5.7.1 <victim@example.org>: Relay access denied", client.rcpt("victim@example.org"))
    _refused(scene, r"NOQUEUE: reject: RCPT .* 554 5\.7\.1 <victim@")
    telling.good("Only domains of the configuration are taken from outside.")


def _refused(scene: Scene, pattern: str) -> None:
    telling.shown("in the log", scene.log(pattern))
    scene.nothing_arrived()


def exchange_down(scene: Scene) -> None:
    """Exchange is switched off, and mail comes in all the same."""
    scene.exchange.stop()
    with scene.client() as client:
        reply = _hand_over(client, RECEPTION, letter("While you were out"))
    expect_in("queued as", reply, "the last answer")
    telling.shown("in the log", [scene.log("status=deferred")[0], scene.log("queued, reason=")[0]])
    queue = _queue(scene)
    telling.shown("relay queue list", queue.splitlines())
    expect_in(reply.split()[-1], queue, "relay queue list")
    telling.good("Acknowledged, because it is safe: the message is on the disk and survives a power cut.")


def exchange_up(scene: Scene) -> None:
    """Exchange is switched on again. Nobody does anything else."""
    scene.exchange.start()
    path, text = scene.arrived()
    expect_in("Subject: While you were out", text, path)
    telling.shown("in the log", [*scene.log("status=sent"), *scene.log(": removed$")])
    queue = _queue(scene)
    telling.shown("relay queue list", queue.splitlines())
    expect_in("the queue is empty", queue, "relay queue list")
    telling.good(f"Arrived by itself in {path}.")


def _queue(scene: Scene) -> str:
    listed = stage.relay(scene.plan, "queue", "list")
    if listed.returncode != 0:
        raise Unexpected(f"relay queue list ended with {listed.returncode}: {listed.stderr.strip()}")
    return listed.stdout


STEPS: Final[tuple[Callable[[Scene], None], ...]] = (
    accepted,
    encrypted,
    firewall,
    unknown,
    restricted,
    no_open_relay,
    exchange_down,
    exchange_up,
)


def walk(scene: Scene) -> None:
    """All steps in order. Raises Unexpected, naming the step that did not go as told."""
    for number, step in enumerate(STEPS, 1):
        title = (step.__doc__ or "").strip()
        telling.headline(number, title)
        scene.begin()
        try:
            step(scene)
            scene.relay.must_run()
        except (Unexpected, stage.Trouble, smtplib.SMTPException, OSError) as error:
            seen = str(error) or type(error).__name__
            raise Unexpected(f"step {number} ({title.rstrip('.')}) did not go as told: {seen}") from error
