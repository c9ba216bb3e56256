"""AUTH as RFC 4954 has it: when it is offered, what a client may get wrong, and that every mechanism works where it can."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import smtplib
import subprocess
import sys

import pytest

from tests.bed.client import Client
from tests.bed.relay import ROOT
from tests.bed.waiting import PATIENCE_S
from tests.bed.wire import after_trace, letter
from tests.submission.world import LISTENERS, OTHER_NAME, PASSWORD, Submission

FAILED = "535 5.7.8 Authentication credentials invalid"
OK = "235 2.7.0 Authentication successful"
EVERY = "SCRAM-SHA-256-PLUS SCRAM-SHA-256 CRAM-MD5 PLAIN LOGIN"


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def plain(user: str, password: str = PASSWORD, authorization: str = "") -> str:
    return b64(f"{authorization}\0{user}\0{password}")


def challenge(client: Client, command: str) -> bytes:
    return base64.b64decode(client.expect("334", command).text)


def by_plain(client: Client, user: str, password: str) -> str:
    return str(client.command(f"AUTH PLAIN {plain(user, password)}"))


def by_plain_in_two(client: Client, user: str, password: str) -> str:
    assert challenge(client, "AUTH PLAIN") == b""
    return str(client.command(plain(user, password)))


def by_login(client: Client, user: str, password: str) -> str:
    assert challenge(client, "auth login") == b"Username:"
    assert challenge(client, b64(user)) == b"Password:"
    return str(client.command(b64(password)))


def by_login_at_once(client: Client, user: str, password: str) -> str:
    assert challenge(client, f"AUTH LOGIN {b64(user)}") == b"Password:"
    return str(client.command(b64(password)))


def by_cram(client: Client, user: str, password: str) -> str:
    said = challenge(client, "AUTH CRAM-MD5")
    return str(client.command(b64(f"{user} {hmac.new(password.encode(), said, 'md5').hexdigest()}")))


def by_scram(client: Client, user: str, password: str, *, binding: bytes | None = None) -> str:
    """RFC 5802 as a client, written from the RFC: the relay's library is not used."""
    header = "n,," if binding is None else "p=tls-server-end-point,,"
    name = "SCRAM-SHA-256" if binding is None else "SCRAM-SHA-256-PLUS"
    bare = f"n={user.replace('=', '=3D').replace(',', '=2C')},r={secrets.token_hex(8)}"
    first = challenge(client, f"AUTH {name} {b64(header + bare)}").decode()
    fields = dict(part.split("=", 1) for part in first.split(","))
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(fields["s"]), int(fields["i"]))
    without_proof = f"c={b64(header.encode() + (binding or b''))},r={fields['r']}"
    signed = f"{bare},{first},{without_proof}".encode()
    key = hmac.digest(salted, b"Client Key", "sha256")
    proof = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
    reply = client.command(b64(f"{without_proof},p={b64(bytes(a ^ b for a, b in zip(key, proof, strict=True)))}"))
    if reply.code != 334:
        return str(reply)
    server = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
    assert base64.b64decode(reply.text) == f"v={b64(server)}".encode()
    return str(client.command(""))


def by_scram_plus(client: Client, user: str, password: str) -> str:
    certificate = client.certificate()
    return by_scram(client, user, password, binding=hashlib.sha256(certificate).digest())


PASSWORDS = [by_plain, by_plain_in_two, by_login, by_login_at_once]
WAYS = [*PASSWORDS, by_cram, by_scram, by_scram_plus]
CELLS = [
    *((way, "submission", user) for way in WAYS for user in ("ann", "Bob@Example.com")),
    *((way, "submissions", "ann") for way in WAYS),
    *((way, "offering", "ann") for way in WAYS),
    *((way, "hashed", user) for way in PASSWORDS for user in ("ARGON2", "SHA512-CRYPT", "SHA256-CRYPT", "SSHA512")),
    *((way, "scram", "sam") for way in (*PASSWORDS, by_scram, by_scram_plus)),
    *((way, "cram", "carl") for way in (*PASSWORDS, by_cram)),
]


@pytest.mark.parametrize(
    ("way", "listener", "user"), CELLS, ids=[f"{way.__name__}-{listener}-{user}" for way, listener, user in CELLS]
)
def test_the_right_password_is_taken_and_a_wrong_one_is_not(bed: Submission, way, listener: str, user: str) -> None:
    with bed.client(listener) as client:
        assert way(client, user, "wrong " + secrets.token_hex(4)) == FAILED
        assert way(client, user, PASSWORD) == OK
        client.quit()


