#!/usr/bin/env python3
"""Carries out the Dockerfile's steps without a container engine, then runs what came out as a container would be run.

usage: tools/check_image.py     (root; Debian package debootstrap; IMAGE_ROOT: where, default ${TMPDIR:-/tmp}/dmz-relay-image)

Each FROM is a bare Debian 12 root, each RUN a shell in it. The result is started as docs/deployment.md says: as the image's
user, without capabilities, on a read-only root, with a volume for the spool, in a network of its own. All mounts live in a
mount namespace, all processes in a process namespace, so that both are gone when the run ends, however it ends.

An instruction that is not known here is an error: nothing is skipped unseen.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

REPO: Final = Path(__file__).resolve().parents[1]
BASE: Final = "debian:bookworm-slim"
PHASE: Final = "DMZ_IMAGE_PHASE"
PATIENCE_S: Final = 60.0
AUTHORITIES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
MACHINES: Final = "etc/machines-authorities.pem"
"""Whom this machine trusts; a step that installs ca-certificates replaces the usual file, and pip would not get out."""
CONFIG: Final = """\
[server]
hostname = "mx.example.com"
[process]
user = ""
hub_user = ""
[[listener]]
name = "mx"
address = "0.0.0.0:25"
[[domain]]
names = ["example.com"]
recipients = "any"
[[route]]
domains = ["example.com"]
next_hops = ["smtp:[127.0.0.1]:2"]
[web]
listen = "0.0.0.0:9125"
"""
CLIENT: Final = """\
import smtplib
with smtplib.SMTP("127.0.0.1", 25, timeout=30) as client:
    client.sendmail("a@example.net", ["b@example.com"], "Subject: x\\r\\n\\r\\ny\\r\\n")
"""


@dataclass(frozen=True)
class Step:
    """One instruction: its name in capitals, and the rest of its lines joined."""

    name: str
    text: str


@dataclass
class Image:
    """A stage, as far as it was carried out."""

    root: str
    name: str = ""
    env: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    workdir: str = "/"
    user: str = "root"
    volumes: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    stop: str = "SIGTERM"


def read_steps(dockerfile: Path) -> list[Step]:
    """The instructions in order; comments and line ends inside them are gone."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [Step(*line.strip().split(None, 1)) for line in joined.splitlines() if line.strip()]


def included() -> Iterator[Path]:
    """What .dockerignore leaves of the tree: it excludes all and names what comes in."""
    rules = (REPO / ".dockerignore").read_text().split()
    assert rules[0] == "*", "another kind of .dockerignore than is understood here"
    yield from (REPO / rule[1:] for rule in rules if rule.startswith("!"))


