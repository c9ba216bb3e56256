"""8-bit content made 7-bit (RFC 6152 §3): what a mail program reads stays the same, and what must not be touched is not."""

from __future__ import annotations

import email.policy
from email import message_from_bytes
from email.message import EmailMessage, Message

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.mail import seven_bit
from relay.mail.seven_bit import Unconvertible, convert, plan


def wire(message: bytes) -> bytes:
    return b"".join(b"." + line if line.startswith(b".") else line for line in message.splitlines(keepends=True))


def cut(octets: bytes, size: int) -> list[bytes]:
    return [octets[start : start + size] for start in range(0, len(octets), size)]


def converted(message: bytes, size: int = 7) -> bytes:
    """What a next hop's user gets: unstuffed again."""
    pieces = cut(wire(message), size)
    out = b"".join(convert(pieces, plan(pieces)))
    lines = out.split(b"\r\n")
    assert lines[-1] == b""
    assert b"." not in lines
    assert out.isascii()
    return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines)


def leaves(octets: bytes) -> list[tuple[str, bytes]]:
    message: Message = message_from_bytes(octets)
    return [
        (part.get_content_type(), part.get_payload(decode=True))  # type: ignore[misc]
        for part in message.walk()
        if not part.is_multipart()
    ]


TEXT = "Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"


def test_text_becomes_quoted_printable() -> None:
    body = "Grüße\r\n.ä\r\n..\r\nlong " + "ö" * 200 + "\r\ntrailing space \r\n=3D\r\n\r\n"
    out = converted((TEXT + body).encode())
    assert b"Content-Transfer-Encoding: quoted-printable\r\n" in out
    assert b"8bit" not in out
    assert max(map(len, out.split(b"\r\n"))) <= 78
    assert leaves(out) == [("text/plain", body.encode())]


def test_mail_without_mime_gets_it() -> None:
    """RFC 1428."""
    out = converted(b"Subject: x\r\n\r\nGr\xfc\xdfe\r\n")
    message = message_from_bytes(out)
    assert message["MIME-Version"] == "1.0"
    assert message.get_content_charset() == "unknown-8bit"
    assert message.get_payload(decode=True) == b"Gr\xfc\xdfe\r\n"


def test_only_what_has_to_change_does() -> None:
    message = (
        'Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n boundary="a b"\r\n'
        "Content-Transfer-Encoding: 8bit\r\n\r\npreamble\r\n--a b\r\n\r\nplain text\r\n\r\n--a b \r\n"
        "Content-Type: multipart/alternative; boundary=inner\r\nContent-Transfer-Encoding: 8BIT\r\n\r\n"
        "--inner\r\nContent-Type: text/html; charset=utf-8\r\ncontent-transfer-encoding: 8bit\r\nX-Kept: yes\r\n\r\n<p>ä</p>\r\n"
        "--inner\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: 8bit\r\n\r\n\u0001ä\r\nö\r\n--inner--\r\n"
        "--a b\r\nContent-Type: application/x\r\nContent-Transfer-Encoding: base64\r\n\r\nw6Q=\r\n--a b--\r\nepilogue\r\n"
    ).encode()
    out = converted(message)
    assert leaves(out) == leaves(message)
    text = out.decode()
    assert "8bit" not in text.lower()
    assert "preamble\r\n--a b\r\n\r\nplain text\r\n\r\n--a b \r\n" in text
    assert "X-Kept: yes\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n<p>=C3=A4</p>\r\n--inner\r\n" in text
    assert text.endswith("Content-Transfer-Encoding: base64\r\n\r\nw6Q=\r\n--a b--\r\nepilogue\r\n")
    assert text.count("MIME-Version") == 1


def nested(inside: str) -> bytes:
    return (
        f"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n{inside}\r\n--b--\r\n".encode()
    )


