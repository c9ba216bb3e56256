"""Owns: what must hold between values of different keys: names used once, a route for each domain, times that fit.

It reads the plain tables as TOML gives them, defaults filled in, and passes over values of a wrong type: so the loader
can report these faults together with those of single keys. It must not open files or import the schema.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from relay.config.transport import DEFAULT, parse_table, search_order

KeyPath = tuple[str | int, ...]
"""Where a value stands: table and key names, and indexes of lists, from the top of the file."""

TABLE: Final[KeyPath] = ("routing", "table")
"""The transport table; a line's number behind it is a place in it."""
UNREAD: Final = "* retry:unread"
"""Stands for a transport table that cannot be read, so that no domain is said to be without a route besides."""
EVERY: Final = -1
"""In a pattern for ``_each``: all items of a list."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at one place, and what to write instead. ``beside`` is the other place of a contradiction."""

    at: KeyPath
    what: str
    hint: str
    beside: KeyPath = ()


class WholeError(ValueError):
    """The values are good one by one and do not fit together."""

    def __init__(self, found: list[Fault]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, fault.at))}: {fault.what}; {fault.hint}" for fault in found))
        self.faults = found


def faults(tables: Mapping[str, object], wrong: Collection[KeyPath] = ()) -> list[Fault]:
    """Everything that does not fit together. ``wrong`` names places already reported: no fault is built upon them."""
    broken = {at[0] for at in wrong if at}
    found = [
        *_twice(
            tables, ("listener", EVERY, "name"), "a listener named {} stands above already", "give each its own name"
        ),
        *_twice(tables, ("domain", EVERY, "names", EVERY), "{} is listed twice", "remove one of the two"),
        *_twice(tables, ("route", EVERY, "domains", EVERY), "{} has a route above already", "remove one of the two"),
        *_twice(
            tables,
            ("directory", "ldap", EVERY, "name"),
            "a directory named {} stands above already",
            "give each its own",
        ),
        *_twice(
            tables, ("directory", "push", EVERY, "name"), "a source named {} stands above already", "name each once"
        ),
        *_ldap(tables),
        *_twice(tables, ("auth", "stores", EVERY, "name"), "a store named {} stands above already", "name each once"),
        *_stores(tables),
        *_peers(tables),
        *_transport(tables),
        *_weights(tables),
        *_twice(tables, ("directory", "overrides", EVERY, "address"), "{} has an override above already", "keep one"),
        *_occupied(tables),
        *_times(tables),
    ]
    if not broken & {"route", "routing"}:
        found += _unrouted(tables)
    if "domain" not in broken:
        found += _foreign(tables)
    if not broken & {"tls", "listener"}:
        found += _tls(tables)
    return [fault for fault in found if fault.at not in wrong]


def _each(node: object, pattern: KeyPath, at: KeyPath = ()) -> Iterator[tuple[KeyPath, object]]:
    if not pattern:
        yield at, node
    elif pattern[0] == EVERY:
        for index, item in enumerate(node if isinstance(node, list) else []):
            yield from _each(item, pattern[1:], (*at, index))
    elif isinstance(node, Mapping) and pattern[0] in node:
        yield from _each(node[pattern[0]], pattern[1:], (*at, pattern[0]))


def _texts(tables: Mapping[str, object], *pattern: str | int) -> Iterator[tuple[KeyPath, str]]:
    for at, value in _each(tables, pattern):
        if isinstance(value, str):
            yield at, value.strip()


def _twice(tables: Mapping[str, object], pattern: KeyPath, what: str, hint: str) -> Iterator[Fault]:
    seen: set[str] = set()
    for at, text in _texts(tables, *pattern):
        if text.lower() in seen:
            yield Fault(at, what.format(f'"{text}"'), hint)
        seen.add(text.lower())


