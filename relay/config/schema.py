"""Owns: the shape of the configuration: every key, its default, its unit, and what it means.

Plain values only: nothing here opens a file or asks the system. The loader (``config.load``) reports every error of
a file at once; load-time checks that need the disk or the network live in ``app``.
"""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from relay.mail.address import is_domain

MEGABYTE: Final = 1024 * 1024


class Section(BaseModel):
    """A table of the file: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, str_strip_whitespace=True)


class Role(StrEnum):
    """What a listener is for; decides TLS and AUTH (row F2)."""

    MX = "mx"
    SUBMISSION = "submission"
    SUBMISSIONS = "submissions"


class Mode(StrEnum):
    """Whether a rule decides (``enforce``), is only logged and counted (``log``), or is not asked (``off``)."""

    ENFORCE = "enforce"
    LOG = "log"
    OFF = "off"


class LineEndings(StrEnum):
    """What happens to a bare CR or LF inside DATA (row F5)."""

    NORMALIZE = "normalize"
    REFUSE = "refuse"


_ADDRESS: Final = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<four>[0-9.]+)):(?P<port>\d{1,5})")


def split_address(text: str) -> tuple[str, int]:
    """``192.0.2.1:25`` or ``[2001:db8::1]:25`` as (address, port); ValueError says what is wrong."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not ADDRESS:PORT; write 0.0.0.0:25 or [::]:25")
    address = found["six"] or found["four"]
    port = int(found["port"])
    ipaddress.ip_address(address)
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535")
    return address, port


class Listener(Section):
    """One address to take mail on. Several ``[[listener]]`` tables may stand in the file."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,30}$")]
    """Short name, used in logs and as metrics label."""
    address: str
    """ADDRESS:PORT, for example 0.0.0.0:25 or [::]:25."""
    role: Role = Role.MX
    """mx: port 25, offers STARTTLS. submission: 587, STARTTLS then AUTH. submissions: 465, TLS from the start."""
    require_tls: bool = False
    """For role mx only: answer 530 5.7.0 before STARTTLS. A public server must not (RFC 3207 section 4)."""

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        split_address(value)
        return value


class Server(Section):
    """What this relay is and where it keeps its state."""

    hostname: str
    """The name in the greeting, in Received and in EHLO towards next hops."""
    spool: Path = Path("/var/spool/dmz-relay")
    """Folder of the queue, the snapshot and the metrics; made at the first start."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Worker processes; 0 means one per core."""
    soft_bounce: bool = False
    """Answer 4xx wherever a 5xx would be due, ours or a next hop's. For the night of the cut-over."""

    @field_validator("hostname")
    @classmethod
    def _hostname(cls, value: str) -> str:
        if not is_domain(value):
            raise ValueError(f"{value!r} is not a host name; write the relay's full name, e.g. mx.example.com")
        return value


class Process(Section):
    """Users and watchdog of the process tree."""

    user: str = "relay"
    """User of workers and web when started as root; "" keeps the user that started the relay."""
    hub_user: str = "relay-hub"
    """User of the hub when started as root; "" keeps the user that started the relay."""
    heartbeat_timeout_s: Annotated[float, Field(ge=0.5, le=300)] = 5.0
    """A worker silent for this long is killed and replaced, seconds."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long a stopping relay waits for open sessions and deliveries, seconds."""


class Tls(Section):
    """The relay's own certificate, for STARTTLS and port 465."""

    certificate: Path | None = None
    """PEM file: certificate and chain. Without it STARTTLS is not offered."""
    key: Path | None = None
    """PEM file of the private key."""
    minimum_version: Literal["1.2", "1.3"] = "1.2"
    """Oldest TLS version spoken."""

    @model_validator(mode="after")
    def _pair(self) -> Tls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both or none")
        return self


