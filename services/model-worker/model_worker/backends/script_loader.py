"""Loads TorchScript while others serve: weights are copied without the interpreter's lock, which `torch.jit.load` holds from start to end.

For 200 MB that is 0.2 to 0.3 s in which no request is answered. `torch.package` shows the way round: its deserializer takes storages that
are there already. So the archive is laid out as a package's, without its weights, and those are handed over beside it; what is left to do
under the lock takes milliseconds, and weights are in memory once less. The calls are those of torch/package/package_importer.py.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from model_worker.backends.archive import Content, zipped

_WEIGHTS: Final = re.compile(r"(\w+)/(\d+)")
_WITH_WEIGHTS: Final = frozenset({"data", "constants"})
_PICKLES: Final = frozenset({"data.pkl", "constants.pkl"})
_ID: Final = "0"  # of the one module in the package


def load(members: Mapping[str, Content], device: str = "cpu") -> Any:
    """Return the torch.jit.ScriptModule of an archive's members, by their names below the archive's own folder. Raises what torch does."""
    weights = _weights(members)
    if device != "cpu" or weights is None:
        return torch.jit.load(io.BytesIO(zipped(members)), map_location=device)  # type: ignore[no-untyped-call]
    storages = torch._C.DeserializationStorageContext()  # noqa: SLF001
    for key, content in weights.items():
        storages.add_storage(key, _copied(content))
    package = zipped({_place(name): content for name, content in members.items() if not _WEIGHTS.fullmatch(name)})
    reader = torch._C.PyTorchFileReader(io.BytesIO(package))  # noqa: SLF001
    unit = torch._C.CompilationUnit()  # noqa: SLF001
    module = torch._C._import_ir_module_from_package(unit, reader, storages, torch.device(device), _ID)  # noqa: SLF001
    return torch.jit._recursive.wrap_cpp_module(module)  # type: ignore[no-untyped-call]  # noqa: SLF001


def _weights(members: Mapping[str, Content]) -> dict[str, Content] | None:
    """Return the weights by key, None where a package would mix them up: there keys are numbers without the folder they are in."""
    found: dict[str, Content] = {}
    folders: set[str] = set()
    for name, content in members.items():
        if match := _WEIGHTS.fullmatch(name):
            folders.add(match[1])
            found[match[2]] = content
        elif name.endswith(".pkl") and name not in _PICKLES:
            return None
    usual = len(folders) < 2 and folders <= _WITH_WEIGHTS and members.get("byteorder", b"little") == b"little"
    return found if usual else None


def _place(name: str) -> str:
    if name.startswith("code/"):
        return f".data/ts_code/{name}"
    if name in _PICKLES:
        return f".data/ts_code/{_ID}/{name}"
    return f".data/{name}" if name == "version" else name


def _copied(content: Content) -> torch.Tensor:
    """Copy into memory that torch has aligned; numpy lets the lock go meanwhile."""
    storage = torch.empty(len(content), dtype=torch.uint8)
    np.copyto(storage.numpy(), np.frombuffer(content, np.uint8))
    return storage
