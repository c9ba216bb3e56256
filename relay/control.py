"""Owns: the control socket between supervisor and child, both ends, and what a child is given at birth.

One JSON object a packet on a SOCK_SEQPACKET pair; the messages are the classes below, named in ``docs/processes.md``.
The child's end runs in its event loop, so that a stuck loop stops beating; the supervisor's end never blocks.
Must not know what a role does with a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Final, TypeAlias, TypeVar, cast

from pydantic import ValidationError

from relay.config.schema import Config, Listener

PACKET_MAX: Final = 384 * 1024
"""Largest packet, octets: a configuration of 5,000 domains and a certificate chain. Linux lets an unprivileged socket
have twice net.core.wmem_max (212,992 by default), and a packet has to fit in whole."""

OUTBOX_MAX: Final = 64
"""Packets waiting for a child that does not read; a healthy one is never more than a handful behind."""

BEATS_PER_TIMEOUT: Final = 5
"""Heartbeats in one heartbeat time-out: four may come late before a living child counts as stuck."""

EXIT_ORPHANED: Final = 70
"""Exit code of a child whose supervisor is gone."""


class ControlError(Exception):
    """A packet that cannot be sent or understood; the message says why."""


@dataclass(frozen=True, slots=True)
class HopSecret:
    """What one ``[[next_hop]]`` needs: its password, and PEM texts. Never printed."""

    password: str = field(default="", repr=False)
    authorities: str = field(default="", repr=False)
    certificate: str = field(default="", repr=False)
    key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a role may know. Empty where there is none, or the role must not have it. Never printed."""

    tls_certificate: str = field(default="", repr=False)
    """PEM: certificate and chain."""
    tls_key: str = field(default="", repr=False)
    """PEM: private key."""
    snapshot_key: bytes = field(default=b"", repr=False)
    """Key of the snapshot's hashes; empty while no snapshot was ever built."""
    directory_passwords: dict[str, str] = field(default_factory=dict, repr=False)
    """The hub's alone: password by name of the ``[[directory.ldap]]``, empty for anonymous ones."""
    next_hops: Mapping[str, HopSecret] = field(default_factory=dict, repr=False)
    """By ``own_key`` of their tables."""
    tls_named: tuple[tuple[tuple[str, ...], str, str], ...] = field(default=(), repr=False)
    """Server names, certificate and key of each ``[[tls.named]]``."""


@dataclass(frozen=True, slots=True)
class Start:
    """First packet to a child."""

    secrets: Secrets
    kind: ClassVar[str] = "start"


@dataclass(frozen=True, slots=True)
class Prepare:
    """Build everything of a new configuration, change nothing, answer ``Prepared`` or ``Refused``."""

    config: Config
    secrets: Secrets
    kind: ClassVar[str] = "prepare"


@dataclass(frozen=True, slots=True)
class Commit:
    """Switch to what was prepared."""

    kind: ClassVar[str] = "commit"


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop what was prepared. May also come without a ``Prepare`` before it."""

    kind: ClassVar[str] = "abort"


@dataclass(frozen=True, slots=True)
class Reopen:
    """Open log files again."""

    kind: ClassVar[str] = "reopen"


@dataclass(frozen=True, slots=True)
class Drain:
    """Stop accepting, finish, exit 0."""

    kind: ClassVar[str] = "drain"


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers share the limits now; at least 1."""

    live: int
    kind: ClassVar[str] = "workers"


@dataclass(frozen=True, slots=True)
class Ready:
    """The child serves."""

    kind: ClassVar[str] = "ready"


