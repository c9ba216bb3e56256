"""Owns: what single values of the configuration look like: addresses, names, networks, next hops, texts.

Each function returns the value in its normal form, or raises ValueError that says what is wrong and what to write.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator

from relay.config.addresses import split_address, split_dns_server
from relay.config.destination import parse_next_hop
from relay.config.invalid import Invalid
from relay.config.section import REFUSAL_OCTETS
from relay.mail.address import AddressFault, is_domain, parse_mailbox
from relay.mail.domain import ascii_domain


def socket_address(value: str) -> str:
    """HOST:PORT to listen on."""
    split_address(value)
    return value


def next_hop(value: str) -> str:
    """One next hop, as a route names it."""
    target = parse_next_hop(value)
    if isinstance(target, tuple) and len(target) > 1:
        raise Invalid(f'"{value}" names several next hops', "write each as an item of the list")
    return value


def next_hops(values: list[str]) -> list[str]:
    """The next hops of a route together."""
    if len(values) > 1 and any(not isinstance(parse_next_hop(value), tuple) for value in values):
        raise Invalid("error:, retry: and discard: stand alone", "leave one of them, or the next hops")
    return values


def dns_server(value: str) -> str:
    """ADDRESS or ADDRESS:PORT of a DNS server."""
    split_dns_server(value)
    return value


def host_name(value: str) -> str:
    """The full name of a host."""
    if not is_domain(value):
        raise Invalid(f'"{value}" is not a host name', "write the relay's full name, e.g. mx.example.com")
    return value


def server_name(value: str) -> str:
    """A name clients connect to, or ``*.`` and a domain; in lower case."""
    if not is_domain(value.removeprefix("*.")):
        raise Invalid(f'"{value}" is not a host name', "write the name clients connect to, e.g. mail.example.org")
    return value.lower()


def domain(value: str) -> str:
    """A domain in lower case, as A-labels."""
    value = ascii_domain(value) or value
    if not is_domain(value):
        raise Invalid(f'"{value}" is not a domain name', "write what stands behind the @, e.g. example.com")
    return value.lower()


def network(value: str) -> str:
    """An address or a network."""
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise Invalid(f'"{value}" is not an address or network', "write 192.0.2.7 or 192.0.2.0/24") from None
    if network.prefixlen == 0:
        raise Invalid(
            f'"{value}" is the whole Internet and would make an open relay',
            "write only the networks of your own servers",
        )
    if "/" in value and str(network.network_address) != str(ipaddress.ip_interface(value).ip):
        raise Invalid(f'"{value}" names a host and a network at once', f"write {network} for the network")
    return value


def clients(value: str) -> str:
    """A network of clients of whom something is required; not the whole Internet."""
    if re.fullmatch(r"(?:0\.0\.0\.0|::)/0", value):
        raise Invalid(f'"{value}" is everybody', "write require_tls = true for that, or the networks that are meant")
    return network(value)


def balancer(value: str) -> str:
    """A network of balancers."""
    if re.fullmatch(r"(?:0\.0\.0\.0|::)/0", value):
        raise Invalid(
            f'"{value}" would let every client say who it is', "write only the addresses of your own balancers"
        )
    return network(value)


def header_name(value: str) -> str:
    """The name of a header field, or its beginning and ``*``."""
    if re.fullmatch(r"[!-)+-9;-~]+\*?", value) is None:
        raise Invalid(f'"{value}" is not a header name', "write the name without colon; a * may stand at its end only")
    return value


def pin(value: str) -> str:
    """SHA-256 fingerprint of a certificate, in lower case without colons."""
    digest = value.replace(":", "").lower()
    if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise Invalid(
            f'"{value}" is no SHA-256 fingerprint',
            "write 64 hexadecimal digits: openssl x509 -noout -fingerprint -sha256",
        )
    return digest


def refusal(value: str) -> str:
    """Text of a refusal: printable ASCII."""
    if re.fullmatch(rf"[ -~]{{1,{REFUSAL_OCTETS}}}", value) is None:
        raise Invalid(
            "this text cannot stand in an SMTP reply", f"write 1 to {REFUSAL_OCTETS} plain ASCII characters in one line"
        )
    return value


def mailbox(value: str) -> str:
    """A whole address."""
    if isinstance(parse_mailbox(value), AddressFault) or "@" not in value:
        raise Invalid(f'"{value}" is not an address', "write a whole address, e.g. hostmaster@example.com")
    return value


def delimiters(value: str) -> str:
    """What separates a tag from a mailbox, one character each."""
    if re.fullmatch(r"[+\-_=#~.]{0,7}", value) is None:
        raise Invalid(f'"{value}" cannot separate a tag', 'write "+", or several of + - _ = # ~ .; "" for none')
    return value


def account(value: str) -> str:
    """The name of a user of the system, or nothing."""
    if re.fullmatch(r"(?:[a-z_][a-z0-9_-]{0,31})?", value) is None:
        raise Invalid(
            f'"{value}" is not a user name', 'write the name of a system user, or "" to keep the starting user'
        )
    return value


SocketAddress = Annotated[str, AfterValidator(socket_address)]
