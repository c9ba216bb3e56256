"""The table against Postfix, in one run: starts Postfix and the relay (express and durable), measures, prints Markdown.

usage: run.py [--part compare|attack|idle|memory|start|auth|fsync ...] [--scenario S ...] [--reps 5] > FILE

Every part starts its servers anew, on empty queues. Progress goes to standard error. Needs root (Postfix's master) and the
Debian packages postfix and openssl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import attack
import benchlib as b
import compare
import fsync
import idle
import logins
import memory

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.bed.certificates import Authority
from tests.bed.slapd import BASE as BASE_DN
from tests.bed.slapd import PASSWORD as SLAPD_PASSWORD
from tests.bed.slapd import SERVICE, Slapd, ldif, openldap_tree

HERE: Final = Path(__file__).resolve().parent
PARTS: Final = ("compare", "attack", "idle", "memory", "start", "auth")
RECIPIENTS: Final = 100_000
START_RECIPIENTS: Final = 500_000
IDLE_CONNECTIONS: Final = 1000
CLIENT_SESSIONS: Final = 5000
"""All traffic comes from one address, so its limit must not be what is measured; it is counted all the same."""

BASE, EXPRESS, DURABLE = "Postfix", "express", "durable"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a figure has to reach, for the relay in express and in durable mode."""

    of: Literal["ratio", "value"]
    sign: Literal["≥", "≤"]
    express: float
    durable: float

    def cell(self, figure: b.Figure, name: str) -> str:
        """The bound, and whether the figure keeps it."""
        bound = self.express if name == EXPRESS else self.durable
        got = (figure.ratios if self.of == "ratio" else figure.values).get(name)
        if got is None:
            return ""
        kept = got >= bound if self.sign == "≥" else got <= bound
        return f"{self.sign} {bound:g}{' ×' if self.of == 'ratio' else ''} {'met' if kept else '**missed**'}"


WANTED: Final = {
    "1k-conn-20": Wanted("ratio", "≥", 5, 4),
    "1k-keep-20": Wanted("ratio", "≥", 10, 6),
    "10k-keep-20": Wanted("ratio", "≥", 7, 5),
    "1m-keep-10": Wanted("ratio", "≥", 1.6, 1.0),
    "1k-keep-20 CPU": Wanted("ratio", "≤", 0.15, 0.25),
    "unknown recipients, serial": Wanted("ratio", "≥", 5, 5),
    "unknown recipients, pipelined": Wanted("ratio", "≥", 14, 14),
    "unknown recipients, churn": Wanted("ratio", "≥", 7, 7),
    f"idle connection ({IDLE_CONNECTIONS})": Wanted("value", "≤", 10, 10),
    "20 messages of 25 MB at once": Wanted("value", "≤", 64, 64),
    f"first 220, {START_RECIPIENTS:,} addresses": Wanted("value", "≤", 1, 1),
    "STARTTLS": Wanted("ratio", "≥", 1, 1),
    "STARTTLS, AUTH PLAIN": Wanted("ratio", "≥", 1, 1),
    f"LDAP-bind logins, {logins.LDAP_CLIENTS} clients": Wanted("value", "≥", 500, 500),
    "CRAM-MD5 from a context": Wanted("value", "≤", 100, 100),
    f"the same, while {logins.GUESSERS} guess": Wanted("value", "≤", 1.2, 1.2),
    "the two apart, file": Wanted("value", "≤", 5, 5),
    "the two apart, LDAP": Wanted("value", "≤", 5, 5),
}


def recipients(state: Path, count: int) -> Path:
    """The file of addresses that Postfix and the relay share (postfix.sh makes the same)."""
    path = state / f"rcpts-{count}"
    if not path.exists():
        path.write_text("".join(f"{number}user@example.com\n" for number in range(count)))
    return path


