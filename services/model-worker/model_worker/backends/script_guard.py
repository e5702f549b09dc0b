"""Refuses TorchScript that could read or write files, before torch opens it: a module's `__setstate__` runs while it is loaded.

Names are looked for in the archive's code as text. TorchScript lets a namespace be renamed (`t = torch`) but not an operator be spelt
otherwise, except through `getattr`; that is let through where it names a submodule plainly, as in `getattr(self.mlp, "0")`.
"""

from __future__ import annotations

import re
from typing import Final

from model_worker.backends.archive import Content, invalid, members, unsafe

_WRITTEN_BY: Final = "torch.jit.save"
_MEMBER: Final = re.compile(
    r"version|byteorder|\.data/(version|serialization_id)|\w+\.pkl|(data|constants|attributes|tensors)/\d+|code/.+\.py(\.debug_pkl)?"
)
_LEFT_OUT: Final = re.compile(r"extra/.*|traced_inputs(\.pkl|/\d+)|\.format_version|\.storage_alignment")
_FORBIDDEN: Final = re.compile(r"\b(save|from_file)\b")
_PLAIN_GETATTR: Final = re.compile(r'\bgetattr\((?:[\w.]|\(\w+\))+, "\w+"\)')


def check(archive: bytes) -> dict[str, Content]:
    """Return the archive's members by name, each of which was checked.

    Raises FailedPrecondition (ARTIFACT_UNSAFE, ARTIFACT_INVALID).
    """
    found = members(archive, _MEMBER, _LEFT_OUT, written_by=_WRITTEN_BY)
    for name, content in found.items():
        if name.endswith(".py"):
            _check_code(bytes(content))
    return found


def _check_code(content: bytes) -> None:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise invalid(error, _WRITTEN_BY) from error
    if used := _FORBIDDEN.search(text):
        raise unsafe(f"its code uses the name {used[0]!r}, by which files are read or written")
    plain = ""
    while plain != text:  # one may stand within the other
        text, plain = _PLAIN_GETATTR.sub("_", text), text
    if "getattr" in text:
        raise unsafe("its code looks something up with getattr in other than the plain form")