@dataclass(frozen=True, slots=True)
class Beat:
    """The child's event loop turns."""

    kind: ClassVar[str] = "beat"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The new configuration can be switched to."""

    kind: ClassVar[str] = "prepared"


@dataclass(frozen=True, slots=True)
class Refused:
    """The new configuration cannot work; the child goes on with the old one."""

    why: str
    kind: ClassVar[str] = "refused"


@dataclass(frozen=True, slots=True)
class Failed:
    """The child is about to end with an error."""

    why: str
    kind: ClassVar[str] = "failed"


ToChild: TypeAlias = Start | Prepare | Commit | Abort | Reopen | Drain | Workers
ToSupervisor: TypeAlias = Ready | Beat | Prepared | Refused | Failed
Message: TypeAlias = ToChild | ToSupervisor
_MessageT = TypeVar("_MessageT", bound=ToChild)


def encode(message: Message) -> bytes:
    """One packet. Raises ControlError when it is larger than ``PACKET_MAX``."""
    body: dict[str, object] = {"type": message.kind}
    match message:
        case Start(secrets):
            body["secrets"] = _secrets_out(secrets)
        case Prepare(config, secrets):
            body["config"] = config.model_dump(mode="json")
            body["secrets"] = _secrets_out(secrets)
        case Workers(live):
            body["live"] = live
        case Refused(why) | Failed(why):
            body["why"] = why[:4096]
        case _:
            pass
    packet = json.dumps(body, separators=(",", ":")).encode()
    if len(packet) > PACKET_MAX:
        raise ControlError(f"{message.kind} has {len(packet)} octets, a control packet holds {PACKET_MAX}")
    return packet


_PLAIN: Final = {m.kind: m for m in (Commit(), Abort(), Reopen(), Drain(), Ready(), Beat(), Prepared())}


def decode(packet: bytes) -> Message:
    """The message in a packet. Raises ControlError."""
    try:
        body = json.loads(packet)
        match body["type"]:
            case Start.kind:
                return Start(_secrets_in(body["secrets"]))
            case Prepare.kind:
                return Prepare(Config.model_validate(body["config"]), _secrets_in(body["secrets"]))
            case Workers.kind:
                return Workers(max(1, int(body["live"])))
            case Refused.kind:
                return Refused(str(body["why"]))
            case Failed.kind:
                return Failed(str(body["why"]))
            case kind:
                return cast("Message", _PLAIN[kind])
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ControlError(f"a control packet makes no sense: {type(error).__name__}") from None


def _secrets_out(secrets: Secrets) -> dict[str, Any]:
    return {
        "tls_certificate": secrets.tls_certificate,
        "tls_key": secrets.tls_key,
        "snapshot_key": secrets.snapshot_key.hex(),
        "directory_passwords": secrets.directory_passwords,
        "next_hops": {name: asdict(secret) for name, secret in secrets.next_hops.items()},
        "tls_named": secrets.tls_named,
    }


def _secrets_in(body: dict[str, Any]) -> Secrets:
    passwords = {str(name): str(password) for name, password in body["directory_passwords"].items()}
    named = tuple((tuple(map(str, names)), str(pem), str(key)) for names, pem, key in body["tls_named"])
    return Secrets(
        str(body["tls_certificate"]),
        str(body["tls_key"]),
        bytes.fromhex(body["snapshot_key"]),
        passwords,
        {str(name): HopSecret(**secret) for name, secret in body.get("next_hops", {}).items()},
        named,
    )


def pair() -> tuple[socket.socket, socket.socket]:
    """A control socket: the supervisor's end, not blocking, and the child's. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_MAX)
    ours.settimeout(0)
    return ours, theirs


