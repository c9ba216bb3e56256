"""Owns: internationalised domain names (IDNA, RFC 5890 and 5891): the ASCII form of a name in UTF-8.

Pure. Two names are the same when their ASCII forms (A-labels) are: routes, own domains, the snapshot and the DNS are asked
with these. The mapping of capitals and widths is UTS 46's, as browsers have it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import idna

DOMAIN_OCTETS: Final = 255  # RFC 5321 §4.5.3.1.2
_LABEL_CHARACTERS: Final = 63
_KEPT: Final = 1024
"""Names whose form is remembered. Strangers choose them, so it is bounded; a miss costs some 20 µs."""


@lru_cache(_KEPT)
def ascii_domain(domain: str) -> str | None:
    """A domain with its labels as A-labels, lower case; None when that is no domain name. ASCII labels stay as they are."""
    labels: list[str] = []
    for label in domain.split("."):
        if label.isascii():
            labels.append(label.lower())
            continue
        if len(label) > _LABEL_CHARACTERS:
            return None
        try:
            labels.append(idna.alabel(idna.uts46_remap(label, std3_rules=True)).decode("ascii"))
        except (idna.IDNAError, UnicodeError):
            return None
    found = ".".join(labels)
    return found if len(found) <= DOMAIN_OCTETS else None
