"""Owns: random commands and bodies, and the listener's rule for line ends, written apart from the relay's own code."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Final

VERBS: Final = (
    b"EHLO", b"HELO", b"MAIL FROM:", b"RCPT TO:", b"DATA", b"BDAT", b"RSET", b"NOOP", b"VRFY", b"EXPN", b"HELP", b"STARTTLS",
    b"AUTH", b"QUIT", b"MAIL", b"RCPT", b"PROXY TCP4", b"XCLIENT", b"GET /", b"ETRN", b"\x16\x03\x01", b"",
)  # fmt: skip
WEIGHTS: Final = (9, 2, 22, 24, 6, 8, 3, 3, 3, 2, 2, 2, 3, 1, 2, 2, 1, 1, 1, 1, 1, 1)
PARTS: Final = (
    b"<>", b"<a@example.net>", b"<user@example.com>", b"<x@any.example.com>", b"<x@any.example.com>", b"<postmaster>",
    b'<"q\\"x"@any.example.com>', b"<a@[192.0.2.1]>", b"<a@[IPv6:::1]>", b"<@a,@b:c@d>", b"<a%b@any.example.com>", b"<a!b@x>",
    b"<", b">", b"@", b".", b"..", b'"', b"\\", b"[", b"]", b"(", b")", b":", b",", b" ", b"  ", b"\t", b"=", b"+", b"-", b"{text}",
    b"SIZE=", b"SIZE=100", b"BODY=8BITMIME", b"BODY=BINARYMIME", b"SMTPUTF8", b"RET=HDRS", b"ENVID=a+2Bb", b"NOTIFY=NEVER",
    b"ORCPT=rfc822;a@b", b"AUTH=<>", b"X=Y", b"LAST", b"0", b"1", b"7", b"100", b"99999999999999999999", b"client.example.net",
    b"\x00", b"\r", b"\n", b"\x7f", b"\xff", b"\xc3\xa9", b"\xe2\x80\xa8", b"%s%n", b"PLAIN", b"AGEAYg==", b"a" * 64, b"b" * 255,
)  # fmt: skip
ENDS: Final = (b"\r\n", b"\n", b"\r\r\n", b"\n\r\n")
END_WEIGHTS: Final = (94, 3, 2, 1)

PIECES: Final = (
    b".", b"..", b"\r\n", b"\r\n", b"\r\n", b"\r\n.", b"\r\n..", b"\r", b"\n", b"\n.", b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r\r\n",
    b"\r.\r", b"Subject: x\r\n", b"\r\n\r\n", b"a", b" ", b"\t", b"\x00", b"\xe4", b"text of a line", b"QUIT\r\n", b"x" * 200,
)  # fmt: skip
CLEAN: Final = tuple(
    piece for piece in PIECES if not re.search(rb"\r(?!\n)|(?<!\r)\n", piece) and piece not in (b"\r\n.", b".", b"\n.")
)


def command(rng: random.Random) -> bytes:
    """One line, its end included: right, nearly right, or noise. LF stands at its very end only."""
    [verb] = rng.choices(VERBS, WEIGHTS)
    roll = rng.random()
    if verb in (b"MAIL FROM:", b"RCPT TO:") and roll < 0.5:
        line = verb + rng.choice(PARTS[:8])
    elif verb == b"BDAT" and roll < 0.7:
        line = b"BDAT %d%s" % (rng.choice((0, 1, 5, 100, 5000)), rng.choice((b"", b" LAST")))
    elif verb in (b"EHLO", b"HELO") and roll < 0.7:
        line = verb + b" client.example.net"
    elif verb in (b"DATA", b"RSET", b"QUIT") and roll < 0.7:
        line = verb
    else:
        line = verb + rng.choice((b" ", b"", b"  ", b"\t")) + b"".join(rng.choices(PARTS, k=rng.randrange(6)))
    roll = rng.random()
    if roll < 0.1 and line:
        at = rng.randrange(len(line))
        line = line[:at] + rng.randbytes(rng.randrange(1, 4)) + line[at + rng.randrange(3) :]
    elif roll < 0.13:
        line = line.swapcase()
    elif roll < 0.14:
        line += b"x" * rng.choice((400, 1500, 2046, 2047, 5000))
    [end] = rng.choices(ENDS, END_WEIGHTS)
    return line.replace(b"\n", b"") + end[:-1].replace(b"\n", b"") + b"\n"


def body(rng: random.Random, pieces: tuple[bytes, ...]) -> bytes:
    """A message's octets as they go over the wire behind 354, up to the final dot, which is not in it."""
    text = b"".join(rng.choices(pieces, k=rng.randrange(30)))
    if rng.random() < 0.002:
        text *= rng.randrange(1, 200)
    if text and not text.endswith(b"\r\n"):
        text += b"\r\n"
    wire = b"\r\n" + text + b".\r\n"
    return wire[2 : wire.index(b"\r\n.\r\n") + 2]


def packets(rng: random.Random, octets: bytes) -> list[bytes]:
    """The same, cut at random."""
    cuts = sorted(rng.randrange(len(octets) + 1) for _ in range(rng.choice((0, 0, 1, 2, 5))))
    edges = [0, *cuts, len(octets)]
    return [octets[a:b] for a, b in pairwise(edges) if a < b]


def is_clean(wire: bytes) -> bool:
    """Whether every CR and LF stands in a CR LF."""
    return re.search(rb"\r(?!\n)|(?<!\r)\n", wire) is None


def normalized(wire: bytes) -> bytes:
    """The rule of ``line_endings = "normalize"``: LF becomes CR LF, a dot behind it is doubled, CR becomes a space."""
    mended = re.sub(rb"\r\n|\n(\.?)|\r", _mend, wire)
    return b"\r\n".join(b".." if line == b"." else line for line in mended.split(b"\r\n"))


def _mend(found: re.Match[bytes]) -> bytes:
    if found[0] == b"\r\n":
        return b"\r\n"
    return b" " if found[0] == b"\r" else b"\r\n" + found[1] * 2


def stuffed(text: bytes) -> bytes:
    """The octets of chunks in wire form, their end as it is."""
    wire = text.replace(b"\r\n.", b"\r\n..")
    return b"." + wire if wire[:1] == b"." else wire
