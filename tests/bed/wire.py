"""Owns: the wire form of messages as tests make and read it, written apart from the relay's own code on purpose."""

from __future__ import annotations

END_OF_DATA = b".\r\n"


def stuffed(message: bytes) -> bytes:
    """A message as it goes over the wire after 354, without the final dot (RFC 5321 §4.5.2)."""
    if not message.endswith(b"\r\n"):
        message += b"\r\n"
    message = message.replace(b"\r\n.", b"\r\n..")
    return b"." + message if message.startswith(b".") else message


def unstuffed(wire: bytes) -> bytes:
    """What the sender meant by it."""
    wire = wire.replace(b"\r\n.", b"\r\n")
    return wire[1:] if wire.startswith(b".") else wire


def letter(subject: str = "hello", body: bytes = b"Hello.\r\n") -> bytes:
    """A small message, not dot-stuffed."""
    head = [
        "From: Sender <sender@example.net>",
        "To: user@example.com",
        f"Subject: {subject}",
        "Date: Tue, 14 Nov 2023 22:13:20 +0000",
        "Message-ID: <1@example.net>",
        "MIME-Version: 1.0",
    ]
    return "".join(f"{line}\r\n" for line in head).encode() + b"\r\n" + body


def after_trace(message: bytes, subject: str = "") -> bytes:
    """A received message without the Received lines on its top; what is left must be what was sent.

    ``subject`` is for the error message alone.
    """
    rest = message
    while rest.startswith(b"Received:"):
        end = rest.find(b"\r\n")
        while end >= 0 and rest[end + 2 : end + 3] in (b" ", b"\t"):
            end = rest.find(b"\r\n", end + 2)
        if end < 0:
            raise AssertionError(f"message {subject} ends within its trace header")
        rest = rest[end + 2 :]
    return rest
