"""Owns: what a next hop answered, as a value: the stage, the codes and its text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The step of an outgoing session that brought the answer."""

    ROUTE = "route"
    """No session: the relay's own routes or the DNS decided."""
    CONNECT = "connect"
    BANNER = "banner"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    FINAL = "final"
    """The reply to the final dot. Code 0 here means: the dot was sent and no answer came (RFC 1047)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One recipient's result. ``code`` 0: no reply (refused, dropped, timed out); ``text`` then says what happened.

    ``enhanced`` is empty when the next hop gave none; ``text`` is printable ASCII, at most 200 octets, without codes.
    """

    stage: Stage
    code: int
    enhanced: str
    text: str
