"""Owns: opening a connection to a next hop by aiosmtplib: TCP, greeting, EHLO, STARTTLS. Then the transport is taken over.

The library's client speaks one command at a time and copies messages; its transaction is replaced by ``outbound.client``,
set onto its transport while no reply is pending.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import aiosmtplib
from aiosmtplib import SMTP

from relay.mail.answer import Answer, Stage
from relay.outbound.client import Capabilities, Connection, split_text
from relay.outbound.lmtp import LmtpConnection
from relay.outbound.login import log_in
from relay.outbound.peer import Peer

if TYPE_CHECKING:
    from relay.outbound.lane import Lane


class ConnectFailed(Exception):
    """No connection; ``answer`` says at which stage and why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.text)
        self.answer = answer


class TlsFailed(ConnectFailed):
    """STARTTLS was offered and did not work; opportunistic TLS goes on without it."""


async def connect(lane: Lane, address: str, peer: Peer) -> Connection:
    """A connection to ``address`` of the next hop that is ready for MAIL. Raises ConnectFailed (TlsFailed for STARTTLS)."""
    return _take_over(lane, await open_client(lane, address, peer))


async def open_client(lane: Lane, address: str, peer: Peer) -> SMTP:
    """The same, the library's client still in charge. Raises ConnectFailed (TlsFailed for STARTTLS)."""
    hop, context = lane.next_hop, peer.context
    client = SMTP(
        # TLS from the start is verified for the name that is connected to, so the name it has to be.
        hostname=hop.host if peer.implicit else address, port=hop.port, timeout=lane.connect_timeout_s,
        use_tls=peer.implicit, start_tls=False, local_hostname=lane.hostname, tls_context=context,
    )  # fmt: skip
    stage = Stage.CONNECT
    try:
        await client.connect()
        if peer.implicit:
            stage = Stage.STARTTLS
            _check_pin(client, peer)
        stage = Stage.EHLO
        await _hello(client, lane)
        if peer.implicit:
            pass
        elif context is not None and client.supports_extension("starttls"):
            stage = Stage.STARTTLS
            await client.starttls(server_hostname=hop.host, tls_context=context, timeout=lane.command_timeout_s)
            _check_pin(client, peer)
            stage = Stage.EHLO
            await _hello(client, lane)
        elif peer.required:
            raise TlsFailed(Answer(Stage.STARTTLS, 0, "", "TLS is required and not offered"))
        if peer.login is not None:
            stage = Stage.AUTH
            await log_in(client, peer.login, lane.command_timeout_s)
    except aiosmtplib.SMTPResponseException as error:
        client.close()
        if isinstance(error, aiosmtplib.SMTPConnectResponseError):
            stage = Stage.BANNER
        enhanced, text = split_text(error.message)
        code = error.code if 200 <= error.code <= 599 else 0
        raise _failed(stage)(Answer(stage, code, enhanced, text)) from error
    except (aiosmtplib.SMTPException, OSError, TimeoutError, ssl.SSLError) as error:
        client.close()
        raise _failed(stage)(Answer(stage, 0, "", _words(error))) from error
    except BaseException:  # what was decided here, cancelled, or unforeseen: the socket must not stay behind
        client.close()
        raise
    return client


def _check_pin(client: SMTP, peer: Peer) -> None:
    """Nothing but TLS was spoken yet. Raises TlsFailed."""
    tls: ssl.SSLObject | None = client.transport.get_extra_info("ssl_object") if client.transport is not None else None
    if not peer.knows(None if tls is None else tls.getpeercert(binary_form=True)):
        raise TlsFailed(Answer(Stage.STARTTLS, 0, "", "its certificate is none of those pinned"))


def _words(error: BaseException) -> str:
    """What went wrong as an operator says it: "Connection refused", not where the library met it."""
    cause = error.__cause__ or error
    words = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error) or type(error).__name__
    return split_text(words)[1]


def _failed(stage: Stage) -> type[ConnectFailed]:
    return TlsFailed if stage is Stage.STARTTLS else ConnectFailed


async def _hello(client: SMTP, lane: Lane) -> None:
    if lane.next_hop.protocol == "lmtp":
        response = await client.execute_command(b"LHLO", lane.hostname.encode("ascii"), timeout=lane.command_timeout_s)
        if response.code != 250:
            raise aiosmtplib.SMTPHeloError(response.code, response.message)
        client.last_ehlo_response = response
        return
    try:
        await client.ehlo(hostname=lane.hostname, timeout=lane.command_timeout_s)
    except aiosmtplib.SMTPHeloError as error:
        if error.code not in (500, 502):  # RFC 5321 §3.2: an old server that knows HELO only
            raise
        await client.helo(hostname=lane.hostname, timeout=lane.command_timeout_s)
    if not client.is_connected:  # closed right behind the reply: the library has let go of the transport
        raise aiosmtplib.SMTPServerDisconnected("connection lost")


def _take_over(lane: Lane, client: SMTP) -> Connection:
    """Put our protocol in the place of the library's; no reply is pending here."""
    offers = client.esmtp_extensions if client.is_ehlo_or_helo_needed is False else {}
    size = offers.get("size", "")
    transport: Any = client.transport
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    capabilities = Capabilities(
        pipelining="pipelining" in offers,
        size_extension="size" in offers,
        size=int(size) if size.isascii() and size.isdigit() else 0,
        eight_bit="8bitmime" in offers,
        tls=(tls.version() or "") if tls is not None else "",
        dsn="dsn" in offers,
        utf8="smtputf8" in offers,
    )
    kind = LmtpConnection if lane.next_hop.protocol == "lmtp" else Connection
    connection = kind(lane, transport, capabilities, lane.now())
    transport.set_protocol(connection)
    # The library's object must not close what is ours now.
    client.transport = None
    client.protocol = None
    return connection