class Builder:
    """Carries out the steps."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.stages: list[Image] = []
        self.folders = run("tools/bare-root", "folders").split()

    def carry_out(self, step: Step) -> None:
        """One step. Raises ValueError for what is not known here."""
        print(f"{step.name} {step.text}"[:120], file=sys.stderr, flush=True)
        if step.name == "FROM":
            self._begin(step.text)
            return
        image = self.stages[-1]
        match step.name:
            case "RUN":
                trusted = [f"PIP_CERT=/{MACHINES}"] if within(image, MACHINES).exists() else []
                inside(image, ["/usr/bin/env", *trusted, "/bin/sh", "-c", step.text])
            case "COPY":
                self._copy(image, step.text.split())
            case "ENV":
                for pair in shlex.split(step.text):
                    key, _, value = pair.partition("=")
                    image.env[key] = string.Template(value).safe_substitute(image.env)
            case "WORKDIR":
                image.workdir = step.text
                within(image, step.text).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = step.text
            case "VOLUME":
                image.volumes.append(step.text)
            case "STOPSIGNAL":
                image.stop = step.text
            case "HEALTHCHECK":
                image.health = json.loads(step.text.partition(" CMD ")[2])
            case "ENTRYPOINT":
                image.entrypoint = json.loads(step.text)
            case "CMD":
                image.command = json.loads(step.text)
            case "EXPOSE":
                pass  # for whoever reads it
            case _:
                raise ValueError(f"{step.name}: not known here")

    def _begin(self, text: str) -> None:
        base, _, name = text.partition(" AS ")
        if base != BASE:
            raise ValueError(f"FROM {base}: only {BASE} is known here")
        root = self.work / f"root-{len(self.stages)}"
        run("tools/bare-root", "unpack", self.work / "bookworm.tar", root)
        if AUTHORITIES.exists():
            shutil.copy(AUTHORITIES, root / MACHINES)
        run("mount", "--bind", root, root)
        run("mount", "-t", "proc", "proc", root / "proc")
        run("mount", "--bind", "/dev", root / "dev")
        for folder in self.folders:  # of this machine's way to packages
            (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            run("mount", "--bind", "-o", "ro", folder, root / folder.lstrip("/"))
        self.stages.append(Image(str(root), name))

    def _copy(self, image: Image, words: list[str]) -> None:
        *sources, to = words
        into = within(image, os.path.join(image.workdir, to))
        if sources[0].startswith("--from="):
            stage = next(one for one in self.stages if one.name == sources[0].removeprefix("--from="))
            found = [within(stage, source) for source in sources[1:]]
        else:
            found = [REPO / source for source in sources]
            left_out = [str(path) for path in found if path not in included()]
            if left_out:
                raise ValueError(f"COPY: .dockerignore leaves out {', '.join(left_out)}")
        for path in found:
            if path.is_dir():  # its contents, as COPY does
                ignore = None if sources[0].startswith("--") else shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                target = into / path.name if to.endswith("/") else into
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def run(*command: object) -> str:
    """A command of this machine; its output. Ends the run when it fails."""
    done = subprocess.run([str(word) for word in command], cwd=REPO, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout


def within(image: Image, path: str) -> Path:
    """A path of the image as this machine sees it."""
    return Path(image.root) / path.lstrip("/")


def words_inside(image: Image, command: Sequence[str]) -> list[str]:
    """A command as root in the image's root, with its environment and folder."""
    env = [f"{key}={value}" for key, value in image.env.items()]
    return [
        "chroot", image.root, "/usr/bin/env", "-i", *env,
        "/bin/sh", "-c", f'cd {shlex.quote(image.workdir)} && exec "$@"', "sh", *command,
    ]  # fmt: skip


def inside(image: Image, command: Sequence[str]) -> None:
    """The same, carried out; a failure is the end."""
    done = subprocess.run(words_inside(image, command), stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"a step failed with {done.returncode}")


def contained(image: Image, command: Sequence[str]) -> list[str]:
    """A command as a container runs it: the image's user, no capability, no way to get one."""
    account = next(line.split(":") for line in within(image, "/etc/passwd").read_text().splitlines()
                   if line.split(":")[0] == image.user)  # fmt: skip
    drop = [
        "/usr/bin/setpriv", f"--reuid={account[2]}", f"--regid={account[3]}", "--clear-groups", "--inh-caps=-all",
        "--bounding-set=-all", "--no-new-privs",
    ]  # fmt: skip
    return words_inside(image, [*drop, *command])


def build(work: Path) -> None:
    """Carry out all steps, and go on in a network of its own."""
    builder = Builder(work)
    for step in read_steps(REPO / "Dockerfile"):
        builder.carry_out(step)
    (work / "image.json").write_text(json.dumps(asdict(builder.stages[-1])))
    os.environ[PHASE] = "start"
    os.execvp("unshare", ["unshare", "--net", sys.executable, __file__])  # noqa: S606 - its own next phase


