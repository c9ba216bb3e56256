"""Owns: LDAP URLs (RFC 4516), read and written. Pure.

A profile says the same in keys of its own; a whole URL is what other programs' configurations hold and what a person can paste
into another tool.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, cast
from urllib.parse import quote, unquote

from relay.config.invalid import Invalid

Scope = Literal["base", "one", "sub"]

EVERYTHING: Final = "(objectClass=*)"
_HINT: Final = "write ldaps://HOST/BASE?ATTRIBUTES?SCOPE?FILTER"
_URL: Final = re.compile(
    r"(?P<scheme>ldaps?)://(?P<place>[^/?#]*)(?:/(?P<base>[^?#]*)"
    r"(?:\?(?P<attributes>[^?#]*)(?:\?(?P<scope>[^?#]*)(?:\?(?P<filter>[^?#]*)(?:\?(?P<extensions>[^?#]*))?)?)?)?)?",
    re.IGNORECASE,
)
_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
# RFC 4516 §2.1: what need not be percent-encoded in a DN, a filter or an attribute; never "?", space or "%".
_PLAIN: Final = "=,()&|!*+:;@/$'-._~<>"


@dataclass(frozen=True, slots=True)
class LdapUrl:
    """One URL, decoded. ``place`` is host and port as written; "" and () where it says nothing."""

    scheme: str
    place: str
    base: str = ""
    attributes: tuple[str, ...] = ()
    scope: Scope = "base"
    filter: str = EVERYTHING

    def __str__(self) -> str:
        """As RFC 4516 writes it, trailing parts that say nothing left out."""
        said = "" if self.filter == EVERYTHING else quote(self.filter, safe=_PLAIN)
        scope = "" if self.scope == "base" else self.scope
        parts = [quote(self.base, safe=_PLAIN), ",".join(self.attributes), scope, said]
        while parts and not parts[-1]:
            parts.pop()
        return f"{self.scheme}://{self.place}" + ("/" + "?".join(parts) if parts else "")

    @property
    def as_keys(self) -> str:
        """The same as keys of ``[[directory.ldap]]``."""
        said = [f'servers = ["{self.scheme}://{self.place}"]']
        if self.base:
            said.append(f'base = "{self.base}"')
        said.append(f'scope = "{self.scope}"')
        if self.filter != EVERYTHING:
            said.append(f'filter = "{self.filter}"')
        if self.attributes:
            names = ", ".join(f'"{name}"' for name in self.attributes)
            said.append(f"address_attributes = [{names}]")
        return ", ".join(said)


def parse_ldap_url(text: str) -> LdapUrl:
    """Read one. Raises Invalid."""
    found = _URL.fullmatch(text)
    if found is None or _PERCENT.search(text):
        raise Invalid(f'"{text}" is not an LDAP URL (RFC 4516)', _HINT)
    scope = unquote(found["scope"] or "").lower() or "base"
    if scope not in {"base", "one", "sub"}:
        raise Invalid(f'"{scope}" is no scope', "write base, one or sub behind the attributes")
    for extension in (found["extensions"] or "").split(","):
        if extension.startswith("!"):  # RFC 4516 §2: an unknown critical one must not be passed over
            raise Invalid(f'the extension "{extension}" is not known', "leave it out; bind has a key of its own")
    try:
        base, asked = unquote(found["base"] or "", errors="strict"), unquote(found["filter"] or "", errors="strict")
    except UnicodeDecodeError:
        raise Invalid(f'"{text}" is not UTF-8 behind its percent signs', _HINT) from None
    attributes = tuple(unquote(name) for name in (found["attributes"] or "").split(",") if name and name != "*")
    return LdapUrl(found["scheme"].lower(), found["place"], base, attributes, cast("Scope", scope), asked or EVERYTHING)
