"""Loads what torch runs (TorchScript, torch.export, AOTInductor, weights of a named architecture) from verified bytes onto a device.

Runs it on the CPU; `cuda` runs it on a GPU.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import torch
from torch.export.passes import move_to_device_pass

from model_worker.artifacts import Artifact
from model_worker.backends import LoadOptions, Model, architectures, cuda, export_guard, script_guard, script_loader
from model_worker.backends.graphs import Rule
from model_worker.packed import Array
from model_worker.placement import CPU, index
from plait.errors import FailedPrecondition, ResourceExhausted
from plait.registry.artifact import ArtifactManifest

# TorchScript that reads or writes files or talks; a model that is handed over has no business doing so. (aten::warn is let through: torch's
# own EmbeddingBag and TransformerEncoder hold it, for arguments that are deprecated.)
_FORBIDDEN_OPS: Final = frozenset({"aten::from_file", "aten::save", "prim::Print", "prim::PythonOp"})
_PLATFORM: Final = {
    "torchscript": "pytorch_torchscript",
    "torch_export": "pytorch_export",
    "aotinductor": "pytorch_aotinductor",
    "safetensors": "pytorch_safetensors",
}
_AUTOCAST: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_COPY_BELOW_BYTES: Final = 16_384  # copying is as cheap as borrowing up to there, and CPython shares its one-byte `bytes` objects


class _Borrowed:
    """Gives numpy's array interface to memory of a read-only array; numpy keeps this object, and so the memory, alive."""

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._owner = array


