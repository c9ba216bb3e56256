"""Stored passwords: published examples, other programs' hashes, and what is refused without being shown."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.auth import md5
from relay.auth.secret import SCHEMES, Secret, SecretError, as_scram, check, cram_digest, read_secret, verifies
from relay.config.auth import Mechanism

DOVECOT = "e02d374fde0dc75a17a557039a3a5338c7743304777dccd376f332bee68d2cf6"

# Made by other programs: slappasswd, doveadm pw, mkpasswd, htpasswd; the password is "secret" but where noted.
FOREIGN = {
    "{SHA}": "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=",
    "$6$": "$6$abcdefgh$ltjgWl6579NluT/Vi1nwEvcil.G5Nbc4NiXZaNGStk8PSwGfQv72N2CKPPrVACtLtip/cZ/1GM/O6IND4WQhG.",
    "$5$": "{CRYPT}$5$abcdefgh$gruCpC7VkOTspMQTTSAR8mtlO9Upms.fwqE5y16JVM.",
    "$2b$": "{BLF-CRYPT}$2b$10$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u",
    "$y$": "$y$j9T$abcdefgh$IUWJt2doU4Kf6E/JP1UkAT3S5O3Q7SSA8SJirXIlEu9",
    "cleartext": "secret",
    "{PLAIN}": "{PLAIN}secret",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_other_programs_made_is_checked(kind: str) -> None:
    secret = read_secret(FOREIGN[kind])
    assert check(secret, b"secret")
    assert not check(secret, b"Secret")
    assert not check(secret, b"")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_relay_makes_is_checked(scheme: str) -> None:
    password = "pässwörd with spaces".encode()
    stored = SCHEMES[scheme](password)
    assert check(read_secret(stored), password)
    assert not check(read_secret(stored), password + b"x")
    assert SCHEMES[scheme](password) != stored or scheme == "CRAM-MD5"


def test_dovecot_s_context_is_that_of_its_documentation() -> None:
    assert md5.context(b"test").hex() == DOVECOT
    secret = read_secret(f"{{CRAM-MD5}}{DOVECOT}")
    challenge = b"<1896.697170952@postoffice.reston.mci.net>"
    assert cram_digest(secret, challenge) == hmac.new(b"test", challenge, "md5").hexdigest()


def test_cram_md5_answers_the_example_of_its_rfc() -> None:
    """RFC 2195 §2."""
    challenge = b"<1896.697170952@postoffice.reston.mci.net>"
    assert cram_digest(read_secret("tanstaaftanstaaf"), challenge) == "b913a602c7eda7a495b4e6e7334d3890"


@given(st.binary(min_size=1, max_size=200), st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_a_context_gives_what_the_password_gives(password: bytes, challenge: bytes) -> None:
    assert md5.hmac_md5(md5.context(password), challenge) == hmac.new(password, challenge, "md5").hexdigest()


def test_scram_keys_are_those_of_the_rfc_s_example() -> None:
    """RFC 7677 §3: user "user", password "pencil"; the proof is checked with the stored key."""
    import base64
    import hashlib

    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    keys = as_scram(read_secret("pencil"), salt)
    assert keys is not None
    nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    message = f"n=user,r=rOprNGfwEbeRWgbNEkqO,r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={nonce}".encode()
    signature = hmac.digest(keys.stored_key, message, "sha256")
    proof = base64.b64decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    client_key = bytes(a ^ b for a, b in zip(proof, signature, strict=True))
    assert hashlib.sha256(client_key).digest() == keys.stored_key
    wanted = base64.b64decode("6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
    assert hmac.digest(keys.server_key, message, "sha256") == wanted


def test_each_kind_says_what_it_can_verify() -> None:
    passwords = {Mechanism.PLAIN, Mechanism.LOGIN}
    assert verifies(read_secret("clear")) == set(Mechanism)
    assert verifies(read_secret(f"{{CRAM-MD5}}{DOVECOT}")) == passwords | {Mechanism.CRAM_MD5}
    assert verifies(read_secret(SCHEMES["SCRAM-SHA-256"](b"x"))) == set(Mechanism) - {Mechanism.CRAM_MD5}
    assert verifies(read_secret(FOREIGN["$6$"])) == passwords


@pytest.mark.parametrize(
    "text",
    [
        "", "{PLAIN}", "{MD5}abcdef", "{UNKNOWN}hunter2", "{SSHA}hunter2", "{SSHA256}aHVudGVyMg==", "{SHA}aHVudGVyMg==",
        "{CRYPT}hunter2", "{CRYPT}$1$abc$iCQ2D3nhptRYi27fDYv2s1", "{CRYPT}$6$hunter2", "$6$rounds=9999999$a$b",
        "{CRYPT}$2b$31$abcdefghijklmnopqrstuuqflPDzB6gcMhKa1rZqKiun2YGL5sa2u", "{ARGON2}hunter2",
        "{ARGON2}$argon2id$v=19$m=9999999,t=3,p=4$TD1E0E2XsFQSa3b99djorg$574I5oAihgIUPFXX8HDPqRn1/ySNSHeW5NAW7A56i7w",
        "{CRAM-MD5}hunter2", "{SCRAM-SHA-256}hunter2", "{SCRAM-SHA-256}1,aHVudGVyMmh1bnRlcjI=,aA==,aA==",
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(SecretError) as refused:
        read_secret(text)
    assert "hunter2" not in str(refused.value)
    assert text == "" or text not in str(refused.value)


@pytest.mark.parametrize("text", [*FOREIGN.values(), f"{{CRAM-MD5}}{DOVECOT}"])
def test_a_secret_is_in_no_repr(text: str) -> None:
    secret: Secret = read_secret(text)
    assert repr(secret) in {f"{type(secret).__name__}()", "Salted(algorithm='sha1')"}
