"""Owns: what LMTP (RFC 2033) does differently from SMTP: one reply for each accepted recipient after the final dot."""

from __future__ import annotations

from relay.mail.answer import Answer, Stage
from relay.outbound.client import Connection


class LmtpConnection(Connection):
    """An open connection that has said LHLO."""

    __slots__ = ()

    def _reply(self, code: int, text: str, rest: int) -> bool:
        if self._stage() is not Stage.FINAL or self._pieces is not None or code == 421:
            return super()._reply(code, text, rest)
        self._unanswered = False
        answer = self._answer(Stage.FINAL, code, text)
        if 300 <= code <= 399:
            return self._abandon(answer)
        waiting = [index for index, given in enumerate(self._answers) if given is None]
        self._answers[waiting[0]] = answer
        if len(waiting) > 1:
            self.deadline = self.lane.now() + self.lane.final_reply_timeout_s
            return True
        if rest:  # more replies than recipients: the next one could not be told apart
            return self._abandon(answer)
        self._finish(answer)
        return self.attempt is not None or not self.transport.is_closing()

    def _awaits_one(self) -> bool:
        return False

    def _data_reply(self, code: int, text: str) -> bool:
        if code == 354 and not self._accepted and self._mail is None:
            # RFC 2033 §4.2 wants 503 here. A lone dot would be answered by nothing at all.
            self._next += 1
            return self._abandon(Answer(Stage.RCPT, 0, "", "no recipient was accepted"))
        return super()._data_reply(code, text)
