"""Owns: what ``relay check`` looks at in a configuration that is valid: what is risky, unusual or not yet done, graded.

It reads this machine and changes nothing. What keeps the relay from starting is found by ``config.files``.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import math
import os
import stat
import time
from collections.abc import Iterator
from typing import Final

from relay.cli import machine, reachable, stored
from relay.cli.certificate import CertificateFault, covers, distrust, examine
from relay.cli.grade import Finding, Grade
from relay.config.addresses import split_address
from relay.config.destination import Host, parse_next_hop
from relay.config.origin import Problem
from relay.config.schema import Config, Mode, Role
from relay.directory.key import read_key
from relay.directory.layout import SnapshotError
from relay.directory.snapshot import ACCEPT, Snapshot
from relay.directory.sources import VERIFIED, ending
from relay.directory.state import read_state, state_path
from relay.directory.weak import weaknesses
from relay.mail.address import Mailbox, domain_of
from relay.policy.route import RouteTable

DAY_S: Final = 86400.0
ENDING_SHOWN: Final = 20  # more of them are one piece of work
EXPIRES_SOON_S: Final = 21 * DAY_S  # renewal runs 30 days ahead by custom: at 21 it has failed for a week
SNAPSHOT_OLD_S: Final = 2 * DAY_S  # the directory is read daily at least
EXCHANGE_CONNECTIONS: Final = 20  # MaxInboundConnectionPerSource of a receive connector
FEWEST_RECIPIENTS: Final = 100  # RFC 5321 section 4.5.3.1.8
ENDS_SOON: Final = dt.timedelta(days=14)
WIDE_NETWORK: Final = {4: 16, 6: 48}  # shorter prefixes than these are seldom one organisation's own servers


def findings(config: Config, problems: list[Problem], *, offline: bool) -> list[Finding]:
    """The whole report; ``problems`` are those of ``check_files``. ``offline``: nobody is asked over the network."""
    report = [Finding(Grade.ERROR, problem.key, problem.what, problem.hint) for problem in problems]
    troubled = {problem.key.partition(".")[0] for problem in problems}
    if "tls" not in troubled:
        report += _certificate(config)
    if "process" not in troubled:
        report += _users(config)
    report += [
        *_listeners(config),
        *machine.ports(config),
        *machine.spool(config),
        *machine.clock(config),
        *_snapshot(config),
        *_directories(config),
        *_pushed(config),
        *stored.stores(config),
        *_domains(config),
        *_overrides(config),
        *_routes(config),
        *_rules(config),
        *_postmaster(config),
        *_trusted(config),
        *_web(config),
        *([] if offline else [*reachable.name_service(config), *reachable.next_hops(config)]),
    ]
    return report


def _certificate(config: Config) -> Iterator[Finding]:
    certificate, key = config.tls.certificate, config.tls.key
    if certificate is None or key is None:
        yield Finding(
            Grade.WARNING, "tls", "no certificate: all mail comes in readable", "set certificate and key in [tls]"
        )
        return
    try:
        seen = examine(certificate, key)
    except CertificateFault as fault:
        yield Finding(Grade.ERROR, "tls", f"{certificate}: {fault}", "renew the certificate")
        return
    days = (seen.expires - time.time()) / DAY_S
    until = time.strftime("%Y-%m-%d", time.gmtime(seen.expires))
    if days * DAY_S < EXPIRES_SOON_S:
        yield Finding(
            Grade.WARNING, "tls", f"the certificate ends in {days:.0f} days, on {until}", "renew it, then relay reload"
        )
    else:
        yield Finding(Grade.OK, "tls", f"the certificate is good until {until}")
    if not covers(seen, config.server.hostname):
        names = ", ".join(seen.names) or "no name"
        hint = "senders that verify will refuse it: get one with this name"
        yield Finding(Grade.WARNING, "tls", f"the certificate is for {names}, not for {config.server.hostname}", hint)
    reason = distrust(certificate, key)
    if reason:
        hint = "fine for encryption alone; for senders that verify get one of a public authority, with its chain in the file"
        yield Finding(Grade.WARNING, "tls trust", f"this machine's authorities do not vouch for it: {reason}", hint)
    if key.stat().st_mode & 0o077:
        yield Finding(Grade.WARNING, "tls", f"{key} can be read by others than its owner", f"chmod 600 {key}")


def _listeners(config: Config) -> Iterator[Finding]:
    for listener in config.listener:
        topic = f"listener {listener.name}"
        yield Finding(Grade.OK, topic, f"{listener.address}, {listener.role}")
        if listener.role is Role.SUBMISSION and config.tls.certificate is None:
            hint = "set certificate and key in [tls], or remove the listener"
            yield Finding(Grade.WARNING, topic, "nobody can log in: submission needs STARTTLS", hint)
        if listener.require_tls and listener.role is Role.MX:
            hint = "write require_tls = false, unless only known partners send here"
            yield Finding(Grade.WARNING, topic, "refuses senders without TLS, which a public server must not", hint)
        elif listener.require_tls:
            yield Finding(
                Grade.WARNING, topic, "require_tls means nothing here", "remove it: this role always needs TLS"
            )


def _users(config: Config) -> Iterator[Finding]:
    process = config.process
    if os.geteuid() != 0:
        hint = "start it as root: it drops its rights itself"
        yield Finding(Grade.WARNING, "process", "not started as root, all processes share one user", hint)
        return
    kept = [key for key, user in (("user", process.user), ("hub_user", process.hub_user)) if not user]
    for key in kept:
        yield Finding(
            Grade.WARNING, "process", f"{key} is empty: these processes stay root", f"name a user in process.{key}"
        )
    if process.user and process.user == process.hub_user:
        hint = "make a user of its own for the hub"
        yield Finding(Grade.WARNING, "process", f'workers and hub share the user "{process.user}"', hint)
    elif not kept:
        yield Finding(Grade.OK, "process", f"workers run as {process.user}, the hub as {process.hub_user}")


def _snapshot(config: Config) -> Iterator[Finding]:
    needed = any(domain.recipients in VERIFIED for domain in config.domain)
    path = config.snapshot_path
    try:
        path.stat()
    except PermissionError:
        yield Finding(
            Grade.WARNING, "snapshot", f"{path} cannot be looked at", "run this as root or as the relay's user"
        )
        return
    except OSError:
        if needed:
            hint = "run relay directory build"
            yield Finding(Grade.ERROR, "snapshot", f"{path} is not there: recipients get 451 until it is", hint)
        else:
            yield Finding(Grade.OK, "snapshot", "none, and no domain asks for it")
        return
    try:
        snapshot = Snapshot.open(path, read_key(config.key_path))
    except SnapshotError as error:
        what, _, hint = str(error).rpartition("; ")
        yield Finding(Grade.ERROR, "snapshot", what or hint, hint)
        return
    age = time.time() - snapshot.created
    text = f"{snapshot.recipients:,} recipients, {snapshot.restricted:,} restricted senders"
    if age > SNAPSHOT_OLD_S:
        yield Finding(Grade.WARNING, "snapshot", f"{text}, {age / DAY_S:.0f} days old", "run relay directory build")
    else:
        yield Finding(Grade.OK, "snapshot", text)
    yield from _since_the_build(config, snapshot)
    if needed and not (snapshot.recipients or snapshot.ruled):
        yield Finding(
            Grade.ERROR, "snapshot", "no address is known: every recipient is refused", "look at directory.sources"
        )


def _since_the_build(config: Config, snapshot: Snapshot) -> Iterator[Finding]:
    """What the configuration says now and the snapshot does not know yet."""
    for domain in config.domain:
        for name in domain.names:
            if domain.recipients == "directory" and domain.case == "sensitive" and name not in snapshot.sensitive:
                text = f'{name} has case = "sensitive", and the snapshot was built before: every spelling is taken'
                yield Finding(Grade.WARNING, "snapshot", text, "run relay directory build")
        mailbox = Mailbox(domain.postmaster or "")
        verifies = any(domain_of(mailbox) in other.names for other in config.domain if other.recipients in VERIFIED)
        if mailbox and verifies and not snapshot.lookup(mailbox) & ACCEPT:
            text = f"mail to postmaster goes to {mailbox}, which the snapshot does not know"
            yield Finding(Grade.WARNING, "domains", text, "name a mailbox that exists")


def _overrides(config: Config) -> Iterator[Finding]:
    """What ends soon or has ended, in the configuration and in files."""
    today = dt.datetime.now(dt.UTC).date()
    dated: list[tuple[dt.date, str, str, str]] = [
        (entry.expires, entry.address, entry.comment, "the configuration")
        for entry in config.directory.overrides
        if entry.expires is not None
    ]
    dated += [
        (line.until, line.key, line.comment, f"{path}:{line.number}")
        for path, line in ending(config)
        if line.until is not None
    ]
    for last, key, comment, place in sorted(dated)[:ENDING_SHOWN]:
        remark = f" ({comment})" if comment else ""
        if last < today:
            yield Finding(Grade.WARNING, "overrides", f"{key}{remark} has ended on {last}", f"remove it from {place}")
        elif last - today <= ENDS_SOON:
            days = (last - today).days
            text = f"{key}{remark} ends in {days} days, on {last}"
            yield Finding(Grade.WARNING, "overrides", text, f"give it another day in {place}, or let it go")


_ENDING: Final = (
    ("certificate_expires", "the certificate of its server", "renew it there; afterwards nothing is read any more"),
    (
        "password_expires",
        "the password of the account that reads",
        "renew it, or let it not expire; it stands in password_file",
    ),
)


def _directories(config: Config) -> Iterator[Finding]:
    for name, server, what in weaknesses(config):
        hint = "use ldaps://, a ca_file or a pin, and an account; relay directory test tries it"
        yield Finding(Grade.WARNING, f"directory {name}", f"{server}: {what}", hint)
    if config.directory.readings or config.directory.push:
        state = read_state(state_path(config.snapshot_path))
        if state.reason:
            yield Finding(Grade.WARNING, "directory", f"the last reading was not taken: {state.why}", state.cure)
        for name, reading in state.profiles.items():
            for key, what, hint in _ENDING:
                days = (float(reading.get(key) or math.inf) - time.time()) / DAY_S
                if days < ENDS_SOON.days:
                    text = f"{what} ends in {days:.0f} days" if days > 0 else f"{what} has ended"
                    yield Finding(Grade.WARNING, f"directory {name}", text, hint)


_CHECKED: Final = {
    "directory": "recipients by the directory",
    "static": "recipients by the files of directory.sources",
    "callout": "recipients by asking the next hop",
    "none": "every recipient",
    "any": "every recipient",
}


def _pushed(config: Config) -> Iterator[Finding]:
    """The folders that signed files are dropped into."""
    for source in config.directory.push:
        topic, folder = f"push {source.name}", source.folder
        try:
            mode = folder.stat().st_mode
        except OSError as error:
            hint = f"make it: install -d -o {config.process.hub_user or 'root'} -g GROUP -m 2770 {folder}"
            yield Finding(Grade.ERROR, topic, f"{folder}: {error.strerror}", hint)
            continue
        if not stat.S_ISDIR(mode):
            yield Finding(Grade.ERROR, topic, f"{folder} is no folder", "name the folder that files are dropped into")
        elif mode & stat.S_IRWXO:
            hint = f"chmod o= {folder}"
            yield Finding(Grade.WARNING, topic, f"every user may enter {folder}, where addresses arrive in clear", hint)
        else:
            yield Finding(Grade.OK, topic, f"files are taken from {folder}")


def _domains(config: Config) -> Iterator[Finding]:
    if not config.domain:
        hint = "add a [[domain]] table with the domains of your users"
        yield Finding(Grade.WARNING, "domains", "none: only trusted networks can send, and only outwards", hint)
    for domain in config.domain:
        checked = _CHECKED[domain.recipients]
        yield Finding(Grade.OK, "domains", f"{_some(domain.names)}: {checked}")


def _routes(config: Config) -> Iterator[Finding]:
    own = {split_address(listener.address) for listener in config.listener}
    for route in config.route:
        name = ", ".join("all others" if domain == "*" else domain for domain in route.domains[:3])
        yield Finding(Grade.OK, "routes", f"{name} to {', then '.join(route.next_hops)}")
        for hop in route.next_hops:
            target = parse_next_hop(hop)
            hosts = [one for one in target if isinstance(one, Host)] if isinstance(target, tuple) else []
            if any((host.host, host.port) in own for host in hosts):
                hint = "name the server behind the relay"
                yield Finding(Grade.ERROR, "routes", f"{hop} is this relay: mail would go round in circles", hint)
    if not any("*" in route.domains for route in config.route):
        hint = 'add a [[route]] with domains = ["*"]'
        yield Finding(Grade.WARNING, "routes", "no default route: reports to senders outside cannot leave", hint)
    if config.delivery.concurrency > EXCHANGE_CONNECTIONS:
        text = f"delivery.concurrency is {config.delivery.concurrency}, Exchange takes {EXCHANGE_CONNECTIONS} from one source"
        hint = "write 20 or less, or raise MaxInboundConnectionPerSource"
        yield Finding(Grade.WARNING, "routes", text, hint)
    workers = config.server.workers or len(os.sched_getaffinity(0))
    if config.delivery.concurrency < workers:
        text = (
            f"delivery.concurrency is {config.delivery.concurrency}, and each of {workers} workers keeps a connection"
        )
        hint = f"write server.workers = {config.delivery.concurrency}, or a higher concurrency"
        yield Finding(Grade.WARNING, "routes", text, hint)
    if config.delivery.tls == "off":
        hint = 'write delivery.tls = "opportunistic"'
        yield Finding(Grade.WARNING, "routes", "delivery.tls is off: mail goes on readable", hint)


def _postmaster(config: Config) -> Iterator[Finding]:
    table = RouteTable(config)
    for key, mailbox in (
        ("postmaster.mailbox", config.postmaster.mailbox),
        ("postmaster.double_bounces", config.postmaster.double_bounces),
    ):
        if mailbox is not None and table.find(Mailbox(mailbox)) is None:
            hint = f"add a [[route]] for {domain_of(mailbox)} or for *"
            yield Finding(Grade.WARNING, "postmaster", f"{key}: no route leads to {mailbox}, letters will wait", hint)


def _rules(config: Config) -> Iterator[Finding]:
    if config.limits.recipients < FEWEST_RECIPIENTS:
        what = f"limits.recipients: senders expect {FEWEST_RECIPIENTS} at least (RFC 5321 section 4.5.3.1.8)"
        yield Finding(Grade.WARNING, "rules", what, f"write limits.recipients = {FEWEST_RECIPIENTS} or more")
    if config.server.soft_bounce:
        hint = "write server.soft_bounce = false when the change-over is done"
        yield Finding(
            Grade.WARNING, "rules", "soft_bounce: nothing is refused for good, senders keep trying for days", hint
        )
    modes = {
        "senders.restricted": config.senders.restricted,
        "recipients.unknown": config.recipients.unknown,
        "recipients.internal": config.recipients.internal,
        "recipients.size_limit": config.recipients.size_limit,
        "content.header_firewall": config.content.header_firewall,
    }
    for key, mode in modes.items():
        if mode is not Mode.ENFORCE:
            effect = "only logged" if mode is Mode.LOG else "not looked at"
            yield Finding(Grade.WARNING, "rules", f"{key} is {effect}", f'write {key} = "enforce"')
    if not config.server.soft_bounce and all(mode is Mode.ENFORCE for mode in modes.values()):
        yield Finding(Grade.OK, "rules", "all enforced")


def _trusted(config: Config) -> Iterator[Finding]:
    for text in config.trusted.networks:
        network = ipaddress.ip_network(text)
        if network.prefixlen < WIDE_NETWORK[network.version]:
            hint = "write the addresses of your own mail servers only"
            yield Finding(Grade.WARNING, "trusted", f"{text} is wide: every host in it may send to everyone", hint)
        else:
            yield Finding(Grade.OK, "trusted", f"{text} may send to everyone")


def _web(config: Config) -> Iterator[Finding]:
    if config.web.listen is None:
        hint = 'write web.listen = "127.0.0.1:9125"'
        yield Finding(Grade.WARNING, "web", "switched off: no metrics, no health", hint)
    elif not ipaddress.ip_address(split_address(config.web.listen)[0]).is_loopback:
        hint = "let a firewall admit the monitoring only, or write 127.0.0.1:9125"
        yield Finding(Grade.WARNING, "web", f"metrics are open to who reaches {config.web.listen}", hint)
    else:
        yield Finding(Grade.OK, "web", config.web.listen)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
