"""Owns: an operator's own word about a recipient, as Postfix maps write it: ``OK`` or ``550 5.1.1 Has left``. Pure."""

from __future__ import annotations

import datetime as dt
import re
from functools import lru_cache
from typing import Final, NamedTuple

from relay.mail.reply import Kind, OperatorText, operator_text, recipient_rejected

RULING_HINT: Final = 'write OK, or a refusal, e.g. "550 5.1.1 Has left the company" or "450 Moving house"'

# In a recipient map of Postfix any word says that the address is valid; these are the ones that people write.
_ACCEPTS: Final = frozenset({"ok", "x", "relay", "permit"})
_REFUSAL: Final = re.compile(r"(?P<code>[45]\d\d)(?: +(?P<enhanced>[45]\.\d{1,3}\.\d{1,3})(?= |$))?(?: +(?P<text>.*))?")
_CODES: Final = frozenset({450, 451, 452, 550, 551, 552, 553, 554})
"""421 would announce the end of the session (RFC 5321 §3.8), and 50x speak of syntax."""
_WORDS: Final = {"reject": 554, "defer": 450}  # access(5)


class Ruling(NamedTuple):
    """``kind`` None: the address is taken. Else the refusal, and its ``text``."""

    kind: Kind | None
    text: OperatorText


def parse_ruling(action: str) -> Ruling | None:
    """What an action means; None when it is none of those above. Raises nothing."""
    action = action.strip()
    word, _, rest = action.partition(" ")
    if action.lower() in _ACCEPTS:
        return Ruling(None, OperatorText(""))
    if word.lower() in _WORDS:
        return _refusal(_WORDS[word.lower()], "", rest.strip())
    found = _REFUSAL.fullmatch(action)
    if found is None or int(found["code"]) not in _CODES:
        return None
    enhanced = found["enhanced"] or ""
    if enhanced and enhanced[0] != action[0]:
        return None
    return _refusal(int(found["code"]), enhanced, (found["text"] or "").strip())


def _refusal(code: int, enhanced: str, text: str) -> Ruling:
    words = text or ("Access denied" if code >= 500 else "Try again later")
    return Ruling(_kind(code, enhanced or f"{code // 100}.7.1"), operator_text(words))


@lru_cache(maxsize=256)
def _kind(code: int, enhanced: str) -> Kind:
    """One Kind for each pair of codes: they are the metrics' keys. More pairs than that nobody has."""
    return recipient_rejected(code, enhanced)


def action_of(ruling: Ruling) -> str:
    """The action that means this ruling: what ``parse_ruling`` reads back."""
    return f"{ruling.kind.code} {ruling.kind.enhanced} {ruling.text}" if ruling.kind else "OK"


def end_of(day: dt.date | None) -> int:
    """The first second after a day (UTC), since 1970; 0 for none: then there is no end."""
    if day is None:
        return 0
    return int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp()) + 86400


def last_day(end: int) -> dt.date:
    """The day of which ``end_of`` gave ``end``."""
    return dt.datetime.fromtimestamp(end - 1, dt.UTC).date()
