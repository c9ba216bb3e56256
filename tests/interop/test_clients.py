"""Other people's senders deliver through the relay to other people's servers, in the clear and by TLS, express and queued."""

from __future__ import annotations

import pytest

from tests.bed.wire import letter
from tests.interop.world import HOPS, WAYS, Hop, Way, World

pytestmark = pytest.mark.needs("postfix", "smtp-sink", "smtp-source", "root")

AWKWARD = (
    b".\r\n..\r\n.x\r\n\r\n. \r\n" + "Grüße aus München\r\n".encode() + b"\xe4\xf6\xfc" * 300 + b"\r\n.\r\n\r\nend\r\n"
)

CLIENTS = [
    pytest.param(World.send_by_smtplib, False, id="smtplib"),
    pytest.param(World.send_by_smtplib, True, id="smtplib by STARTTLS"),
    pytest.param(World.send_by_swaks, False, id="swaks", marks=pytest.mark.needs("swaks")),
    pytest.param(World.send_by_msmtp, False, id="msmtp", marks=pytest.mark.needs("msmtp")),
    pytest.param(World.send_by_msmtp, True, id="msmtp by STARTTLS", marks=pytest.mark.needs("msmtp")),
    pytest.param(World.send_by_curl, False, id="curl", marks=pytest.mark.needs("curl")),
    pytest.param(World.send_by_curl, True, id="curl by STARTTLS", marks=pytest.mark.needs("curl")),
    pytest.param(World.send_by_nodemailer, False, id="nodemailer", marks=pytest.mark.needs("node")),
    pytest.param(World.send_by_nodemailer, True, id="nodemailer by STARTTLS", marks=pytest.mark.needs("node")),
    pytest.param(World.send_by_postfix, True, id="Postfix"),
]


@pytest.mark.parametrize("hop", HOPS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("send", "tls"), CLIENTS)
def test_a_message_of_a_foreign_sender_arrives_octet_for_octet(
    world: World, send, *, tls: bool, way: Way, hop: Hop
) -> None:
    sender = world.sender()
    message = letter(subject=sender, body=AWKWARD)
    send(world, way, sender, world.recipient(way, hop), message, tls=tls)
    world.wait_until_sent(way, sender)
    world.wait_for_arrival(hop, message)
    [received] = world.relays[way].grep(rf"from=<{sender}>, ")
    assert ("proto=ESMTPS" in received) == tls
    assert ("tls=TLSv1." in received) == tls


@pytest.mark.parametrize("hop", HOPS)
@pytest.mark.parametrize("way", WAYS)
def test_smtp_source_delivers_a_load(world: World, way: Way, hop: Hop) -> None:
    sender = world.sender()
    before = len(world.sink.messages() if hop == "sink" else world.postfix.messages())
    world.smtp_source(way, "-m", "40", "-s", "4", "-l", "3000", "-f", sender, "-t", world.recipient(way, hop))
    world.smtp_source(way, "-d", "-m", "10", "-s", "2", "-f", sender, "-t", world.recipient(way, hop))
    world.wait_until_sent(way, sender, 50)
    if hop == "postfix":
        world.postfix.wait_for_messages(before + 50)
    messages = world.sink.messages() if hop == "sink" else world.postfix.messages()
    assert len(messages) == before + 50
    assert sum(f"From: <{sender}>".encode() in message for message in messages) == 50


def test_postfix_is_told_of_a_refusal_and_reports_it(world: World) -> None:
    """What the relay refuses at RCPT is for its client to report."""
    sender = world.sender()
    domain = world.domain("express", "sink")
    world.send_by_postfix("express", sender, f"nobody@{domain}", letter(), tls=True)
    world.relays["express"].wait_for_log(rf"reject: RCPT .*550 5\.1\.1 <nobody@{domain}>.*from=<{sender}>")
