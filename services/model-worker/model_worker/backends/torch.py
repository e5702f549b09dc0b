"""torch, and nothing of it anywhere else: loads TorchScript and torch.export models from verified bytes and runs them on the CPU."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from model_worker.artifacts import Artifact
from model_worker.backends import LoadOptions, export_guard, script_guard
from model_worker.packed import Array
from plait.errors import FailedPrecondition

# TorchScript that reads or writes files or talks; a model that is handed over has no business doing so. (aten::warn is let through: torch's
# own EmbeddingBag and TransformerEncoder hold it, for arguments that are deprecated.)
_FORBIDDEN_OPS: Final = frozenset({"aten::from_file", "aten::save", "prim::Print", "prim::PythonOp"})
_PLATFORM: Final = {"torchscript": "pytorch_torchscript", "torch_export": "pytorch_export"}
_COPY_BELOW_BYTES: Final = 16_384  # copying is as cheap as borrowing up to there, and CPython shares its one-byte `bytes` objects


class _Borrowed:
    """Gives numpy's array interface to memory of a read-only array; numpy keeps this object, and so the memory, alive."""

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._owner = array


class TorchModel:
    """A loaded model, called with arrays in the signature's order (row splits last), answering arrays in the signature's order."""

    def __init__(
        self, module: Callable[..., Any], output_names: Sequence[str], *, platform: str, memory_bytes: int, num_threads: int
    ) -> None:
        self._module = module
        self._output_names = tuple(output_names)
        self._num_threads = num_threads
        self.platform = platform
        self.memory_bytes = memory_bytes

    def prepare_thread(self) -> None:
        """Set how many threads one operator may use, which torch keeps per thread."""
        torch.set_num_threads(self._num_threads)

    def close(self) -> None:
        """Nothing but memory is held."""

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Run one forward pass; raises whatever the model raises, TypeError where its answer is not tensors."""
        with torch.inference_mode():
            answer = self._module(*(tensor(array) for array in inputs))
            return [_array(t) for t in self._in_order(answer)]

    def _in_order(self, answer: Any) -> Sequence[Any]:
        if isinstance(answer, Mapping):
            return [answer[name] for name in self._output_names]
        return answer if isinstance(answer, tuple | list) else (answer,)


def load(artifact: Artifact, options: LoadOptions) -> TorchModel:
    """Load a model from the verified bytes of its file.

    Raises FailedPrecondition: ARTIFACT_INVALID (torch cannot load it), ARTIFACT_UNSAFE, MODEL_UNSUPPORTED.
    """
    manifest = artifact.manifest
    if any(t.dtype == "bytes" for t in (*manifest.inputs, *manifest.outputs)):
        raise FailedPrecondition("torch has no BYTES tensors: encode them before the model", reason="MODEL_UNSUPPORTED")
    loader = {"torchscript": _load_torchscript, "torch_export": _load_export}[manifest.format]
    torch.set_num_threads(options.num_threads)
    content = artifact.read(manifest.entry)
    try:
        module = loader(content)
    except FailedPrecondition:
        raise
    except Exception as error:
        raise FailedPrecondition(
            f"torch {torch.__version__} cannot load it as {manifest.format} ({type(error).__name__}): export it again with this torch",
            reason="ARTIFACT_INVALID",
        ) from error
    return TorchModel(
        module,
        [t.name for t in manifest.outputs],
        platform=_PLATFORM[manifest.format],
        memory_bytes=len(content),
        num_threads=options.num_threads,
    )


def tensor(array: Array) -> torch.Tensor:
    """Return a tensor over the array's memory, without a copy where it is worth it.

    An array over a message's bytes is read-only, which torch does not know and warns of. The bytes belong to this request alone
    (protobuf makes them anew on each access), so a model that writes into its inputs harms nobody.
    """
    if not array.flags.writeable:
        array = array.copy() if array.nbytes < _COPY_BELOW_BYTES else np.asarray(_Borrowed(array))
    return torch.from_numpy(array)


def _load_torchscript(content: bytes) -> Callable[..., Any]:
    with warnings.catch_warnings():
        # torch deprecates TorchScript in favour of torch.export; plait serves both because teams still hand over both.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit.*")
        module = torch.jit.load(io.BytesIO(script_guard.check(content)), map_location="cpu")  # type: ignore[no-untyped-call]
        module.eval()
    used = sorted(kind for kind in _FORBIDDEN_OPS if module.inlined_graph.findAllNodes(kind, True))
    if used:
        raise FailedPrecondition(f"the model uses {', '.join(used)}, which a model may not", reason="ARTIFACT_UNSAFE")
    return module  # type: ignore[no-any-return]


def _load_export(content: bytes) -> Callable[..., Any]:
    checked = export_guard.check(content)
    if checked.examples:
        # torch.export.load tries `weights_only` first and falls back to a full unpickling; where the first works it never does.
        torch.load(io.BytesIO(checked.examples), weights_only=True)
    program = torch.export.load(io.BytesIO(checked.archive))
    return program.module()


def _array(value: Any) -> Array:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"the model answered {type(value).__name__} where a tensor was due")
    return value.detach().numpy() if value.is_contiguous() else value.detach().contiguous().numpy()