def _occupied(tables: Mapping[str, object]) -> Iterator[Fault]:
    """Two sockets on one port; 0.0.0.0 takes the port from every other IPv4 address, [::] from every IPv6 one."""
    taken: dict[str, set[str]] = {}
    for at, text in [*_texts(tables, "listener", EVERY, "address"), *_texts(tables, "web", "listen")]:
        host, _, port = text.rpartition(":")
        others = taken.setdefault(port, set())
        six = host.startswith("[")
        everything = "[::]" if six else "0.0.0.0"
        rivals = {other for other in others if other.startswith("[") == six}
        if rivals and (host in rivals or everything in rivals or host == everything):
            yield Fault(at, f'"{text}" is taken by a listener above', "give each its own address or port")
        others.add(host)


_PASSWORDS: Final = ("password_file", "password_env", "password_credential")


def _ldap(tables: Mapping[str, object]) -> Iterator[Fault]:
    """What cannot go together in one ``[[directory.ldap]]``, and domains that no ``[[domain]]`` asks the directory for."""
    asked = {
        name.lower()
        for _, domain in _each(tables, ("domain", EVERY))
        if isinstance(domain, Mapping) and domain.get("recipients", "directory") == "directory"
        for _, name in _texts(domain, "names", EVERY)
    }
    for at, profile in _each(tables, ("directory", "ldap", EVERY)):
        if not isinstance(profile, Mapping):
            continue
        secrets = [key for key in _PASSWORDS if profile.get(key) is not None]
        if len(secrets) > 1:
            yield Fault((*at, secrets[1]), f"there is {secrets[0]} as well", "leave one of the two")
        if profile.get("bind") and not secrets:
            yield Fault((*at, "bind"), "there is no password for it", 'write password_file = "FILE"')
        if secrets and not profile.get("bind"):
            yield Fault((*at, secrets[0]), "nobody is named whose password it is", "write bind, e.g. user@example.com")
        clear = [u for _, u in _texts(profile, "servers", EVERY) if u.lower().startswith("ldap://")]
        if profile.get("insecure") is True and not clear:
            yield Fault((*at, "insecure"), "every server is ldaps://, which is never in clear", "remove it")
        if profile.get("pin") and profile.get("verify") is False:
            yield Fault((*at, "verify"), "with a pin the certificate is verified by it", "remove one of the two")
        if profile.get("pin") and profile.get("ca_file"):
            yield Fault((*at, "pin"), "there is a ca_file as well", "remove one: a pin needs no authority")
        for place, name in _texts(profile, "domains", EVERY):
            if name.lower() not in asked:
                hint = f'add it to a [[domain]] with recipients = "directory", or remove "{name}" here'
                yield Fault((*at, *place), f'no domain asks the directory for "{name}"', hint)


def _peers(tables: Mapping[str, object]) -> Iterator[Fault]:
    """A next hop's keys that belong together; a login never goes out in clear."""
    seen: set[tuple[str, object]] = set()
    for at, entry in _each(tables, ("next_hop", EVERY)):
        if not isinstance(entry, Mapping):
            continue
        tls = entry.get("tls") or next((value for _, value in _each(tables, ("delivery", "tls"))), "")
        name = (str(entry.get("host", "")).lower(), entry.get("port", 0))
        if name in seen:
            yield Fault(
                (*at, "host"), f'"{entry.get("host")}" has a [[next_hop]] above already', "remove one of the two"
            )
        seen.add(name)
        for one, other in (
            ("user", "password_file"),
            ("password_file", "user"),
            ("certificate", "key"),
            ("key", "certificate"),
        ):
            if entry.get(one) and not entry.get(other):
                yield Fault((*at, other), f"{one} and {other} belong together", f"set {other}, or remove {one}")
        if entry.get("user") and not entry.get("implicit") and tls not in {"required", "verified", "pinned"}:
            yield Fault(
                (*at, "user"),
                "a login needs TLS, and this next hop may be spoken to in clear",
                'write tls = "verified"',
            )
        if (tls == "pinned") != bool(entry.get("pins")):
            yield Fault((*at, "pins"), 'pins and tls = "pinned" belong together', "set both, or neither")
        if entry.get("implicit") and entry.get("tls") == "off":
            yield Fault(
                (*at, "implicit"), 'TLS from the start and tls = "off" contradict each other', "remove one of the two"
            )
        if "SCRAM-SHA-256-PLUS" in (entry.get("mechanisms") or []):
            yield Fault(
                (*at, "mechanisms"), "SCRAM-SHA-256-PLUS is not spoken towards next hops", "write SCRAM-SHA-256"
            )


