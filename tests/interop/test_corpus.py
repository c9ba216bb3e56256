"""A corpus of awkward messages arrives octet for octet behind trace headers, express and queued, in memory and in files."""

from __future__ import annotations

import pytest

from tests.bed.wire import END_OF_DATA, letter, stuffed
from tests.interop.world import HOPS, WAYS, Hop, Way, World

pytestmark = pytest.mark.needs("postfix", "smtp-sink", "root")

KILOBYTE = 1024
MEGABYTE = 1024 * 1024
TEXT = bytes(octet for octet in range(1, 256) if octet not in b"\r\n")

DOTS = b"".join((b".\r\n", b"..\r\n", b"\r\n", b"...\r\n", b".a\r\n", b"\r\n.\r\n", b". \r\n", b"\r\n\r\n")) * 40


def around(border: int) -> bytes:
    """A message whose dots lie around ``border``, counted from its first octet; trace headers shift it by less."""
    head = letter(subject=f"dots around {border}", body=b"")
    filler = (b"x" * 70 + b"\r\n") * (border // 72 + 1)
    before = border - len(DOTS) // 2 - len(head)
    return head + filler[: before - before % 72] + DOTS + filler[: 9000 - 9000 % 72]


CORPUS = {
    "8-bit": letter(subject="8-bit", body=TEXT * 40 + b"\r\n"),
    "8-bit header": b"Subject: \xe4\xf6\xfc \xc3\xa4\r\n\r\n8-bit header\r\n",
    "dots around 64 KB": around(64 * KILOBYTE),
    "dots around 64 KB, a little later": around(64 * KILOBYTE + 300),
    "dots around 256 KB": around(256 * KILOBYTE),
    "dots around 256 KB, a little later": around(256 * KILOBYTE + 300),
    "dots around 512 KB": around(512 * KILOBYTE),
    "dots only": letter(subject="dots only", body=b".\r\n" * 120_000),
    "empty lines only": letter(subject="empty lines only", body=b"\r\n" * 150_000),
    "lines of 998": letter(subject="lines of 998", body=(b"." + b"y" * 997 + b"\r\n") * 300),
    "lines of 5000": letter(subject="lines of 5000", body=(b"." + b"z" * 4999 + b"\r\n") * 60),
    "one line of 100,000": letter(subject="one line", body=b"w" * 100_000 + b"\r\n"),
    "empty body": letter(subject="empty body", body=b""),
    "an empty line as body": letter(subject="an empty line as body", body=b"\r\n"),
    "header only": letter(subject="header only", body=b"").removesuffix(b"\r\n"),
    "a folded header": b"Subject: folded\r\n once\r\n\ttwice\r\nTo: a,\r\n b\r\n\r\nbody\r\n",
    "a large header": b"Subject: large\r\n"
    + b"".join(b"X-%d: %s\r\n" % (n, b"h" * 900) for n in range(90))
    + b"\r\nbody\r\n",
    "ends in dots": letter(subject="ends in dots", body=b"text\r\n.\r\n..\r\n.\r\n"),
    "spaces at line ends": letter(subject="spaces", body=b"a \r\n b\t\r\n \r\n\t\r\n"),
    "MIME": letter(subject="MIME", body=b"--b\r\nContent-Type: message/rfc822\r\n\r\n" + letter() + b"\r\n--b--\r\n"),
}
# smtp-sink takes these as they are; Postfix mends what it finds wrong with a header.
ODD = {
    "odd header fields": b"subject:odd\r\nX-Empty:\r\nX-Space : a\r\nX-Trailing: b  \r\n\r\nbody\r\n",
    "no header": b"This is not a header line.\r\nnor this\r\n",
    "an empty line first": b"\r\nbody without a header\r\n",
    "nothing": b"",
    "one empty line": b"\r\n",
    "dots first": b".\r\n..\r\nleading dots\r\n",
}


def deliver(world: World, way: Way, hop: Hop, messages: dict[str, bytes]) -> None:
    sender = world.sender()
    with world.raw(way) as client:
        for name, message in messages.items():
            client.envelope(sender, [world.recipient(way, hop)], "BODY=8BITMIME")
            client.expect("354", "DATA")
            client.send((stuffed(message) if message else b"") + END_OF_DATA)
            assert client.read().code == 250, name
        client.quit()
    world.wait_until_sent(way, sender, len(messages))
    for message in messages.values():
        world.wait_for_arrival(hop, message)


@pytest.mark.parametrize("hop", HOPS)
@pytest.mark.parametrize("way", WAYS)
def test_the_corpus_arrives_octet_for_octet(world: World, way: Way, hop: Hop) -> None:
    deliver(world, way, hop, {name: b"X-Way: %s\r\n%s" % (way.encode(), message) for name, message in CORPUS.items()})


@pytest.mark.parametrize("way", WAYS)
def test_messages_with_an_odd_header_or_none_arrive_as_they_are(world: World, way: Way) -> None:
    deliver(world, way, "sink", ODD)


@pytest.mark.parametrize("hop", HOPS)
@pytest.mark.parametrize("way", WAYS)
def test_25_megabytes_arrive_octet_for_octet(world: World, way: Way, hop: Hop) -> None:
    line = b".%07d of very many lines, each begins with a dot and has some m\xfcmbers\r\n"
    body = b"".join(line % number for number in range(25 * MEGABYTE // len(line % 0)))
    deliver(world, way, hop, {"25 MB": letter(subject=f"big, {way}", body=body)})


@pytest.mark.parametrize("way", WAYS)
def test_the_header_firewall_takes_its_fields_and_no_octet_more(world: World, way: Way) -> None:
    sender = world.sender()
    message = letter(subject=f"F10, {way}", body=b".\r\n" * 40_000)
    with world.raw(way) as client:
        reply = client.deliver(
            sender, world.recipient(way, "postfix"), b"X-MS-Exchange-Organization-SCL:\r\n -1\r\n" + message
        )
        assert reply.code == 250
        client.quit()
    world.wait_until_sent(way, sender)
    world.wait_for_arrival("postfix", message)
