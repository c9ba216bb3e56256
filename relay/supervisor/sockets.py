"""Owns: the listening sockets, opened once, before any privilege is dropped, and shared by all later processes.

Sockets that a service manager opened (sd_listen_fds(3)) are taken where their address is one of the configuration's; then
neither root nor a capability is needed for ports below 1024. Must not accept a connection.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from relay.config.addresses import split_address
from relay.config.schema import Config, Listener
from relay.supervisor.errors import Refusal

BACKLOG: Final = 4096
"""Connections waiting to be accepted; the kernel cuts it to net.core.somaxconn (4096 by default)."""

HUB_BACKLOG: Final = 128
"""Every worker connects once; the rest is room for a hub that is being replaced."""

FIRST_GIVEN: Final = 3
"""SD_LISTEN_FDS_START."""

UNIX_PATH_MAX: Final = 107
"""Octets of a Unix socket's path (unix(7): sun_path has 108, the last is NUL)."""


@dataclass(frozen=True, slots=True)
class Listening:
    """All listening sockets of the tree. ``mail`` by address, as it stands in the configuration."""

    mail: dict[str, socket.socket]
    web: socket.socket | None
    hub: socket.socket
    hub_address: str

    def listeners(self, config: Config) -> tuple[tuple[Listener, socket.socket], ...]:
        """Each configured listener with its socket."""
        return tuple((listener, self.mail[listener.address]) for listener in config.listener)

    def close_public(self) -> None:
        """Let go of everything the network can reach; while a child has a copy, it goes on listening."""
        for sock in self.mail.values():
            sock.close()

    def close(self) -> None:
        """Let go of everything."""
        self.close_but()

    def close_but(self, *, mail: bool = False, web: bool = False, hub: bool = False) -> None:
        """In a child: close what its role does not use."""
        for wanted, socks in ((mail, self.mail.values()), (web, (self.web,)), (hub, (self.hub,))):
            for sock in socks:
                if sock is not None and not wanted:
                    sock.close()


def open_all(config: Config, run: Path, group: int | None) -> Listening:
    """Open everything or nothing. ``group`` may connect to the hub (None: the owner alone). Raises Refusal."""
    problems: list[str] = []
    mail: dict[str, socket.socket] = {}
    web: socket.socket | None = None
    given = _given(problems)
    for listener in config.listener:
        with _collecting(problems, f"listener {listener.name}", listener.address):
            mail[listener.address] = _taken(given, listener.address)
    if config.web.listen is not None:
        with _collecting(problems, "web.listen", config.web.listen):
            web = _taken(given, config.web.listen)
    for address, unused in given.items():
        unused.close()
        problems.append(
            f"socket {address}: the service manager opened it, but no listener has this address; "
            "make ListenStream= and the listener's address the same, or take it out of the .socket unit"
        )
    hub_path = run / "hub"
    hub: socket.socket | None = None
    if len(os.fsencode(hub_path)) > UNIX_PATH_MAX:
        problems.append(f"server.spool: {hub_path} is too long for a Unix socket; choose a shorter folder")
    elif not problems:
        with _collecting(problems, "hub", str(hub_path)):
            hub = _listen_unix(hub_path, group)
    if problems or hub is None:
        for sock in (*mail.values(), web, hub):
            if sock is not None:
                sock.close()
        raise Refusal(*problems)
    return Listening(mail, web, hub, str(hub_path))


def _taken(given: dict[str, socket.socket], address: str) -> socket.socket:
    return given.pop(address) if address in given else _listen(address)


def _given(problems: list[str]) -> dict[str, socket.socket]:
    """The sockets of the service manager by address, as it stands in configurations. The variables are taken away: no
    child may believe that the descriptors are its own.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isascii() or not count.isdigit():
        return {}
    given: dict[str, socket.socket] = {}
    for descriptor in range(FIRST_GIVEN, FIRST_GIVEN + int(count)):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the library's own form
        found = socket.socket(fileno=descriptor)
        if found.family not in {socket.AF_INET, socket.AF_INET6} or found.type != socket.SOCK_STREAM:
            problems.append(
                f"descriptor {descriptor}: the service manager gave a socket that is not TCP; use ListenStream=PORT"
            )
            found.close()
            continue
        # asyncio asks the object for its protocol and leaves TCP_NODELAY off without one.
        sock = socket.socket(found.family, found.type, socket.IPPROTO_TCP, fileno=found.detach())
        host, port = sock.getsockname()[:2]
        sock.listen(BACKLOG)
        sock.settimeout(0)
        given[f"[{host}]:{port}" if found.family == socket.AF_INET6 else f"{host}:{port}"] = sock
    return given


@contextlib.contextmanager
def _collecting(problems: list[str], key: str, address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problems.append(f"{key}: cannot listen on {address}: {_advice(error)}")


def _advice(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is in use; stop the other server (ss -ltnp shows it) or choose another port"
        case errno.EACCES | errno.EPERM:
            return (
                "no permission; ports below 1024 need root, CAP_NET_BIND_SERVICE, "
                "or a lower net.ipv4.ip_unprivileged_port_start"
            )
        case errno.EADDRNOTAVAIL:
            return "this machine does not have the address; use one that `ip address` shows, or 0.0.0.0 or [::]"
        case errno.EAFNOSUPPORT:
            return "this machine has no IPv6; use an IPv4 address"
        case _:
            return f"{error.strerror or error}"


def _listen(text: str) -> socket.socket:
    address, port = split_address(text)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # Without an explicit protocol asyncio leaves TCP_NODELAY off, and pipelined replies wait 40 ms for an ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # 0.0.0.0:25 and [::]:25 are two listeners; IPv4 clients never appear as ::ffff:… addresses.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
        sock.settimeout(0)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_unix(path: Path, group: int | None) -> socket.socket:
    """The spool is locked, so whatever lies at ``path`` is left over from a tree that is gone."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        # The folder lets nobody else in; between bind and chmod there is no door open.
        path.chmod(0o600 if group is None else 0o660)
        if group is not None:
            os.chown(path, -1, group)
        sock.listen(HUB_BACKLOG)
        sock.settimeout(0)
    except OSError:
        sock.close()
        raise
    return sock
