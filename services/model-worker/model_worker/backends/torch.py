"""The only place that knows torch: TorchScript and torch.export programs as functions from arrays to arrays.

Neither format may bring code: TorchScript has an interpreter and an unpickler of its own that know no Python, and a .pt2 is looked at by
`pt2_check` first.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from model_worker.backends import pt2_check
from model_worker.packed import Array
from plait.errors import FailedPrecondition, Internal
from plait.registry.artifact import Format

_SMALL_BYTES: Final = 4096  # copying less costs less than avoiding it


class TorchModel:
    """A loaded program. Calls must come from one thread at a time; the first one on a thread sets torch's thread count there.

    `threads`: how many a single operator may use; with one process per core and requests side by side, 1 is fastest.
    """

    def __init__(self, program: Callable[..., Any], *, threads: int) -> None:
        self._program = program
        self._threads = threads

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the forward pass on arrays, positionally, and return its outputs as arrays.

        Raises Internal (MODEL_OUTPUT_WRONG) where it gives anything but tensors; whatever the program raises comes through.
        """
        if torch.get_num_threads() != self._threads:  # a setting of the calling thread
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            found = self._program(*(_tensor(array) for array in inputs))
        outputs = found if isinstance(found, tuple | list) else (found,)
        if not all(isinstance(output, torch.Tensor) for output in outputs):
            kinds = ", ".join(type(output).__name__ for output in outputs)
            raise Internal(f"the model gave {kinds}: it must give one tensor, or a tuple of them", reason="MODEL_OUTPUT_WRONG")
        return [output.numpy(force=True) for output in outputs]


def load(format_: Format, file: Path, *, threads: int) -> TorchModel:
    """Load a program onto the CPU. Raises FailedPrecondition: MODEL_UNSAFE, or MODEL_UNLOADABLE where torch cannot read it."""
    try:
        program = _load_torchscript(file) if format_ == "torchscript" else _load_export(file)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError) as error:
        line = str(error).strip().partition("\n")[0][:300]
        message = f"torch {torch.__version__} cannot load {file.name} as {format_}: {line}; was it saved by a torch this old or older?"
        raise FailedPrecondition(message, reason="MODEL_UNLOADABLE") from error
    return TorchModel(program, threads=threads)


def _load_torchscript(file: Path) -> Callable[..., Any]:
    with warnings.catch_warnings():
        # torch deprecates TorchScript in favour of torch.export; teams still hand it over, so both are served.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        program = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
        frozen: Callable[..., Any] = torch.jit.freeze(program.eval())
        return frozen


def _load_export(file: Path) -> Callable[..., Any]:
    sample_inputs = pt2_check.check(file)
    if sample_inputs:
        try:
            # torch.export.load would try this too, but go on with full pickle where it fails.
            torch.load(io.BytesIO(sample_inputs), weights_only=True)
        except Exception as error:
            message = "the .pt2 file is refused: its sample inputs need pickle; export the model with plain tensors"
            raise FailedPrecondition(message, reason="MODEL_UNSAFE") from error
    return torch.export.load(file).module()


def _tensor(array: Array) -> torch.Tensor:
    """Return a tensor on the array's own memory.

    Arrays over a message's bytes are read-only, which torch warns of because it cannot keep a program from writing. These bytes were
    made for this request and nobody else sees them, so a program that works in place harms no one; what is small is copied, since
    Python shares one-byte strings.
    """
    if not array.flags.writeable:
        array = array.copy() if array.nbytes < _SMALL_BYTES else np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _Writable:
    """The same memory without the read-only mark. https://numpy.org/doc/stable/reference/arrays.interface.html"""

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._owner = array
