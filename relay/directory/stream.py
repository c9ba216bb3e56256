"""Owns: octets to and from a directory server: TLS in memory, and taking much at a time.

Servers send each entry in a TLS record of its own. ``ssl.SSLSocket`` asks the kernel twice for each record and gives no more than
one at a time, so that reading would cost more than understanding; here a read of the socket feeds some hundred records.
Must not know LDAP. The context decides what is trusted (``directory.tls``).
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from contextlib import suppress
from typing import Final

RECEIVE_OCTETS: Final = 1 << 18
_RECORD_OCTETS: Final = 1 << 15
"""More than any record has: less room than this is not worth a read."""


_GATHER_S: Final = 0.003
"""After the first octets of an answer: the rest of the page comes meanwhile, and is taken in one piece instead of in hundreds."""


class TlsStream:
    """TLS over a connected socket, with the methods of a socket that ldap3 and ``Connection`` use."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str) -> None:
        """Shake hands. Raises ssl.SSLError and OSError."""
        self._socket = sock
        self._room = memoryview(bytearray(RECEIVE_OCTETS))  # a new one for each read costs more than the read
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_hostname=server_hostname)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fill():
                    raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol") from None
            except ssl.SSLError:
                with suppress(OSError):
                    self._flush()  # the alert that tells the server why
                raise
        self._flush()

    def _flush(self) -> None:
        if self._leaving.pending:
            self._socket.sendall(self._leaving.read())

    def _fill(self) -> bool:
        count = self._socket.recv_into(self._room)
        if count:
            self._arrived.write(self._room[:count])
        else:
            self._arrived.write_eof()
        return bool(count)

    def recv_into(self, room: memoryview) -> int:
        """Some octets into ``room``; 0 at the end. Raises OSError, BlockingIOError when nothing is there and none may wait."""
        while True:
            try:
                return self._tls.read(len(room), room)  # type: ignore[return-value] # a count, given room
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fill():
                    return 0
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def fill(self, room: memoryview) -> int:
        """As much as is there, or as one read of the socket brings; 0 at the end. Raises as ``recv_into``."""
        filled = self.recv_into(room)
        read, enough = self._tls.read, len(room) - _RECORD_OCTETS
        if filled:
            with suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError, ssl.SSLEOFError):
                while filled < enough:
                    filled += read(RECEIVE_OCTETS, room[filled:])  # type: ignore[operator] # a count, given room
        return filled

    def recv(self, count: int) -> bytes:
        """As of a socket."""
        room = memoryview(bytearray(count))
        return bytes(room[: self.recv_into(room)])

    def sendall(self, octets: bytes) -> None:
        """As of a socket."""
        self._tls.write(octets)
        self._flush()

    def getpeercert(self) -> bytes | None:
        """The server's certificate, DER."""
        return self._tls.getpeercert(binary_form=True)

    def version(self) -> str | None:
        """Of TLS."""
        return self._tls.version()

    def settimeout(self, seconds: float | None) -> None:
        """As of a socket."""
        self._socket.settimeout(seconds)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """As of a socket."""
        self._socket.setsockopt(level, option, value)

    def fileno(self) -> int:
        """As of a socket."""
        return self._socket.fileno()

    def shutdown(self, how: int) -> None:
        """As of a socket."""
        self._socket.shutdown(how)

    def close(self) -> None:
        """As of a socket."""
        self._socket.close()


def received(sock: socket.socket | TlsStream, room: memoryview, seconds: float) -> bytes:
    """What is there, or what comes first; empty at the end. ``room`` is memory to read into. Raises TimeoutError, OSError."""
    filled, enough = 0, len(room) - _RECORD_OCTETS
    sock.settimeout(0)
    try:
        while filled < enough:
            try:
                count = sock.fill(room[filled:]) if isinstance(sock, TlsStream) else sock.recv_into(room[filled:])
            except BlockingIOError:
                if filled:
                    break
                _wait(sock, seconds)
                continue
            if not count:
                break
            filled += count
    except OSError:
        if not filled:  # else what came before the break is looked at first, and the break is met again
            raise
    return bytes(room[:filled])


def _wait(sock: socket.socket | TlsStream, seconds: float) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise TimeoutError
    time.sleep(_GATHER_S)