def start(work: Path) -> None:
    """Run the image, and say what was seen."""
    image = Image(**json.loads((work / "image.json").read_text()))
    run("ip", "link", "set", "lo", "up")
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0\n")
    _mount(image, work)
    wrote = subprocess.run(
        words_inside(image, ["/bin/sh", "-c", "touch /opt/x"]), stderr=subprocess.PIPE, text=True, check=False
    )
    _must("Read-only file system" in wrote.stderr, "the root file system is read-only, for root as well")

    health = contained(image, image.health)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    _must(subprocess.run(health, check=False, **quiet).returncode != 0, "the health check fails while nothing runs")
    relay = subprocess.Popen(contained(image, [*image.entrypoint, *image.command]))
    until = time.monotonic() + PATIENCE_S
    while subprocess.run(health, check=False, **quiet).returncode != 0:
        if relay.poll() is not None or time.monotonic() > until:
            sys.exit(f"NOT so: the entry point runs and is healthy within {PATIENCE_S:.0f} s")
        time.sleep(0.2)
    _must(relay.poll() is None, "the entry point runs, and the health check succeeds")
    statuses = [_status(process) for process in _family(relay.pid)]
    _must(len(statuses) >= 3, f"{len(statuses)} processes")
    _must(all("0" not in status["Uid"].split() for status in statuses), "none of them is root")
    none = all(int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0 for status in statuses)
    _must(none, "none has or can get a capability")
    sent = subprocess.run(contained(image, ["python3", "-c", CLIENT]), check=False)
    _must(sent.returncode == 0, "a message is taken on port 25")
    arguments = ["queue", "list", "--json", "--config", image.command[-1]]
    listed = subprocess.run(
        contained(image, [*image.entrypoint, *arguments]), stdout=subprocess.PIPE, text=True, check=False
    )
    _must(len(listed.stdout.splitlines()) == 1, "it is in the queue, on the volume")
    os.kill(relay.pid, signal.Signals[image.stop])
    _must(relay.wait(PATIENCE_S) == 0, f"{image.stop} ends it with exit code 0")


def _mount(image: Image, work: Path) -> None:
    """Volumes and configuration from outside, everything else read-only."""
    config = work / "config"
    config.mkdir()
    (config / Path(image.command[-1]).name).write_text(CONFIG)
    run("mount", "--bind", "-o", "ro", config, within(image, str(Path(image.command[-1]).parent)))
    for number, volume in enumerate(image.volumes):
        owner = within(image, volume).stat()  # a new volume has owner and mode of what it covers
        there = work / f"volume-{number}"
        there.mkdir(mode=owner.st_mode & 0o7777)
        os.chown(there, owner.st_uid, owner.st_gid)
        run("mount", "--bind", there, within(image, volume))
    run("mount", "-o", "remount,bind,ro", image.root)


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in _family(int(child)))]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _must(holds: bool, what: str) -> None:  # noqa: FBT001 - a condition and its words
    if not holds:
        sys.exit(f"NOT so: {what}")
    print(f"ok: {what}", flush=True)


def main() -> None:
    """The phases: outside, with namespaces for the steps, with a network for the run."""
    work = Path(os.environ.get("IMAGE_ROOT") or Path(tempfile.gettempdir()) / "dmz-relay-image").resolve()
    match os.environ.get(PHASE):
        case "build":
            build(work)
        case "start":
            start(work)
        case _:
            if os.getuid():
                sys.exit("tools/check_image.py needs root, for debootstrap and chroot")
            if work.is_relative_to(REPO):
                sys.exit(f"IMAGE_ROOT lies inside the tree: {work}")
            work.mkdir(parents=True, exist_ok=True)
            _clear(work)
            run("tools/bare-root", "make", work / "bookworm.tar", work / "root-0")
            done = subprocess.run(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "--mount-proc",
                 sys.executable, __file__],
                env={**os.environ, PHASE: "build", "IMAGE_ROOT": str(work)}, check=False,
            )  # fmt: skip
            _clear(work)
            sys.exit(done.returncode)


def _clear(work: Path) -> None:
    """Everything but the archive, which is kept for the next run."""
    for path in work.iterdir():
        if path.name not in {"bookworm.tar", "bookworm.tar.log"}:
            run("rm", "-rf", "--one-file-system", path)


if __name__ == "__main__":
    main()
