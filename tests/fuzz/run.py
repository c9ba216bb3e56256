"""Owns: the two runs: command lines until a session does what it must not, bodies until one arrives changed."""

from __future__ import annotations

import random
import re
from typing import Final

from tests.fuzz.noise import CLEAN, PIECES, body, command, is_clean, normalized, packets, stuffed
from tests.fuzz.rig import Connection, Fault, Rig

RIGHT: Final = (
    b"EHLO client.example.net\r\n",
    b"MAIL FROM:<a@example.net>\r\n",
    b"RCPT TO:<user@any.example.com>\r\n",
    b"DATA\r\n",
)
"""Said in this order every now and then, so that noise meets every state of a session."""
LINES_PER_SESSION: Final = 150
_BDAT: Final = re.compile(rb"BDAT +(\d{1,20})(?: +LAST)? *\r\n", re.IGNORECASE)


async def commands(count: int, seed: int) -> int:
    """Play ``count`` random command lines; how many messages came of them. Raises Fault, naming seed and line."""
    rng = random.Random(seed)
    rig = Rig("normalize")
    connection = rig.connect()
    said: list[bytes] = []
    taken = 0
    for number in range(count):
        if connection.closed or len(said) >= LINES_PER_SESSION:
            connection.leave()
            connection, said = rig.connect(), []
        line = RIGHT[len(said) % len(RIGHT)] if rng.random() < 0.4 else command(rng)
        said.append(line)
        try:
            await _line(connection, line, rng)
            rig.complaints()
        except Exception as error:
            error.add_note(f"seed {seed}, line {number}; the session: {said[-12:]!r}")
            raise
        taken += len(rig.messages)
        rig.messages.clear()
    connection.leave()
    return taken


async def _line(connection: Connection, line: bytes, rng: random.Random) -> None:
    """One line gets one reply; what it announces is sent and gets one, too."""
    await connection.send(*packets(rng, line))
    codes = connection.replies()
    session = connection.session
    chunk = _BDAT.fullmatch(line)
    if session.receiver is None:
        if len(codes) != 1 and not (connection.closed and len(codes) == 2 and codes[1] == b"421"):
            raise Fault(f"{line!r} was answered by {codes}")
    elif chunk is None:
        if codes != [b"354"]:
            raise Fault(f"{line!r} began a message by {codes}")
        await connection.send(*packets(rng, body(rng, PIECES) + b".\r\n"))
        if len(codes := connection.replies()) != 1 or session.receiver is not None:
            raise Fault(f"a message was answered by {codes}")
    elif codes:
        raise Fault(f"a chunk was answered by {codes} before it came")
    elif int(chunk[1]) > 10_000:
        connection.closed = True  # the client gives up
    else:
        await connection.send(*packets(rng, rng.randbytes(int(chunk[1]))))
        if len(codes := connection.replies()) != 1 or session.receiver is not None:
            raise Fault(f"a chunk was answered by {codes}")


async def bodies(count: int, seed: int) -> int:
    """Send ``count`` random messages by DATA and BDAT to both kinds of listeners; how many had proper line ends."""
    rng = random.Random(seed)
    rigs = {endings: Rig(endings) for endings in ("normalize", "refuse")}
    connections = {endings: rig.connect() for endings, rig in rigs.items()}
    proper = 0
    for connection in connections.values():
        await connection.send(b"EHLO client.example.net\r\n")
        connection.replies()
    for number in range(count):
        endings = rng.choice(("normalize", "refuse"))
        wire = body(rng, CLEAN if rng.random() < 0.4 else PIECES)
        try:
            proper += await _message(connections[endings], endings, wire, rng)
            rigs[endings].complaints()
        except Exception as error:
            error.add_note(f"seed {seed}, body {number}, {endings}: {wire[:2000]!r}")
            raise
    return proper


def _behind_trace(message: bytes) -> bytes:
    """Without the three lines of the relay's own; a client's first line may look like one more of them."""
    return message.split(b"\r\n", 3)[3]


async def _message(connection: Connection, endings: str, wire: bytes, rng: random.Random) -> bool:
    await connection.send(b"MAIL FROM:<a@example.net>\r\nRCPT TO:<user@any.example.com>\r\n")
    if connection.replies() != [b"250", b"250"]:
        raise Fault("the envelope was refused")
    if rng.random() < 0.6:
        await connection.send(*packets(rng, b"DATA\r\n" + wire + b".\r\n"))
        codes = connection.replies()[1:]
    else:
        text = wire if rng.random() < 0.5 else wire[: rng.randrange(len(wire) + 1)]
        wire = stuffed(text)
        cuts = packets(rng, text) or [b""]
        chunks = [b"BDAT %d\r\n" % len(part) + part for part in cuts[:-1]]
        chunks.append(b"BDAT %d LAST\r\n" % len(cuts[-1]) + cuts[-1])
        await connection.send(*packets(rng, b"".join(chunks)))
        codes = connection.replies()
        if is_clean(wire) and wire and not wire.endswith(b"\r\n"):
            wire += b"\r\n"
        elif endings == "normalize" and not is_clean(wire):
            wire = normalized(wire)
            wire += b"" if wire.endswith(b"\r\n") else b"\r\n"
        if not is_clean(wire):  # refused in the chunk where it shows; what follows finds no transaction
            codes = [code for code in codes if code not in (b"250", b"503")]
    messages, connection.rig.messages = connection.rig.messages, []
    clean = is_clean(wire)
    if endings == "refuse" and not clean:
        if codes != [b"554"] or messages:
            raise Fault(f"bare line ends were answered by {codes}")
        return False
    if codes[-1:] != [b"250"] or len(messages) != 1:
        raise Fault(f"answered by {codes}, {len(messages)} messages")
    expected = wire if clean else normalized(wire)
    if expected[:1] in (b" ", b"\t"):  # it must not continue the trace
        expected = b"\r\n" + expected
    if _behind_trace(messages[0]) != expected:
        raise Fault(f"arrived as {_behind_trace(messages[0])[:2000]!r}, not {expected[:2000]!r}")
    return clean
