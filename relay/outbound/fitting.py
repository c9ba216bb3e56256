"""Owns: what has to be different about a message for a next hop that lacks an extension the message wants.

It must not send anything, nor decide what an answer means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from relay.mail.address import Mailbox, ascii_form
from relay.mail.answer import Answer, Stage
from relay.mail.content import Content
from relay.mail.dsn import header_of
from relay.mail.seven_bit import Unconvertible, convert, plan
from relay.mail.terms import Terms
from relay.outbound.attempt import Attempt

if TYPE_CHECKING:
    from relay.outbound.client import Capabilities

HEADER_OCTETS: Final = 4 * 1024 * 1024
"""Where a header ends at the latest: the upper bound of limits.header_octets."""

NO_UTF8: Final = Answer(Stage.ROUTE, 553, "5.6.7", "SMTPUTF8 is needed, and the next hop does not offer it")

NO_8BIT: Final = "8-bit content, and the next hop takes 7 bits only"

_WIDE: Final = re.compile(r"[^\x00-\x7f]")


class Fitted:
    """An attempt as this next hop can take it. Recipients it cannot have are answered for here."""

    __slots__ = ("_given", "_places", "body_8bit", "content", "original", "recipients", "sender", "started", "terms")

    def __init__(self, original: Attempt, sender: Mailbox, recipients: Sequence[Mailbox | None]) -> None:
        """``recipients`` as they are to be named, None for those that cannot be."""
        self.original = original
        self.sender = sender
        self._places = [place for place, mailbox in enumerate(recipients) if mailbox is not None]
        self._given = len(recipients)
        self.recipients: Sequence[Mailbox] = [mailbox for mailbox in recipients if mailbox is not None]
        self.content: Content = original.content
        self.body_8bit = original.body_8bit
        self.terms: Terms = original.terms.only(self._places)
        self.started = original.started

    @property
    def told(self) -> bool:
        return self.original.told

    @told.setter
    def told(self, told: bool) -> None:
        self.original.told = told

    def may_finish(self) -> bool:
        return self.original.may_finish()

    def done(self, answers: list[Answer], next_hop: str) -> None:
        every = [NO_UTF8] * self._given
        for place, answer in zip(self._places, answers, strict=True):
            every[place] = answer
        self.original.done(every, next_hop)


class _Converted(Content):
    """A body file read as 7 bits, converted as it is sent: it is never whole in memory. The file stays its owner's."""

    __slots__ = ("_original", "_parts")

    def __init__(self, original: Content, parts: frozenset[int]) -> None:
        self._original = original
        self._parts = parts
        super().__init__(None, -1, sum(map(len, self.chunks())), original.path)

    def chunks(self) -> Iterator[bytes]:
        return convert(self._original.chunks(), self._parts)


def in_seven_bits(content: Content, *, may_convert: bool) -> Content | Answer:
    """The content for a next hop without 8BITMIME, itself when it is ASCII; or why it cannot go there (RFC 6152 §3).

    Reads the whole: for a file, to be called in a thread. Raises OSError.
    """
    if all(piece.isascii() for piece in content.chunks()):
        return content
    if not may_convert:
        return Answer(Stage.ROUTE, 554, "5.6.3", NO_8BIT)
    try:
        parts = plan(content.chunks())
        if content.memory is None:
            return _Converted(content, parts)
        return Content.of(b"".join(convert(content.chunks(), parts)))
    except Unconvertible as why:
        return Answer(Stage.ROUTE, 554, "5.6.3", f"{NO_8BIT}; not converted: {why}")


def with_content(attempt: Attempt, content: Content) -> Fitted:
    """The attempt with another content, in 7 bits."""
    given = attempt if isinstance(attempt, Fitted) else Fitted(attempt, attempt.sender, attempt.recipients)
    given.content = content
    given.body_8bit = False
    return given


def fitted(attempt: Attempt, capabilities: Capabilities) -> Attempt | Answer:
    """The attempt, changed where it has to be; or the answer for all its recipients. Raises OSError when the body cannot
    be read.
    """
    if attempt.terms.utf8 and not capabilities.utf8:
        # RFC 6531 §3.2: such a message may not go there. What was announced and is not in it needs nothing.
        sender = ascii_form(attempt.sender)
        if sender is None or not _header(attempt.content).isascii():
            return NO_UTF8
        recipients = [ascii_form(recipient) for recipient in attempt.recipients]
        if not any(recipients):
            return NO_UTF8
        return Fitted(attempt, sender, recipients)
    return attempt


def _header(content: Content) -> bytes:
    return header_of(content.head(HEADER_OCTETS))


def words_of(terms: Terms, capabilities: Capabilities, recipients: int) -> list[str]:
    """What is said with MAIL, and with each RCPT, of what the client said."""
    utf8 = terms.utf8 and capabilities.utf8
    mail = [word for word in ("SMTPUTF8" if utf8 else "", terms.report_words if capabilities.dsn else "") if word]
    said = [" ".join(mail)] + [terms.of(number).words if capabilities.dsn else "" for number in range(recipients)]
    if not utf8:  # RFC 6533 §3: an original recipient in UTF-8 has a form in ASCII, too
        said = [_WIDE.sub(lambda found: f"\\x{{{ord(found[0]):02X}}}", words) for words in said]
    return said