@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_a_login_is_bound_to_the_certificate_that_the_client_asked_for_by_name(bed: Submission, listener: str) -> None:
    with bed.client(listener) as usual, bed.client(listener, server_name=OTHER_NAME) as named:
        assert usual.certificate() != named.certificate()
        other = hashlib.sha256(usual.certificate()).digest()
        assert by_scram(named, "ann", PASSWORD, binding=other) == FAILED
        assert by_scram_plus(named, "ann", PASSWORD) == OK
        named.quit()
        usual.quit()


@pytest.mark.parametrize("way", [by_plain, by_login, by_cram])
def test_dovecot_s_example_logs_in(bed: Submission, way) -> None:
    with bed.client("cram") as client:
        assert way(client, "test", "test") == OK
        client.quit()


@pytest.mark.parametrize("way", WAYS)
def test_an_account_that_does_not_exist_is_refused_in_the_same_words(bed: Submission, way) -> None:
    with bed.client() as client:
        assert way(client, f"nobody-{secrets.token_hex(4)}", PASSWORD) == FAILED
        client.quit()


@pytest.mark.parametrize("user", ["ann", "ANN", "Ann", "ａｎｎ"])
def test_an_account_has_one_identity_in_every_spelling(bed: Submission, user: str) -> None:
    with bed.client() as client:
        assert by_plain(client, user, PASSWORD) == OK
        client.expect("250", "MAIL FROM:<ANN@example.com>")
        client.quit()


@pytest.mark.parametrize(
    ("listener", "offered"),
    [
        ("submission", EVERY),
        ("submissions", EVERY),
        ("offering", EVERY),
        ("hashed", "PLAIN LOGIN"),
        ("scram", "SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN"),
        ("cram", "CRAM-MD5 PLAIN LOGIN"),
        ("mx", None),
    ],
)
def test_a_mechanism_is_offered_when_every_account_can_use_it_and_inside_tls_only(
    bed: Submission, listener: str, offered: str | None
) -> None:
    if listener != "submissions":
        with bed.relay.client(listener) as client:
            assert "AUTH" not in client.open().extensions
            client.quit()
    with bed.client(listener) as client:
        assert client.extensions.get("AUTH") == offered
        client.quit()
    shown = bed.relay.command("auth", "matrix").stdout
    if offered:
        assert (
            f"listener {listener} ({listener if listener in ('hashed', 'scram', 'cram') else 'clear'}) offers {offered}\n"
            in shown
        )


@pytest.mark.parametrize("listener", [name for name in LISTENERS if name != "submissions"])
def test_nobody_logs_in_before_tls(bed: Submission, listener: str) -> None:
    with bed.relay.client(listener) as client:
        client.open()
        for command in (f"AUTH PLAIN {plain('ann')}", "AUTH LOGIN", "AUTH CRAM-MD5", "AUTH NONSENSE"):
            wanted = "530 5.7.0" if LISTENERS[listener] == "submission" else "538 5.7.11"
            client.expect(wanted, command)
        client.quit()


def test_a_listener_without_auth_says_so(bed: Submission) -> None:
    with bed.client("mx") as client:
        client.expect("503 5.5.1 Authentication is not enabled here", f"AUTH PLAIN {plain('ann')}")
        client.expect("555 5.5.4", "MAIL FROM:<a@example.net> AUTH=<>")
        client.quit()


