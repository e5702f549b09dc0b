"""Ids, feature values and secrets that occur nowhere else, in every form in which a careless line might show them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from typing import Final

ID: Final = "needle-in-the-haystack"
NUMBER: Final = 4_815_162_342_108
PART: Final = "needlepart-of-a-key"
EVENT_ID: Final = "needleevent-7"
VALUE: Final = 48151.625  # exact as float32
TEXT: Final = "needletext-colour"


def forms(secrets: Mapping[str, str] = {}) -> dict[str, str]:
    """Return what to look for, and what it would give away: ids, values and the named secrets, as text, hex, base64 and Python's bytes."""
    found: dict[str, str] = {}
    for text in (ID, PART, EVENT_ID, TEXT, *secrets.values()):
        name = next((f"the {name}" for name, secret in secrets.items() if secret == text), text)
        found |= dict.fromkeys((text, text.encode().hex(), *_base64(text.encode())), name)
    for number in (NUMBER, NUMBER + 1):
        found |= {str(number): "the number", f"{number:x}": "the number"}
        for order in "<>":
            found |= _of_bytes(struct.pack(f"{order}q", number), "the number")
    for value in (VALUE, 2 * VALUE):
        found |= {
            str(value): "the value",
            **_of_bytes(struct.pack("<f", value), "the value"),
            **_of_bytes(struct.pack("<d", value), "the value"),
        }
    return found


def _of_bytes(data: bytes, name: str) -> dict[str, str]:
    return {data.hex(): name, repr(data)[2:-1]: name}


def _base64(data: bytes) -> set[str]:
    """Return what any base64 of a text that holds `data` holds, whatever is before it."""
    return {base64.b64encode(bytes(shift) + data)[4 if shift else 0 : -4].decode() for shift in range(3)}