def _stores(tables: Mapping[str, object]) -> Iterator[Fault]:
    """Stores that listeners name and nobody has written, and keys of a store that do not go together."""
    written = {text for _, text in _texts(tables, "auth", "stores", EVERY, "name")}
    for at, text in _texts(tables, "listener", EVERY, "stores", EVERY):
        if text not in written:
            yield Fault(at, f'there is no store named "{text}"', "write one of the names in auth.stores")
    directories = {text for _, text in _texts(tables, "directory", "ldap", EVERY, "name")}
    by_name = {
        profile.get("name"): [text for _, text in _texts(profile, "servers", EVERY)]
        for _, profile in _each(tables, ("directory", "ldap", EVERY))
        if isinstance(profile, Mapping)
    }
    for at, store in _each(tables, ("auth", "stores", EVERY)):
        if not isinstance(store, Mapping):
            continue
        match store.get("type"):
            case "file":
                if store.get("path") is None:
                    yield Fault((*at, "path"), "there is no path", 'write path = "/etc/dmz-relay/users"')
                if store.get("directory"):
                    yield Fault(
                        (*at, "directory"), "the accounts of this store stand in a file", "remove it, or the path"
                    )
            case "ldap":
                yield from _directory_store(at, store, directories)
                if any("://_" in url for url in by_name.get(store.get("directory"), ())):
                    yield Fault(
                        (*at, "directory"),
                        f'"{store.get("directory")}" finds its servers by SRV records, and logins cannot',
                        "write its servers by name, or a [[directory.ldap]] of its own for logins with recipients = false",
                    )


def _directory_store(at: KeyPath, store: Mapping[str, object], directories: Collection[str]) -> Iterator[Fault]:
    known = ", ".join(sorted(directories)) or "there is none yet"
    if store.get("path") is not None:
        yield Fault((*at, "path"), "the accounts of this store stand in a directory", "remove it")
    if store.get("directory") not in directories:
        yield Fault(
            (*at, "directory"),
            f'there is no directory named "{store.get("directory") or ""}"',
            f"write the name of a [[directory.ldap]] ({known}); with recipients = false it serves logins alone",
        )
    check, names, domains = store.get("check", "bind"), store.get("names", "as-typed"), store.get("domains") or []
    if store.get("mechanisms") and check != "attribute":
        yield Fault(
            (*at, "mechanisms"),
            "the directory checks passwords itself and has to be shown them, which is PLAIN and LOGIN",
            'remove it, or write check = "attribute" where stored passwords can be read',
        )
    if names in {"add-domain", "windows"} and not domains:
        yield Fault((*at, "names"), "no domain is named to add", 'write domains = ["example.com"]')
    bind_name = store.get("bind_name") or ""
    if (check == "fastbind") != bool(bind_name):
        what = "nobody is named who binds" if check == "fastbind" else f"with check = {check} the name is searched for"
        yield Fault(
            (*at, "bind_name"), what, 'write bind_name = "uid=%U,ou=People,dc=example,dc=org" with fastbind alone'
        )
    elif isinstance(bind_name, str) and bind_name:
        places = set(re.findall(r"%(.)", bind_name)) - {"%"}
        one = names in {"add-domain", "windows"} and isinstance(domains, list) and len(domains) == 1
        if not places & {"u", "U"} or not places <= ({"u", "U", "d"} if one else {"U"}):
            yield Fault(
                (*at, "bind_name"),
                "one account could be written in several ways, each with guesses of its own",
                'write %U, or %u with names = "add-domain" or "windows" and one of domains',
            )


