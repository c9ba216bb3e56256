"""Mail that leaves goes out under the primary address of its sender, where an operator wants that (row R15)."""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.directory.build import Place
from relay.directory.key import address_hasher, read_key
from relay.directory.primary import Gathered, load, path_of, save
from relay.directory.snapshot import Directory
from tests.bed.certificates import Authority
from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.slapd import BASE, PASSWORD, SERVICE, Slapd, ldif
from tests.bed.slapd import _root as root
from tests.bed.wire import letter
from tests.directory.conftest import Site

pytestmark = pytest.mark.needs("slapd", "ldapmodify")
DOMAINS = ("example.com", "example.net")


def person(number: int, *proxies: str, **more: str) -> str:
    return ldif(
        f"CN=p{number},OU=Staff,{BASE['ad']}", ["user"], cn=f"p{number}", sAMAccountName=f"p{number}",
        objectGUID=number.to_bytes(16, "big"), uSNChanged=str(number), proxyAddresses=list(proxies), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[Slapd]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-test-"))
    entries = [
        *root("ad", ("Staff", "Shared", "Groups", "Contacts", "Folders", "Service")),
        ldif(SERVICE["ad"], ["user"], cn="svc-relay", sAMAccountName="svc-relay", userPassword=PASSWORD),
        person(1, "SMTP:Ann.Smith@example.com", "smtp:ann@example.com", "smtp:as@example.net", "X400:c=de"),
        person(2, "smtp:bob@example.com", "SMTP:Bob.Jones@example.com", "SMTP:bj@example.com"),
        person(3, "SMTP:carol@partner.example", "smtp:carol@example.com"),
    ]
    made = Slapd(folder, "ad", entries, authority)
    yield made
    made.close()
    shutil.rmtree(folder)


def test_the_reading_knows_primary_addresses_and_stores_them_only_where_it_is_on(server: Slapd, tmp_path: Path) -> None:
    site = Site(tmp_path, server.profile(), domains=DOMAINS)
    site.good()
    path = path_of(site.config.snapshot_path)
    assert not path.exists()
    tables = site.config.model_dump(exclude_defaults=True)
    site.config = type(site.config).model_validate({**tables, "senders": {"rewrite": "envelope"}})
    site.good()
    key = read_key(site.config.key_path)
    found = load(path, key)
    assert found is not None
    assert found.get("ANN@example.com") == found.get("as@example.net") == "Ann.Smith@example.com"
    assert found.get("ann.smith@example.com") is None
    assert found.get("bob@example.com") is None  # two that say they are primary
    assert found.get("carol@example.com") is None  # under a foreign address nobody goes out
    assert load(path, bytes(32)) is None
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert load(path, key) is None
    path.write_bytes(whole)
    assert Directory(site.config.snapshot_path, key).primaries is not None
    # An address that is gone is forgotten, and a new primary one counts with the next reading.
    server.modify(
        f"dn: CN=p1,OU=Staff,{BASE['ad']}\nchangetype: modify\nreplace: proxyAddresses\n"
        "proxyAddresses: SMTP:ann@example.com\nproxyAddresses: smtp:Ann.Smith@example.com\n\n"
    )
    site.good()
    found = load(path, key)
    assert found is not None
    assert (found.get("ann.smith@example.com"), found.get("ann@example.com")) == ("ann@example.com", None)
    assert found.get("as@example.net") is None
    server.modify(
        f"dn: CN=p1,OU=Staff,{BASE['ad']}\nchangetype: modify\nreplace: proxyAddresses\n"
        "proxyAddresses: SMTP:Ann.Smith@example.com\nproxyAddresses: smtp:ann@example.com\n"
        "proxyAddresses: smtp:as@example.net\n\n"
    )
    site.config = type(site.config).model_validate(tables)
    site.good()
    assert not path.exists()


def test_only_mail_of_our_own_that_leaves_is_renamed(server: Slapd, tmp_path: Path) -> None:
    hop = NextHop()
    folder = tmp_path / "relay"
    folder.mkdir()
    config = {
        "domain": [{"names": list(DOMAINS)}],
        "route": [{"domains": ["*"], "next_hops": [hop.route]}],
        "directory": {"sources": None, "ldap": [server.profile()]},
        "senders": {"rewrite": "envelope", "own_domains": "off"},
        "trusted": {"networks": ["127.0.0.3"]},
    }
    relay = RelayRunner(folder, hop.route, config=config)
    try:
        relay.start(build=False)
        relay.wait_for_log("snapshot_taken")

        def arrives_from(sender: str, recipients: list[str], source: str) -> str:
            count = len(hop.accepted)
            with relay.client(source=source) as client:
                assert client.open().deliver(sender, recipients, letter()).code == 250
            return hop.wait_for_accepted(count + 1)[-1].sender

        ours, stranger = "127.0.0.3", "127.0.0.1"
        assert arrives_from("ann@example.com", ["x@far.example"], ours) == "Ann.Smith@example.com"
        relay.wait_for_log(r"sender_rewritten sender=ann@example\.com goes_out_as=Ann\.Smith@example\.com")
        assert arrives_from("ann.smith@example.com", ["x@far.example"], ours) == "ann.smith@example.com"
        assert arrives_from("bob@example.com", ["x@far.example"], ours) == "bob@example.com"
        assert arrives_from("ann@example.com", ["bob@example.com"], ours) == "ann@example.com"
        assert arrives_from("ann@example.com", ["bob@example.com", "x@far.example"], ours) == "ann@example.com"
        assert arrives_from("ann@example.com", ["bob@example.com"], stranger) == "ann@example.com"
        assert "Ann.Smith@example.com" in relay.command("sender", "-v", "ann@example.com").stdout
    finally:
        relay.close()
        hop.close()


def test_a_reading_of_changes_alone_keeps_what_it_did_not_read(tmp_path: Path) -> None:
    key, place = bytes(range(32)), Place(tmp_path / "snapshot", tmp_path / "key", -1, -1)
    hash_of = address_hasher(key)

    def saved(known: list[str], *entries: tuple[str, list[str]]) -> dict[str, str | None]:
        found = Gathered(hash_of)
        for primary, others in entries:
            found.note(primary, others)
        save(place, key, [found], array("Q", sorted(map(hash_of, known))), 0.0)
        primaries = load(path_of(place.path), key)
        assert primaries is not None
        return {address: primaries.get(address) for address in ("a1@x.org", "a2@x.org", "b1@x.org")}

    everybody = ["a1@x.org", "a2@x.org", "b1@x.org", "b2@x.org"]
    whole = saved(everybody, ("a2@x.org", ["a1@x.org"]), ("b2@x.org", ["b1@x.org"]))
    assert whole == {"a1@x.org": "a2@x.org", "a2@x.org": None, "b1@x.org": "b2@x.org"}
    # The two change places; nobody read the other entry.
    assert saved(everybody, ("a1@x.org", ["a2@x.org"])) == {**whole, "a1@x.org": None, "a2@x.org": "a1@x.org"}
    # An address that the snapshot has not is forgotten.
    assert saved(["a1@x.org"]) == dict.fromkeys(whole)
