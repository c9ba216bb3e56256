"""Owns: the commands about directories that are read: sync, test, accept, history, rollback, audit. Decides nothing.

Each calls what the schedule calls; the reading runs in a child of the command's, as it does in the hub.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Final

import typer

from relay.cli import differences
from relay.cli.options import DEFAULT_CONFIG, EXIT_FAILED, CommandFailed, ConfigOption, JsonOption
from relay.cli.progress import ReadingProgress
from relay.config.ldap import LdapProfile, parse_server
from relay.config.load import load
from relay.config.schema import Config
from relay.directory import history as kept
from relay.directory import names
from relay.directory.build import only_build
from relay.directory.child import run, start
from relay.directory.failure import LdapFailure, Reason
from relay.directory.layout import SnapshotError
from relay.directory.passwords import read_passwords
from relay.directory.presets import plan
from relay.directory.reading import INCREMENTAL, Look, look
from relay.directory.servers import servers_of
from relay.directory.snapshot import inspect
from relay.directory.state import read_state, state_path, write_state
from relay.directory.sync import Extent, Outcome, Purpose
from relay.directory.weak import weaknesses

EXIT_GUARDED: Final = 3
"""The directory was read, and a guard holds the result back."""
GUARDED: Final = frozenset((Reason.SHRUNK, Reason.CANARY))
SHOWN: Final = 20
"""Addresses of a difference printed one by one; --json has more."""

_WIDTH: Final = 12

FullOption = Annotated[bool, typer.Option("--full", help="Read everything, and not only what changed.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Read and compare; change nothing.")]


def sync(
    dry_run: DryRunOption = False,
    full: FullOption = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Read the directories and sources now and put the result in place; running workers take it within a second.

    Exit code: 0 done, 1 could not be read, 3 a guard holds it back.
    """
    purpose = Purpose.DRY_RUN if dry_run else Purpose.ASKED
    extent = Extent.EVERYTHING if full else Extent.CHANGES
    sync_now(load(config, os.environ), purpose, extent, as_json=as_json)


