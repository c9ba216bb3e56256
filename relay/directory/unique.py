"""Owns: what tells the entries of a directory apart and which of them changed: unique ids and stamps, as attributes. Pure.

Active Directory: objectGUID, and uSNChanged, which counts the changes of one domain controller. OpenLDAP: entryUUID, and
entryCSN, the time of the change and the number of the server that made it (RFC 4530; draft-chu-ldap-csn).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_LOW: Final = (1 << 64) - 1
_MIX: Final = 0xC7880FF07F40BEF211322F715D3DD1DD
"""Odd, and else thrown by dice: multiply and shift (Dietzfelbinger) spreads even ids that a clock made one after the other."""
_GUID_OCTETS: Final = 16
_UUID_OCTETS: Final = 36
_CSN_OCTETS: Final = 40  # 20261127190501.123456Z#000000#001#000000


class Unique:
    """Ids and stamps of one reading's entries. ``missing`` counts entries without either; ``newest`` is the greatest stamp."""

    __slots__ = ("_is_ad", "key_attribute", "missing", "newest", "octets", "stamp_attribute")

    def __init__(self, *, is_ad: bool) -> None:
        self._is_ad = is_ad
        self.key_attribute: Final = "objectguid" if is_ad else "entryuuid"
        self.stamp_attribute: Final = "usnchanged" if is_ad else "entrycsn"
        self.octets: Final = _GUID_OCTETS if is_ad else _UUID_OCTETS
        self.missing = 0
        self.newest = b""

    def number(self, key: bytes) -> int:
        """An id as 64 bits: two of a million entries share them once in 10⁷ directories. -1 for what is no id."""
        try:
            whole = int.from_bytes(key, "big") if self._is_ad else int(key.replace(b"-", b""), 16)
        except ValueError:
            return -1
        return whole * _MIX >> 64 & _LOW if len(key) == self.octets else -1

    def note(self, stamp: bytes) -> bool:
        """Note a stamp; False for what is none."""
        if self._is_ad:
            return stamp.isdigit()
        if len(stamp) != _CSN_OCTETS or stamp[14:15] != b".":
            return False
        self.newest = max(self.newest, stamp)
        return True

    def filter(self, key: bytes) -> str:
        """What finds the entry with this id."""
        value = "".join(f"\\{octet:02x}" for octet in key) if self._is_ad else key.decode("ascii", "replace")
        return f"({self.key_attribute}={value})"

    def of(self, attributes: Mapping[str, list[bytes]]) -> int:
        """The number of an entry that was read the long way; entries without an id or a stamp are counted, and give 0."""
        key, stamp = attributes.get(self.key_attribute), attributes.get(self.stamp_attribute)
        number = self.number(key[0]) if key else -1
        if number < 0 or not stamp or not self.note(stamp[0]):
            self.missing += 1
            return 0
        return number
