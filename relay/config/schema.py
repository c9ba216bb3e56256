"""Owns: the shape of the configuration: every key, its default, its unit, and what it means.

Plain values only: nothing here opens a file or asks the system. Types are strict (``true`` is no number, ``"4"`` is no
4), every number has an upper bound, and every validator says what to write instead. The loader (``config.load``)
reports every error of a file at once; checks that need the disk stand in ``config.files``.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from relay.config import values
from relay.config.addresses import own_host
from relay.config.auth import STORES, Auth, Mechanism
from relay.config.callout import Callout
from relay.config.destination import HOSTS
from relay.config.directory import Directory
from relay.config.section import DAY_S, MANY, TABLES, FilePath, Seconds, Section, label
from relay.config.senders import SenderRule
from relay.config.transport import parse_pattern
from relay.config.whole import WholeError, faults

MEGABYTE: Final = 1024 * 1024

# Upper bounds keep slips of the keyboard (a zero too many, octets for megabytes) out of sockets, timers and memory.
LARGEST_MESSAGE: Final = 2**31 - 1  # Exchange takes no more; also what fits everywhere as a length
CERTIFICATES: Final = 20  # all of them go to each worker in one packet
LISTENERS: Final = 64  # each is a socket and a metrics label


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


class Listener(Section):
    """One address to take mail on. Several ``[[listener]]`` tables may stand in the file."""

    name: Annotated[str, AfterValidator(label), Field(examples=["mx"])]
    """Short name, used in logs and as metrics label."""
    address: Annotated[values.SocketAddress, Field(examples=["0.0.0.0:25"])]
    """ADDRESS:PORT, for example 0.0.0.0:25 or [::]:25."""
    role: Annotated[Role, Field(strict=False)] = Role.MX
    """mx: port 25, offers STARTTLS. submission: 587, STARTTLS then AUTH. submissions: 465, TLS from the start."""
    require_tls: bool = False
    """For role mx only: answer 530 5.7.0 before STARTTLS. A public server must not (RFC 3207 section 4)."""
    auth: bool = False
    """For role mx only: offer AUTH inside TLS on this port, too. The other roles always do."""
    stores: Annotated[list[Annotated[str, AfterValidator(label)]], Field(max_length=STORES)] = []
    """Names of the auth.stores that accounts of this listener stand in; empty: all of them."""

    @property
    def takes_logins(self) -> bool:
        """Whether AUTH is offered once TLS is up."""
        return self.auth or self.role is not Role.MX

    require_tls_from: Annotated[list[Annotated[str, AfterValidator(values.clients)]], Field(max_length=1000)] = []
    """Client networks that get 530 5.7.0 before STARTTLS while others may send in clear: partners with an agreement."""
    proxy_protocol: Annotated[list[Annotated[str, AfterValidator(values.balancer)]], Field(max_length=1000)] = []
    """Balancers that say by PROXY protocol (version 1 or 2) who the client is. When set, nobody else may connect."""


class Server(Section):
    """What this relay is and where it keeps its state."""

    hostname: Annotated[str, AfterValidator(values.host_name), Field(examples=["mx.example.com"])]
    """The name in the greeting, in Received and in EHLO towards next hops."""
    spool: FilePath = Path("/var/spool/dmz-relay")
    """Folder of the queue, the snapshot and the metrics; made at the first start."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Worker processes; 0 means one per core."""
    soft_bounce: bool = False
    """Answer 4xx wherever a 5xx would be due, ours or a next hop's. For the night of the cut-over."""


class Process(Section):
    """Users and watchdog of the process tree."""

    user: Annotated[str, AfterValidator(values.account)] = "relay"
    """User of workers and web when started as root; "" keeps the user that started the relay."""
    hub_user: Annotated[str, AfterValidator(values.account)] = "relay-hub"
    """User of the hub when started as root; "" keeps the user that started the relay."""
    heartbeat_timeout_s: Annotated[float, Field(ge=0.5, le=300)] = 5.0
    """A worker silent for this long is killed and replaced, seconds."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long a stopping relay waits for open sessions and deliveries, seconds."""