class Forward:
    """A module, called with tensors in the signature's order (row splits last), answering tensors in the signature's order and types."""

    def __init__(self, module: Callable[..., Any], manifest: ArtifactManifest, options: LoadOptions) -> None:
        self._module = module
        self._device_type = torch.device(options.device).type
        self._output_names = tuple(t.name for t in manifest.outputs)
        self._autocast = _AUTOCAST.get(options.autocast)
        # Under autocast a model answers in the narrow type; callers were promised the signature's.
        self._output_types = tuple(getattr(torch, t.dtype) for t in manifest.outputs)

    def __call__(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one pass, in inference mode. Raises whatever the model raises, TypeError where its answer is not tensors."""
        if self._autocast is None:
            return [_checked(t) for t in self._in_order(self._module(*given))]
        # What autocast caches of the weights ends with the pass, which a recorded graph would not know.
        with torch.autocast(self._device_type, dtype=self._autocast, cache_enabled=False):
            answer = [_checked(t) for t in self._in_order(self._module(*given))]
        return [_as(t, dtype) for t, dtype in zip(answer, self._output_types, strict=True)]

    def _in_order(self, answer: Any) -> Sequence[Any]:
        if isinstance(answer, Mapping):
            return [answer[name] for name in self._output_names]
        return answer if isinstance(answer, tuple | list) else (answer,)


class TorchModel:
    """A loaded model on the CPU, called with arrays in the signature's order (row splits last), answering arrays in the signature's order."""

    def __init__(self, forward: Forward, *, num_threads: int, platform: str, memory_bytes: int) -> None:
        self._forward: Forward | None = forward
        self._num_threads = num_threads
        self.platform = platform
        self.memory_bytes = memory_bytes

    def prepare_thread(self) -> None:
        """Set how many threads one operator may use, which torch keeps per thread."""
        torch.set_num_threads(self._num_threads)

    def close(self) -> None:
        """Let go of the weights; a call after that is an error."""
        self._forward = None

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Run one forward pass; raises whatever the model raises, TypeError where its answer is not tensors."""
        if self._forward is None:
            raise RuntimeError("the model was closed")
        given = [tensor(array) for array in inputs]
        with torch.inference_mode():
            return [_array(t) for t in self._forward(given)]


def load(artifact: Artifact, options: LoadOptions) -> Model:
    """Load a model from the verified bytes of its file.

    Raises FailedPrecondition: ARTIFACT_INVALID (torch cannot load it), ARTIFACT_UNSAFE, MODEL_UNSUPPORTED, DEVICE_UNAVAILABLE;
    ResourceExhausted (OUT_OF_DEVICE_MEMORY).
    """
    manifest = artifact.manifest
    if any(t.dtype == "bytes" for t in (*manifest.inputs, *manifest.outputs)):
        raise FailedPrecondition("torch has no BYTES tensors: encode them before the model", reason="MODEL_UNSUPPORTED")
    if options.device != CPU:
        cuda.check(options.device)
    if manifest.format == "aotinductor" and not options.allow_native:
        raise FailedPrecondition(
            "an AOTInductor package is native code, which may do whatever the worker may: allow it in the settings, or publish the "
            "model as torch_export or onnx",
            reason="ARTIFACT_UNSAFE",
        )
    torch.set_num_threads(options.num_threads)
    content = artifact.read(manifest.entry)
    try:
        module = _load(manifest, content, options.device)
    except FailedPrecondition:
        raise
    except Exception as error:
        if cuda.is_out_of_memory(error):
            raise ResourceExhausted(
                f"the memory of {options.device} does not suffice for the weights: unload something, or take a larger GPU",
                reason="OUT_OF_DEVICE_MEMORY",
            ) from error
        raise FailedPrecondition(
            f"torch {torch.__version__} cannot load it as {manifest.format} ({type(error).__name__}): export it again with this torch",
            reason="ARTIFACT_INVALID",
        ) from error
    forward, platform, weight_bytes = Forward(module, manifest, options), _PLATFORM[manifest.format], _memory_bytes(module, content)
    if options.device == CPU:
        return TorchModel(forward, num_threads=options.num_threads, platform=platform, memory_bytes=weight_bytes)
    return cuda.CudaModel(
        forward,
        device=options.device,
        rule=Rule.of(manifest, options.buckets),
        lanes=options.instances,
        num_threads=options.num_threads,
        platform=platform,
        weight_bytes=weight_bytes,
        to_array=_array,
    )


def _load(manifest: ArtifactManifest, content: bytes, device: str) -> Callable[..., Any]:
    match manifest.format:
        case "torchscript":
            return _load_torchscript(content, device)
        case "torch_export":
            return _load_export(content, device)
        case "aotinductor":
            return _load_native(content, device)
        case "safetensors":
            return architectures.build(manifest.architecture, content).to(device)
        case other:
            raise FailedPrecondition(f"torch does not run the format {other!r}", reason="MODEL_UNSUPPORTED")


def _memory_bytes(module: Callable[..., Any], content: bytes) -> int:
    """Return the bytes of the parameters and buffers; a compiled package has none to ask, and is about as large as its weights."""
    if not isinstance(module, torch.nn.Module):
        return len(content)
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def tensor(array: Array) -> torch.Tensor:
    """Return a tensor over the array's memory, without a copy where it is worth it.

    An array over a message's bytes is read-only, which torch does not know and warns of. The bytes belong to this request alone
    (protobuf makes them anew on each access), so a model that writes into its inputs harms nobody.
    """
    if not array.flags.writeable:
        array = array.copy() if array.nbytes < _COPY_BELOW_BYTES else np.asarray(_Borrowed(array))
    if array.dtype == ml_dtypes.bfloat16:  # no type of numpy's own, so its bits change hands as another of that size
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _load_torchscript(content: bytes, device: str) -> Callable[..., Any]:
    with warnings.catch_warnings():
        # torch deprecates TorchScript in favour of torch.export; plait serves both because teams still hand over both.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit.*")
        module = script_loader.load(script_guard.check(content), device)
        module.eval()
    used = sorted(kind for kind in _FORBIDDEN_OPS if module.inlined_graph.findAllNodes(kind, True))
    if used:
        raise FailedPrecondition(f"the model uses {', '.join(used)}, which a model may not", reason="ARTIFACT_UNSAFE")
    return module  # type: ignore[no-any-return]


def _load_export(content: bytes, device: str) -> Callable[..., Any]:
    checked = export_guard.check(content)
    if checked.examples:
        # torch.export.load tries `weights_only` first and falls back to a full unpickling; where the first works it never does.
        torch.load(io.BytesIO(checked.examples), weights_only=True)
    program = torch.export.load(io.BytesIO(checked.archive))
    if device != CPU:  # the weights, and the devices that the graph names where it makes tensors
        program = move_to_device_pass(program, device)
    return program.module()


def _load_native(content: bytes, device: str) -> Callable[..., Any]:
    """The package is opened by its path and unpacked from there while it is loaded; what is written is what was hashed."""
    kind = torch.device(device).type
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pt2")
        file.write_bytes(content)
        package = torch._inductor.aoti_load_package(str(file), device_index=-1 if device == CPU else index(device))  # noqa: SLF001 - torch's documented name for it
    if (built_for := package.get_metadata().get("AOTI_DEVICE_KEY", kind)) != kind:
        raise FailedPrecondition(
            f"this AOTInductor package was compiled for {built_for} and this worker computes on {kind}: compile it for {kind}, or set "
            f"models.device to match",
            reason="DEVICE_UNAVAILABLE",
        )
    return package


def _checked(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"the model answered {type(value).__name__} where a tensor was due")
    return value


def _as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _array(value: torch.Tensor) -> Array:
    plain = value.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()