@pytest.mark.parametrize(
    "message",
    [
        nested("Content-Type: multipart/signed; boundary=s; protocol=x\r\n\r\n--s\r\n\r\nä\r\n--s\r\n\r\nsig\r\n--s--"),
        nested("Content-Type: multipart/encrypted; boundary=s\r\n\r\n--s\r\n\r\nä\r\n--s--"),
        nested("Content-Type: message/rfc822\r\n\r\nSubject: x\r\n\r\nä"),
        nested("Content-Type: message/global\r\nContent-Transfer-Encoding: 8bit\r\n\r\nSubject: ä\r\n\r\nx"),
        nested("Content-Type: text/plain\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nä"),
        nested("Content-Type: application/x\r\nContent-Transfer-Encoding: base64\r\n\r\nä"),
        nested("Content-Type: text/plain; name=ä\r\n\r\nä"),
        nested("Content-Type: multipart/mixed\r\n\r\n--?\r\n\r\nä"),
        nested("\r\nx\r\n--b--\r\nä"),
        b"Content-Type: multipart/digest; boundary=b\r\n\r\n--b\r\n\r\nSubject: x\r\n\r\n\xe4\r\n--b--\r\n",
        "Subject: Grüße\r\n\r\nä\r\n".encode(),
        "Content-Type: multipart/mixed; boundary=b\r\n\r\nprä\r\n--b\r\n\r\nx\r\n--b--\r\n".encode(),
        b"A: b\r\n\r\n" + b"\xe4" * (seven_bit.LINE_OCTETS + 1) + b"\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\r\n" * (seven_bit.PARTS + 1) + b"\xe4\r\n",
        b"A: b\r\n\r\n\xe4",
    ],
)  # fmt: skip
def test_what_must_not_be_changed_or_is_no_proper_mime_is_left_alone(message: bytes) -> None:
    with pytest.raises(Unconvertible):
        plan([wire(message)])


def test_nesting_is_bounded() -> None:
    message = "".join(
        f"Content-Type: multipart/mixed; boundary=b{n}\r\n\r\n--b{n}\r\n" for n in range(seven_bit.DEPTH + 1)
    )
    with pytest.raises(Unconvertible, match="nested"):
        plan([message.encode()])


@pytest.mark.parametrize("message", [b"", b"A: b\r\n", b"\r\n", b"\r\nbody\r\n", b"A: b\r\n\r\n"])
def test_an_odd_message_in_ascii_stays_octet_for_octet_but_for_the_end_of_its_header(message: bytes) -> None:
    assert plan([message]) == frozenset()
    assert b"".join(convert([message], frozenset())).rstrip() == message.rstrip()


_LINE = st.binary(max_size=120).map(lambda octets: octets.replace(b"\r", b"").replace(b"\n", b""))
_BODY = st.lists(_LINE, max_size=6).map(lambda lines: b"".join(line + b"\r\n" for line in lines))


@settings(max_examples=300)
@given(_BODY, st.integers(1, 40), st.sampled_from(["text/plain", "application/octet-stream"]))
def test_any_body_reads_the_same_afterwards(body: bytes, size: int, kind: str) -> None:
    message = f"MIME-Version: 1.0\r\nContent-Type: {kind}\r\nContent-Transfer-Encoding: 8bit\r\n\r\n".encode() + body
    out = converted(message, size)
    assert leaves(out)[0][1] == body


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["text/html", "image/png", ""]), _BODY), min_size=1, max_size=4),
    st.integers(1, 50),
)
def test_any_parts_read_the_same_afterwards(parts: list[tuple[str, bytes]], size: int) -> None:
    boundary = b"=_frontier_="
    message = b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="' + boundary + b'"\r\n\r\n'
    for kind, body in parts:
        head = f"Content-Type: {kind}\r\nContent-Transfer-Encoding: 8bit\r\n" if kind else ""
        message += b"--" + boundary + b"\r\n" + head.encode() + b"\r\n" + body + b"\r\n"
    message += b"--" + boundary + b"--\r\n"
    assert [payload for _, payload in leaves(converted(message, size))] == [body for _, body in parts]


@given(
    st.sampled_from([b"", b"Content-Type: ", b"Content-Type: multipart/mixed; ", b"Content-Transfer-Encoding: "]),
    st.text("a;=*'\"\\%0 \r\n\té-/bound().", max_size=80).map(str.encode) | st.binary(max_size=200),
    st.binary(max_size=60),
    st.integers(1, 30),
)
def test_no_octets_break_it(name: bytes, octets: bytes, body: bytes, size: int) -> None:
    pieces = cut(name + octets + b"\r\n\r\n" + body + b"\r\n", size)
    try:
        eight = plan(pieces)
    except Unconvertible:
        return
    assert b"".join(convert(pieces, eight)).isascii()


def test_a_large_attachment_comes_in_pieces_of_bounded_size() -> None:
    line = bytes(range(128, 228)) + b"\r\n"
    head = b"MIME-Version: 1.0\r\nContent-Type: application/x\r\n\r\n"
    pieces = [head, *[line * 1000] * 20]
    sizes = [len(piece) for piece in convert(pieces, plan(pieces))]
    assert max(sizes) < 2 * seven_bit.PIECE_OCTETS
    out = b"".join(convert(pieces, plan(pieces)))
    parsed = message_from_bytes(out, policy=email.policy.SMTP)
    assert isinstance(parsed, EmailMessage)
    assert parsed.get_content() == line * 20_000
