"""``relay probe`` names the cause of what a next hop refuses, as Exchange says it, and what mends it."""

from __future__ import annotations

import asyncio

import pytest

from relay.cli.probe import _fields
from relay.config.schema import Config
from relay.outbound.probe import walk
from relay.policy.route import NextHop
from tests.bed.fixtures import MakeNextHop
from tests.bed.relay import RelayRunner
from tests.bed.script import Say, Step

SAID = {
    "greeting": ((Step.BANNER, "554 5.7.1 No"), "greeting", "RemoteIPRanges"),
    "ehlo": ((Step.EHLO, "550 5.7.1 Go away"), "ehlo", ""),
    "anonymous": ((Step.MAIL, "530 5.7.57 Client not authenticated to send anonymous mail"), "anonymous", "AnonymousUsers"),
    "send as": ((Step.MAIL, "550 5.7.60 Client does not have permissions to send as this sender"), "sender_right", "ms-Exch-SMTP-Accept-Any-Sender"),
    "submit": ((Step.MAIL, "550 5.7.1 Client does not have permissions to submit"), "submit_right", "ms-Exch-SMTP-Submit"),
    "relay": ((Step.RCPT, "550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain"), "recipient_right", "ms-Exch-SMTP-Accept-Any-Recipient"),
    "starttls first": ((Step.MAIL, "530 5.7.0 Must issue a STARTTLS command first"), "tls", "RequireTLS"),
    "login": ((Step.MAIL, "530 5.7.0 Authentication required"), "auth", "PermissionGroups"),
    "unknown": ((Step.RCPT, "550 5.1.1 User unknown"), "refused", ""),
    "back pressure": ((Step.MAIL, "452 4.3.1 Insufficient system resources"), "deferred", ""),
    "not active": ((Step.MAIL, "421 4.3.2 Service not active"), "deferred", ""),
    "syntax": ((Step.MAIL, "500 5.5.1 Unrecognized command"), "syntax", ""),
}  # fmt: skip


def config(port: int) -> Config:
    return Config.model_validate(
        {
            "server": {"hostname": "mx.example.com"},
            "listener": [{"name": "mx", "address": "127.0.0.1:2525"}],
            "route": [{"domains": ["*"], "next_hops": [f"smtp:[127.0.0.1]:{port}"]}],
        }
    )


@pytest.mark.parametrize("case", SAID)
def test_a_refusal_has_its_cause_and_cure(case: str, make_next_hop: MakeNextHop) -> None:
    (step, said), cause, cure = SAID[case]
    hop = make_next_hop()
    hop.on(step, Say(said))
    target = NextHop("127.0.0.1", hop.port)
    asked = asyncio.run(walk(target, config(hop.port), {}, "someone@example.net", "user@example.com"))
    refused = _fields(target, asked)["refused"]
    assert isinstance(refused, dict)
    assert refused["cause"] == cause
    assert refused["advice"]
    assert cure in "\n".join(refused["cure"])
    assert "\n".join(refused["cure"]).isascii()
    assert hop.transactions == []


def test_probe_prints_the_walk_and_sends_nothing(relay: RelayRunner, next_hop) -> None:
    done = relay.command("probe", f"smtp:[127.0.0.1]:{next_hop.port}", "--to", "user@example.com")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "everything was taken; RSET, nothing was sent"
    next_hop.on(Step.MAIL, Say("530 5.7.57 Client not authenticated to send anonymous mail"))
    done = relay.command("probe", f"127.0.0.1:{next_hop.port}")
    assert done.returncode == 1
    assert "cause    anonymous" in done.stdout
    assert "New-ReceiveConnector" in done.stdout
    for wrong in ("smtp:[127.0.0.1]:x", "error:5.1.1 no", "smtp:", "a b"):
        assert relay.command("probe", wrong).returncode == 1
    assert next_hop.transactions == []
