"""Owns: the AUTH dialogue of a session (RFC 4954 §4): base64, ``*``, lengths, and what is said in the end.

What a mechanism wants is ``auth.mechanism``'s, whether the login is right the hub's. No password stays here: the dialogue is
dropped with its answer. It must not know MAIL, nor decide who may send as whom.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from relay.auth.mechanism import Challenge, Circumstances, Dialogue, Hopeless, Malformed, begin
from relay.auth.question import Question, Reply, Result
from relay.config.auth import Mechanism
from relay.mail import reply
from relay.mail.reply import Kind
from relay.net.tls import binding_of
from relay.policy.ownership import Account

if TYPE_CHECKING:
    from relay.inbound.session import Session

RESPONSE_OCTETS: Final = 12288
"""Longest base64 text of a response (RFC 4954 §4)."""

_REFUSALS: Final = {
    Result.REFUSED: (reply.AUTH_FAILED, "refused"),
    Result.BLOCKED: (reply.AUTH_BLOCKED, "blocked"),
    Result.UNAVAILABLE: (reply.AUTH_UNAVAILABLE, "unavailable"),
}


def start(session: Session, argument: bytes) -> Login | None:
    """What stands behind AUTH: the dialogue, or None when it was refused."""
    listener = session.listener
    words = argument.split(b" ")
    if not words[0] or len(words) > 2:
        session.say(reply.BAD_ARGUMENTS)
        return None
    try:
        mechanism = Mechanism(words[0].decode("ascii").upper())
    except ValueError:
        session.say(reply.AUTH_MECHANISM)
        return None
    if mechanism not in listener.mechanisms:
        session.say(reply.AUTH_MECHANISM)
        return None
    initial = None if len(words) == 1 else b"" if words[1] == b"=" else _decoded(words[1])
    if isinstance(initial, Kind):
        session.say(initial)
        return None
    challenge = f"<{secrets.token_hex(16)}@{listener.hostname}>".encode("ascii")
    bound = Mechanism.SCRAM_SHA_256_PLUS in listener.mechanisms
    end = session.transport.get_extra_info("ssl_object")
    around = Circumstances(challenge, binding_of(end, listener.binding) if bound else b"")
    return Login(session, mechanism, begin(mechanism, initial, around))


def _decoded(text: bytes) -> bytes | Kind:
    if len(text) > RESPONSE_OCTETS:
        return reply.AUTH_TOO_LONG
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return reply.AUTH_NOT_BASE64


class Login:
    """One dialogue, from AUTH to its last reply."""

    def __init__(self, session: Session, mechanism: Mechanism, dialogue: Dialogue) -> None:
        self._session = session
        self._mechanism = mechanism
        self._dialogue = dialogue
        self._tag = session.listener.logins.tag()
        self._account: Account | None = None
        self._asking = False

    def begin(self) -> None:
        """Say the first challenge, or ask at once when there was an initial response."""
        self._advance(lambda: next(self._dialogue))

    def line(self, line: bytes) -> None:
        """A response of the client."""
        if line == b"*":
            self._end(reply.AUTH_CANCELLED, "cancelled")
            return
        octets = _decoded(line)
        if isinstance(octets, Kind):
            self._end(octets, "malformed")
        else:
            self._advance(lambda: self._dialogue.send(octets))

    def abandon(self) -> None:
        """The client is gone."""
        self._session.listener.logins.forget(self._tag, self._mechanism, self._session.listener.name)
        self._dialogue.close()

    def _advance(self, step: Callable[[], Challenge | Question]) -> None:
        session = self._session
        try:
            said = step()
        except StopIteration:
            self._succeed()
        except Malformed:
            self._end(reply.AUTH_MALFORMED, "malformed")
        except Hopeless as error:
            self._failed(error.user, str(error), reply.AUTH_FAILED, "refused")
        else:
            if isinstance(said, Challenge):
                session.challenge(base64.b64encode(said.octets))
                return
            listener = session.listener
            session.wait()
            listener.logins.ask(self._tag, said, session.address, listener.name, self._answered)

    def _answered(self, answer: Reply) -> None:
        """The hub has looked at it."""
        session = self._session
        if session.closed:
            return
        session.busy = False
        if answer.result in {Result.OK, Result.GO_ON}:
            self._account = answer.account
            self._advance(lambda: self._dialogue.send(answer.octets))
        else:
            kind, result = _REFUSALS[answer.result]
            self._failed(answer.user, answer.why, kind, result)
        if not session.busy:
            session.answered()

    def _succeed(self) -> None:
        session, account = self._session, self._account
        assert account is not None, "a dialogue ends well after an account was named alone"
        session.listener.metrics.login(self._mechanism, "ok")
        session.listener.log.login(session.client, account.name, self._mechanism)
        session.logged_in(account)
        session.say(reply.AUTH_OK)

    def _failed(self, user: str, why: str, kind: Kind, result: str) -> None:
        self._session.listener.log.login_failed(self._session.client, user, self._mechanism, why)
        self._end(kind, result)

    def _end(self, kind: Kind, result: str) -> None:
        session = self._session
        session.listener.metrics.login(self._mechanism, result)
        self._dialogue.close()
        session.logged_out()
        session.say(kind)
