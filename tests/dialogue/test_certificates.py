"""Which certificate a client gets (SNI), how it is renewed, and that a TLS session can be taken up again."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from tests.bed.client import Client
from tests.dialogue.sites import Site

PROXY = b"PROXY TCP4 192.0.2.7 127.0.0.1 1 25\r\n"


def secured(site: Site, name: str, *, verify: bool = True) -> Client:
    """Behind STARTTLS, having asked for ``name``."""
    context = site.authority.client()
    if not verify:
        context.check_hostname = False
    client = site.client("open", server_name=name).open()
    client.starttls(context)
    client.ehlo()
    return client


def certificate(client: Client) -> bytes:
    end = client._socket
    assert isinstance(end, ssl.SSLSocket)
    found = end.getpeercert(binary_form=True)
    assert found
    return found


@pytest.mark.parametrize("name", ["localhost", "mail.example.org", "MAIL.Example.Org", "a.example.edu", "127.0.0.1"])
def test_a_client_gets_the_certificate_of_the_name_it_asks_for(fronted: Site, name: str) -> None:
    """RFC 6066 §3; the client verifies the name."""
    with secured(fronted, name) as client:
        client.quit()


def test_who_asks_for_no_name_of_ours_gets_the_first_one(fronted: Site) -> None:
    with secured(fronted, "localhost") as client:
        first = certificate(client)
        client.quit()
    for name in ("example.edu", "a.b.example.edu", "unknown.example", ""):
        with secured(fronted, name or "127.0.0.1", verify=False) as client:
            assert certificate(client) == first
            client.quit()
    with pytest.raises(ssl.SSLCertVerificationError):
        secured(fronted, "unknown.example")


def test_by_implicit_tls_behind_a_balancer_too(fronted: Site) -> None:
    with fronted.client("submissions", server_name="mail.example.org") as client:
        client.send(PROXY)
        client.wrap(fronted.authority.client())
        client.open()
        client.quit()


def test_certificates_are_renewed_by_a_reload_and_sessions_go_on(fronted: Site) -> None:
    old = {}
    names = ("localhost", "mail.example.org", "a.example.edu")
    for name in names:
        with secured(fronted, name) as client:
            old[name] = certificate(client)
            client.quit()
    with secured(fronted, "mail.example.org") as open_session:
        fronted.authority.files(fronted.folder)
        for name in ("mail.example.org", "*.example.edu"):
            fronted.named(name)
        assert fronted.relay.command("reload").returncode == 0
        for name in names:
            with secured(fronted, name) as client:
                assert certificate(client) != old[name]
                client.quit()
        open_session.expect("250", "NOOP")
        open_session.quit()


def test_a_reload_with_a_key_that_does_not_fit_changes_nothing(fronted: Site) -> None:
    key = fronted.folder / "mail.example.org" / "key.pem"
    good = key.read_bytes()
    key.write_bytes((fronted.folder / "key.pem").read_bytes())
    try:
        said = fronted.relay.command("reload")
        assert said.returncode != 0
        assert "tls.named" in said.stdout + said.stderr
        with secured(fronted, "mail.example.org") as client:
            client.quit()
    finally:
        key.write_bytes(good)
    assert fronted.relay.command("reload").returncode == 0


def s_client(site: Site, bundle: Path, *options: str) -> str:
    port = site.relay.ports["open"]
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-starttls", "smtp", "-CAfile", str(bundle),
         "-verify_return_error", "-crlf", "-ign_eof", *options],
        input="EHLO client.example.net\nQUIT\n", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("name", ["localhost", "mail.example.org"])
def test_a_tls_session_is_taken_up_again(fronted: Site, tmp_path: Path, version: str, name: str) -> None:
    """RFC 5077, RFC 8446 §2.2: a client that comes often saves the handshake's arithmetic."""
    bundle, kept = fronted.authority.bundle(tmp_path), str(tmp_path / "session")
    before = len(fronted.relay.grep(r"TLS connection established.*\(resumed\)"))
    first = s_client(fronted, bundle, version, "-servername", name, "-sess_out", kept)
    assert "New, TLSv1." in first
    assert "Reused" not in first
    second = s_client(fronted, bundle, version, "-servername", name, "-sess_in", kept)
    assert "Reused, TLSv1." in second, second
    fronted.relay.wait_for_log(r"TLS connection established.*\(resumed\)", before + 1)


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    "options",
    [
        ("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"),
        ("-tls1", "-cipher", "ALL:@SECLEVEL=0"),
        *(("-tls1_2", "-cipher", f"{weak}:@SECLEVEL=0") for weak in ("aNULL", "eNULL", "RC4", "3DES", "EXPORT", "PSK")),
    ],
    ids="_".join,
)
def test_what_is_weak_is_not_spoken(fronted: Site, tmp_path: Path, options: tuple[str, ...]) -> None:
    said = s_client(fronted, fronted.authority.bundle(tmp_path), *options)
    assert "Cipher is (NONE)" in said or "no cipher match" in said.lower() or "no ciphers available" in said, said
    assert "EHLO" not in said.partition("New, ")[2]