class NamedCertificate(Section):
    """A certificate for clients that ask for one of these names (SNI, RFC 6066 section 3)."""

    names: Annotated[
        list[Annotated[str, AfterValidator(values.server_name)]],
        Field(min_length=1, max_length=100, examples=[["mail.example.org"]]),
    ]
    """Server names; *.example.org for every name one level below."""
    certificate: Annotated[FilePath, Field(examples=["/etc/dmz-relay/example.org.pem"])]
    """PEM file: certificate and chain."""
    key: Annotated[FilePath, Field(examples=["/etc/dmz-relay/example.org.key"])]
    """PEM file of the private key."""


class Tls(Section):
    """The relay's own certificate, for STARTTLS and port 465."""

    certificate: FilePath | None = None
    """PEM file: certificate and chain. Without it STARTTLS is not offered."""
    key: FilePath | None = None
    """PEM file of the private key."""
    named: Annotated[list[NamedCertificate], Field(max_length=CERTIFICATES)] = []
    """Further certificates, chosen by the name that the client asks for; any other name, or none, gets the one above."""
    minimum_version: Literal["1.2", "1.3"] = "1.2"
    """Oldest TLS version spoken."""
    ciphers: Annotated[str, Field(max_length=1000)] = "ECDHE+AESGCM:ECDHE+CHACHA20"
    """Cipher suites of TLS 1.2, in OpenSSL's words (openssl ciphers -v 'TEXT'). Those of TLS 1.3 are all good."""