class Link:
    """The supervisor's end. Nothing here blocks; what a child does not read waits in a bounded outbox."""

    __slots__ = ("_outbox", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._outbox: deque[bytes] = deque()

    @property
    def waiting(self) -> bool:
        """Whether packets wait for room in the socket."""
        return bool(self._outbox)

    def send(self, message: ToChild) -> None:
        """Queue and try to send. Raises ControlError when the child does not read or the message is too large."""
        if len(self._outbox) >= OUTBOX_MAX:
            raise ControlError("it does not read its control socket")
        self._outbox.append(encode(message))
        self.flush()

    def flush(self) -> None:
        """Send what there is room for; a child that is gone is noticed elsewhere, by its death."""
        try:
            while self._outbox:
                self.sock.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            pass
        except ConnectionError:
            self._outbox.clear()

    def receive(self) -> tuple[list[ToSupervisor], bool]:
        """Everything the child said, and whether it closed its end. Raises ControlError."""
        messages: list[ToSupervisor] = []
        while True:
            try:
                packet = self.sock.recv(PACKET_MAX)
            except BlockingIOError:
                return messages, False
            except ConnectionError:
                return messages, True
            if not packet:
                return messages, True
            message = decode(packet)
            if not isinstance(message, ToSupervisor):
                raise ControlError(f"a child sent {message.kind}")
            messages.append(message)

    def close(self) -> None:
        """Let go of the socket; a child that still lives ends by this."""
        self.sock.close()


def receive_start(sock: socket.socket) -> Start:
    """The first packet, waited for. Raises ControlError when something else or nothing came."""
    message = decode(sock.recv(PACKET_MAX))
    if not isinstance(message, Start):
        raise ControlError(f"the first packet is {message.kind}, not start")
    return message


class Control:
    """The child's end, in its event loop: callbacks by message class, heartbeats by a timer of the loop.

    Without a callback for ``Prepare`` the answer is ``Prepared``: nothing of the configuration concerns the role after
    its start. When the supervisor is gone the process ends at once, exit code ``EXIT_ORPHANED``.
    """

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop, heartbeat_timeout_s: float) -> None:
        """Start reading and beating. ``heartbeat_timeout_s`` is ``process.heartbeat_timeout_s``, seconds."""
        self._sock = sock
        self._loop = loop
        self._interval = heartbeat_timeout_s / BEATS_PER_TIMEOUT
        self._prepared_interval = self._interval
        self._calls: dict[type[Any], Callable[[Any], None]] = {}
        self._outbox: deque[bytes] = deque()
        sock.settimeout(0)
        loop.add_reader(sock.fileno(), self._readable)
        self._timer = loop.call_soon(self._beat)

    def on(self, kind: type[_MessageT], call: Callable[[_MessageT], None]) -> None:
        """Have ``call`` called for each message of this class. It runs in the event loop and must not block."""
        self._calls[kind] = call

    def send(self, message: ToSupervisor) -> None:
        """Send, or queue while the supervisor does not read. Raises ControlError when it is too large."""
        if len(self._outbox) >= OUTBOX_MAX:
            raise ControlError("the supervisor does not read its control sockets")
        self._outbox.append(encode(message))
        self._flush()

    def close(self) -> None:
        """Stop reading and beating; the socket stays open, or the supervisor would take the child for lost."""
        self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())

    def _beat(self) -> None:
        # A beat that cannot go out now is worth nothing later.
        if not self._outbox:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self._sock.send(_BEAT)
        self._timer.cancel()
        self._timer = self._loop.call_later(self._interval, self._beat)

    def _flush(self) -> None:
        try:
            while self._outbox:
                self._sock.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._sock.fileno(), self._flush)
            return
        except ConnectionError:
            self._orphaned()
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            packet = self._sock.recv(PACKET_MAX)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self._orphaned()
        message = decode(packet)
        assert isinstance(message, ToChild)
        if isinstance(message, Prepare):
            self._prepared_interval = message.config.process.heartbeat_timeout_s / BEATS_PER_TIMEOUT
        call = self._calls.get(type(message))
        if call is not None:
            call(message)
        elif isinstance(message, Prepare):
            self.send(Prepared())
        if isinstance(message, Commit):
            self._interval = self._prepared_interval
            self._beat()

    def _orphaned(self) -> None:
        """No clean-up: the next tree waits for this process, and every file is made for a kill at any moment."""
        os._exit(EXIT_ORPHANED)


_BEAT: Final = encode(Beat())


@dataclass(frozen=True, slots=True)
class Child:
    """What a role function gets. All sockets are open; the process has its final user and may not import any more."""

    config: Config
    secrets: Secrets
    slot: int
    """Stable place in the tree: workers from 0; hub and web ``HUB_SLOT`` and ``WEB_SLOT``."""
    incarnation: int
    """Counts the processes of this slot, from 1."""
    live_workers: int
    control: socket.socket
    listeners: tuple[tuple[Listener, socket.socket], ...]
    """For workers: where mail comes in. Shared by all of them, not blocking."""
    web: socket.socket | None
    """For web: where HTTP comes in."""
    hub: socket.socket | None
    """For the hub: where workers connect. Outlives every hub."""
    hub_address: str
    """Where workers connect to the hub: path of a Unix socket."""
    boot_id: str
    sessions: memoryview = field(default_factory=lambda: memoryview(b""))
    """Open sessions of each worker, 64 bits each; memory that all workers share."""

    @property
    def owner(self) -> str:
        """Owner of leases: a later process of the slot, or of another boot, is another owner."""
        return f"{self.boot_id}:{self.slot}:{self.incarnation}"


HUB_SLOT: Final = 64
"""Above the largest worker slot (``server.workers`` is at most 64)."""
WEB_SLOT: Final = 65
