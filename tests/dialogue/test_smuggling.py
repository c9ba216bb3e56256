"""SMTP smuggling (CVE-2023-51764 and its kin): CR LF . CR LF ends a message, and nothing else does.

Each variant of an end is followed by a second transaction. When the relay took the variant for an end, the second
transaction would be executed, and the next hop would see ``smuggled@``; when it passed the variant on as it is, the
next hop might see one. The variants are also cut into packets at every place.
"""

from __future__ import annotations

import re

import pytest

from tests.bed.client import Client
from tests.bed.wire import after_trace
from tests.dialogue.sites import Site

SMUGGLED = (
    b"MAIL FROM:<smuggled@example.net>\r\nRCPT TO:<user@example.com>\r\nDATA\r\nSubject: smuggled\r\n\r\nsmuggled"
)
HEADER = b"Subject: x\r\n\r\nfirst\r\n"

LINE_ENDS = {
    "LF": b"\n",
    "CR": b"\r",
    "CRLF": b"\r\n",
    "CRCR": b"\r\r",
    "CRCRLF": b"\r\r\n",
    "LFCR": b"\n\r",
    "LFLF": b"\n\n",
}
DOTS = {
    "dot": b".",
    "dot space": b". ",
    "space dot": b" .",
    "dot NUL": b".\0",
    "NUL dot": b"\0.",
    "dot tab": b".\t",
    "dot FF": b".\x0c",
    "dot VT": b".\x0b",
    "dot NEL": b".\x85",
    "dot LS": b".\xe2\x80\xa8",
    "wide dot": b"\xef\xbc\x8e",
}
END = b"\r\n.\r\n"

VARIANTS = {
    f"{before}, {dot}, {after}": LINE_ENDS[before] + DOTS[dot] + LINE_ENDS[after]
    for before in LINE_ENDS
    for dot in DOTS
    for after in LINE_ENDS
    if END not in LINE_ENDS[before] + DOTS[dot] + LINE_ENDS[after]
} | {
    "no line end before": b"text.\r\n",
    "half, then the end of the header": b"\r\n.\r",
    "stuffed": b"\r\n..\r\n",
    "twice half": b"\r\n.\r.\r\n",
    "end in a quoted line": b"=0D=0A.=0D=0A",
    "overlong dot": b"\r\n\xc0\xae\r\n",
    "backspace": b"\r\nx\x08.\r\n",
}


def smuggle(client: Client, sender: str, variant: bytes) -> None:
    """One message with the variant and a second transaction inside; nothing of it may be answered before its end."""
    client.envelope(sender, ["user@example.com"])
    client.expect("354", "DATA")
    client.send(HEADER + variant + SMUGGLED + END)
    assert client.read().code == 250
    client.expect("250 2.0.0", "NOOP")  # the next reply is to the next command: nothing inside was answered


def test_no_variant_of_an_end_ends_a_message(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        for variant in VARIANTS.values():
            smuggle(client, sender, variant)
        client.quit()
    messages = usual.arrived(sender, len(VARIANTS))
    for (name, variant), seen in zip(VARIANTS.items(), messages, strict=True):
        message = after_trace(seen.message)
        assert message.startswith(HEADER), name
        assert message.endswith(b"Subject: smuggled\r\n\r\nsmuggled\r\n"), name
        assert END not in seen.wire, name
        # All that is not a line end, nor a dot at a line's beginning, is there.
        assert _essence(message) == _essence(HEADER + variant + SMUGGLED), name
    usual.nothing_but(sender)


def _essence(octets: bytes) -> bytes:
    return re.sub(rb"[\r\n .]", b"", octets)


@pytest.mark.parametrize(
    "variant", [b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r.\r", b"\r\n.\r\r\n", b"\r.\r\n", b"\r\n.\r"]
)
def test_the_packets_make_no_difference(usual: Site, variant: bytes) -> None:
    sender = usual.sender()
    stream = HEADER + variant + SMUGGLED + END
    core = len(HEADER)
    with usual.client() as client:
        client.open()
        for place in range(core - 2, core + len(variant) + 3):
            client.envelope(sender, ["user@example.com"])
            client.expect("354", "DATA")
            client.send(stream[:place])
            client.send(stream[place:-2])
            client.send(stream[-2:])
            assert client.read().code == 250
        for octets in ([stream[at : at + 1] for at in range(len(stream))],):
            client.envelope(sender, ["user@example.com"])
            client.expect("354", "DATA")
            for octet in octets:
                client.send(octet)
            assert client.read().code == 250
        client.quit()
    count = len(variant) + 5 + 1
    assert len({after_trace(seen.message) for seen in usual.arrived(sender, count)}) == 1
    usual.nothing_but(sender)


@pytest.mark.parametrize("place", range(1, 5))
def test_the_true_end_is_seen_in_any_packets(usual: Site, place: int) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        client.envelope(sender, ["user@example.com"])
        client.expect("354", "DATA")
        whole = HEADER[:-2] + END
        cut = len(whole) - len(END) + place
        client.send(whole[:cut])
        client.send(whole[cut:] + b"NOOP\r\n")
        assert client.read().code == 250
        assert client.read().text == "2.0.0 Ok"
        client.quit()
    [seen] = usual.arrived(sender)
    assert after_trace(seen.message) == HEADER


def test_refuse_refuses_every_bare_line_end_at_the_true_end(soft: Site) -> None:
    sender = soft.sender()
    bare = [variant for variant in VARIANTS.values() if re.search(rb"\r(?!\n)|(?<!\r)\n", variant)]
    assert len(bare) > 300
    for start in range(0, len(bare), 19):  # each is an error, and a session has twenty
        with soft.client() as client:
            client.open()
            for variant in bare[start : start + 19]:
                client.envelope(sender, ["user@example.com"])
                client.expect("354", "DATA")
                client.send(HEADER + variant + SMUGGLED + END)
                client.expect("451 4.6.0 Bare CR or LF in the message")
                client.expect("250 2.0.0", "NOOP")
            client.quit()
    assert soft.from_(sender) == []
    soft.nothing_but()


def test_a_bare_lf_becomes_a_line_end_and_a_bare_cr_a_space(usual: Site) -> None:
    sender = usual.sender()
    with usual.client() as client:
        client.open()
        client.envelope(sender, ["user@example.com"])
        client.expect("354", "DATA")
        client.send(b"Subject: x\n\r\none\ntwo\rthree\n.four\n.\n..five\r\n..six\r\n.\r\n")
        assert client.read().code == 250
        client.quit()
    [seen] = usual.arrived(sender)
    assert after_trace(seen.message) == b"Subject: x\r\n\r\none\r\ntwo three\r\n.four\r\n.\r\n..five\r\n.six\r\n"
