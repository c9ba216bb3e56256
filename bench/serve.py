"""Run the shipped relay in the foreground on an ordinary configuration made from the options below.

Writes DIR/relay.toml, makes DIR/cert.pem, builds the snapshot when its inputs changed, and then becomes `relay serve`. The
pidfile holds the supervisor's pid and appears once all listeners accept. SIGTERM drains. A DIR used before keeps its queue.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

SESSIONS = 5000
"""Open sessions over all workers: the idle benchmark holds 1,000, and a load generator may open a few thousand."""

ROLES = (("mx", "listen_25"), ("submission", "listen_587"), ("submissions", "listen_465"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="bench/serve", description=__doc__)
    made.add_argument("--state", type=_path, required=True, metavar="DIR", help="configuration, certificate, snapshot")
    made.add_argument("--listen-25", type=_endpoint, required=True, metavar="HOST:PORT")
    made.add_argument("--listen-587", type=_endpoint, metavar="HOST:PORT")
    made.add_argument("--listen-465", type=_endpoint, metavar="HOST:PORT")
    made.add_argument("--domains", type=_names, metavar="D,D", help="default: those of the recipients")
    made.add_argument(
        "--recipients", type=_file, metavar="FILE", help="one address a line; needed unless --ldap is given"
    )
    made.add_argument("--ldap", metavar="URL", help="directory to read, e.g. ldaps://dc1.example.com; needs --domains")
    made.add_argument("--ldap-base", metavar="DN", help="default: what the server names")
    made.add_argument(
        "--ldap-preset", choices=("active-directory", "exchange", "openldap", "rit-schema"), default="active-directory"
    )
    made.add_argument("--ldap-bind", metavar="NAME", help="DN, user@domain or DOMAIN\\user; default: anonymous")
    made.add_argument("--ldap-password-file", type=_file, metavar="FILE")
    trust = made.add_mutually_exclusive_group()
    trust.add_argument("--ldap-ca", type=_file, metavar="FILE", help="default: the system's authorities")
    trust.add_argument("--ldap-insecure", action="store_true", help="in clear, or with any certificate")
    made.add_argument("--sync-s", type=float, metavar="SECONDS", help="time between two readings of the directory")
    made.add_argument("--restriction-attribute", metavar="NAME", help="attribute that restricts senders")
    made.add_argument("--restricted", type=_file, metavar="FILE", help="restricted senders, one address a line")
    made.add_argument(
        "--users", type=_file, metavar="FILE", help="name:password:address a line: who may log in on 587 and 465"
    )
    made.add_argument("--auth", choices=("ldap",), help="ldap: who may log in stands in the directory of --ldap, too")
    made.add_argument("--next-hop", type=_endpoint, required=True, metavar="HOST:PORT", help="serves the domains")
    made.add_argument("--default-next-hop", type=_endpoint, metavar="HOST:PORT", help="serves every other domain")
    made.add_argument("--next-hop-timeout-s", type=float, metavar="S", help="limits every step towards a next hop")
    made.add_argument("--express", choices=("on", "off"), default="on")
    made.add_argument("--workers", type=int, default=0, metavar="N", help="default: one per core")
    made.add_argument("--retry-s", type=float, metavar="S", help="every wait between attempts, without jitter")
    made.add_argument("--size-limit", type=int, default=50 * 1024 * 1024, metavar="BYTES")
    made.add_argument("--max-recipients", type=int, default=1000, metavar="N")
    made.add_argument("--sessions-per-client", type=int, default=50, metavar="N")
    made.add_argument(
        "--error-budget", type=_budget, default=20, metavar="N|off", help="off: tarpit and unknown recipients, too"
    )
    made.add_argument("--spool", type=_path, metavar="DIR", help="default: DIR/spool")
    made.add_argument("--log", type=_path, metavar="FILE", help="default: DIR/relay.log")
    made.add_argument("--metrics", type=_endpoint, metavar="HOST:PORT")
    made.add_argument("--pidfile", type=_path, required=True, metavar="FILE")
    return made


def _path(text: str) -> Path:
    return Path(text).absolute()


def _file(text: str) -> Path:
    path = _path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return path


def _names(text: str) -> list[str]:
    return [name.strip().lower() for name in text.split(",") if name.strip()]


def _budget(text: str) -> int:
    """0 is the configuration's word for off; `0` itself is refused, so that nobody takes it for "none allowed"."""
    if text == "off":
        return 0
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor off")
    return int(text)