def accept(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Read again, and let the losses through that the last reading was held back for, but no greater ones."""
    loaded = load(config, os.environ)
    if not read_state(state_path(loaded.snapshot_path)).refused:
        raise CommandFailed("no reading is held back; relay directory status says how the last one went")
    sync_now(loaded, Purpose.ACCEPT, as_json=as_json)


def sync_now(loaded: Config, purpose: Purpose, extent: Extent = Extent.CHANGES, *, as_json: bool) -> None:
    """Read, print, and end with the exit code. Raises CommandFailed."""
    try:
        reader = start(loaded, read_passwords(loaded, os.environ), purpose, extent=extent)
    except (SnapshotError, OSError) as error:
        raise CommandFailed(f"nothing was read: {error}") from None
    profiles = read_state(state_path(loaded.snapshot_path)).profiles
    show = ReadingProgress({name: int(reading["entries"]) for name, reading in profiles.items()})
    try:
        outcome = run(reader, loaded, show.told)
    finally:
        show.end()
    if as_json:
        typer.echo(json.dumps(outcome.plain(), indent=2))
    else:
        _print(outcome, purpose)
    if outcome.reason:
        raise typer.Exit(EXIT_GUARDED if outcome.reason in GUARDED else EXIT_FAILED)


def _print(outcome: Outcome, purpose: Purpose) -> None:
    for reading in outcome.readings:
        _line("read", f"{reading['entries']} entries of {reading['profile']} from {reading['server']}{_how(reading)}")
        for failed in reading["failed"]:
            _line("", f"before that: {failed}")
    for example in outcome.examples:
        typer.echo(f"left out: {example}", err=True)
    for reason, count in sorted(outcome.skipped.items()):
        _line("left out", f"{count} × {reason}")
    if outcome.twice:
        some = f": {', '.join(outcome.twice_names)}" if outcome.twice_names else "; --dry-run names them"
        _line("twice", f"{outcome.twice} addresses stand on two entries, and what is said of both holds{some}")
    found = outcome.difference
    if outcome.counts:
        for what, count in sorted(outcome.counts.items()):
            _line("", f"{count} {what}")
    if found and not (outcome.reason and not outcome.counts):
        _line("difference", f"{found['added']} added, {found['removed']} removed, {found['changed']} changed")
        if purpose is Purpose.DRY_RUN:
            signs = (
                ("+", "added_names", "added"),
                ("~", "changed_names", "changed"),
                ("-", "removed_names", "removed"),
            )
            for sign, which, number in signs:
                for address in found[which][:SHOWN]:
                    _line("", f"{sign} {address}")
                if found[which] and found[number] > SHOWN:
                    _line("", f"{sign} and {found[number] - SHOWN} more")
            for loss in found["losses"]:
                _line("", f"- {loss['gone']} of {loss['of']} {loss['what']}")
    if outcome.reason:
        typer.echo(f"relay: not taken ({outcome.reason}): {outcome.why}", err=True)
        typer.echo(f"       {outcome.cure}", err=True)
    elif outcome.generation:
        _line("generation", f"{outcome.generation}, after {outcome.seconds:.1f} s")


def _how(reading: dict[str, Any]) -> str:
    """Whether all of them were read, in words."""
    return f", {reading['changed']} of them new, changed or gone" if reading["kind"] == INCREMENTAL else ""


def trial(
    profile: Annotated[str, typer.Argument(metavar="[NAME]", help="One directory; all of them without it.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Try every server step by step: DNS, TCP, TLS, login, search; name the cause of a failure, and its cure.

    Changes nothing. Exit code 1 when any server fails.
    """
    loaded = load(config, os.environ)
    chosen = [one for one in loaded.directory.ldap if profile in {"", one.name}]
    if not chosen:
        raise CommandFailed(_none(loaded, profile))
    try:
        passwords = read_passwords(loaded, os.environ)
    except SnapshotError as error:
        raise CommandFailed(str(error)) from None
    looks = [one for profile in chosen for one in _looks(loaded, profile, passwords[profile.name])]
    if as_json:
        typer.echo(json.dumps([_plain(one) for one in looks], indent=2))
    else:
        for one in looks:
            typer.echo(f"{one.profile}: {one.server}")
            typer.echo(f"  asked   {_asked(loaded, one)}")
            for step, found in one.steps:
                typer.echo(f"  {step:7} ok      {found}")
            if one.failure is not None:
                typer.echo(f"  {one.failed_step:7} FAILED  {one.failure.what}")
                typer.echo(f"          cause   {one.failure.reason}")
                typer.echo(f"          cure    {one.failure.cure}")
    if any(one.failure is not None for one in looks):
        raise typer.Exit(EXIT_FAILED)


def _looks(loaded: Config, profile: LdapProfile, password: str) -> Iterator[Look]:
    try:
        servers = servers_of(loaded, profile)
    except LdapFailure as failure:  # of the DNS, for SRV records
        yield Look(profile.name, failure.where, (), "DNS", failure)
        return
    for server in servers:
        yield look(loaded, profile, server, password)


def _asked(loaded: Config, one: Look) -> str:
    """The whole question as an LDAP URL (RFC 4516), which other tools take."""
    profile = next(profile for profile in loaded.directory.ldap if profile.name == one.profile)
    made = plan(profile, loaded.directory.restriction_attribute)
    return str(profile.url(parse_server(one.server), made.addresses, made.filter))


def _none(loaded: Config, profile: str) -> str:
    names = ", ".join(one.name for one in loaded.directory.ldap)
    if profile and names:
        return f"there is no directory named {profile}; there are: {names}"
    return "no directory is configured; add a [[directory.ldap]] table"


def _plain(one: Look) -> dict[str, Any]:
    failure = one.failure
    said = None if failure is None else {"reason": failure.reason, "what": failure.what, "cure": failure.cure}
    steps = [{"step": step, "found": found} for step, found in one.steps]
    return {"directory": one.profile, "server": one.server, "steps": steps, "failed": one.failed_step, "failure": said}


def history(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """List the generations that relay directory rollback can go back to, newest first; with what the next one changed, where
    names are kept.
    """
    loaded = load(config, os.environ)
    headers = [header for _, header in kept.generations(loaded.snapshot_path)]
    found: list[dict[str, Any]] = [
        {"generation": h.generation, "created": h.created, "recipients": h.recipients, "restricted": h.restricted}
        for h in headers
    ]
    for one, changed in zip(found, differences.since(loaded, [h.generation for h in headers]), strict=True):
        one.update(changed)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        typer.echo("none yet: a generation is kept when another one that differs takes its place")
    for one in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["created"]))
        since = (
            f"; then {one['added']} added, {one['removed']} removed, {one['changed']} changed" if "added" in one else ""
        )
        _line(str(one["generation"]), f"{when}  {one['recipients']} recipients, {one['restricted']} restricted{since}")


