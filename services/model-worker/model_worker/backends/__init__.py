"""What the worker asks of a loaded model, whatever library runs it, and the one place that knows which library reads which format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from model_worker.artifacts import Artifact
from model_worker.packed import Array
from plait.errors import FailedPrecondition


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load one instance of a model.

    `num_threads`: threads one operator may use. `device`: "cpu" or "cuda:<n>". `instances`: threads that will
    call it side by side. `autocast`: compute in this type where the device is faster
    at it. `buckets`: ascending row counts that batches are padded to (CUDA graphs are captured at these).
    `allow_native`: load formats that are native code (AOTInductor), which may do whatever this process may.
    """

    num_threads: int = 1
    device: str = "cpu"
    instances: int = 1
    autocast: Literal["", "float16", "bfloat16"] = ""
    buckets: tuple[int, ...] = ()
    allow_native: bool = False


class Model(Protocol):
    """A loaded model. Called from the threads of its instances, each of which ran `prepare_thread` first."""

    @property
    def platform(self) -> str:
        """What the protocol's ModelMetadata calls it, for example "pytorch_torchscript"."""

    @property
    def memory_bytes(self) -> int:
        """Bytes its weights take, on its device."""

    def prepare_thread(self) -> None:
        """Make the calling thread ready to compute (thread-local settings of the library)."""

    def __call__(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run one forward pass on arrays in the signature's order (row splits last), answering in the signature's order.

        Raises whatever the model raises; ResourceExhausted (OUT_OF_DEVICE_MEMORY) where the device's memory did not suffice.
        """

    def close(self) -> None:
        """Give back what it holds."""


def device_memory(device: str) -> tuple[int, int] | None:
    """Return the memory (free, total) of a GPU in bytes, None where there is no such GPU. It is torch that knows, also of ONNX models."""
    from model_worker.backends import cuda  # noqa: PLC0415 - asked only where the settings name a GPU

    return cuda.memory(device)


def load(artifact: Artifact, options: LoadOptions) -> Model:
    """Load a verified artifact. Blocks. Raises FailedPrecondition: ARTIFACT_INVALID, ARTIFACT_UNSAFE, MODEL_UNSUPPORTED, DEVICE_UNAVAILABLE;
    ResourceExhausted: OUT_OF_DEVICE_MEMORY."""
    match artifact.manifest.format:
        case "torchscript" | "torch_export" | "aotinductor" | "safetensors":
            from model_worker.backends import torch as torch_backend  # noqa: PLC0415 - a worker without torch models never loads torch

            return torch_backend.load(artifact, options)
        case "onnx":
            from model_worker.backends import onnx as onnx_backend  # noqa: PLC0415 - and a worker without ONNX models no onnxruntime

            return onnx_backend.load(artifact, options)
        case other:
            raise FailedPrecondition(f"the format {other!r} is not served", reason="MODEL_UNSUPPORTED")
