"""Owns: which directories are asked in a way that should not last: in clear, unverified, as nobody (row D11). Pure."""

from __future__ import annotations

from collections.abc import Iterator

from relay.config.schema import Config


def weaknesses(config: Config) -> Iterator[tuple[str, str, str]]:
    """Directory, server, and what is wrong with how it is asked."""
    for profile in config.directory.ldap:
        for server in profile.targets():
            if profile.insecure and not server.ldaps:
                yield (
                    profile.name,
                    server.url,
                    "in clear: password and addresses can be read on the way (insecure = true)",
                )
            elif not profile.verify:
                yield (
                    profile.name,
                    server.url,
                    "any certificate is taken: anyone on the way can pose as it (verify = false)",
                )
        if not profile.bind and profile.preset in {"active-directory", "exchange"}:
            yield profile.name, profile.servers[0], "asked as nobody: Active Directory answers only who logs in (bind)"
