"""Owns: the programs that strangers look at a mail server with, and what each says of one. Run alone: the whole look.

    .venv/bin/python -m tests.external.look         # make look

Starts a relay of its own on loopback, as it is shipped, and prints what nmap, sslscan, testssl.sh and swaks find.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.bed.certificates import Authority
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner

LISTENERS: Final = {"mx": "mx", "submission": "submission", "submissions": "submissions"}
SMTP_SCRIPTS: Final = ("smtp-open-relay", "smtp-enum-users", "smtp-commands", "smtp-ntlm-info", "smtp-strangeport")
TLS_SCRIPTS: Final = (
    "ssl-enum-ciphers", "sslv2", "sslv2-drown", "ssl-poodle", "ssl-heartbleed", "ssl-ccs-injection", "ssl-dh-params",
    "tls-ticketbleed",
)  # fmt: skip
LONGEST_S: Final = 600.0


def run(folder: Path, *command: str) -> str:
    """What a program says, on both channels. It runs in ``folder`` and has no input."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LONGEST_S, cwd=folder, stdin=subprocess.DEVNULL, check=False
    )
    return done.stdout + done.stderr


def nmap(folder: Path, port: int, *scripts: str) -> str:
    """nmap's scripts, told to try although the port is an odd one."""
    wanted = ",".join(f"+{script}" for script in scripts)
    told = "smtp-enum-users.methods={VRFY,EXPN,RCPT},smtp-open-relay.domain=elsewhere.example,smtp.domain=example.com"
    return run(folder, "nmap", "-Pn", "-n", "-p", str(port), "--script", wanted, "--script-args", told, "127.0.0.1")


def sslscan(folder: Path, port: int, *options: str) -> str:
    """sslscan without colours."""
    return run(folder, "sslscan", "--no-colour", *options, f"127.0.0.1:{port}")


def testssl(folder: Path, port: int, *options: str) -> str:
    """testssl.sh without colours and questions."""
    fixed = ("--color", "0", "--warnings", "batch", "--quiet", "--fast")
    return run(folder, "testssl", *fixed, *options, f"127.0.0.1:{port}")


def weaknesses(said: str) -> list[str]:
    """Lines of testssl.sh that tell of one; "not vulnerable" and what only the test's certificate is to blame for left out."""
    found = re.findall(r"^.*(?:VULNERABLE|NOT ok|weak|deprecated).*$", said, re.MULTILINE)
    return [line.strip() for line in found if not re.search(r"Chain of trust|CRL|OCSP", line)]


def make(folder: Path) -> tuple[RelayRunner, NextHop]:
    """A relay with all three listeners and a certificate, and its next hop; not started."""
    hop = NextHop()
    files = Authority().files(folder, "localhost", "127.0.0.1")
    return RelayRunner(folder, hop.route, listeners=LISTENERS, certificate=files), hop


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="dmz-relay-look-") as name:
        folder = Path(name)
        relay, hop = make(folder)
        relay.start()
        try:
            mx, submission, submissions = (relay.ports[name] for name in LISTENERS)
            for port in (mx, submission):
                print(nmap(folder, port, *SMTP_SCRIPTS), flush=True)
            print(nmap(folder, submissions, *TLS_SCRIPTS), flush=True)
            print(sslscan(folder, submissions), sslscan(folder, mx, "--starttls-smtp"), flush=True)
            found = testssl(folder, submissions, "-p", "-s", "-f", "-P", "-S", "-U")
            found += testssl(folder, mx, "-t", "smtp", "-p", "-s", "-f", "-P", "-S", "-U")
            print(found)
            print("weaknesses that testssl.sh names:", *(weaknesses(found) or ["none"]), sep="\n  ")
        finally:
            relay.stop()
            hop.close()


if __name__ == "__main__":
    sys.exit(main())
