"""Owns: one LDAP connection of an event loop, for logins: open, TLS, bind, short searches, each with a deadline.

The readers of whole directories have ``directory.connection``, which blocks. One question at a time; a connection whose
question was not answered to the end is broken off, because nobody knows what the server thinks of it. Must not fail over.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Final, cast

from relay.config.ldap import LdapProfile, LdapServer
from relay.directory import ber
from relay.directory.failure import LdapFailure, Reason
from relay.directory.tls import certificate_fault, pinned

ENTRIES_MAX: Final = 200
"""More than any of these searches may find; a server that goes on is broken off."""
ANSWER_OCTETS: Final = 4 << 20
"""An entry with thousands of addresses and values of a picture fits many times."""


class Link(asyncio.Protocol):
    """An open connection. ``opened`` and ``used`` are times of the loop."""

    def __init__(self, server: LdapServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.opened = self.used = loop.time()
        self.lost = False
        self.asked = False
        """Whether it was ever asked anything: the end of one that was idle says nothing about its server."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._number = 0
        self._entries: list[ber.Entry] = []
        self._answer: asyncio.Future[ber.Result] | None = None

    # --- the protocol --------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._fail(Reason.LOST, "the server hung up")

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at = 0
        try:
            while (found := ber.message(data, at)) is not None:
                at = found.whole
                self._take(found)
            if len(data) - at > ANSWER_OCTETS:
                raise ber.Garbled("an answer is too long")
        except ber.Garbled as fault:
            self._fail(Reason.NOT_LDAP, str(fault))
            self.abort()
            return
        self._rest = data[at:]

    def _take(self, found: ber.Message) -> None:
        if found.operation == ber.EXTENDED_RESPONSE and not found.number:  # Notice of Disconnection, RFC 4511 §4.4.1
            raise ber.Garbled("the server hangs up: " + (ber.result(found).diagnostic or "it does not say why"))
        if self._answer is None or found.number != self._number:
            raise ber.Garbled("an answer belongs to no question")
        match found.operation:
            case ber.SEARCH_ENTRY:
                self._entries.append(ber.entry(found))
                if len(self._entries) > ENTRIES_MAX:
                    raise ber.Garbled("there is no end of entries")
            case ber.SEARCH_REFERENCE:
                pass  # never followed: it would get the password
            case ber.SEARCH_DONE | ber.BIND_RESPONSE | ber.EXTENDED_RESPONSE:
                if not self._answer.done():
                    self._answer.set_result(ber.result(found))
            case _:
                raise ber.Garbled("an answer is of a kind that was not asked for")

    def _fail(self, reason: Reason, what: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(LdapFailure(reason, what, self.server.url))

    # --- asking --------------------------------------------------------------------------------------------------------
    async def _ask(self, request: bytes, until: float) -> ber.Result:
        """The result of one question; entries are in ``_entries``. Raises LdapFailure, after which the link is no more."""
        if self.lost or self._transport is None:
            raise LdapFailure(Reason.LOST, "the server had hung up", self.server.url)
        self.asked = True
        self._number += 1
        self._entries = []
        self._answer = self._loop.create_future()
        self._transport.write(ber.tlv(0x30, ber.integer(self._number) + request))
        timer = self._loop.call_at(until, self._fail, Reason.SLOW, "no answer in time")
        try:
            result = await self._answer
        except BaseException:
            self.abort()
            raise
        finally:
            timer.cancel()
            self._answer = None
        self.used = self._loop.time()
        return result

    async def bind(self, name: str, password: bytes, until: float) -> ber.Result:
        """What the server says to name and password. Raises LdapFailure, ValueError for a password that must not be asked."""
        if not password or b"\0" in password:
            raise ValueError("an empty password logs in nobody, and succeeds (RFC 4513 §5.1.2)")
        return await self._ask(ber.bind(name, password), until)

    async def search(
        self, base: str, scope: int, compiled: bytes, attributes: Iterable[str], most: int, until: float
    ) -> tuple[list[ber.Entry], ber.Result]:
        """Up to ``most`` entries; result 4 says that there are more. Raises LdapFailure."""
        result = await self._ask(ber.search(base, scope, compiled, attributes, most), until)
        return self._entries, result

    async def start_tls(self, context: ssl.SSLContext, profile: LdapProfile, until: float) -> None:
        """RFC 4511 §4.14. Raises LdapFailure, OSError (ssl.SSLError among them), TimeoutError."""
        result = await self._ask(ber.STARTTLS, until)
        transport = self._transport
        if result.code or self._rest or transport is None:  # what came before TLS is nobody's word
            self.abort()
            raise LdapFailure(Reason.TLS, f"StartTLS was refused (result {result.code})", self.server.url)
        async with asyncio.timeout_at(until):
            upgraded = await self._loop.start_tls(
                transport, self, context, server_hostname=profile.tls_server_name or self.server.host
            )
        if upgraded is None:
            raise LdapFailure(Reason.LOST, "the server hung up during TLS", self.server.url)
        self._transport = upgraded

    def pinned(self, profile: LdapProfile) -> None:
        """Check the key that the server showed, where the profile has pins. Raises LdapFailure."""
        if profile.pin:
            assert self._transport is not None
            end = self._transport.get_extra_info("ssl_object")
            pinned(end.getpeercert(binary_form=True), profile, self.server)

    def close(self) -> None:
        """Hang up politely."""
        if self._transport is not None and not self.lost:
            self._transport.write(ber.tlv(0x30, ber.integer(self._number + 1) + ber.UNBIND))
            self._transport.close()
        self.lost = True

    def abort(self) -> None:
        """Break off."""
        self.lost = True
        if self._transport is not None:
            self._transport.abort()


async def connect(server: LdapServer, profile: LdapProfile, context: ssl.SSLContext | None, until: float) -> Link:
    """A connection with TLS as the profile has it, nobody logged in. Raises LdapFailure."""
    loop = asyncio.get_running_loop()
    link = Link(server, loop)
    try:
        async with asyncio.timeout_at(until):
            if server.ldaps:
                await loop.create_connection(
                    lambda: link,
                    server.host,
                    server.port,
                    ssl=context,
                    server_hostname=profile.tls_server_name or server.host,
                )
            else:
                await loop.create_connection(lambda: link, server.host, server.port)
                if context is not None:
                    await link.start_tls(context, profile, until)
        if context is not None:
            link.pinned(profile)
    except TimeoutError:
        link.abort()
        raise LdapFailure(Reason.FILTERED, "no connection in time", server.url) from None
    except ssl.SSLError as error:
        link.abort()
        raise certificate_fault(error, server) from None
    except OSError as error:
        link.abort()
        raise _unreached(error, server) from None
    except BaseException:
        link.abort()
        raise
    return link


def _unreached(error: OSError, server: LdapServer) -> LdapFailure:
    match error:
        case ConnectionRefusedError():
            return LdapFailure(Reason.REFUSED, "connection refused", server.url)
        case ConnectionError():
            return LdapFailure(Reason.LOST, "the server hung up", server.url)
        case _:
            reason = Reason.DNS if type(error).__name__ == "gaierror" else Reason.FILTERED
            return LdapFailure(reason, error.strerror or "unreachable", server.url)
