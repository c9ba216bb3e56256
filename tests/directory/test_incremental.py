"""Reading what changed (row R8): after each change the snapshot is what a whole reading makes of the directory, and it was none."""

from __future__ import annotations

import base64
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.cli.readings import remembered, remembered_lines
from relay.directory import ber
from relay.directory.kept import path_of
from relay.directory.key import read_key
from relay.directory.passwords import read_passwords
from relay.directory.snapshot import ACCEPT, RESTRICTED, Snapshot
from relay.directory.sync import Extent, Outcome, Purpose, synchronise
from tests.bed.ldap_faults import ENTRY, Break, FaultProxy, inside, tlv
from tests.bed.slapd import BASE, DOMAINS, Slapd, Truth, ldif
from tests.directory.conftest import Site

pytestmark = pytest.mark.needs("slapd", "ldapmodify")
DC = "cn=NTDS Settings,cn=DC1,dc=corp,dc=test"


def add(text: str) -> str:
    """An entry as a change record."""
    return text.replace("\nobjectClass", "\nchangetype: add\nobjectClass", 1)


class Place:
    """A site that reads what changed, and one beside it that reads everything, with the same key."""

    def __init__(self, folder: Path, profile: dict[str, Any], domains: tuple[str, ...], **directory: Any) -> None:
        self.folder, self.profile, self.domains = folder, profile, domains
        self.site = Site(folder / "site", profile, domains=domains, **directory)
        self.config = self.site.config

    def sync(self, purpose: Purpose = Purpose.ASKED, extent: Extent = Extent.CHANGES) -> Outcome:
        passwords = read_passwords(self.config, {})
        return synchronise(self.config, passwords, purpose, time.time(), lambda _, __: None, extent=extent)

    def take(self, kind: str) -> dict[str, Any]:
        """A reading of that kind that is taken; what it says about itself."""
        outcome = self.sync()
        assert outcome.reason == "", outcome.why
        (reading,) = outcome.readings
        assert (outcome.kind, reading["kind"]) == (kind, kind), reading["why"]
        return reading

    def right(self, kind: str = "incremental") -> Snapshot:
        """Read, and the same as if all were read anew."""
        self.take(kind)
        shutil.rmtree(self.folder / "whole", ignore_errors=True)
        whole = Site(self.folder / "whole", self.profile, domains=self.domains, key_file=self.config.key_path)
        assert whole.good().kind == "full"
        ours, theirs = self.site.snapshot, Snapshot.open(whole.config.snapshot_path, read_key(self.config.key_path))
        assert list(ours.tables.hashes) == list(theirs.tables.hashes)
        assert said(ours) == said(theirs)
        assert ours.origin["counts"] == theirs.origin["counts"]
        return ours


def said(snapshot: Snapshot) -> list[object]:
    return [snapshot.tables.records[place] for place in snapshot.tables.places]