class Limits(Section):
    """How much one client, one session and one message may take."""

    sessions: Annotated[int, Field(ge=1, le=MANY)] = 2000
    """Open sessions, over all workers."""
    sessions_per_client: Annotated[int, Field(ge=1, le=MANY)] = 50
    """Open sessions of one client address, over all workers."""
    message_octets: Annotated[int, Field(ge=1024, le=LARGEST_MESSAGE)] = 50 * MEGABYTE
    """Largest message; announced by SIZE (RFC 1870)."""
    header_octets: Annotated[int, Field(ge=1024, le=4 * MEGABYTE)] = 256 * 1024
    """Largest message header; Exchange's own limit is 256 KB."""
    recipients: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Recipients of one message; RFC 5321 section 4.5.3.1.8 asks for at least 100."""
    errors: Annotated[int, Field(ge=0, le=MANY)] = 20
    """Refused commands before a session ends with 421; 0 switches the budget off."""
    tarpit_after: Annotated[int, Field(ge=0, le=MANY)] = 10
    """Refused commands of one session that are answered at once."""
    tarpit_s: Annotated[float, Field(ge=0, le=60)] = 1.0
    """Every further refusal is answered after this long, seconds, half a second more or less; 0 switches that off."""
    tarpit_sessions: Annotated[int, Field(ge=0, le=MANY)] = 200
    """So many sessions of a worker are kept waiting at most; who comes then is answered at once."""
    unknown_recipients_per_client: Annotated[int, Field(ge=0, le=MANY)] = 100
    """Unknown recipients of one client (IPv4 address, IPv6 /64) within the period; then every recipient is answered 450
    until some of the budget has come back. 0 switches it off."""
    unknown_recipients_per_network: Annotated[int, Field(ge=0, le=MANY)] = 500
    """The same for a network: IPv4 /24, IPv6 /48."""
    unknown_recipients_period_s: Seconds = 3600.0
    """Time in which a whole budget of unknown recipients comes back, evenly, seconds."""
    connections_per_minute: Annotated[int, Field(ge=0, le=MANY)] = 0
    """Connections of one client in a minute; more are answered 421. 0: no such limit."""
    messages_per_minute: Annotated[int, Field(ge=0, le=MANY)] = 0
    """MAIL commands of one client in a minute; more are answered 450. 0: no such limit."""
    trusted_exempt: bool = True
    """Clients in [trusted] networks are not kept waiting, and have no budget of unknown recipients and no rates."""
    command_timeout_s: Seconds = 300.0
    """Wait for the next command to be there as a whole, seconds (RFC 5321 section 4.5.3.2.7)."""
    data_timeout_s: Seconds = 180.0
    """Wait for the next block of a message, seconds."""
    data_rate: Annotated[int, Field(ge=0, le=MEGABYTE)] = 500
    """Octets a second that a message must come with on average; a client may fall behind by data_timeout_s. 0: any."""
    session_timeout_s: Annotated[float, Field(ge=0, le=DAY_S)] = 0.0
    """Longest session, whatever the client does, seconds. 0: no such limit."""
    greet_pause_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    """Wait before the greeting, seconds; who talks meanwhile is no mail server and is refused with 554. 0: none."""
    tls_handshake_timeout_s: Seconds = 30.0
    """TLS handshake, seconds."""
    stress_percent: Annotated[int, Field(ge=0, le=100)] = 80
    """Share of limits.sessions from which on times and errors shrink to those below. 0: never."""
    stress_timeout_s: Seconds = 10.0
    """Under stress: every wait for a client, seconds, unless it is shorter anyway."""
    stress_errors: Annotated[int, Field(ge=1, le=MANY)] = 1
    """Under stress: refused commands before a session ends, unless they are fewer anyway."""
    memory_octets: Annotated[int, Field(ge=0, le=1024 * 1024 * MEGABYTE)] = 0
    """What messages on their way in may take of memory, over all workers. 0: a quarter of the machine's or the container's."""
    hops: Annotated[int, Field(ge=1, le=1000)] = 100
    """Received lines before a message counts as looping (RFC 5321 section 6.3); ten of our own name are one already."""


class Domain(Section):
    """Domains the relay takes mail for."""

    names: Annotated[
        list[Annotated[str, AfterValidator(values.domain)]],
        Field(min_length=1, max_length=TABLES, examples=[["example.com"]]),
    ]
    """Domain names, exactly as they stand behind the @."""
    recipients: Literal["directory", "static", "callout", "none", "any"] = "directory"
    """directory: only addresses of the snapshot. static: of these only the ones from ``directory.sources``. callout: those
    that the next hop takes when it is asked. none (or any): every address, the next hop decides when the mail is there."""
    delimiter: Annotated[str, AfterValidator(values.delimiters)] = ""
    """Characters that begin a tag: with "+", user+tag is valid where user is. "": an address is taken as it is."""
    tag: Literal["keep", "remove"] = "keep"
    """keep: the next hop gets the address with its tag. remove: without it, for servers that know no tags."""
    case: Literal["insensitive", "sensitive"] = "insensitive"
    """sensitive: what stands before the @ must be written as in the directory. Takes effect with the next build."""
    postmaster: Annotated[str, AfterValidator(values.mailbox)] | None = None
    """Mailbox that mail to postmaster of these domains goes to, e.g. hostmaster@example.com; none: to postmaster itself."""


class Route(Section):
    """Where mail for some domains goes. ``domains = ["*"]`` is the default route."""

    domains: Annotated[
        list[Annotated[str, AfterValidator(parse_pattern)]], Field(min_length=1, max_length=TABLES, examples=[["*"]])
    ]
    """Recipient domains; .example.com for what is below it, user@example.com for one address; "*" for all others (needed
    for reports to senders outside). The most specific one decides."""
    next_hops: Annotated[
        list[Annotated[str, AfterValidator(values.next_hop)]],
        Field(min_length=1, max_length=HOSTS, examples=[["smtp:[exchange.example.com]:25"]]),
        AfterValidator(values.next_hops),
    ]
    """In order of preference: smtp:[host]:port or lmtp:[host]:port for this host, smtp:example.com for the mail exchangers
    of a domain, smtp: for those of the recipient's; the next one is used while one is down. Or alone: error:, retry: or
    discard: with a text."""
    weights: Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(max_length=HOSTS)] = []
    """One number for each next hop: its share of the mail. 0: only while those with a share are down. Empty: by order."""


class Routing(Section):
    """The transport table: routes in Postfix's syntax, beside those of [[route]]."""

    transport: FilePath | None = None
    """File in the syntax of Postfix's transport(5); read at the start and by relay reload."""
    table: Annotated[str, Field(strict=True)] = ""
    """The same, written here between triple quotes."""