# ------------------------------------------------------------------------------------------------------------ servers
@contextlib.contextmanager
def postfix(state: Path, port: int, processes: int, submission: int = 0) -> Iterator[b.Target]:
    """The reference, with its sink on the port above; ``submission``: a port where one can log in."""
    environment = os.environ | {
        "BENCH_STATE": str(state),
        "PF_PORT": str(port),
        "SINK_PORT": str(port + 1),
        "PF_PROCS": str(processes),
        "PF_RCPTS": str(RECIPIENTS),
        **({"PF_SUBMISSION": str(submission)} if submission else {}),
    }

    def control(word: str) -> str:
        done = subprocess.run(
            ["/bin/sh", HERE / "postfix.sh", word], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    control("stop")
    shutil.rmtree(state / "postfix" / "queue", ignore_errors=True)
    sink = b.Sink(port + 1)
    try:
        control("start")
        b.wait_until(f"Postfix on port {port}", lambda: b.accepts("127.0.0.1", port))
        yield b.Target(BASE, "127.0.0.1", port, [int(control("pid"))], sink)
    finally:
        control("stop")
        sink.close()


def relay_options(state: Path, name: str, port: int, addresses: int) -> list[str]:
    """Options of bench/serve: budgets of clients off, everything else as it is shipped, log and metrics on."""
    return [
        *("--state", str(state / name)),
        *("--listen-25", f"127.0.0.1:{port}"),
        *("--recipients", str(recipients(state, addresses))),
        *("--next-hop", f"127.0.0.1:{port + 1}"),
        *("--metrics", f"127.0.0.1:{port + 2}"),
        *("--express", "off" if name == DURABLE else "on"),
        *("--error-budget", "off"),
        *("--sessions-per-client", str(CLIENT_SESSIONS)),
        *("--pidfile", str(state / f"{name}.pid")),
    ]


@contextlib.contextmanager
def running(command: Sequence[str | Path], pidfile: Path) -> Iterator[int]:
    """A relay in the foreground of a child process, from the pidfile to SIGTERM."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        b.wait_until(f"{pidfile} of the relay", lambda: pidfile.exists() or process.poll() is not None)
        if process.poll() is not None:
            sys.exit(f"the relay ended with {process.returncode}: {' '.join(map(str, command))}")
        yield int(pidfile.read_text())
    finally:
        b.stop(process, grace_s=45)


@contextlib.contextmanager
def relay(state: Path, name: str, port: int) -> Iterator[b.Target]:
    """The relay as bench/serve runs it, on an empty queue, with its sink on the port above."""
    shutil.rmtree(state / name, ignore_errors=True)
    sink = b.Sink(port + 1)
    try:
        with running([HERE / "serve", *relay_options(state, name, port, RECIPIENTS)], state / f"{name}.pid") as pid:
            yield b.Target(name, "127.0.0.1", port, [pid], sink)
    finally:
        sink.close()


@contextlib.contextmanager
def servers(state: Path, port: int, names: Sequence[str], processes: int = 150) -> Iterator[list[b.Target]]:
    """Some of the three servers, fresh."""
    recipients(state, RECIPIENTS)
    with contextlib.ExitStack() as held:
        targets = []
        for place, name in enumerate((BASE, EXPRESS, DURABLE)):
            if name in names:
                at = port + 10 * place
                server = postfix(state, at, processes) if name == BASE else relay(state, name, at)
                targets.append(held.enter_context(server))
        yield targets


# ------------------------------------------------------------------------------------------------------------- logins
def auth(state: Path, port: int, reps: int) -> Iterator[b.Figure]:
    """Everything about logins: against Postfix with Cyrus SASL, and against a slapd."""
    users = state / "users"
    everybody = [logins.USER, *logins.accounts()]
    users.write_text("".join(f"{name}:{logins.PASSWORD}:x@example.com\n" for name in everybody))
    users.chmod(0o600)
    recipients(state, RECIPIENTS)
    with postfix(state, port, 150, port + 2) as reference:
        at = port + 10
        shutil.rmtree(state / EXPRESS, ignore_errors=True)
        options = relay_options(state, EXPRESS, at, RECIPIENTS)
        options += ["--listen-587", f"127.0.0.1:{at + 3}", "--users", str(users)]
        with running([HERE / "serve", *options], state / f"{EXPRESS}.pid") as pid:
            base = b.Target(BASE, "127.0.0.1", port + 2, reference.roots)
            ours = b.Target(EXPRESS, "127.0.0.1", at + 3, [pid])
            yield from logins.compare([base, ours], reps, 2.0)
            yield logins.cram_md5(EXPRESS)
            yield from logins.under_attack(ours, min(reps, 3), 3.0)
            yield from logins.pairs(ours, "file")
    with directory(state, port + 20) as (ours, slapd):
        yield from logins.by_bind(ours, reps, 2.0, slapd)
        yield from logins.pairs(ours, "LDAP")


@contextlib.contextmanager
def directory(state: Path, port: int) -> Iterator[tuple[b.Target, int]]:
    """The relay with `--auth ldap` before a slapd of its own, and the pid of that."""
    name = "ldap"
    for folder in (state / name, state / "slapd"):
        shutil.rmtree(folder, ignore_errors=True)
    (state / "slapd").mkdir()
    entries, _ = openldap_tree(0)
    place = f"ou=People,{BASE_DN['openldap']}"
    entries += [
        ldif(f"uid={name},{place}", ["inetOrgPerson"], uid=name, cn="x", sn="x", mail=f"{name}@example.com",
             userPassword=logins.PASSWORD)
        for name in logins.accounts()
    ]  # fmt: skip
    server = Slapd(state / "slapd", "openldap", entries, Authority())
    try:
        secret = state / "slapd" / "secret"
        secret.write_text(SLAPD_PASSWORD)
        options = relay_options(state, name, port, RECIPIENTS)
        options += ["--listen-587", f"127.0.0.1:{port + 3}", "--auth", "ldap", "--ldap", server.tls_url]
        options += ["--ldap-ca", str(server.ca_file), "--ldap-preset", "openldap", "--ldap-base", place]
        options += ["--ldap-bind", SERVICE["openldap"], "--ldap-password-file", str(secret), "--domains", "example.com"]
        with running([HERE / "serve", *options], state / f"{name}.pid") as pid:
            yield b.Target(EXPRESS, "127.0.0.1", port + 3, [pid]), server.pid
    finally:
        server.close()


# -------------------------------------------------------------------------------------------------------- time to 220
def first_220(state: Path, port: int, reps: int) -> b.Figure:
    """Seconds from `relay serve` to its first 220, on a snapshot that is there already."""
    name = "start"
    pidfile = state / f"{name}.pid"
    shutil.rmtree(state / name, ignore_errors=True)
    with running([HERE / "serve", *relay_options(state, name, port, START_RECIPIENTS)], pidfile):
        pass
    serve: list[str | Path] = [
        sys.executable,
        "-m",
        "relay",
        "serve",
        "--config",
        str(state / name / "relay.toml"),
        "--pidfile",
        pidfile,
    ]
    rounds = []
    for _ in range(reps):
        pidfile.unlink(missing_ok=True)
        start = time.monotonic()
        process = subprocess.Popen(serve, stdout=sys.stderr)
        try:
            while process.poll() is None and not _greeted(port):
                time.sleep(0.002)
            rounds.append({EXPRESS: time.monotonic() - start})
            if process.poll() is not None:
                sys.exit(f"relay serve ended with {process.returncode}")
        finally:
            b.stop(process, grace_s=45)
    return b.figure(f"first 220, {START_RECIPIENTS:,} addresses", "s", rounds)


def _greeted(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            return connection.recv(3) == b"220"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------------- output
def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on."""
    command = [b.tool("findmnt"), "--noheadings", "--output", "FSTYPE", "--target", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def conditions(state: Path) -> str:
    """What the figures were taken under."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    version = subprocess.run(
        [b.tool("postconf"), "-d", "-h", "mail_version"], capture_output=True, text=True, check=True
    )
    return ", ".join(
        (
            dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            f"{os.cpu_count()} cores ({models[0] if models else platform.machine()})",
            f"Linux {platform.release()}",
            f"Python {platform.python_version()}",
            f"Postfix {version.stdout.strip()}",
            f"{file_system(state)}, {fsync.floor(state):.0f} appends of 4 KB with fsync/s",
            f"{RECIPIENTS:,} recipients",
            f"load {os.getloadavg()[0]:.1f} at the start",
        )
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def row(figure: b.Figure) -> str:
    """One line of the table."""
    wanted = WANTED.get(figure.measure)
    cells = [figure.measure, figure.unit, _number(figure.values.get(BASE))]
    for name in (EXPRESS, DURABLE):
        ratio = figure.ratios.get(name) if BASE in figure.values else None
        cells += [
            _number(figure.values.get(name)),
            "–" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}",
            wanted.cell(figure, name) if wanted else "",
        ]
    return "| " + " | ".join(cells) + " |"


HEAD: Final = (
    "| measure | unit | Postfix | express | × | wanted | durable | × | wanted |",
    "|---|---|--:|--:|--:|---|--:|--:|---|",
)


def figures(parts: Sequence[str], scenarios: Sequence[str], reps: int, state: Path, port: int) -> Iterator[b.Figure]:
    """Every figure of the parts asked for, as it comes."""
    everyone = (BASE, EXPRESS, DURABLE)
    if "compare" in parts:
        with servers(state, port, everyone) as targets:
            yield from compare.measure(targets, scenarios, reps, 1.5)
    if "attack" in parts:
        with servers(state, port, everyone) as targets:
            yield from attack.measure(targets, reps, 1.5)
    if "idle" in parts:
        with servers(state, port, everyone, processes=IDLE_CONNECTIONS + 100) as targets:
            yield from idle.measure(targets, IDLE_CONNECTIONS)
    if "memory" in parts:
        with servers(state, port, (EXPRESS, DURABLE)) as targets:
            yield from memory.measure(targets)
    if "auth" in parts:
        yield from auth(state, port, reps)
    if "start" in parts:
        yield first_220(state, port + 30, reps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=(*PARTS, "fsync"), help="default: all but fsync")
    parser.add_argument("--scenario", action="append", choices=list(compare.SCENARIOS), help="of compare")
    parser.add_argument("--reps", type=int, default=5, help="repetitions whose median counts")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "relay-bench", metavar="FOLDER")
    parser.add_argument("--port", type=int, default=2600, help="the first of some 40 ports")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the servers are stopped
    state: Path = options.state.absolute()
    state.mkdir(parents=True, exist_ok=True)
    parts = options.part or PARTS
    if "fsync" in parts:
        subprocess.run([sys.executable, HERE / "fsync.py", state], check=True)
        if parts == ["fsync"]:
            return
    if os.geteuid() != 0:
        sys.exit("bench/run.py: root is needed, for Postfix's master process")
    print(f"Medians of {options.reps}, interleaved; {conditions(state)}.\n", *HEAD, sep="\n", flush=True)
    for figure in figures(parts, options.scenario or compare.TABLE, options.reps, state, options.port):
        b.say(str(figure))
        print(row(figure), flush=True)


if __name__ == "__main__":
    main()