class TestOpenldap:
    """entryUUID, entryCSN, contextCSN."""

    people = f"ou=People,{BASE['openldap']}"
    groups = f"ou=Groups,{BASE['openldap']}"

    @pytest.fixture
    def place(self, tmp_path: Path, openldap: tuple[Slapd, Truth]) -> Place:
        made = Place(tmp_path, openldap[0].profile(base=self.people), DOMAINS["openldap"])
        made.take("full")
        return made

    def test_adds_changes_moves_renames_and_deletions_show(self, place: Place, openldap: tuple[Slapd, Truth]) -> None:
        server, _ = openldap
        people, groups = self.people, self.groups

        def person(uid: str, parent: str = people, **more: str) -> str:
            return add(
                ldif(f"uid={uid},{parent}", ["inetOrgPerson", "dmzRelayAccount"], uid=uid, cn=uid, sn=uid, **more)
            )

        server.modify(person("new", mail="new@example.org", mailAlternateAddress="alias@example.net"))
        assert place.right().lookup("alias@example.net") & ACCEPT
        server.modify(f"dn: uid=new,{people}\nchangetype: modify\ndelete: mailAlternateAddress\n")
        found = place.right()
        assert found.lookup("new@example.org") & ACCEPT
        assert not found.lookup("alias@example.net")
        server.modify(
            f"dn: uid=new,{people}\nchangetype: modify\nreplace: smtpdSenderRestrictions\nsmtpdSenderRestrictions: no\n"
        )
        assert place.right().lookup("new@example.org") & RESTRICTED
        server.modify(f"dn: uid=new,{people}\nchangetype: modify\ndelete: mail\n")
        assert not place.right().lookup("new@example.org")
        server.modify(f"dn: uid=new,{people}\nchangetype: modify\nadd: mail\nmail: new@example.org\n")
        assert place.right().lookup("new@example.org") & ACCEPT
        server.modify(
            f"dn: uid=new,{people}\nchangetype: modrdn\nnewrdn: uid=new\ndeleteoldrdn: 0\nnewsuperior: {groups}\n"
        )
        assert not place.right().lookup("new@example.org")
        server.modify(
            f"dn: uid=new,{groups}\nchangetype: modrdn\nnewrdn: uid=new\ndeleteoldrdn: 0\nnewsuperior: {people}\n"
        )
        assert place.right().lookup("new@example.org") & ACCEPT
        server.modify(f"dn: uid=new,{people}\nchangetype: delete\n")
        assert not place.right().lookup("new@example.org")
        # A parent that is renamed changes nothing of its children; moved out of the base and back, it takes them with it.
        team = f"ou=Team,{people}"
        server.modify(add(ldif(team, ["organizationalUnit"], ou="Team")))
        server.modify(person("one", team, mail="one@example.org"))
        place.right()
        server.modify(f"dn: {team}\nchangetype: modrdn\nnewrdn: ou=Crew\ndeleteoldrdn: 1\n")
        assert place.right().lookup("one@example.org") & ACCEPT
        server.modify(
            f"dn: ou=Crew,{people}\nchangetype: modrdn\nnewrdn: ou=Crew\ndeleteoldrdn: 0\nnewsuperior: {groups}\n"
        )
        assert not place.right().lookup("one@example.org")
        server.modify(
            f"dn: ou=Crew,{groups}\nchangetype: modrdn\nnewrdn: ou=Crew\ndeleteoldrdn: 0\nnewsuperior: {people}\n"
        )
        assert place.right().lookup("one@example.org") & ACCEPT
        server.modify(f"dn: uid=one,ou=Crew,{people}\nchangetype: delete\n\ndn: ou=Crew,{people}\nchangetype: delete\n")
        assert not place.right().lookup("one@example.org")

    def test_where_nothing_changed_no_entry_is_read(self, place: Place, openldap: tuple[Slapd, Truth]) -> None:
        reading = place.take("incremental")
        assert reading["changed"] == 0
        assert reading["entries"] > 2000
        assert place.site.snapshot.recipients == reading["addresses"]

    def test_groups_joined_and_left_show(self, tmp_path: Path, openldap: tuple[Slapd, Truth]) -> None:
        server, _ = openldap
        staff, inner = f"cn=staff,{self.groups}", f"cn=inner,{self.groups}"
        server.modify(
            add(ldif(inner, ["groupOfNames"], cn="inner", member=[f"uid=user20,{self.people}"])) + "\n"
            + add(ldif(staff, ["groupOfNames"], cn="staff", member=[inner, f"uid=user30,{self.people}"]))
        )  # fmt: skip
        place = Place(tmp_path, server.profile(groups=[staff]), DOMAINS["openldap"])
        place.right("full")
        place.right("incremental")
        before = place.site.snapshot.recipients
        server.modify(f"dn: {inner}\nchangetype: modify\nadd: member\nmember: uid=user40,{self.people}\n")
        assert place.right("full").recipients > before
        server.modify(f"dn: {staff}\nchangetype: modify\ndelete: member\nmember: {inner}\n")
        assert place.right("full").recipients < before
        server.modify(f"dn: {staff}\nchangetype: delete\n\ndn: {inner}\nchangetype: delete\n")

    def test_an_outcome_that_a_guard_refuses_is_read_as_a_whole_first_and_the_next_goes_on_from_the_old_one(
        self, tmp_path: Path, openldap: tuple[Slapd, Truth]
    ) -> None:
        server, _ = openldap
        profile = server.profile(base=self.people, filter="(&(mail=*)(uid=user5*))")
        place = Place(tmp_path, profile, DOMAINS["openldap"], shrink=0.1, shrink_floor=5)
        place.take("full")
        before = path_of(place.config.snapshot_path, "openldap").read_bytes()
        names = [f"uid=user5{n:02},{self.people}" for n in range(60)]
        server.modify("".join(f"dn: {n}\nchangetype: modify\nreplace: sn\nsn: changed\n\n" for n in names))
        place.take("incremental")
        after = path_of(place.config.snapshot_path, "openldap").read_bytes()
        assert after != before
        server.modify("".join(f"dn: {n}\nchangetype: modify\ndelete: mail\n\n" for n in names))
        outcome = place.sync()
        assert (outcome.reason, outcome.kind) == ("shrunk", "full")
        assert path_of(place.config.snapshot_path, "openldap").read_bytes() == after
        assert place.sync(Purpose.ACCEPT).reason == ""
        place.right("incremental")

    def test_what_is_kept_holds_no_address_and_is_for_one_user_alone(self, place: Place) -> None:
        kept = path_of(place.config.snapshot_path, "openldap")
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        data = kept.read_bytes()
        assert len(data) > 50_000
        assert b"user1" not in data
        assert b"alias" not in data

    def test_what_is_kept_is_not_used_when_it_is_damaged_or_of_another_configuration(
        self, tmp_path: Path, place: Place, openldap: tuple[Slapd, Truth]
    ) -> None:
        kept = path_of(place.config.snapshot_path, "openldap")
        data = kept.read_bytes()
        kept.write_bytes(data[: len(data) // 2])
        assert "cannot be used" in place.take("full")["why"]
        changed = openldap[0].profile(base=self.people, domains=["example.org"])
        other = Place(tmp_path, changed, DOMAINS["openldap"], shrink=1.0)
        assert "configuration" in other.take("full")["why"]
        assert place.sync(extent=Extent.EVERYTHING).kind == "full"
        assert place.take("incremental")
        often = Place(tmp_path, place.profile, DOMAINS["openldap"], full_every_s=0.0)
        assert "full_every_s" in often.take("full")["why"]
        assert not kept.exists()

    def test_the_status_says_of_which_kind_the_last_one_was(self, place: Place) -> None:
        place.take("incremental")
        found = remembered(place.config, time.time())
        assert found["kind"] == "incremental"
        assert any("incremental, in" in text for _, text in remembered_lines(found))


class Controller:
    """What a domain controller says of itself, laid over the answers of a slapd."""

    def __init__(self, target: int) -> None:
        self.proxy = FaultProxy(target)
        self.proxy.act = self.act
        self.usn = 100_000
        self.service = DC
        self.broken_after = 0
        """Break the connection at this entry of the next connection; 0 for never."""

    def act(self, message: bytes, operation: int, before: int) -> bytes:
        if operation == ENTRY and self.broken_after and before >= self.broken_after:
            self.broken_after = 0
            raise Break("reset")
        found = ber.message(message, 0)
        if operation != ENTRY or found is None:
            return message
        name, attributes = ber.entry(found)
        if name:
            return message
        more = {
            **attributes,
            "dsServiceName": [self.service.encode()],
            "highestCommittedUSN": [str(self.usn).encode()],
            "dnsHostName": [b"dc1.corp.test"],
        }
        listed = b"".join(
            tlv(0x30, tlv(4, kind.encode()) + tlv(0x31, b"".join(tlv(4, value) for value in values)))
            for kind, values in more.items()
        )
        number, _ = inside(message)
        return tlv(0x30, number + tlv(ENTRY, tlv(4, b"") + tlv(0x30, listed)))


@pytest.fixture(scope="module")
def settings(ad: tuple[Slapd, Truth]) -> None:
    """The objects that stand for the database of each domain controller."""
    for n in (1, 2):
        dc = f"cn=DC{n},{BASE['ad']}"
        ad[0].modify(
            add(ldif(dc, ["user"], cn=f"DC{n}"))
            + add(ldif(f"cn=NTDS Settings,{dc}", ["user"], cn="NTDS Settings", invocationId=bytes([n]) * 16))
        )


class TestActiveDirectory:
    """objectGUID, uSNChanged, and who is asked."""

    staff = f"ou=Staff,{BASE['ad']}"

    @pytest.fixture
    def controller(self, ad: tuple[Slapd, Truth]) -> Iterator[Controller]:
        made = Controller(ad[0].port)
        yield made
        made.proxy.close()

    @pytest.fixture
    def place(self, tmp_path: Path, ad: tuple[Slapd, Truth], controller: Controller, settings: None) -> Place:
        profile = ad[0].profile(servers=[controller.proxy.url], insecure=True, ca_file=None)
        made = Place(tmp_path, profile, DOMAINS["ad"])
        made.take("full")
        return made

    def person(self, name: str, guid: bytes, usn: int, *addresses: str) -> str:
        proxies: list[str] = [f"smtp:{one}" for one in addresses]
        return add(
            ldif(
                f"cn={name},{self.staff}",
                ["user"],
                cn=name,
                objectGUID=guid,
                uSNChanged=str(usn),
                proxyAddresses=proxies,
            )
        )

    def test_adds_changes_deletions_and_restores_show(
        self, place: Place, ad: tuple[Slapd, Truth], controller: Controller
    ) -> None:
        server, guid = ad[0], b"one-of-16-octets"

        def bump() -> int:
            controller.usn += 3
            return controller.usn

        server.modify(self.person("Fresh", guid, bump(), "fresh@corp.test", "alias@corp.test"))
        assert place.right().lookup("alias@corp.test") & ACCEPT
        name = f"cn=Fresh,{self.staff}"
        server.modify(
            f"dn: {name}\nchangetype: modify\ndelete: proxyAddresses\nproxyAddresses: smtp:alias@corp.test\n-\n"
            f"replace: uSNChanged\nuSNChanged: {bump()}\n"
        )
        assert not place.right().lookup("alias@corp.test")
        # A change that no stamp tells of is what a whole reading is for; it proves that the others were none.
        server.modify(f"dn: {name}\nchangetype: modify\nadd: proxyAddresses\nproxyAddresses: smtp:unseen@corp.test\n")
        assert place.take("incremental")["changed"] == 0
        assert not place.site.snapshot.lookup("unseen@corp.test")
        assert place.sync(extent=Extent.EVERYTHING).kind == "full"
        assert place.site.snapshot.lookup("unseen@corp.test") & ACCEPT
        server.modify(
            f"dn: {name}\nchangetype: modify\ndelete: proxyAddresses\n-\nreplace: uSNChanged\nuSNChanged: {bump()}\n"
        )
        assert not place.right().lookup("fresh@corp.test")
        server.modify(f"dn: {name}\nchangetype: delete\n")
        place.right()
        # Back with its old id and its old stamp, as when a parent comes back into the base.
        server.modify(self.person("Fresh", guid, 5, "fresh@corp.test"))
        reading = place.take("incremental")
        assert reading["changed"] == 1
        assert place.site.snapshot.lookup("fresh@corp.test") & ACCEPT
        server.modify(f"dn: {name}\nchangetype: delete\n")
        assert not place.right().lookup("fresh@corp.test")

    def test_another_controller_another_database_or_an_older_state_means_everything(
        self, place: Place, ad: tuple[Slapd, Truth], controller: Controller
    ) -> None:
        controller.service = DC.replace("DC1", "DC2")
        assert "another server" in place.take("full")["why"]
        place.take("incremental")
        ad[0].modify(
            f"dn: {controller.service}\nchangetype: modify\nreplace: invocationId\n"
            f"invocationId:: {base64.b64encode(b'x' * 16).decode()}\n"
        )
        assert "invocationId" in place.take("full")["why"]
        controller.usn -= 50
        assert "restored" in place.take("full")["why"]
        place.take("incremental")
        controller.service = f"cn=nobody,{BASE['ad']}"
        assert "invocationId" in place.take("full")["why"]
        assert not path_of(place.config.snapshot_path, "ad").exists()

    @pytest.mark.parametrize("entry", [1, 1200, 2000])
    def test_a_connection_that_breaks_leaves_snapshot_and_what_is_kept_as_they_were(
        self, place: Place, ad: tuple[Slapd, Truth], controller: Controller, entry: int
    ) -> None:
        before = place.site.snapshot.generation
        controller.usn += 1
        ad[0].modify(self.person(f"Late {entry}", bytes([entry % 251]) * 16, controller.usn, f"late{entry}@corp.test"))
        controller.broken_after = entry
        outcome = place.sync()
        assert outcome.reason == "lost", outcome
        assert place.site.snapshot.generation == before
        assert place.right().lookup(f"late{entry}@corp.test") & ACCEPT
        ad[0].modify(f"dn: cn=Late {entry},{self.staff}\nchangetype: delete\n")


def test_a_directory_without_stamps_is_read_as_a_whole_each_time(
    make_site: Callable[..., Site], ad: tuple[Slapd, Truth]
) -> None:
    site = make_site(ad[0])
    for _ in range(2):
        outcome = site.good()
        assert outcome.kind == "full"
        assert "does not say where it stands" in outcome.readings[0]["why"]
    assert not path_of(site.config.snapshot_path, "ad").exists()
