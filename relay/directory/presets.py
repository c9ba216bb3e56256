"""Owns: what a preset stands for (row D8): filter, attributes, and how the entries of a kind of directory are read.

Pure. ``plan`` lays a profile's own keys over its preset. Filters use ``objectClass`` and never ``objectCategory=person``:
that one is a short form of Active Directory's own, and matches nothing elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, assert_never

from relay.config.ldap import LdapProfile

EXCHANGE_OWN: Final = (
    "healthmailbox", "systemmailbox{", "discoverysearchmailbox", "federatedemail.", "migration.", "msexchapproval",
)  # fmt: skip
"""How the names of Exchange's own mailboxes begin (row R4)."""

_KINDS: Final = {
    "contacts": "(objectClass=contact)",
    "groups": "(objectClass=group)",
    "dynamic-groups": "(objectClass=msExchDynamicDistributionList)",
    "public-folders": "(objectClass=publicFolder)",
}
# Users, and shared and room mailboxes among them: told apart by msExchRecipientTypeDetails, when the entry is read.
# Computers are users, too, and left out then: where a class is unknown, (!(objectClass=computer)) matches nothing.
_PEOPLE: Final = "(objectClass=user)"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask for, and which attribute says what; names are in lower case, "" where there is none."""

    filter: str
    addresses: tuple[str, ...]
    restriction: str
    needs_auth: str
    size_limit_kb: str
    is_ad: bool
    groups: str
    """Filter of all groups, to find those within groups."""
    membership: tuple[str, ...]
    """Attributes of a group that hold its members: DNs, and last user names, if any."""
    user_name: str
    next_hop: str = ""
    imap_access: str = ""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Everything to ask for about an entry."""
        wanted = [*self.addresses, self.restriction, self.needs_auth, self.size_limit_kb]
        wanted += [self.next_hop, self.imap_access]
        if self.is_ad:
            wanted += ["useraccountcontrol", "msexchrecipienttypedetails", "objectclass"]
        return tuple(dict.fromkeys(name for name in wanted if name))


def plan(profile: LdapProfile, restriction_attribute: str) -> Plan:
    """The preset with the profile's own keys over it. ``restriction_attribute`` is the one for all directories."""
    restriction = (profile.restriction_attribute or restriction_attribute).lower()
    of_rit = profile.preset == "rit-schema"
    addresses = (
        None if profile.address_attributes is None else tuple(name.lower() for name in profile.address_attributes)
    )
    match profile.preset:
        case "active-directory" | "exchange":
            # An Exchange recipient has an alias; without Exchange, mail alone makes an address.
            holders = ("proxyaddresses",) if profile.preset == "exchange" else ("proxyaddresses", "mail")
            addresses = addresses or holders
            return Plan(
                profile.filter or _active_directory(profile, addresses),
                addresses,
                restriction,
                needs_auth="msexchrequireauthtosendto",
                size_limit_kb="delivcontlength",
                is_ad=True,
                groups="(objectClass=group)",
                membership=("member",),
                user_name="samaccountname",
                next_hop=(profile.next_hop_attribute or "").lower(),
            )
        case "openldap":
            addresses = addresses or ("mail", "mailalternateaddress", "maillocaladdress")
            found = _any(addresses)
        case "rit-schema":
            addresses = addresses or ("mail", "mailalternateaddress")
            found = f"(&(objectClass=ritMailAccount){_any(addresses)})"
        case never:
            assert_never(never)
    return Plan(
        profile.filter or found,
        addresses,
        restriction,
        needs_auth="",
        size_limit_kb="",
        is_ad=False,
        groups="(|(objectClass=groupOfNames)(objectClass=groupOfUniqueNames)(objectClass=posixGroup))",
        membership=("member", "uniquemember", "memberuid"),
        user_name="uid",
        next_hop=(profile.next_hop_attribute or ("ritMailHost" if of_rit else "")).lower(),
        imap_access="ritimapmailaccess" if of_rit else "",
    )


def _any(attributes: tuple[str, ...]) -> str:
    present = "".join(f"({name}=*)" for name in attributes)
    return present if len(attributes) == 1 else f"(|{present})"


def _active_directory(profile: LdapProfile, addresses: tuple[str, ...]) -> str:
    kinds = profile.kinds
    if kinds is None:
        classes = [_PEOPLE, *_KINDS.values()]
    else:
        classes = [_KINDS[kind] for kind in kinds if kind in _KINDS]
        if {"users", "shared"} & set(kinds):
            classes.insert(0, _PEOPLE)
    return f"(&{_any(addresses)}(|{''.join(classes)}))"