def _endpoint(text: str) -> str:
    """ADDRESS:PORT; a host name becomes its address, because a listener takes addresses only."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    host = host.strip("[]") or "0.0.0.0"
    with suppress(ValueError):
        address = ip_address(host)
        return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    try:
        return f"{socket.gethostbyname(host)}:{port}"
    except OSError as problem:
        raise argparse.ArgumentTypeError(f"{host!r} does not resolve: {problem}") from None


def _next_hop(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    return f"smtp:[{host.strip('[]')}]:{port}"


def domains_of(recipients: Path) -> list[str]:
    """The domains behind the @ in a list of addresses."""
    with recipients.open(encoding="utf-8") as lines:
        return sorted({line.rpartition("@")[2].strip().lower() for line in lines if "@" in line})


def _value(value: object) -> str:
    match value:
        case Path():
            return json.dumps(str(value))
        case list():
            return "[" + ", ".join(_value(item) for item in value) + "]"
        case _:
            return json.dumps(value)  # a JSON string, number or boolean is the same in TOML


def _table(head: str, **keys: object) -> Iterator[str]:
    yield head
    for key, value in keys.items():
        if value is not None:
            yield f"{key} = {_value(value)}"
    yield ""


def configuration(options: argparse.Namespace, domains: list[str]) -> str:
    """The configuration file, as TOML."""
    state: Path = options.state
    step, retry = options.next_hop_timeout_s, options.retry_s
    sources = [(k, p) for k, p in (("list", options.recipients), ("restricted", options.restricted)) if p is not None]
    lines = [
        "# Written by bench/serve.",
        *_table(
            "[server]", hostname="relay.bench.test", spool=options.spool or state / "spool", workers=options.workers
        ),
        "# Every role keeps the user that started the relay: the folders belong to that user.",
        *_table("[process]", user="", hub_user=""),
        *_table("[tls]", certificate=state / "cert.pem", key=state / "key.pem"),
        *_table(
            "[limits]",
            sessions=SESSIONS,
            sessions_per_client=options.sessions_per_client,
            message_octets=options.size_limit,
            recipients=options.max_recipients,
            errors=options.error_budget,
            # Off means: nothing is held against a client, for a load generator is one.
            tarpit_s=None if options.error_budget else 0.0,
            unknown_recipients_per_client=None if options.error_budget else 0,
            unknown_recipients_per_network=None if options.error_budget else 0,
        ),
    ]
    for role, option in ROLES:
        if (address := getattr(options, option)) is not None:
            lines += _table("[[listener]]", name=role, address=address, role=role)
    if options.users or options.auth:
        # Everything comes from one address here, so only the budget of each account is what it is when shipped.
        lines += _table("[auth]", client_failures=10_000, network_failures=100_000)
    if options.users:
        lines += _table("[[auth.stores]]", name="local", type="file", path=options.users)
    if options.auth:
        lines += _table("[[auth.stores]]", name="ldap", type="ldap", directory="ldap")
    lines += _table("[[domain]]", names=domains, recipients="directory")
    lines += _table("[[route]]", domains=domains, next_hops=[_next_hop(options.next_hop)])
    if options.default_next_hop:
        lines += _table("[[route]]", domains=["*"], next_hops=[_next_hop(options.default_next_hop)])
    lines += [
        *_table(
            "[delivery]",
            express=options.express == "on",
            connect_timeout_s=step,
            command_timeout_s=step,
            final_reply_timeout_s=step,
        ),
        *_table(
            "[queue]",
            retry_s=None if retry is None else [retry],
            retry_jitter=None if retry is None else 0.0,
            # The lease has to outlast the wait for the final reply; the default of 900 s does so for shorter ones.
            lease_s=step + 60 if step is not None and step >= 900 else None,
        ),
    ]
    if options.ldap or options.restriction_attribute:
        lines += _table("[directory]", sync_s=options.sync_s, restriction_attribute=options.restriction_attribute)
    if options.ldap:
        lines += _table("[[directory.ldap]]", **_profile(options))
    for kind, path in sources:
        lines += _table("[[directory.sources]]", type=kind, path=path)
    lines += _table("[log]", file=options.log or state / "relay.log")
    if options.metrics:
        lines += _table("[web]", listen=options.metrics)
    return "\n".join(lines)


def _profile(options: argparse.Namespace) -> dict[str, object]:
    clear = options.ldap.lower().startswith("ldap://")
    return {
        "name": "ldap",
        "preset": options.ldap_preset,
        "servers": [options.ldap],
        "base": options.ldap_base,
        "bind": options.ldap_bind,
        "password_file": options.state / "ldap.password" if options.ldap_password_file else None,
        "ca_file": options.ldap_ca,
        "insecure": True if options.ldap_insecure and clear else None,
        "verify": False if options.ldap_insecure and not clear else None,
    }


def password(options: argparse.Namespace) -> None:
    """A copy that only its owner may read: the relay refuses any other."""
    if options.ldap_password_file:
        beside = options.state / ".ldap.password"
        beside.unlink(missing_ok=True)
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(options.ldap_password_file.read_bytes())
        beside.rename(options.state / "ldap.password")


def certificate(state: Path) -> None:
    """A self-signed certificate and its key, made once."""
    if (state / "cert.pem").exists() and (state / "key.pem").exists():
        return
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "3650", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(state / "key.pem"), "-out", str(state / "cert.pem")]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit("bench/serve: openssl is missing; install the Debian package openssl")
    if made.returncode:
        sys.exit(f"bench/serve: openssl made no certificate: {made.stderr.strip()}")


def fingerprint(options: argparse.Namespace, domains: list[str]) -> str:
    """Changes with everything that the snapshot is built from."""
    ldap = [_profile(options), options.restriction_attribute] if options.ldap else options.restriction_attribute
    whole = hashlib.sha256(json.dumps([domains, str(options.spool), ldap], default=str).encode())
    for path in (options.recipients, options.restricted):
        if path is not None:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
        whole.update(b"|")
    return whole.hexdigest()


def build(options: argparse.Namespace, domains: list[str], config: Path) -> None:
    """Build the snapshot unless the one at hand was made from the same inputs."""
    stamp = options.state / "inputs.sha256"
    wanted = fingerprint(options, domains)
    snapshot = (options.spool or options.state / "spool") / "directory" / "snapshot"
    if snapshot.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    command = [sys.executable, "-m", "relay", "directory", "build", "--config", str(config)]
    built = subprocess.run(command, stdout=sys.stderr, check=False)
    if built.returncode and options.ldap:
        print("bench/serve: the directory was not read; going on without", file=sys.stderr)
        return
    if built.returncode:
        sys.exit(built.returncode)
    stamp.write_text(wanted)


def main() -> None:
    made = parser()
    options = made.parse_args()
    if not options.recipients and not options.ldap:
        made.error("give --recipients, --ldap, or both")
    if options.auth and not options.ldap:
        made.error("--auth ldap needs --ldap")
    if not options.recipients and not options.domains:
        made.error("--ldap without --recipients needs --domains")
    options.state.mkdir(parents=True, exist_ok=True)
    options.pidfile.unlink(missing_ok=True)
    domains = options.domains or domains_of(options.recipients)
    config = options.state / "relay.toml"
    config.write_text(configuration(options, domains))
    certificate(options.state)
    password(options)
    build(options, domains, config)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    command = [sys.executable, "-m", "relay", "serve", "--config", str(config), "--pidfile", str(options.pidfile)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
