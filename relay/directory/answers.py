"""Owns: what next hops said about recipients, for a while: valid, unknown (row R13). Must not ask, nor read a clock."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

KEPT: Final = 20_000
"""Answers kept by a worker, some 4 MB. The budget lets in far fewer in the time that they are good for."""


class Answers:
    """The newest ``KEPT`` answers; who is asked for most stays longest. One thread only."""

    __slots__ = ("_said",)

    def __init__(self) -> None:
        self._said: Final[OrderedDict[str, tuple[bool, float]]] = OrderedDict()

    def get(self, mailbox: str, now: float) -> bool | None:
        """Whether the mailbox is valid; None when that is not known. ``now`` in seconds of the clock given to ``put``."""
        key = mailbox.lower()
        said = self._said.get(key)
        if said is None:
            return None
        valid, until = said
        if now >= until:
            del self._said[key]
            return None
        self._said.move_to_end(key)
        return valid

    def put(self, mailbox: str, until: float, *, valid: bool) -> None:
        """Note an answer."""
        said = self._said
        key = mailbox.lower()
        said[key] = (valid, until)
        said.move_to_end(key)
        if len(said) > KEPT:
            said.popitem(last=False)

    def forget(self) -> None:
        """All of it: other next hops are asked now."""
        self._said.clear()
