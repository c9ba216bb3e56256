"""Owns: other people's mail servers in private instances: Postfix, and its smtp-sink. Both listen on loopback only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.bed.ports import free_port
from tests.bed.waiting import wait_for

CONCURRENT: Final = "100"

_MASTER_CF: Final = """\
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 1 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
tlsmgr unix - - n 1000? 1 tlsmgr
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5):
            return True
    except OSError:
        return False


class SmtpSink:
    """Postfix's smtp-sink, which writes each message it takes to a file."""

    def __init__(self, folder: Path, *options: str) -> None:
        """``options`` are smtp-sink's own, for example ``-8`` (no 8BITMIME) or ``-p`` (no PIPELINING)."""
        self.port = free_port()
        self._messages = folder / "sink"
        self._messages.mkdir()
        if os.geteuid() == 0:
            shutil.chown(self._messages, "nobody")
            options = ("-u", "nobody", *options)
        self._process = subprocess.Popen(
            ["smtp-sink", *options, "-d", f"{self._messages}/%s.", f"127.0.0.1:{self.port}", CONCURRENT],
            stdin=subprocess.DEVNULL,
        )
        wait_for(lambda: self._process.poll() is not None or _accepts(self.port), "smtp-sink")
        assert self._process.poll() is None, "smtp-sink did not start"

    @property
    def route(self) -> str:
        """As a configuration names it."""
        return f"smtp:[127.0.0.1]:{self.port}"

    def messages(self) -> list[bytes]:
        """What it took, with CR LF lines, without the lines it puts in front."""
        return [_of_sink(path.read_bytes()) for path in sorted(self._messages.iterdir())]

    def wait_for_count(self, count: int) -> None:
        """Wait until it has begun to take so many; a message is complete when its sender has the reply."""
        wait_for(lambda: len(list(self._messages.iterdir())) >= count, f"{count} messages at smtp-sink")

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(20)


def _of_sink(file: bytes) -> bytes:
    """smtp-sink writes X-... lines about the envelope and a Received line of its own, the message, an empty line."""
    lines = file.removesuffix(b"\n").split(b"\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(b"Received:"))
    start += 1
    while lines[start][:1] in (b" ", b"\t"):
        start += 1
    return b"\r\n".join(lines[start:])


class Postfix:
    """A private Postfix that delivers mail for ``domain`` into Maildirs, and everything else to ``relayhost``.

    Needs root, as Postfix does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        domain: str = "example.com",
        relayhost: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """``folder`` and all above it must be passable by the user postfix. ``settings`` go last into main.cf."""
        self.port = free_port()
        self.log_file = folder / "postfix.log"
        self._mail = folder / "maildirs"
        self._config = folder / "postfix"
        queue, data = folder / "queue", folder / "data"
        for made in (self._config, queue, data, self._mail):
            made.mkdir()
            made.chmod(0o755)
        shutil.chown(data, "postfix")
        shutil.chown(self._mail, "nobody")
        mailbox_settings = {
            "virtual_mailbox_domains": domain,
            "virtual_mailbox_base": str(self._mail),
            "virtual_mailbox_maps": "static:all/",
            "virtual_uid_maps": "static:65534",
            "virtual_gid_maps": "static:65534",
        }
        main = {
            "compatibility_level": "3.6",
            "config_directory": str(self._config),
            "queue_directory": str(queue),
            "data_directory": str(data),
            "maillog_file": str(self.log_file),
            "maillog_file_prefixes": str(folder),
            "myhostname": "postfix.example.com",
            "mydestination": "",
            "local_recipient_maps": "",
            "local_transport": "error:no local mail",
            "alias_maps": "",
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "mynetworks": "127.0.0.0/8",
            "relayhost": relayhost,
            "smtpd_recipient_restrictions": "permit_mynetworks, reject",
            "smtpd_peername_lookup": "no",
            "smtpd_tls_security_level": "none",
            "smtp_host_lookup": "native",
            "local_header_rewrite_clients": "",
            "smtp_line_length_limit": "0",
            "in_flow_delay": "0",
            "message_size_limit": "52428800",
            "virtual_mailbox_limit": "0",
            "mailbox_size_limit": "0",
            **(mailbox_settings if domain else {}),
            **(settings or {}),
        }
        (self._config / "main.cf").write_text("".join(f"{key} = {value}\n" for key, value in main.items()))
        (self._config / "master.cf").write_text(_MASTER_CF.format(port=self.port))
        self._run("start")
        wait_for(lambda: _accepts(self.port), lambda: f"Postfix; its log: {self.log()}")

    @property
    def route(self) -> str:
        """As a configuration names it."""
        return f"smtp:[127.0.0.1]:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        """Where it takes mail."""
        return "127.0.0.1", self.port

    def log(self) -> str:
        """Its mail log so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def messages(self) -> list[bytes]:
        """What it delivered, with CR LF lines; Return-Path, Delivered-To and its own Received line stand in front."""
        return [path.read_bytes().replace(b"\n", b"\r\n") for path in sorted(self._mail.glob("all/new/*"))]

    def wait_for_messages(self, count: int = 1) -> list[bytes]:
        """What it delivered, once there are ``count``."""
        return wait_for(
            lambda: messages if len(messages := self.messages()) >= count else [],
            lambda: f"{count} messages in Postfix's Maildir; its log: {self.log()}",
        )

    def close(self) -> None:
        """Stop it and wait until it is gone."""
        self._run("stop")
        wait_for(lambda: not _accepts(self.port), "end of Postfix")

    def _run(self, verb: str) -> None:
        subprocess.run(
            ["postfix", "-c", str(self._config), verb],
            check=True,
            capture_output=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