def _transport(tables: Mapping[str, object]) -> Iterator[Fault]:
    """The lines of the transport table, each for itself and against ``[[route]]``."""
    written = _patterns(tables)
    for _, text in _each(tables, TABLE):
        lines, wrong = parse_table(text) if isinstance(text, str) else ([], [])
        for fault in wrong:
            yield Fault((*TABLE, fault.number), fault.what, fault.hint)
        for line in [] if text == UNREAD else lines:
            at = (*TABLE, line.number)
            if line.target is None and written.isdisjoint(search_order(line.pattern)):
                what = f'"{line.pattern}" is left to [[route]], and no such table fits it'
                yield Fault(at, what, "write smtp: for the mail exchangers of the domain")
            elif line.target is not None and line.pattern in written:
                yield Fault(at, f'"{line.pattern}" has a [[route]] table as well', "remove one of the two")


def _patterns(tables: Mapping[str, object]) -> set[str]:
    return {text.lower() for _, text in _texts(tables, "route", EVERY, "domains", EVERY)}


def _weights(tables: Mapping[str, object]) -> Iterator[Fault]:
    for at, route in _each(tables, ("route", EVERY)):
        weights = route.get("weights") if isinstance(route, Mapping) else None
        hops = route.get("next_hops") if isinstance(route, Mapping) else None
        if not (isinstance(weights, list) and weights and isinstance(hops, list)):
            continue
        if len(weights) != len(hops):
            what = f"{len(weights)} weights for {len(hops)} next hops"
            yield Fault((*at, "weights"), what, "write one for each next hop, in the same order")
        elif not any(weights):
            yield Fault((*at, "weights"), "no next hop has a share", "write 1 or more for one of them")


def _unrouted(tables: Mapping[str, object]) -> Iterator[Fault]:
    routed = _patterns(tables)
    for _, text in _each(tables, TABLE):
        routed |= {line.pattern for line in parse_table(text)[0]} if isinstance(text, str) else set()
    if DEFAULT not in routed:
        for at, text in _texts(tables, "domain", EVERY, "names", EVERY):
            if routed.isdisjoint(search_order(text.lower())):
                yield Fault(at, f'"{text}" has no route', f'add a [[route]] table with domains = ["{text}"]')


def _foreign(tables: Mapping[str, object]) -> Iterator[Fault]:
    """An override of somebody else's address would wait for mail that is refused before it is looked at."""
    ours = {text.lower() for _, text in _texts(tables, "domain", EVERY, "names", EVERY)}
    for at, text in _texts(tables, "directory", "overrides", EVERY, "address"):
        if text.rpartition("@")[2].lower() not in ours:
            yield Fault(at, f'"{text}" is of no [[domain]]', "add its domain to a [[domain]], or remove this")


def _times(tables: Mapping[str, object]) -> Iterator[Fault]:
    """A lease that ends while the final reply may still come would let a second worker send the message again."""
    lease = [value for _, value in _each(tables, ("queue", "lease_s"))]
    reply = [value for _, value in _each(tables, ("delivery", "final_reply_timeout_s"))]
    match lease, reply:
        case [int() | float() as held], [int() | float() as waited] if held <= waited:
            yield Fault(
                ("queue", "lease_s"),
                f"{held:g} is not longer than delivery.final_reply_timeout_s ({waited:g})",
                f"write lease_s = {waited + 300:g}",
                beside=("delivery", "final_reply_timeout_s"),
            )
        case _:
            pass


def _tls(tables: Mapping[str, object]) -> Iterator[Fault]:
    certificate, key = (next((v for _, v in _each(tables, ("tls", name))), None) for name in ("certificate", "key"))
    if (certificate is None) != (key is None):
        missing = "certificate" if certificate is None else "key"
        yield Fault(("tls", missing), "certificate and key belong together", f"set {missing}, or remove the other")
    if certificate is None and key is None:
        for index, listener in _each(tables, ("listener", EVERY)):
            if isinstance(listener, Mapping) and (
                listener.get("role") == "submissions" or listener.get("require_tls") or listener.get("require_tls_from")
            ):
                yield Fault(index, "this listener needs TLS", "set certificate and key in [tls]")
