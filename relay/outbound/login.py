"""Owns: logging in at a next hop (RFC 4954 §4, the client's side), inside TLS only.

aiosmtplib's own login tries one mechanism after the other with the same password; here the operator's order decides and one
try is all there is, because a directory counts each. The password gets into no exception.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from aiosmtplib import SMTP, SMTPAuthenticationError

from relay.config.auth import Mechanism

MOST_ITERATIONS: Final = 1_000_000
"""A next hop that asks for more wants the worker's time, not a login."""


@dataclass(frozen=True, slots=True)
class Login:
    """Who the relay is at a next hop. ``mechanisms`` in order of preference."""

    user: str
    password: str = field(repr=False)
    mechanisms: tuple[Mechanism, ...]

    def choose(self, offered: list[str]) -> Mechanism | None:
        """The first mechanism that the next hop offers; None when there is none."""
        names = {name.upper() for name in offered}
        return next((mechanism for mechanism in self.mechanisms if mechanism in names), None)


Command = Callable[..., Awaitable[tuple[int, str]]]


async def log_in(client: SMTP, login: Login, timeout_s: float) -> None:
    """Log in. Raises SMTPAuthenticationError with the next hop's answer, and what the client raises."""
    mechanism = login.choose(client.server_auth_methods)
    if mechanism is None:
        offered = " ".join(client.server_auth_methods).upper() or "none"
        raise SMTPAuthenticationError(504, f"no mechanism in common: it offers {offered}")

    async def say(*words: bytes) -> tuple[int, str]:
        response = await client.execute_command(*words, timeout=timeout_s)
        return response.code, response.message

    code, message = await _DIALOGUES[mechanism](say, login)
    if code != 235:
        raise SMTPAuthenticationError(code, message)


async def _plain(say: Command, login: Login) -> tuple[int, str]:
    return await say(b"AUTH", b"PLAIN", _b64(f"\0{login.user}\0{login.password}".encode()))


async def _login(say: Command, login: Login) -> tuple[int, str]:
    answer = await say(b"AUTH", b"LOGIN")
    for word in (login.user, login.password):
        if answer[0] != 334:
            return answer
        answer = await say(_b64(word.encode()))
    return answer


async def _cram_md5(say: Command, login: Login) -> tuple[int, str]:
    code, message = await say(b"AUTH", b"CRAM-MD5")
    if code != 334:
        return code, message
    digest = hmac.new(login.password.encode(), _octets(message), "md5").hexdigest()
    return await say(_b64(f"{login.user} {digest}".encode()))


async def _scram(say: Command, login: Login) -> tuple[int, str]:
    """RFC 5802, RFC 7677. The next hop has to show that it knows the password, too."""
    name = login.user.replace("=", "=3D").replace(",", "=2C")
    bare, nonce = f"n={name},r=", secrets.token_hex(16)
    bare += nonce
    code, message = await say(b"AUTH", b"SCRAM-SHA-256", _b64(f"n,,{bare}".encode()))
    if code != 334:
        return code, message
    first = _octets(message).decode("utf-8", "replace")
    fields = dict(part.split("=", 1) for part in first.split(",") if "=" in part)
    rounds = fields.get("i", "")
    if not fields.get("r", "").startswith(nonce) or not rounds.isdigit() or not 0 < int(rounds) <= MOST_ITERATIONS:
        raise SMTPAuthenticationError(501, "its answer is no SCRAM-SHA-256")
    salted = hashlib.pbkdf2_hmac("sha256", login.password.encode(), _octets(fields.get("s", "")), int(rounds))
    without_proof = f"c=biws,r={fields['r']}"
    signed = f"{bare},{first},{without_proof}".encode()
    key = hmac.digest(salted, b"Client Key", "sha256")
    signature = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
    proof = _b64(bytes(a ^ b for a, b in zip(key, signature, strict=True))).decode()
    code, message = await say(_b64(f"{without_proof},p={proof}".encode()))
    if code != 334:
        return code, message
    wanted = b"v=" + _b64(hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256"))
    if not hmac.compare_digest(_octets(message), wanted):
        raise SMTPAuthenticationError(535, "the next hop does not know the password that it asked for")
    return await say(b"")


def _b64(octets: bytes) -> bytes:
    return base64.b64encode(octets)


def _octets(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SMTPAuthenticationError(501, "its challenge is not base64") from None


_DIALOGUES: Final[dict[Mechanism, Callable[[Command, Login], Awaitable[tuple[int, str]]]]] = {
    Mechanism.PLAIN: _plain,
    Mechanism.LOGIN: _login,
    Mechanism.CRAM_MD5: _cram_md5,
    Mechanism.SCRAM_SHA_256: _scram,
}