class Limits(Section):
    """How much one client, one session and one message may take."""

    sessions: Annotated[int, Field(ge=1)] = 2000
    """Open sessions, over all workers."""
    sessions_per_client: Annotated[int, Field(ge=1)] = 50
    """Open sessions of one client address, over all workers."""
    message_octets: Annotated[int, Field(ge=1024)] = 50 * MEGABYTE
    """Largest message; announced by SIZE (RFC 1870)."""
    header_octets: Annotated[int, Field(ge=1024, le=4 * MEGABYTE)] = 256 * 1024
    """Largest message header; Exchange's own limit is 256 KB."""
    recipients: Annotated[int, Field(ge=100)] = 1000
    """Recipients of one message; RFC 5321 section 4.5.3.1.8 asks for at least 100."""
    errors: Annotated[int, Field(ge=0)] = 20
    """Refused commands before a session ends with 421; 0 switches the budget off."""
    command_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Wait for the next command, seconds (RFC 5321 section 4.5.3.2.7)."""
    data_timeout_s: Annotated[float, Field(gt=0)] = 180.0
    """Wait for the next block of a message, seconds."""
    tls_handshake_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """TLS handshake, seconds."""
    hops: Annotated[int, Field(ge=1, le=1000)] = 100
    """Received lines before a message counts as looping (RFC 5321 section 6.3)."""


class Domain(Section):
    """Domains the relay takes mail for."""

    names: Annotated[list[str], Field(min_length=1)]
    """Domain names, lower case, exactly as they stand behind the @."""
    recipients: Literal["directory", "any"] = "directory"
    """directory: only addresses of the snapshot. any: every address (the next hop decides)."""

    @field_validator("names")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not is_domain(name):
                raise ValueError(f"{name!r} is not a domain name")
        return [name.lower() for name in value]


_NEXT_HOP: Final = re.compile(r"smtp:\[(?P<host>[^\[\]]+)\](?::(?P<port>\d{1,5}))?")


def split_next_hop(text: str) -> tuple[str, int]:
    """``smtp:[host]:port`` as (host, port), port 25 by default; ValueError says what to write instead."""
    found = _NEXT_HOP.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a next hop; write smtp:[exchange.example.com]:25")
    host, port = found["host"], int(found["port"] or 25)
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not is_domain(host):
            raise ValueError(f"{host!r} is neither a host name nor an IP address") from None
    return host, port


class Route(Section):
    """Where mail for some domains goes. ``domains = ["*"]`` is the default route."""

    domains: Annotated[list[str], Field(min_length=1)]
    """Recipient domains, or "*" for every other domain (needed for reports to senders outside)."""
    next_hops: Annotated[list[str], Field(min_length=1, max_length=16)]
    """In order of preference: smtp:[host]:port. The next is used while one is down."""

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: list[str]) -> list[str]:
        for name in value:
            if name != "*" and not is_domain(name):
                raise ValueError(f"{name!r} is neither a domain name nor *")
        return [name.lower() for name in value]

    @field_validator("next_hops")
    @classmethod
    def _next_hops(cls, value: list[str]) -> list[str]:
        for text in value:
            split_next_hop(text)
        return value


class Delivery(Section):
    """How next hops are spoken to."""

    express: bool = True
    """Hand mail straight on when the next hop is healthy; false: always through the queue."""
    express_deadline_s: Annotated[float, Field(gt=0, le=120)] = 3.0
    """After this long without the next hop's answer the message is queued and acknowledged, seconds."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 16
    """Connections to one next hop, over all workers. Exchange allows 20 per source."""
    connect_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Connecting, seconds."""
    command_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Any reply but the last, seconds (RFC 5321 section 4.5.3.2)."""
    final_reply_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """The reply to the final dot, seconds (RFC 5321 section 4.5.3.2.6)."""
    reuse_s: Annotated[float, Field(gt=0)] = 480.0
    """A connection is reused for at most this long, seconds (Exchange ends it after 600)."""
    idle_s: Annotated[float, Field(gt=0)] = 240.0
    """An unused connection is closed after this long, seconds."""
    failures: Annotated[int, Field(ge=1)] = 3
    """Failed connections in a row before a next hop counts as down."""
    tls: Literal["off", "opportunistic", "verified"] = "opportunistic"
    """STARTTLS towards next hops: off; when offered, any certificate; always, with a certificate that verifies."""


class Queue(Section):
    """Retries, expiry and reports."""

    retry_s: Annotated[list[float], Field(min_length=1)] = [60, 300, 900, 1800, 3600]
    """Waits between attempts, seconds; the last one repeats."""
    retry_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Share by which each wait varies at random."""
    expire_after_s: Annotated[float, Field(gt=0)] = 5 * 86400.0
    """After this long an undelivered message is returned to its sender, seconds (RFC 5321 section 4.5.4.1)."""
    lease_s: Annotated[float, Field(ge=5)] = 900.0
    """How long a worker owns a message it works on; must exceed delivery.final_reply_timeout_s."""
    active: Annotated[int, Field(ge=1, le=10000)] = 500
    """Messages one worker delivers from memory at once; the rest waits on disk."""
    write_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Wait for the disk before the client is told 451, seconds."""


class Source(Section):
    """One input of the snapshot."""

    type: Literal["list", "ldif", "restricted"]
    """list: a valid address a line. ldif: entries with mail and proxyAddresses. restricted: ADDRESS [TEXT] a line."""
    path: Path
    """The file."""


