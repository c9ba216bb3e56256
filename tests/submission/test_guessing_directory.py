"""Ten thousand guesses from many addresses at accounts of a directory: never more binds than the budget; owners get in."""

from __future__ import annotations

import random
import secrets
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.bed.certificates import Authority
from tests.bed.relay import RelayRunner
from tests.bed.slapd import Slapd, ldif, openldap_tree
from tests.submission.directory_world import ROOT, person
from tests.submission.test_login import FAILED, OK, by_plain

pytestmark = pytest.mark.needs("slapd", "slapadd")

GUESSES = 10_000
ADDRESSES, ACCOUNTS, PER_SESSION = 50, 20, 25
BUDGET, LOCKOUT = 6, 5
BLOCKED = "454 4.7.0 Too many failed logins, try again later"
PASSWORD = "right"
POLICY = ldif(f"cn=default,ou=People,{ROOT}", ["device", "pwdPolicy"], cn="default", pwdAttribute="userPassword",
              pwdLockout="TRUE", pwdMaxFailure=str(LOCKOUT), pwdFailureCountInterval="3600")  # fmt: skip


def test_an_attacker_never_causes_more_binds_than_the_budget_and_owners_get_in(authority: Authority) -> None:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-guessing-"))
    folder.chmod(0o755)
    (folder / "slapd").mkdir()
    people = [
        person(f"user{number}", mail=f"u{number}@example.com", userPassword=PASSWORD) for number in range(ACCOUNTS)
    ]
    slapd = Slapd(folder / "slapd", "openldap", [*openldap_tree(0)[0], POLICY, *people], authority,
                  overlays=("overlay ppolicy", f"ppolicy_default cn=default,ou=People,{ROOT}"))  # fmt: skip
    (folder / "relay").mkdir()
    relay = RelayRunner(
        folder / "relay",
        "smtp:[127.0.0.1]:1",
        listeners={"mx": "mx", "submission": "submission"},
        certificate=authority.files(folder),
        config={
            "server": {"workers": 2},
            "limits": {"errors": 0},
            "auth": {
                "stores": [{"name": "people", "type": "ldap", "directory": "people"}],
                "account_failures": BUDGET,
                # Only the accounts' own budget is between the attacker and the directory.
                "client_failures": 10_000,
                "network_failures": 100_000,
                "failure_delay_s": 0.0,
            },
        },
    )
    relay.config["directory"]["ldap"] = [slapd.profile(name="people", base=f"ou=People,{ROOT}", recipients=False)]
    relay.configure({})

    def session(client: str, tries: list[tuple[str, str]]) -> list[str]:
        with relay.client("submission", source=client) as made:
            made.open()
            made.starttls(authority.client())
            made.ehlo()
            said = [by_plain(made, user, password) for user, password in tries]
            made.quit()
        return said

    def owner(number: int) -> str:
        return session(f"127.0.200.{number + 1}", [(f"user{number}", PASSWORD)])[0]

    try:
        relay.start()
        assert [owner(number) for number in range(ACCOUNTS)] == [OK] * ACCOUNTS
        dice = random.Random(5)
        spellings = ["user{}", "USER{}", "u{}@example.com", "U{}@Example.COM", " user{} "]
        work = [
            (f"127.0.{number % ADDRESSES + 1}.1",
             [(dice.choice(spellings).format(dice.randrange(ACCOUNTS)), secrets.token_hex(4)) for _ in range(PER_SESSION)])
            for number in range(GUESSES // PER_SESSION)
        ]  # fmt: skip
        with ThreadPoolExecutor(8) as pool:
            said = Counter(reply for replies in pool.map(lambda one: session(*one), work) for reply in replies)
        assert set(said) == {FAILED, BLOCKED}
        assert sum(said.values()) == len(work) * PER_SESSION
        assert [owner(number) for number in range(ACCOUNTS)] == [OK] * ACCOUNTS, "nobody is locked out, here or there"
        binds = [slapd.binds(f"uid=user{number},ou=People,{ROOT}") - 2 for number in range(ACCOUNTS)]
        assert max(binds) <= min(BUDGET, LOCKOUT - 1), binds
        assert said[FAILED] == sum(binds), "what is not a bind is blocked"
        assert relay.grep(r"auth_lockout store=people failures=5 window_s=3600")
    finally:
        try:
            relay.close()
        finally:
            slapd.close()
            shutil.rmtree(folder)
