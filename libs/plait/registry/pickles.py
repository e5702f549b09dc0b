"""Telling a pickle from a model by its bytes, so that whoever hands one over hears what to do instead; nothing is ever unpickled here."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from plait.errors import InvalidArgument

NAMES: Final = frozenset({"pickle", "pkl", "joblib", "dill", "cloudpickle"})
_SUFFIXES: Final = frozenset({".pkl", ".pickle", ".joblib", ".dill"})
_ADVICE: Final = (
    "pickle is never loaded, because unpickling runs whatever the file says: export the model (torch.export.save gives torch_export, "
    "torch.onnx.export gives onnx, skl2onnx turns scikit-learn into onnx), or save its weights alone with safetensors.torch.save_file and "
    "name the class that takes them (--format safetensors --architecture NAME)"
)


def is_pickle(file: Path) -> bool:
    """Say whether a file is one that only unpickling opens: by its name, by how pickles begin, or as an archive of torch.save.

    TorchScript and torch.export write archives too; what they hold beside a pickle tells them apart. A file that cannot be read is none.
    """
    if file.suffix.lower() in _SUFFIXES:
        return True
    try:
        with file.open("rb") as opened:
            start = opened.read(2)
        if start == b"PK":
            return _is_torch_save(file)
    except (OSError, zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return False
    return start[:1] == b"\x80" and start[1:] in {b"\x02", b"\x03", b"\x04", b"\x05"}  # PROTO and its version: PEP 307, PEP 3154, PEP 574


def refused(what: str) -> InvalidArgument:
    """Return the error for `what` (a file, a format) with what to do instead."""
    return InvalidArgument(f"{what}: {_ADVICE}", reason="ARTIFACT_PICKLE")


def _is_torch_save(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        inside = {name.partition("/")[2] for name in archive.namelist()}
    return "data.pkl" in inside and "constants.pkl" not in inside
