"""What of a valid configuration this machine does not allow."""

from __future__ import annotations

import pwd
import subprocess
import sys

import pytest
import trustme

from relay.config.files import check_files
from relay.config.load import read

HEAD = """\
[server]
hostname = "mx.example.com"
spool = "spool"

[[listener]]
name = "mx"
address = "127.0.0.1:2525"

[process]
user = ""
hub_user = ""
"""


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def pair(authority, tmp_path):
    """certificate.pem and key.pem in the configuration's folder."""
    issued = authority.issue_cert("mx.example.com")
    for index, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(tmp_path / "certificate.pem", append=index > 0)
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    return tmp_path


TLS = '[tls]\ncertificate = "certificate.pem"\nkey = "key.pem"\n'


@pytest.fixture
def problems(tmp_path):
    def check(more="", **environ):
        (tmp_path / "relay.toml").write_text(HEAD + more)
        loaded = read(tmp_path / "relay.toml", {f"DMZ_RELAY__{key}": value for key, value in environ.items()})
        found = check_files(loaded.config, loaded.origin)
        return [str(problem).replace(f"{tmp_path}/", "").replace(str(tmp_path), ".") for problem in found]

    return check


def test_a_configuration_that_fits_the_machine_has_no_problem(problems, pair):
    (pair / "list.txt").touch()
    assert problems(TLS + '[directory]\nsources = [{ type = "list", path = "list.txt" }]\n[log]\nfile = "log"\n') == []


def test_a_certificate_and_a_key_that_are_not_there(problems):
    assert problems(TLS) == [
        (
            "relay.toml:13: tls.certificate: certificate.pem: No such file or directory; "
            "write the path of the certificate (PEM)"
        ),
        "relay.toml:14: tls.key: key.pem: No such file or directory; write the path of the private key (PEM)",
    ]


def test_a_key_of_another_certificate(problems, pair, authority):
    authority.issue_cert("other.example.com").private_key_pem.write_to_path(pair / "key.pem")
    assert problems(TLS) == [
        (
            "relay.toml:14: tls.key: key.pem does not belong to certificate.pem; "
            "name the key that the certificate was made for"
        )
    ]


def test_suites_that_openssl_does_not_know(problems, pair):
    assert problems(TLS + 'ciphers = "STRONG"\n') == [
        (
            'relay.toml:15: tls.ciphers: "STRONG" chooses no cipher suite; '
            "write it as for: openssl ciphers -v 'ECDHE+AESGCM:ECDHE+CHACHA20'"
        )
    ]


def test_a_certificate_file_without_certificate(problems, pair):
    (pair / "certificate.pem").write_text("none")
    (line,) = problems(TLS)
    assert line.startswith("relay.toml:13: tls.certificate: certificate.pem holds no certificate; ")


@pytest.mark.parametrize("content", ["", "none", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_file_without_key(problems, pair, content):
    (pair / "key.pem").write_text(content)
    (line,) = problems(TLS)
    assert line.startswith("relay.toml:14: tls.key: key.pem holds no usable private key; ")


@pytest.mark.needs("openssl")
def test_an_encrypted_key_is_told_and_no_passphrase_is_asked_for(problems, pair):
    command = ["openssl", "pkey", "-in", "key.pem", "-out", "locked.pem", "-aes128", "-passout", "pass:secret"]
    subprocess.run(command, cwd=pair, check=True, capture_output=True)
    (pair / "locked.pem").replace(pair / "key.pem")
    (line,) = problems(TLS)
    assert line.startswith("relay.toml:14: tls.key: key.pem holds no usable private key; ")


@pytest.mark.needs("openssl")
def test_a_certificate_too_weak_for_openssl(problems, tmp_path):
    command = ["openssl", "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-subj", "/CN=mx", "-keyout", "key.pem"]
    subprocess.run([*command, "-out", "certificate.pem"], cwd=tmp_path, check=True, capture_output=True)
    assert problems(TLS) == [
        "relay.toml:13: tls.certificate: OpenSSL refuses it: EE_KEY_TOO_SMALL; get a certificate of 2048 bits or more"
    ]


def test_inputs_of_the_directory_that_are_not_there_or_folders(problems, tmp_path):
    (tmp_path / "folder").mkdir()
    sources = '[directory]\nsources = [\n{ type = "list", path = "none.txt" },\n{ type = "ldif", path = "folder" }]\n'
    assert problems(sources) == [
        (
            "relay.toml:14: directory.sources[0].path: none.txt: No such file or directory; "
            "write the path of an existing file"
        ),
        "relay.toml:15: directory.sources[1].path: folder is a folder; write the path of an existing file",
    ]


def test_a_spool_below_a_file(problems, tmp_path):
    (tmp_path / "file").touch()
    assert problems(SERVER__SPOOL="file/deep/spool") == [
        (
            "DMZ_RELAY__SERVER__SPOOL: server.spool: file: Not a directory; "
            "make the folder file and let the relay write to it"
        )
    ]


def test_a_spool_several_folders_deep_is_made_at_the_start(problems):
    assert problems(SERVER__SPOOL="a/b/spool") == []


def test_a_log_without_folder_and_a_log_that_is_one(problems):
    assert problems('[log]\nfile = "log/mail.log"\n') == [
        "relay.toml:13: log.file: log: No such file or directory; make the folder log and let the relay write to it"
    ]
    (line,) = problems(LOG__FILE="../")
    assert line.endswith("is a folder; write the path of a file")


@pytest.mark.needs("root")
def test_users_that_do_not_exist_or_are_root(problems):
    lines = problems(PROCESS__USER="no-such-user", PROCESS__HUB_USER="root")
    assert lines == [
        (
            'DMZ_RELAY__PROCESS__USER: process.user: there is no user "no-such-user"; make it (useradd --system '
            '--user-group --no-create-home --shell /usr/sbin/nologin no-such-user), or write user = "" to stay root'
        ),
        (
            'DMZ_RELAY__PROCESS__HUB_USER: process.hub_user: "root" is root; '
            'name an ordinary user, or write hub_user = "" to stay root'
        ),
    ]


@pytest.mark.needs("root")
def test_users_that_exist_are_taken(problems):
    assert problems(PROCESS__USER="nobody", PROCESS__HUB_USER=pwd.getpwuid(1).pw_name) == []


@pytest.mark.needs("root")
def test_what_the_starting_user_may_not_read_or_write_is_told(bed_folder):
    """In a process of its own, which gives up root."""
    (bed_folder / "locked").mkdir(mode=0o755)
    script = f"""
import os, sys
from pathlib import Path
from relay.config.files import check_files
from relay.config.schema import Config
config = Config.model_validate({{
    "server": {{"hostname": "mx.example.com", "spool": "{bed_folder}/locked/spool"}},
    "listener": [{{"name": "mx", "address": "127.0.0.1:2525"}}],
    "log": {{"file": "{bed_folder}/locked/log"}},
}})
os.setuid(65534)
print(*check_files(config), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"configuration: {key}: {bed_folder}/locked: Permission denied; "
        f"make the folder {bed_folder}/locked and let the relay write to it"
        for key in ("server.spool", "log.file")
    ]
