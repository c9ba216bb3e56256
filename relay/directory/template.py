"""Owns: filters and names with places for a login in them (``%u``, ``%U``, ``%d``, ``%s``), and how a login fills these.

A filter is compiled once, with its places empty, and filled as octets: no character of a login can change what is asked,
escaped or not. Pure but for ldap3's compiler. Must not know accounts or passwords.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from relay.directory import ber
from relay.directory.connection import compile_filter

PLACES: Final = re.compile(r"%([uUds%])")
_DN_SPECIAL: Final = re.compile(r'[,+"\\<>;=#]')

_Part: TypeAlias = "bytes | str"
"""Octets as they are, or the letter of a place."""


@dataclass(frozen=True, slots=True)
class Login:
    """A login's name as it fills places: ``given`` as typed, ``whole`` as modified, and its two halves."""

    given: str
    whole: str
    user: str
    domain: str

    def fill(self, place: str) -> str:
        """What stands in a place."""
        match place:
            case "u":
                return self.whole
            case "U":
                return self.user
            case "d":
                return self.domain
            case _:
                return self.given


@dataclass(frozen=True, slots=True)
class _Node:
    """An element of BER: of other elements, or of parts."""

    tag: int
    inner: tuple[_Node, ...]
    parts: tuple[_Part, ...]

    def octets(self, login: Login) -> bytes:
        if self.inner:
            return ber.tlv(self.tag, b"".join(node.octets(login) for node in self.inner))
        return ber.tlv(
            self.tag, b"".join(part if isinstance(part, bytes) else login.fill(part).encode() for part in self.parts)
        )


class FilterTemplate:
    """A filter whose places a login fills."""

    def __init__(self, text: str) -> None:
        """Raises LdapFailure when the filter cannot be read."""
        token = secrets.token_hex(8)  # what no filter has
        octets = compile_filter(PLACES.sub(lambda at: "%" if at[1] == "%" else token + at[1], text))
        self.places: Final = frozenset(at[1] for at in PLACES.finditer(text)) - {"%"}
        [self._node] = _nodes(octets, token.encode())

    def octets(self, login: Login) -> bytes:
        """The filter for one login, as it goes over the wire."""
        return self._node.octets(login)


def _nodes(octets: bytes, token: bytes) -> tuple[_Node, ...]:
    found: list[_Node] = []
    at = 0
    while at < len(octets):
        tag, start, at = ber.header(octets, at)
        content = octets[start:at]
        if tag & 0x20 and content:
            found.append(_Node(tag, _nodes(content, token), ()))
            continue
        first, *others = content.split(token)
        parts: list[_Part] = [first]
        for other in others:
            parts += [chr(other[0]), other[1:]]
        found.append(_Node(tag, (), tuple(parts)))
    return tuple(found)


def name(template: str, login: Login) -> str:
    """A name to bind with: what stands in a DN is escaped (RFC 4514 §2.4)."""
    is_dn = "=" in template

    def fill(at: re.Match[str]) -> str:
        if at[1] == "%":
            return "%"
        text = login.fill(at[1])
        return _DN_SPECIAL.sub(r"\\\g<0>", text) if is_dn else text

    return PLACES.sub(fill, template)


def any_of(attributes: tuple[str, ...]) -> str:
    """The filter that looks for a login in several attributes."""
    terms = [f"({one}=smtp:%u)" if one.lower() == "proxyaddresses" else f"({one}=%u)" for one in attributes]
    return terms[0] if len(terms) == 1 else f"(|{''.join(terms)})"


def first_text(attributes: Mapping[str, list[bytes]], attribute: str) -> str:
    """The first value of an attribute, "" when there is none that is text."""
    for raw in attributes.get(attribute.lower(), ()):
        try:
            return raw.decode()
        except UnicodeDecodeError:
            continue
    return ""
