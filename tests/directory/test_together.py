"""A directory and files in one snapshot: who says what, who is heard, and addresses that two entries claim."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.directory.snapshot import ACCEPT, RESTRICTED
from relay.directory.sync import Purpose
from tests.bed.slapd import BASE, Slapd, Truth
from tests.directory.conftest import Site

pytestmark = pytest.mark.needs("slapd", "ldapmodify")
PEOPLE = f"ou=People,{BASE['openldap']}"

FILES = {
    "list": "listed@example.org\n",
    "aliases": "Alias: SMTP:Virtual@example.org, smtp:second@example.net, X400:c=de\n",
    "map": "mapped@example.org OK\nleft@example.org 550 5.1.1 Has left\n@example.net 450 4.2.1 Moving\n",
    "overrides": "{user} 550 5.1.1 Not any more\nnew@example.org OK\n",
    "restricted": "{user} Ask first\nforeign@elsewhere.example\n",
    "ldif": "dn: cn=x\nmail: ldif@example.org\nproxyAddresses: smtp:ldif2@example.org\nsmtpdSenderRestrictions: TRUE\n",
}


def test_files_and_a_directory_join_and_overrides_stand_over_both(
    openldap: tuple[Slapd, Truth], make_site: Callable[..., Site], tmp_path: Path
) -> None:
    server, truth = openldap
    user = min(truth.valid - truth.restricted)
    sources: list[dict[str, Any]] = []
    for kind, text in FILES.items():
        path = tmp_path / kind
        path.write_text(text.replace("{user}", user))
        sources.append({"type": kind, "path": path})
    site = make_site(server, sources=sources)
    site.good()
    snapshot = site.snapshot
    added = {
        "listed@example.org", "virtual@example.org", "second@example.net", "mapped@example.org", "ldif@example.org",
        "ldif2@example.org",
    }  # fmt: skip
    assert {address for address in truth.valid | added if not snapshot.lookup(address) & ACCEPT} == set()
    assert snapshot.recipients == len(truth.valid | added)
    assert {address for address in truth.restricted if not snapshot.lookup(address) & RESTRICTED} == set()
    over = snapshot.entry(user)
    assert over is not None
    assert over.ruling is not None
    assert (over.ruling.text, over.text, bool(over.flags & RESTRICTED)) == ("Not any more", "Ask first", True)
    for key, text in (("left@example.org", "Has left"), ("@example.net", "Moving"), ("new@example.org", "")):
        entry = snapshot.entry(key)
        assert entry is not None
        assert entry.ruling is not None
        assert entry.ruling.text == text
    assert snapshot.lookup("foreign@elsewhere.example") == RESTRICTED
    assert site.good().unchanged  # and the next reading says the same


def test_an_address_of_two_entries_is_counted_and_named_and_both_are_heard(
    openldap: tuple[Slapd, Truth], make_site: Callable[..., Site]
) -> None:
    server, _ = openldap
    person = "dn: uid={uid},{place}\nchangetype: add\nobjectClass: inetOrgPerson\nobjectClass: dmzRelayAccount\nuid: {uid}\ncn: x\nsn: x\nmail: {mail}\n\n"
    for uid in ("twin1", "twin2"):
        server.modify(person.format(uid=uid, place=PEOPLE, mail="Twin@example.org"))
    try:
        site = make_site(server)
        looked = site.sync(Purpose.DRY_RUN)
        assert (looked.twice, looked.twice_names) == (1, ("twin@example.org",))
        taken = site.good()
        assert taken.twice == 1
        assert site.snapshot.lookup("twin@example.org") & ACCEPT
        assert json.loads(json.dumps(taken.plain()))["twice"] == 1
        # One of them is restricted: so is the address, whichever of the two the server names last.
        server.modify(
            f"dn: uid=twin1,{PEOPLE}\nchangetype: modify\nadd: smtpdSenderRestrictions\nsmtpdSenderRestrictions: TRUE\n\n"
        )
        site.good()
        assert site.snapshot.lookup("twin@example.org") & RESTRICTED
    finally:
        server.modify("".join(f"dn: uid={uid},{PEOPLE}\nchangetype: delete\n\n" for uid in ("twin1", "twin2")))
