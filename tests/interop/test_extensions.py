"""DSN and SMTPUTF8 with other people's programs on both sides: Python's smtplib sends, Postfix is the next hop."""

from __future__ import annotations

import shutil
import smtplib
import tempfile
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import SMTPUTF8
from pathlib import Path

import pytest

from tests.bed.next_hop import NextHop
from tests.bed.relay import RelayRunner
from tests.bed.servers import Postfix
from tests.bed.waiting import wait_for

pytestmark = pytest.mark.needs("postfix", "root")

USER = "user@hop.example.com"


class Chain:
    """smtplib → relay → Postfix; what Postfix reports comes out at ``outside``."""

    def __init__(self, folder: Path) -> None:
        self.outside = NextHop()
        self.postfix = Postfix(
            folder, domain="hop.example.com bücher.example", relayhost=f"[127.0.0.1]:{self.outside.port}",
            settings={"smtputf8_enable": "yes"},
        )  # fmt: skip
        (folder / "relay").mkdir()
        domains = ["hop.example.com", "bücher.example"]
        self.relay = RelayRunner(
            folder / "relay",
            self.postfix.route,
            config={
                "domain": [{"names": domains, "recipients": "any"}],
                "route": [{"domains": ["*"], "next_hops": [self.postfix.route]}],
            },
        ).start(build=False)

    def client(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.relay.ports["mx"], timeout=30)

    def close(self) -> None:
        self.relay.close()
        self.postfix.close()
        self.outside.close()


@pytest.fixture(scope="module")
def chain() -> Iterator[Chain]:
    folder = Path(tempfile.mkdtemp(prefix="dmz-relay-extensions-"))
    folder.chmod(0o755)
    made = Chain(folder)
    yield made
    made.close()
    shutil.rmtree(folder)
    assert made.outside.violations == []


def test_postfix_reports_the_delivery_that_smtplib_asked_the_relay_for(chain: Chain) -> None:
    with chain.client() as client:
        client.ehlo()
        assert client.has_extn("DSN")
        client.sendmail(
            "asker@example.net", [USER], "Subject: x\r\n\r\nx\r\n", ["RET=HDRS", "ENVID=smtplib+2B1"],
            ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;Old+40example.org"],
        )  # fmt: skip
    reports = wait_for(
        lambda: [one for one in chain.outside.accepted if one.recipients == ("asker@example.net",)],
        lambda: f"Postfix's report; its log: {chain.postfix.log()}",
    )
    text = reports[0].message.decode()
    assert "Original-Envelope-Id: smtplib+1\r\n" in text
    assert "Original-Recipient: rfc822;Old@example.org\r\n" in text
    assert "Action: delivered\r\n" in text
    assert not chain.relay.grep(r"sender delivery status notification")


def test_smtplib_writes_to_an_address_in_utf8_and_postfix_has_it(chain: Chain) -> None:
    before = len(chain.postfix.messages())
    message = EmailMessage(policy=SMTPUTF8)
    message["From"], message["To"] = "jörg@bücher.example", "zoë@bücher.example"
    message["Subject"] = "Grüße"
    message.set_content("ä\n")
    with chain.client() as client:
        client.send_message(message)
    arrived = chain.postfix.wait_for_messages(before + 1)
    [mine] = [one for one in arrived if "Subject: Grüße\r\n".encode() in one]
    assert "Delivered-To: zoë@bücher.example\r\n".encode() in mine
    assert "Return-Path: <jörg@bücher.example>\r\n".encode() in mine
    assert b" with UTF8SMTP id " in mine


def test_a_plain_message_is_no_utf8_message_at_postfix(chain: Chain) -> None:
    before = len(chain.postfix.messages())
    with chain.client() as client:
        client.sendmail("plain@example.net", [USER], "Subject: plain\r\n\r\nx\r\n")
    arrived = chain.postfix.wait_for_messages(before + 1)
    [mine] = [one for one in arrived if b"Subject: plain\r\n" in one]
    assert b"UTF8SMTP" not in mine
