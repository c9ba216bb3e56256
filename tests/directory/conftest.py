"""Directories for the tests of this folder: one slapd of each kind for a module, the relay's own functions called in place."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.config.schema import Config
from relay.directory.key import read_key
from relay.directory.passwords import read_passwords
from relay.directory.snapshot import ACCEPT, NEEDS_AUTH, RESTRICTED, Snapshot
from relay.directory.sync import Outcome, Purpose, synchronise
from tests.bed.certificates import Authority
from tests.bed.slapd import DOMAINS, Slapd, Truth, ad_tree, openldap_tree

COUNT = 2300  # three pages


class Site:
    """A spool and a configuration; ``sync`` is what the hub and the commands call."""

    def __init__(self, folder: Path, *profiles: dict[str, Any], domains: tuple[str, ...], **directory: Any) -> None:
        self.config = Config.model_validate({
            "server": {"hostname": "mx.example.com", "spool": folder / "spool"},
            "process": {"user": "", "hub_user": ""},
            "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
            "domain": [{"names": list(domains)}],
            "route": [{"domains": ["*"], "next_hops": ["smtp:[127.0.0.1]:26"]}],
            "directory": {"ldap": list(profiles), **directory},
        })  # fmt: skip
        self.environ: dict[str, str] = {}

    def sync(self, purpose: Purpose = Purpose.ASKED) -> Outcome:
        passwords = read_passwords(self.config, self.environ)
        return synchronise(self.config, passwords, purpose, time.time(), lambda _, __: None)

    def good(self) -> Outcome:
        outcome = self.sync()
        assert outcome.reason == "", outcome.why
        return outcome

    def good_in(self, seconds: float) -> Outcome:
        """A reading that has all the time, where the profile is an impatient one."""
        impatient = self.config
        patient = [
            profile.model_copy(update={"answer_timeout_s": seconds, "connect_timeout_s": seconds})
            for profile in impatient.directory.ldap
        ]
        self.config = impatient.model_copy(
            update={"directory": impatient.directory.model_copy(update={"ldap": patient})}
        )
        try:
            return self.good()
        finally:
            self.config = impatient

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot.open(self.config.snapshot_path, read_key(self.config.key_path))


def agrees(snapshot: Snapshot, truth: Truth) -> None:
    """Every address of the truth, and no other: the header's counts say that nothing else is in it."""
    lookup = snapshot.lookup
    assert {a for a in truth.valid if not lookup(a) & ACCEPT} == set()
    assert {a for a in truth.never if lookup(a) & ACCEPT} == set()
    assert snapshot.recipients == len(truth.valid)
    assert {a for a in truth.restricted if not lookup(a) & RESTRICTED} == set()
    assert snapshot.restricted == len(truth.restricted)
    assert {a for a in truth.valid if lookup(a) & NEEDS_AUTH} == truth.internal
    assert {a for a in truth.valid if snapshot.entry(a).size_limit} == truth.limited


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def ad(folder: Path, authority: Authority) -> Iterator[tuple[Slapd, Truth]]:
    place = folder / "ad"
    place.mkdir()
    entries, truth = ad_tree(COUNT)
    server = Slapd(place, "ad", entries, authority)
    yield server, truth
    server.close()


@pytest.fixture(scope="module")
def openldap(folder: Path, authority: Authority) -> Iterator[tuple[Slapd, Truth]]:
    place = folder / "openldap"
    place.mkdir()
    entries, truth = openldap_tree(COUNT)
    server = Slapd(place, "openldap", entries, authority)
    yield server, truth
    server.close()


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Site]:
    made = 0

    def make(server: Slapd, profile: dict[str, Any] | None = None, **directory: Any) -> Site:
        nonlocal made
        made += 1
        return Site(tmp_path / str(made), server.profile(**(profile or {})), domains=DOMAINS[server.kind], **directory)

    return make