class Dns(Section):
    """Looking up mail exchangers. Only routes without brackets need it."""

    servers: Annotated[list[Annotated[str, AfterValidator(values.dns_server)]], Field(max_length=8)] = []
    """Resolvers, asked in this order: ADDRESS or ADDRESS:PORT. Empty: those of /etc/resolv.conf."""
    timeout_s: Annotated[float, Field(gt=0, le=30)] = 2.0
    """Wait for one answer of one server, seconds; each server is asked twice."""
    families: Annotated[list[Literal["ipv4", "ipv6"]], Field(min_length=1, max_length=2)] = ["ipv4", "ipv6"]
    """Which addresses of a mail exchanger are used, and which first."""
    private: bool = False
    """Whether mail by the route for * may go to private addresses (RFC 1918 and the like). Its domains are chosen by
    strangers, who could point them at hosts inside; routes for domains of your choice may always."""
    own_hosts: Annotated[list[Annotated[str, AfterValidator(own_host)]], Field(max_length=100)] = []
    """Names and addresses that lead to this relay besides its own, such as those of a balancer or of NAT: mail never
    goes to a mail exchanger that is among them."""


class Delivery(Section):
    """How next hops are spoken to."""

    express: bool = True
    """Hand mail straight on when the next hop is healthy; false: always through the queue."""
    express_deadline_s: Annotated[float, Field(gt=0, le=120)] = 3.0
    """After this long without the next hop's answer the message is queued and acknowledged, seconds."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 16
    """Connections to one next hop, over all workers. Exchange allows 20 per source."""
    connect_timeout_s: Seconds = 30.0
    """Connecting, seconds."""
    command_timeout_s: Seconds = 300.0
    """Any reply but the last, seconds (RFC 5321 section 4.5.3.2)."""
    final_reply_timeout_s: Seconds = 600.0
    """The reply to the final dot, seconds (RFC 5321 section 4.5.3.2.6)."""
    reuse_s: Seconds = 480.0
    """A connection is reused for at most this long, seconds (Exchange ends it after 600)."""
    idle_s: Seconds = 240.0
    """An unused connection is closed after this long, seconds."""
    failures: Annotated[int, Field(ge=1, le=1000)] = 3
    """Failed connections in a row before a next hop counts as down."""
    tls: Literal["off", "opportunistic", "verified"] = "opportunistic"
    """STARTTLS towards next hops: off; when offered, any certificate; always, with a certificate that verifies."""
    eight_bit: Literal["pass", "convert", "refuse"] = "pass"
    """8-bit content for a next hop without 8BITMIME: pass it as it is; convert it (breaks DKIM signatures); refuse it, 5.6.3."""


class NextHop(Section):
    """How one next hop is spoken to, where it differs from [delivery] (row T3)."""

    host: Annotated[str, Field(min_length=1, max_length=255, examples=["exchange.example.com"])]
    """Its name or address, as the route writes it between the brackets."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Its port; 0: any."""
    tls: Literal["", "off", "opportunistic", "required", "verified", "pinned"] = ""
    """required: TLS with any certificate. verified: one that is trusted for the host's name. pinned: one of pins. Empty: as
    delivery.tls."""
    implicit: bool = False
    """TLS from the first octet (port 465) instead of STARTTLS."""
    authorities: FilePath | None = None
    """PEM file of the authorities that verified trusts here; none: those of the system."""
    pins: Annotated[list[Annotated[str, AfterValidator(values.pin)]], Field(max_length=10)] = []
    """SHA-256 of certificates that pinned takes: openssl x509 -noout -fingerprint -sha256."""
    certificate: FilePath | None = None
    """PEM file of the relay's client certificate."""
    key: FilePath | None = None
    """PEM file of its private key."""
    user: str = ""
    """Log in as; empty: no login."""
    password_file: FilePath | None = None
    """File whose first line is the password; the relay reads it as the user that starts it, and again when it changes."""
    mechanisms: Annotated[
        list[Annotated[Mechanism, Field(strict=False)]], Field(min_length=1, max_length=len(Mechanism))
    ] = [Mechanism.SCRAM_SHA_256, Mechanism.CRAM_MD5, Mechanism.LOGIN, Mechanism.PLAIN]
    """The first one that the next hop offers is used, once. Exchange offers LOGIN."""
    messages_per_minute: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Most messages it gets in a minute, over all workers, each of which has its share; 0: no limit."""

    @property
    def own_key(self) -> str:
        """What its secrets are kept by."""
        return f"{self.host.lower()}:{self.port}"


class Queue(Section):
    """Retries, expiry and reports."""

    retry_s: Annotated[list[Seconds], Field(min_length=1, max_length=100)] = [60.0, 300.0, 900.0, 1800.0, 3600.0]
    """Waits between attempts, seconds; the last one repeats."""
    retry_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Share by which each wait varies at random."""
    expire_after_s: Annotated[float, Field(gt=0, le=60 * DAY_S)] = 5 * 86400.0
    """After this long an undelivered message is returned to its sender, seconds (RFC 5321 section 4.5.4.1)."""
    delay_warning_after_s: Annotated[float, Field(ge=0, le=60 * DAY_S)] = 0.0
    """After this long senders are told, once, that their message is late, seconds; 0: never. Exchange does after 14400."""
    lease_s: Annotated[float, Field(ge=5, le=DAY_S)] = 900.0
    """How long a worker owns a message it works on; must exceed delivery.final_reply_timeout_s."""
    active: Annotated[int, Field(ge=1, le=10000)] = 500
    """Messages one worker delivers from memory at once; the rest waits on disk."""
    write_timeout_s: Seconds = 30.0
    """Wait for the disk before the client is told 451, seconds."""


