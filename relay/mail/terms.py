"""Owns: the terms a client hands a message over on, beside sender, recipients and body: which reports it wants (DSN,
RFC 3461) and whether addresses and header may be UTF-8 (SMTPUTF8, RFC 6531).

Pure. Values are kept as the client wrote them, because they are passed on so (RFC 3461 §5.2.1). ``words`` is both what is
said to a next hop and what the queue stores; ``Terms.read`` and ``RecipientTerms.read`` take it back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from relay.mail.address import UNFIT

ENVID_CHARACTERS: Final = 100  # RFC 3461 §4.4
ORCPT_CHARACTERS: Final = 500  # RFC 3461 §4.2
_EVENTS: Final = frozenset({"SUCCESS", "FAILURE", "DELAY"})

_XTEXT: Final = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")  # RFC 3461 §4
_HEXCHAR: Final = re.compile(r"\+([0-9A-F]{2})")
# What an envelope identifier or an original recipient may decode to: graphic characters and white space (§4.2, §4.4).
# It ends up in the header of a report, so nothing else may.
_PLAIN: Final = re.compile(r"[\t -~]*")
_TYPED: Final = re.compile(r"([A-Za-z0-9!#$%&'*+/?^_`{|}~-]+);(.*)", re.DOTALL)  # addr-type is an atom; "=" cannot come
# RFC 6533 §3: the type "utf-8" has an escape of its own, and plain UTF-8 where SMTPUTF8 is on.
_UNITEXT: Final = re.compile(r"(?:[!-*,-<>-\[\]-~]|[^\x00-\x7f]|\\x\{[0-9A-F]{2,6}\})+")
_EMBEDDED: Final = re.compile(r"\\x\{([0-9A-F]{2,6})\}")


def decode_xtext(text: str) -> str | None:
    """What xtext stands for, None when it is none or stands for something that no report may contain."""
    if _XTEXT.fullmatch(text) is None:
        return None
    plain = _HEXCHAR.sub(lambda found: chr(int(found[1], 16)), text)
    return plain if _PLAIN.fullmatch(plain) else None


def parse_notify(value: str) -> str | None:
    """NOTIFY in capitals, each word once; None when it is none (RFC 3461 §4.1)."""
    words = dict.fromkeys(value.upper().split(","))
    if words.keys() == {"NEVER"} or (words and words.keys() <= _EVENTS):
        return ",".join(words)
    return None


def parse_envid(value: str) -> str | None:
    """ENVID as it was sent, None when it is none."""
    return value if 0 < len(value) <= ENVID_CHARACTERS and decode_xtext(value) is not None else None


def parse_ret(value: str) -> str | None:
    """FULL or HDRS, None when it is neither."""
    return value.upper() if value.upper() in ("FULL", "HDRS") else None


def parse_original(value: str) -> str | None:
    """ORCPT as it was sent, None when it is none."""
    return value if len(value) <= ORCPT_CHARACTERS and _original(value) is not None else None


def _original(value: str) -> tuple[str, str] | None:
    """Address type and address, decoded."""
    found = _TYPED.fullmatch(value)
    if found is None:
        return None
    kind, text = found[1], found[2]
    plain = None if kind.lower() == "utf-8" and "\\" in text else decode_xtext(text)
    if kind.lower() != "utf-8":
        return None if plain is None else (kind, plain)
    if _UNITEXT.fullmatch(text):
        points = [int(found[1], 16) for found in _EMBEDDED.finditer(text)]
        if all(point <= 0x10FFFF for point in points):
            plain = _EMBEDDED.sub(lambda found: chr(int(found[1], 16)), text)
    return None if plain is None or UNFIT.search(plain) else (kind, plain)


@dataclass(frozen=True, slots=True)
class RecipientTerms:
    """What was said with one RCPT. ``notify``: NEVER, or SUCCESS, FAILURE, DELAY with commas between; "" when nothing was
    said. ``original``: ORCPT, type;xtext.
    """

    notify: str = ""
    original: str = ""

    @property
    def wants_success(self) -> bool:
        """A report is due when the message has arrived."""
        return "SUCCESS" in self.notify

    @property
    def wants_failure(self) -> bool:
        """A report is due when it cannot be delivered: unless something else was asked for (RFC 3461 §5.2.6)."""
        return not self.notify or "FAILURE" in self.notify

    @property
    def wants_delay(self) -> bool:
        """A report may go when delivery takes long (RFC 3461 §5.2.5)."""
        return not self.notify or "DELAY" in self.notify

    @property
    def original_address(self) -> tuple[str, str] | None:
        """Type and address of ORCPT, decoded; None when there was none."""
        return _original(self.original) if self.original else None

    @property
    def words(self) -> str:
        """As parameters of RCPT; "" when nothing was said."""
        return _joined(("NOTIFY", self.notify), ("ORCPT", self.original))

    @classmethod
    def read(cls, words: str) -> RecipientTerms | None:
        """What ``words`` gave; None when that cannot be."""
        if not words:
            return PLAIN_RECIPIENT
        said = dict(word.partition("=")[::2] for word in words.split(" "))
        notify, original = said.pop("NOTIFY", ""), said.pop("ORCPT", "")
        bad = said or (notify and parse_notify(notify) != notify) or (original and parse_original(original) is None)
        return None if bad else cls(notify, original)


PLAIN_RECIPIENT: Final = RecipientTerms()


@dataclass(frozen=True, slots=True)
class Terms:
    """What was said with MAIL and its RCPTs.

    ``utf8``: SMTPUTF8. ``ret``: FULL or HDRS. ``envid``: ENVID, xtext. ``recipients``: empty when nothing was said with any
    RCPT, else one for each recipient of the envelope.
    """

    utf8: bool = False
    ret: str = ""
    envid: str = ""
    recipients: tuple[RecipientTerms, ...] = ()

    def of(self, number: int) -> RecipientTerms:
        """Those of the recipient at this place of the envelope."""
        return self.recipients[number] if self.recipients else PLAIN_RECIPIENT

    def only(self, numbers: list[int]) -> Terms:
        """The same for some of the recipients, in this order."""
        return replace(self, recipients=some([self.recipients[n] for n in numbers])) if self.recipients else self

    @property
    def words(self) -> str:
        """As parameters of MAIL; "" when nothing was said."""
        report = self.report_words
        return f"SMTPUTF8 {report}".rstrip(" ") if self.utf8 else report

    @property
    def report_words(self) -> str:
        """Those about reports alone."""
        return _joined(("RET", self.ret), ("ENVID", self.envid))

    @classmethod
    def read(cls, words: str, recipients: tuple[RecipientTerms, ...] = ()) -> Terms | None:
        """What ``words`` gave; None when that cannot be."""
        if not words and not recipients:
            return PLAIN
        said = dict(word.partition("=")[::2] for word in words.split(" ")) if words else {}
        utf8 = said.pop("SMTPUTF8", None) is not None
        ret, envid = said.pop("RET", ""), said.pop("ENVID", "")
        bad = said or (ret and parse_ret(ret) != ret) or (envid and parse_envid(envid) is None)
        return None if bad else cls(utf8, ret, envid, recipients)


PLAIN: Final = Terms()
"""Those of nearly all mail."""


def some(recipients: list[RecipientTerms]) -> tuple[RecipientTerms, ...]:
    """For ``Terms.recipients``: empty where nobody said anything."""
    return tuple(recipients) if any(each is not PLAIN_RECIPIENT and each.words for each in recipients) else ()


def _joined(*parameters: tuple[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters if value)