def rollback(
    generation: Annotated[int | None, typer.Argument(help="One that relay directory history lists.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Put an earlier generation back in place, the newest one kept unless told otherwise.

    Scheduled readings then wait, or they would undo it; relay directory sync ends the waiting.
    """
    loaded = load(config, os.environ)
    now = time.time()
    try:
        with only_build(loaded) as place:
            before = inspect(place.path).generation
            was, snapshot = kept.go_back(place, generation, now, loaded.directory.history)
            names.keep_again(loaded, place, was, snapshot.generation)
            path = state_path(place.path)
            held = f"rolled back to generation {was}; relay directory sync goes on"
            write_state(path, replace(read_state(path), held=held), place.owner, place.group)
    except (SnapshotError, OSError) as error:
        raise CommandFailed(str(error)) from None
    _line("generation", f"{snapshot.generation} says what {was} said: {snapshot.recipients} recipients")
    if loaded.directory.names_max_age_s:
        differences.show_between(loaded, before, snapshot.generation)
    if loaded.directory.scheduled:
        _line("", "scheduled readings wait until relay directory sync")


def audit(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """List directories that are asked in clear, unverified or as nobody. Exit code 1 when there is any (row D11)."""
    loaded = load(config, os.environ)
    found = list(weaknesses(loaded))
    if as_json:
        typer.echo(json.dumps([{"directory": name, "server": server, "what": what} for name, server, what in found]))
    else:
        for name, server, what in found:
            typer.echo(f"{name}: {server}: {what}")
        if not found:
            typer.echo(f"{len(loaded.directory.ldap)} directories, all of them verified")
    if found:
        raise typer.Exit(EXIT_FAILED)


def remembered(config: Config, now: float) -> dict[str, Any]:
    """What ``relay directory status`` says about readings."""
    state = read_state(state_path(config.snapshot_path))
    try:
        age: float | None = now - inspect(config.snapshot_path).created
    except SnapshotError:
        age = None
    return {
        "last_success": state.succeeded,
        "last_attempt": state.tried,
        "since_success_s": round(now - state.succeeded, 3) if state.succeeded else None,
        "stale": age is None or age > config.directory.max_age_s,
        "reason": state.reason,
        "why": state.why,
        "cure": state.cure,
        "kind": state.kind,
        "seconds": state.seconds,
        "held": state.held,
        "refused": state.refused,
        "failures": state.failures,
        "profiles": state.profiles,
    }


def remembered_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same for people."""
    for name, reading in found["profiles"].items():
        expires = reading.get("certificate_expires")
        days = f", its certificate ends in {(expires - time.time()) / 86400:.0f} days" if expires else ""
        password = reading.get("password_expires")
        days += f", the account's password in {(password - time.time()) / 86400:.0f} days" if password else ""
        yield "directory", f"{name}: {reading['entries']} entries from {reading['server']}{days}"
    since = found["since_success_s"]
    took = f", {found['kind']}, in {found['seconds']:.1f} s" if found["kind"] else ""
    yield "last read", "never" if since is None else f"{since:.0f} s ago{took}"
    for name, reading in found["profiles"].items():
        if reading.get("why") and reading["why"] != "asked for":
            yield "", f"{name} was read in full: {reading['why']}"
    if found["reason"]:
        yield "not taken", f"{found['reason']}: {found['why']}"
        yield "", found["cure"]
    if found["held"]:
        yield "held", found["held"]
    if found["stale"]:
        yield "stale", "yes: unknown recipients get 451 (directory.stale)"


def _line(name: str, text: str) -> None:
    typer.echo(f"{name:{_WIDTH}}{text}")