BAD = {
    "no mechanism": (["AUTH"], "501 5.5.4"),
    "unknown mechanism": (["AUTH GSSAPI"], "504 5.5.4"),
    "three words": ([f"AUTH PLAIN {plain('ann')} x"], "501 5.5.4"),
    "wrong base64": (["AUTH PLAIN !!!"], "501 5.5.2 Cannot decode"),
    "wrong padding": (["AUTH PLAIN YQ="], "501 5.5.2 Cannot decode"),
    "wrong base64 in a response": (["AUTH LOGIN", "a b"], "501 5.5.2 Cannot decode"),
    "= is no response": (["AUTH LOGIN", "="], "501 5.5.2 Cannot decode"),
    "cancelled": (["AUTH PLAIN", "*"], "501 5.7.0"),
    "cancelled at the password": (["AUTH LOGIN", b64("ann"), "*"], "501 5.7.0"),
    "cancelled SCRAM": (["AUTH SCRAM-SHA-256", b64("n,,n=ann,r=abcdef"), "*"], "501 5.7.0"),
    "PLAIN without NULs": ([f"AUTH PLAIN {b64('ann')}"], "501 5.5.2 Not what"),
    "PLAIN with a NUL in the password": ([f"AUTH PLAIN {plain('ann', 'a' + chr(0) + 'b')}"], "501 5.5.2 Not what"),
    "PLAIN with an empty initial response": (["AUTH PLAIN ="], "501 5.5.2 Not what"),
    "PLAIN not in UTF-8": ([f"AUTH PLAIN {b64(bytes([0, 255, 0, 254]))}"], "501 5.5.2 Not what"),
    "PLAIN for somebody else": ([f"AUTH PLAIN {plain('ann', PASSWORD, 'bob')}"], FAILED),
    "empty user": ([f"AUTH PLAIN {plain('')}"], FAILED),
    "empty password": ([f"AUTH PLAIN {plain('ann', '')}"], FAILED),
    "empty password by LOGIN": (["AUTH LOGIN", b64("ann"), ""], FAILED),
    "control characters in the name": ([f"AUTH PLAIN {plain('ann' + chr(10))}"], FAILED),
    "control characters in the password": ([f"AUTH PLAIN {plain('ann', PASSWORD + chr(7))}"], FAILED),
    "a NUL behind the name by LOGIN": (["AUTH LOGIN", b64("ann\0junk"), b64(PASSWORD)], FAILED),
    "filter characters": ([f"AUTH PLAIN {plain('*)(uid=ann')}"], FAILED),
    "a long name": ([f"AUTH PLAIN {plain('a' * 600)}"], FAILED),
    "a long password": ([f"AUTH PLAIN {plain('ann', 'p' * 1025)}"], FAILED),
    "12,288 octets": ([f"AUTH PLAIN {b64(bytes(9216))}"], "501 5.5.2 Not what"),
    "12,289 octets": ([f"AUTH PLAIN {b64(bytes(9216))}A"], "500 5.5.6"),
    "12,288 octets of response": (["AUTH PLAIN", b64(bytes(9216))], "501 5.5.2 Not what"),
    "12,289 octets of response": (["AUTH PLAIN", b64(bytes(9216)) + "A"], "500 5.5.6"),
    "CRAM-MD5 with an initial response": ([f"AUTH CRAM-MD5 {b64('ann x')}"], "501 5.5.2 Not what"),
    "CRAM-MD5 without a digest": (["AUTH CRAM-MD5", b64("ann")], "501 5.5.2 Not what"),
    "CRAM-MD5 with a foreign digest": (["AUTH CRAM-MD5", b64("ann " + "0" * 32)], FAILED),
    "SCRAM nonsense": ([f"AUTH SCRAM-SHA-256 {b64('nonsense')}"], FAILED),
    "SCRAM as somebody else": ([f"AUTH SCRAM-SHA-256 {b64('n,a=bob,n=ann,r=abc')}"], FAILED),
    "SCRAM without channel binding though there is": ([f"AUTH SCRAM-SHA-256 {b64('y,,n=ann,r=abcdef')}"], FAILED),
    "SCRAM final without first": (
        ["AUTH SCRAM-SHA-256", b64("n,,n=ann,r=abcdef"), b64("c=biws,r=abcdef,p=AAAA")],
        FAILED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_dialogue_is_refused_and_the_session_goes_on(bed: Submission, case: str) -> None:
    lines, wanted = BAD[case]
    with bed.client() as client:
        for line in lines[:-1]:
            client.expect("334", line)
        client.expect(wanted, lines[-1])
        client.expect("530 5.7.0 Authentication required", "MAIL FROM:<ann@example.com>")
        client.quit()


def test_a_challenge_of_cram_md5_serves_once(bed: Submission) -> None:
    with bed.client() as client:
        said = challenge(client, "AUTH CRAM-MD5")
        replayed = b64(f"ann {hmac.new(PASSWORD.encode(), said, 'md5').hexdigest()}")
        client.expect("501 5.7.0", "*")
        assert challenge(client, "AUTH CRAM-MD5") != said
        client.expect(FAILED, replayed)
        client.quit()


def test_auth_has_its_place(bed: Submission) -> None:
    """Not before EHLO, once, and not within a transaction (RFC 4954 §4)."""
    with bed.relay.client("submission") as client:
        client.open()
        client.starttls(bed.authority.client())
        client.expect("503 5.5.1 Say EHLO first", f"AUTH PLAIN {plain('ann')}")
        client.ehlo()
        client.expect(OK, f"AUTH PLAIN {plain('ann')}")
        client.expect("503 5.5.1 Already authenticated", f"AUTH PLAIN {plain('ann')}")
        client.expect("250", "RSET")
        client.ehlo()
        client.expect("503 5.5.1 Already authenticated", "AUTH LOGIN")
        client.expect("250", "MAIL FROM:<ann@example.com>")
        client.quit()
    with bed.client("offering") as client:
        client.expect("250", "MAIL FROM:<a@example.net>")
        client.expect("503 5.5.1 AUTH is not permitted", f"AUTH PLAIN {plain('ann')}")
        client.quit()


def test_a_pipelined_group_behind_auth_is_worked_through_after_it(bed: Submission) -> None:
    with bed.client() as client:
        said = client.pipeline(f"AUTH PLAIN {plain('ann')}", "MAIL FROM:<ann@example.com>", "NOOP")
        assert [reply.code for reply in said] == [235, 250, 250]
        client.quit()


def test_other_commands_do_not_become_longer_with_auth(bed: Submission) -> None:
    with bed.client() as client:
        client.expect("500 5.5.2 Line too long", "NOOP " + "x" * 3000)
        client.expect("501 5.7.0", client_cancel(client))
        client.quit()


def client_cancel(client: Client) -> str:
    client.expect("334", "AUTH PLAIN")
    return "*"


def test_a_message_of_a_user_goes_anywhere_and_does_not_name_the_login(bed: Submission) -> None:
    with bed.client() as client:
        assert by_plain(client, "ann", PASSWORD) == OK
        client.ehlo()
        message = letter(subject="from ann")
        client.envelope("ann@example.com", ["someone@far.example"], "AUTH=ann+40example.com")
        assert client.data(message).code == 250
        client.quit()
    arrived = bed.arrived("someone@far.example")
    assert after_trace(arrived.message) == message
    assert b" with ESMTPSA id " in arrived.message
    assert b"Authenticated" not in arrived.message
    bed.relay.wait_for_log(r"login from unknown\[127\.0\.0\.1\]: sasl_method=PLAIN, sasl_username=ann$")


def test_user_and_header_firewall(bed: Submission) -> None:
    """Who logs in may relay, and is no server of ours whose headers are believed."""
    with bed.client() as client:
        by_plain(client, "ann", PASSWORD)
        message = b"X-MS-Exchange-Organization-SCL: -1\r\n" + letter(subject="scl")
        assert client.deliver("ann@example.com", "firewall@far.example", message).code == 250
        client.quit()
    arrived = bed.arrived("firewall@far.example")
    assert b"X-MS-Exchange" not in arrived.message


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5"])
def test_python_s_client(bed: Submission, mechanism: str) -> None:
    _, port = bed.relay.address("submission")
    with smtplib.SMTP("localhost", port, timeout=PATIENCE_S) as client:
        client.starttls(context=bed.authority.client())
        client.ehlo()
        client.user, client.password = "ann", PASSWORD
        method = getattr(client, f"auth_{mechanism.lower().replace('-', '_')}")
        assert client.auth(mechanism, method)[0] == 235
        assert client.sendmail("ann@example.com", ["user@example.com"], letter()) == {}


@pytest.mark.needs("msmtp")
@pytest.mark.parametrize("mechanism", ["plain", "login", "cram-md5", "scram-sha-256"])
@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_msmtp(bed: Submission, mechanism: str, listener: str) -> None:
    bundle = bed.authority.bundle(bed.folder)
    done = subprocess.run(
        ["msmtp", "--host=localhost", f"--port={bed.relay.ports[listener]}", "--tls=on",
         f"--tls-starttls={'on' if listener == 'submission' else 'off'}", f"--tls-trust-file={bundle}",
         f"--auth={mechanism}", "--user=ann", f"--passwordeval=printf %s '{PASSWORD}'", "--from=ann@example.com",
         "user@example.com"],
        input=letter(), capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    if b"not supported" in done.stderr or b"not available" in done.stderr:
        pytest.skip(f"this msmtp has no {mechanism}")
    assert done.returncode == 0, done.stderr


@pytest.mark.needs("curl")
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5", "SCRAM-SHA-256"])
def test_curl(bed: Submission, mechanism: str) -> None:
    bundle, mail = bed.authority.bundle(bed.folder), bed.folder / "mail"
    mail.write_bytes(letter())
    if mechanism.startswith("SCRAM") and "GSASL" not in _curl("--version").stdout:
        pytest.skip("this curl has no SCRAM")
    done = _curl(
        f"smtps://localhost:{bed.relay.ports['submissions']}", "--cacert", str(bundle), "--user", f"ann:{PASSWORD}",
        "--login-options", f"AUTH={mechanism}", "--mail-from", "ann@example.com", "--mail-rcpt", "user@example.com",
        "--upload-file", str(mail), "--no-progress-meter",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["curl", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_no_secret_is_in_the_log(bed: Submission) -> None:
    with bed.client() as client:
        by_plain(client, "ann", PASSWORD)
        client.quit()
    told = bed.relay.complaints() + "\n".join(bed.relay.log_lines())
    for secret in (PASSWORD, b64(PASSWORD), plain("ann"), *re.findall(r":(\{[^:]+):", bed.hashed.read_text())):
        assert secret not in told


def test_hash_password_asks_for_a_password_that_can_be_typed() -> None:
    for given, scheme in (("", "CRAM-MD5"), ("a\x07b", "CRAM-MD5"), ("x" * 1025, "CRAM-MD5"), ("x", "MD5")):
        done = subprocess.run(
            [sys.executable, "-m", "relay", "hash-password", "--scheme", scheme],
            cwd=ROOT, input=f"{given}\n", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