CopyKind = Literal["bounce", "2bounce", "delay", "policy", "resource", "software"]
"""Classes of what went wrong, in Postfix's words."""


class Postmaster(Section):
    """What a person of yours is told of what went wrong (row Q7)."""

    mailbox: Annotated[str, AfterValidator(values.mailbox)] | None = None
    """Where copies go; a route must lead there. None: nobody gets any."""
    notify: Annotated[list[CopyKind], Field(max_length=6)] = ["resource", "software"]
    """What is told, as notify_classes in Postfix: bounce, 2bounce, delay, policy, resource, software."""
    double_bounces: Annotated[str, AfterValidator(values.mailbox)] | None = None
    """Where mail goes that could not be delivered and has no sender to return it to; none: to mailbox, if 2bounce is told."""


class Senders(Section):
    """Restricted senders (rows S1 to S3)."""

    restricted: Annotated[Mode, Field(strict=False)] = Mode.ENFORCE
    """What happens to mail from restricted senders."""
    stage: Literal["mail", "rcpt"] = "rcpt"
    """When they are told; at rcpt the log names the recipient."""
    text: Annotated[str, AfterValidator(values.refusal)] = "This account is not allowed to send emails"
    """Wording of the refusal when the entry has none of its own."""
    rules: Annotated[list[SenderRule], Field(max_length=TABLES)] = []
    """What is said of single senders and whole domains, whatever the directory says."""
    only_listed: bool = False
    """Of our own domains only senders whom a rule allows may send: an allow-list instead of a deny-list."""
    hold_queued: bool = True
    """Hold mail in the queue whose sender has been restricted meanwhile, until relay queue release."""
    rewrite: Literal["off", "envelope"] = "off"
    """envelope: mail of trusted clients and logins that leaves goes out under the primary address of its sender, as the
    directory has it. Takes effect with the next reading, and stores primary addresses in clear."""
    own_domains: Annotated[Mode, Field(strict=False)] = Mode.ENFORCE
    """What happens to strangers (neither trusted nor logged in) who name one of our domains as envelope sender."""
    own_domains_from: Annotated[list[Annotated[str, AfterValidator(values.network)]], Field(max_length=1000)] = []
    """Clients outside that may do so all the same, such as a newsletter service: addresses or networks."""


