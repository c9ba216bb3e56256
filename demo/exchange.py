"""Owns: a stand-in for Exchange: an SMTP server that takes every message and keeps it in a Maildir.

usage: demo/exchange.py --listen HOST:PORT --maildir FOLDER      says "ready" when it accepts; SIGTERM ends it

It answers as Exchange does by default: every recipient is fine, so an unknown one has to be stopped in front of it.
"""

from __future__ import annotations

import argparse
import asyncio
from mailbox import Maildir
from pathlib import Path
from typing import Final

from aiosmtpd.smtp import SMTP, Envelope, Session

HOSTNAME: Final = "exchange.example.com"
MESSAGE_OCTETS: Final = 100 * 1024 * 1024
"""Twice what the relay takes, so that the relay's limit is the one that is met."""


class Mailbox:
    """Keeps each message as one file in ``maildir/new``, with the envelope in front."""

    def __init__(self, folder: Path) -> None:
        self._maildir = Maildir(folder, create=True)

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's
        """Called by aiosmtpd with each message; 250 only when it is on the disk."""
        assert isinstance(envelope.content, bytes)
        lines = [f"Return-Path: <{envelope.mail_from or ''}>", *(f"Delivered-To: {to}" for to in envelope.rcpt_tos)]
        octets = "".join(f"{line}\n" for line in lines).encode() + envelope.content.replace(b"\r\n", b"\n")
        self._maildir.add(octets)
        return "250 2.6.0 Queued mail for delivery"


async def serve(host: str, port: int, maildir: Path) -> None:
    """Take mail until the process is ended. Raises OSError when the port cannot be had."""
    mailbox = Mailbox(maildir)
    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(mailbox, hostname=HOSTNAME, ident="stand-in for Exchange", data_size_limit=MESSAGE_OCTETS),
        host,
        port,
    )
    print("ready", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve what the command line asks for."""
    parser = argparse.ArgumentParser(description="A stand-in for Exchange that keeps what it gets in a Maildir.")
    parser.add_argument("--listen", metavar="HOST:PORT", required=True)
    parser.add_argument("--maildir", metavar="FOLDER", type=Path, required=True)
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")
    asyncio.run(serve(host, int(port), options.maildir))


if __name__ == "__main__":
    main()