class Directory(Section):
    """Where valid recipients and restricted senders come from."""

    sources: list[Source] = []
    """Inputs of ``relay directory build``."""
    snapshot: Path | None = None
    """The snapshot file; default: SPOOL/directory/snapshot."""
    key_file: Path | None = None
    """32 octets that key the address hashes; default: SPOOL/directory/key, made at the first build."""
    restriction_attribute: str = "smtpdSenderRestrictions"
    """LDIF attribute that restricts a sender when its value is TRUE; any other text but FALSE is the reply's text."""


class Senders(Section):
    """Restricted senders (rows S1 to S3)."""

    restricted: Mode = Mode.ENFORCE
    """What happens to mail from restricted senders."""
    stage: Literal["mail", "rcpt"] = "rcpt"
    """When they are told; at rcpt the log names the recipient."""
    text: str = "This account is not allowed to send emails"
    """Wording of the refusal when the entry has none of its own."""


class Recipients(Section):
    """Recipient validation (row R1)."""

    unknown: Mode = Mode.ENFORCE
    """What happens to recipients that the snapshot does not know."""


class Content(Section):
    """What may be inside a message (rows F5, F10)."""

    line_endings: LineEndings = LineEndings.NORMALIZE
    """normalize: a bare LF becomes CR LF, a bare CR a space. refuse: 554 5.6.0."""
    header_firewall: Mode = Mode.ENFORCE
    """Removal of the headers below from mail of untrusted clients."""
    remove_headers: list[str] = ["X-MS-Exchange-Organization-*", "X-MS-Exchange-Forest-*"]
    """Header names, * at the end for a prefix. Authentication-Results with our own name is always among them."""

    @field_validator("remove_headers")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        for name in value:
            if re.fullmatch(r"[!-)+-9;-~]+\*?", name) is None:
                raise ValueError(f"{name!r} is not a header name; a * may stand at its end only")
        return value


class Trusted(Section):
    """Clients that may relay anywhere and keep their headers."""

    networks: list[str] = []
    """Addresses or networks, for example 10.0.0.0/8. Keep this tight: they can send to everyone."""

    @field_validator("networks")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        for text in value:
            network = ipaddress.ip_network(text)
            if network.prefixlen == 0:
                raise ValueError(f"{text!r} is the whole Internet: the relay would be open to everyone")
        return value


class Log(Section):
    """The mail log."""

    format: Literal["postfix", "json"] = "postfix"
    """postfix: lines in Postfix's form. json: one object a line."""
    file: Path | None = None
    """Log file, opened again on SIGHUP; default: standard error."""


class Web(Section):
    """Metrics and health over HTTP."""

    listen: str | None = None
    """ADDRESS:PORT of /metrics, /livez and /readyz; none: switched off."""

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value


class Config(Section):
    """The whole file."""

    server: Server
    process: Process = Process()
    tls: Tls = Tls()
    limits: Limits = Limits()
    listener: Annotated[list[Listener], Field(min_length=1)]
    domain: list[Domain] = []
    route: list[Route] = []
    delivery: Delivery = Delivery()
    queue: Queue = Queue()
    directory: Directory = Directory()
    senders: Senders = Senders()
    recipients: Recipients = Recipients()
    content: Content = Content()
    trusted: Trusted = Trusted()
    log: Log = Log()
    web: Web = Web()

    @property
    def snapshot_path(self) -> Path:
        """The snapshot in use."""
        return self.directory.snapshot or self.server.spool / "directory" / "snapshot"

    @property
    def key_path(self) -> Path:
        """The key of the snapshot's hashes."""
        return self.directory.key_file or self.server.spool / "directory" / "key"

    @model_validator(mode="after")
    def _whole(self) -> Config:
        problems: list[str] = []
        names = [listener.name for listener in self.listener]
        problems += [f"listener: two listeners are named {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
        domains = [name for domain in self.domain for name in domain.names]
        problems += [f"domain: {n!r} is listed twice" for n in sorted({n for n in domains if domains.count(n) > 1})]
        routed = [name for route in self.route for name in route.domains]
        problems += [f"route: {n!r} has two routes" for n in sorted({n for n in routed if routed.count(n) > 1})]
        if "*" not in routed:
            problems += [
                f"domain: {n!r} has no route; add a [[route]] with domains = [\"{n}\"]"
                for n in domains
                if n not in routed
            ]
        if self.queue.lease_s <= self.delivery.final_reply_timeout_s:
            problems.append("queue.lease_s must be longer than delivery.final_reply_timeout_s")
        if any(x.role is Role.SUBMISSIONS or x.require_tls for x in self.listener) and self.tls.certificate is None:
            problems.append("tls.certificate: a listener needs TLS, but no certificate is set")
        if problems:
            raise ValueError("\n".join(problems))
        return self
