"""Owns: one relay with accounts of every kind of stored password; all mail goes to one next hop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.bed.certificates import Authority
from tests.bed.client import Client
from tests.bed.next_hop import NextHop, Transaction
from tests.bed.relay import ROOT, RelayRunner
from tests.bed.waiting import wait_for

PASSWORD: Final = "correct horse: battery"
DOVECOT: Final = "{CRAM-MD5}e02d374fde0dc75a17a557039a3a5338c7743304777dccd376f332bee68d2cf6"
"""The stored form of ``test`` in dovecot's documentation."""
LISTENERS: Final = {
    "mx": "mx",
    "offering": "mx",
    "submission": "submission",
    "submissions": "submissions",
    "hashed": "submission",
    "scram": "submission",
    "cram": "submission",
}
OTHER_NAME: Final = "mail.example.org"
"""A name that the relay has a certificate of its own for."""
TRUSTED: Final = "127.0.0.3"
NEWSLETTER: Final = "127.0.0.4"


def made(scheme: str, password: str = PASSWORD) -> str:
    """What ``relay hash-password`` makes."""
    done = subprocess.run(
        [sys.executable, "-m", "relay", "hash-password", "--scheme", scheme],
        cwd=ROOT, input=f"{password}\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


class Submission:
    """The relay, its next hop, and what its accounts are called."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self.authority = authority
        self.hop = NextHop()
        self.clear = folder / "clear"
        self.clear.write_text(
            f"ann:{PASSWORD}:ann@example.com,ann.smith@example.com,@team.example.com\n"
            "Bob@Example.com:{PLAIN}" + PASSWORD + ":\n"
            f"scanner:{PASSWORD}:*\n"
            f"robot:{PASSWORD}:*@own\n"
            f"mute:{PASSWORD}:mute@example.com restricted@example.com\n"
            f"nobody:{PASSWORD}:\n"
        )
        self.hashed = folder / "hashed"
        schemes = ("ARGON2", "SHA512-CRYPT", "SHA256-CRYPT", "SSHA512")
        self.hashed.write_text("".join(f"{scheme}:{made(scheme)}:x@example.com\n" for scheme in schemes))
        self.scram = folder / "scram"
        self.scram.write_text(f"sam:{made('SCRAM-SHA-256')}:sam@example.com\n")
        self.cram = folder / "cram"
        self.cram.write_text(f"test:{DOVECOT}:test@example.com\ncarl:{made('CRAM-MD5')}:carl@example.com\n")
        names = ("clear", "hashed", "scram", "cram")
        other = folder / "other"
        other.mkdir()
        certificate, key = authority.files(other, OTHER_NAME)
        self.relay = RelayRunner(
            folder,
            self.hop.route,
            listeners=LISTENERS,
            certificate=authority.files(folder),
            default_next_hop=self.hop.route,
            config={
                "trusted": {"networks": [TRUSTED]},
                "tls": {"named": [{"names": [OTHER_NAME], "certificate": certificate, "key": key}]},
                "senders": {"own_domains_from": [NEWSLETTER]},
                "auth": {
                    "stores": [{"name": name, "type": "file", "path": folder / name} for name in names],
                    "failure_delay_s": 0.05,
                    "account_failures": 1000,
                    "client_failures": 10_000,
                    "network_failures": 10_000,
                },
            },
        )
        for listener in self.relay.config["listener"]:
            listener["stores"] = [listener["name"] if listener["name"] in names else "clear"]
            listener["auth"] = listener["name"] == "offering"
        self.relay.configure({})
        self.relay.start()

    def client(self, listener: str = "submission", **options: object) -> Client:
        """A session inside TLS, EHLO said."""
        if listener == "submissions":
            return self.relay.client(listener, tls=self.authority.client(), **options).open()
        client = self.relay.client(listener, **options).open()
        client.starttls(self.authority.client())
        client.ehlo()
        return client

    def arrived(self, recipient: str) -> Transaction:
        """The one message for ``recipient``, once the next hop has it."""
        [found] = wait_for(
            lambda: [one for one in self.hop.accepted if list(one.recipients) == [recipient]],
            lambda: f"a message for {recipient}; {self.hop.story()}",
        )
        return found

    def close(self) -> None:
        """Stop both."""
        self.relay.close()
        self.hop.close()
