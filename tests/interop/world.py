"""Owns: the relays, senders and next hops of the interoperability tests: other people's programs on both sides.

Two relays, one that hands on straight away (express) and one that queues, each with a domain that goes to Postfix's
smtp-sink and one that goes to a real Postfix with Maildirs. A second Postfix is a client of both.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import smtplib
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Final, Literal

from tests.bed.certificates import Authority
from tests.bed.client import Client
from tests.bed.relay import RelayRunner
from tests.bed.servers import Postfix, SmtpSink
from tests.bed.waiting import wait_for
from tests.bed.wire import after_trace

Way = Literal["express", "queue"]
Hop = Literal["sink", "postfix"]

WAYS: Final[tuple[Way, ...]] = ("express", "queue")
HOPS: Final[tuple[Hop, ...]] = ("sink", "postfix")
PATIENCE_S: Final = 60.0

_numbers = count(1)


class World:
    """All of it, started once for a test process."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.folder = Path(tempfile.mkdtemp(prefix="dmz-relay-interop-"))
        self.folder.chmod(0o755)
        self.bundle = authority.bundle(self.folder)
        self.sink = SmtpSink(self._folder("sink"))
        self.postfix = Postfix(
            self._folder("postfix-hop"), domain=" ".join(self.domain(way, "postfix") for way in WAYS)
        )
        self.relays = {way: self._relay(way) for way in WAYS}
        ports = {self.domain(way, hop): self.relays[way].ports["mx"] for way in WAYS for hop in HOPS}
        maps = ", ".join(f"{{ {domain} = smtp:[127.0.0.1]:{port} }}" for domain, port in ports.items())
        self.client_postfix = Postfix(
            self._folder("postfix-client"),
            domain="",
            settings={
                "transport_maps": f"inline:{{ {maps} }}",
                "smtp_tls_security_level": "may",
                "smtp_tls_loglevel": "1",
            },
        )

    def _folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    def _relay(self, way: Way) -> RelayRunner:
        folder = self._folder(f"relay-{way}")
        domains = {self.domain(way, "sink"): self.sink.route, self.domain(way, "postfix"): self.postfix.route}
        relay = RelayRunner(
            folder,
            self.sink.route,
            recipients=[f"user@{domain}" for domain in domains],
            certificate=self.authority.files(folder),
            config={
                "delivery": {"express": way == "express", "express_deadline_s": 60.0},
                "domain": [{"names": list(domains)}],
                "route": [{"domains": [domain], "next_hops": [route]} for domain, route in domains.items()],
            },
        )
        return relay.start()

    def close(self) -> None:
        """Stop everything; the relays object to bad exits."""
        self.client_postfix.close()
        for relay in self.relays.values():
            relay.close()
        self.postfix.close()
        self.sink.close()
        shutil.rmtree(self.folder)

    # --- addresses ---
    @staticmethod
    def domain(way: Way, hop: Hop) -> str:
        """The domain that goes this way to this next hop."""
        return f"{hop}.{way}.example.com"

    def recipient(self, way: Way, hop: Hop) -> str:
        """The address there."""
        return f"user@{self.domain(way, hop)}"

    @staticmethod
    def sender() -> str:
        """An address that no other message of this process has."""
        return f"sender{next(_numbers)}@example.net"

    # --- what became of a message ---
    def wait_until_sent(self, way: Way, sender: str, messages: int = 1) -> list[str]:
        """The relay's ids of that sender's messages, once the next hop has taken them all."""
        relay = self.relays[way]
        lines = relay.wait_for_log(rf"client=\S+, from=<{re.escape(sender)}>", messages, PATIENCE_S)
        ids = [line.partition("]: ")[2].partition(":")[0] for line in lines]
        assert len(ids) == messages
        for queue_id in ids:
            [result] = relay.wait_for_log(rf" {queue_id}: to=<\S+>, relay=\S+, .*status=", 1, PATIENCE_S)
            assert "status=sent" in result, result
            if way == "queue":
                relay.wait_for_log(rf" {queue_id}: queued, ")
        return ids

    def arrived(self, hop: Hop) -> set[bytes]:
        """Digests of what the next hop has, behind all trace headers."""
        messages = self.sink.messages() if hop == "sink" else self.postfix.messages()
        return {digest(after_trace(_without_delivery_lines(message))) for message in messages}

    def wait_for_arrival(self, hop: Hop, message: bytes) -> None:
        """Fail unless the message is there, octet for octet; a Maildir is filled a moment after the 250."""
        wanted = digest(message)
        wait_for(lambda: wanted in self.arrived(hop), lambda: f"this message at {hop}: {message[:300]!r}", PATIENCE_S)

    # --- senders ---
    def raw(self, way: Way) -> Client:
        """A dialogue of the test's own."""
        return self.relays[way].client().open()

    def send_by_smtplib(self, way: Way, sender: str, recipient: str, message: bytes, *, tls: bool) -> None:
        """Python's own client."""
        host, port = self.relays[way].address()
        with smtplib.SMTP("localhost" if tls else host, port, timeout=PATIENCE_S) as client:
            if tls:
                client.starttls(context=self.authority.client())
            assert client.sendmail(sender, [recipient], message, mail_options=["BODY=8BITMIME"]) == {}

    def send_by_swaks(self, way: Way, sender: str, recipient: str, message: bytes, *, tls: bool) -> None:
        """swaks, the Swiss army knife for SMTP. It adds a line end; its TLS needs a Perl module that is often absent."""
        assert not tls
        server = ["--server", "127.0.0.1", "--port", str(self.relays[way].ports["mx"]), "--ehlo", "client.example.net"]
        self._run(["swaks", *server, "--from", sender, "--to", recipient, "--data", "-"], message.removesuffix(b"\r\n"))

    def send_by_msmtp(self, way: Way, sender: str, recipient: str, message: bytes, *, tls: bool) -> None:
        """msmtp, a sendmail for people without a server."""
        options = ["--auth=off", "--set-date-header=off", f"--from={sender}", f"--port={self.relays[way].ports['mx']}"]
        if tls:
            options += ["--host=localhost", "--tls=on", "--tls-starttls=on", f"--tls-trust-file={self.bundle}"]
        else:
            options += ["--host=127.0.0.1", "--tls=off"]
        self._run(["msmtp", *options, "--", recipient], message.replace(b"\r\n", b"\n"))

    def send_by_curl(self, way: Way, sender: str, recipient: str, message: bytes, *, tls: bool) -> None:
        """curl, which many devices and scripts are made of."""
        port = self.relays[way].ports["mx"]
        options = ["--ssl-reqd", "--cacert", str(self.bundle)] if tls else []
        address = f"smtp://{'localhost' if tls else '127.0.0.1'}:{port}/client.example.net"
        envelope = ["--mail-from", sender, "--mail-rcpt", recipient]
        self._run(["curl", "--silent", "--show-error", *options, address, *envelope, "--upload-file", "-"], message)

    def send_by_nodemailer(self, way: Way, sender: str, recipient: str, message: bytes, *, tls: bool) -> None:
        """nodemailer, what programs in JavaScript send with."""
        server = {
            "host": "localhost",
            "port": self.relays[way].ports["mx"],
            "name": "client.example.net",
            "requireTLS": tls,
            "ignoreTLS": not tls,
        }
        given = {"server": server, "authorities": str(self.bundle), "from": sender, "to": recipient}
        script = Path(__file__).with_name("nodemailer.js")
        self._run(["node", str(script), json.dumps(given)], message)

    def send_by_postfix(self, _: Way, sender: str, recipient: str, message: bytes, *, tls: bool) -> None:
        """Postfix's own smtp client, which takes TLS when it is offered."""
        assert tls
        with Client(self.client_postfix.address) as client:
            client.open()
            assert client.deliver(sender, recipient, message, "BODY=8BITMIME").code == 250

    def smtp_source(self, way: Way, *options: str) -> None:
        """Postfix's load generator."""
        self._run(["smtp-source", *options, f"127.0.0.1:{self.relays[way].ports['mx']}"])

    @staticmethod
    def _run(command: list[str], standard_input: bytes = b"") -> None:
        done = subprocess.run(command, input=standard_input, capture_output=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout.decode(errors='replace')}{done.stderr.decode()}"


def digest(message: bytes) -> bytes:
    """What tells one message from another."""
    return hashlib.sha256(message).digest()


def _without_delivery_lines(message: bytes) -> bytes:
    """A Maildir's file without what its delivery agent puts in front."""
    while message.startswith((b"Return-Path:", b"X-Original-To:", b"Delivered-To:")):
        message = message.partition(b"\r\n")[2]
    return message