class Submission(Section):
    """What logged-in users may do (rows A11, F4)."""

    sender: Annotated[Mode, Field(strict=False)] = Mode.ENFORCE
    """What happens to mail whose envelope sender is none of the account's addresses."""
    null_sender: bool = False
    """Let users send with the null sender, as programs do that write reports."""
    any_sender: Annotated[list[str], Field(max_length=10_000)] = []
    """Accounts that may send as anybody."""
    own_domains: Annotated[list[str], Field(max_length=10_000)] = []
    """Accounts that may send as anybody of the relay's own domains."""


class Recipients(Section):
    """Recipient validation (row R1)."""

    unknown: Annotated[Mode, Field(strict=False)] = Mode.ENFORCE
    """What happens to recipients that the snapshot does not know."""
    internal: Annotated[Mode, Field(strict=False)] = Mode.ENFORCE
    """What happens to strangers who write to a recipient that wants authenticated senders alone, by the directory."""
    size_limit: Annotated[Mode, Field(strict=False)] = Mode.ENFORCE
    """What happens to messages above the size that the directory gives for their recipient."""


class Content(Section):
    """What may be inside a message (rows F5, F10)."""

    line_endings: Annotated[LineEndings, Field(strict=False)] = LineEndings.NORMALIZE
    """normalize: a bare LF becomes CR LF, a bare CR a space. refuse: 554 5.6.0."""
    header_firewall: Annotated[Mode, Field(strict=False)] = Mode.ENFORCE
    """Removal of the headers below from mail of untrusted clients."""
    remove_headers: Annotated[list[Annotated[str, AfterValidator(values.header_name)]], Field(max_length=200)] = [
        "X-MS-Exchange-Organization-*",
        "X-MS-Exchange-Forest-*",
    ]
    """Header names, * at the end for a prefix. Authentication-Results with our own name is always among them."""
    outbound: bool = False
    """Take the headers above also from mail of trusted clients that goes to others' domains alone."""
    hide_received: bool = False
    """Take the Received lines of our own servers from such mail: they tell strangers names and addresses inside."""


class Trusted(Section):
    """Clients that may relay anywhere and keep their headers."""

    networks: Annotated[list[Annotated[str, AfterValidator(values.network)]], Field(max_length=1000)] = []
    """Addresses or networks, for example 10.0.0.0/8. Keep this tight: they can send to everyone."""


class Log(Section):
    """The mail log."""

    format: Literal["postfix", "json"] = "postfix"
    """postfix: lines in Postfix's form. json: one object a line."""
    file: FilePath | None = None
    """Log file, opened again on SIGHUP; default: standard error."""


class Web(Section):
    """Metrics and health over HTTP."""

    listen: values.SocketAddress | None = None
    """ADDRESS:PORT of /metrics, /livez and /readyz; none: switched off."""


class Config(Section):
    """The whole file."""

    server: Server
    process: Process = Process()
    tls: Tls = Tls()
    limits: Limits = Limits()
    listener: Annotated[list[Listener], Field(min_length=1, max_length=LISTENERS)]
    domain: Annotated[list[Domain], Field(max_length=TABLES)] = []
    route: Annotated[list[Route], Field(max_length=TABLES)] = []
    routing: Routing = Routing()
    dns: Dns = Dns()
    delivery: Delivery = Delivery()
    next_hop: Annotated[list[NextHop], Field(max_length=TABLES)] = []
    queue: Queue = Queue()
    postmaster: Postmaster = Postmaster()
    directory: Directory = Directory()
    callout: Callout = Callout()
    senders: Senders = Senders()
    recipients: Recipients = Recipients()
    content: Content = Content()
    trusted: Trusted = Trusted()
    auth: Auth = Auth()
    submission: Submission = Submission()
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

    @property
    def snapshot_max_age_s(self) -> float | None:
        """From which age on the snapshot is not believed about unknown recipients; None: at any age."""
        directory = self.directory
        return directory.max_age_s if (directory.readings or directory.push) and directory.stale == "defer" else None

    @model_validator(mode="after")
    def _whole(self) -> Config:
        found = faults(self.model_dump())
        if found:
            raise WholeError(found)
        return self
