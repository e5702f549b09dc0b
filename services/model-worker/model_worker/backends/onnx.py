"""onnxruntime, and nothing of it anywhere else: runs ONNX graphs from verified bytes, without ever importing torch.

The graph and its external data are handed over as the bytes that were hashed. A location that is not among the artifact's files is
refused: onnxruntime is given a table of them, and an empty folder to find everything else in. Libraries of custom operators are never registered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnxruntime as ort

from model_worker.artifacts import Artifact
from model_worker.backends import LoadOptions
from model_worker.packed import Array
from model_worker.placement import index
from plait.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import TensorSpec

_CUDA: Final = "CUDAExecutionProvider"
_CPU: Final = "CPUExecutionProvider"
_TYPES: Final = {
    "tensor(bool)": "bool", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
    "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(float)": "float32", "tensor(double)": "float64",
    "tensor(string)": "bytes",
}  # fmt: skip
_BFLOAT16: Final = 16  # onnx.TensorProto.BFLOAT16
_OUT_OF_MEMORY: Final = ("out of memory", "failed to allocate memory", "cublas_status_alloc_failed")


class _Held:
    """Gives numpy the memory of an OrtValue, which has no numpy type for bfloat16, and keeps it alive."""

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, value: Any) -> None:
        self.__array_interface__ = {"shape": tuple(value.shape()), "typestr": "<u2", "data": (value.data_ptr(), False), "version": 3}
        self._owner = value


class OnnxModel:
    """A session, called with arrays in the signature's order (row splits last), answering arrays in the signature's order."""

    platform = "onnxruntime_onnx"

    def __init__(self, session: Any, inputs: Sequence[tuple[str, str]], outputs: Sequence[tuple[str, str]], *, memory_bytes: int) -> None:
        self._session = session
        self._feeds = tuple((name, _FEED.get(dtype)) for name, dtype in inputs)
        self._names = [name for name, _ in outputs]
        self._strings = tuple(i for i, (_, dtype) in enumerate(outputs) if dtype == "bytes")
        self._by_value = any(dtype == "bfloat16" for _, dtype in (*inputs, *outputs))
        self.memory_bytes = memory_bytes

    def prepare_thread(self) -> None:
        """Nothing of onnxruntime is kept per thread: a session holds its own pool."""

    def close(self) -> None:
        """Free the session and its arenas."""
        self._session = None

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the graph; contiguous numeric inputs are borrowed, not copied.

        Raises InvalidArgument (BYTES_NOT_UTF8), ResourceExhausted (OUT_OF_DEVICE_MEMORY), or what onnxruntime raises.
        """
        feeds = {name: array if feed is None else feed(array) for (name, feed), array in zip(self._feeds, inputs, strict=True)}
        try:
            outputs: list[Array] = self._run_values(feeds) if self._by_value else self._session.run(self._names, feeds)
        except Exception as error:
            if is_out_of_memory(str(error)):
                raise ResourceExhausted(
                    "the device's memory did not suffice for this batch: send fewer rows, or publish a smaller batching.max_rows",
                    reason="OUT_OF_DEVICE_MEMORY",
                    retry_after_s=1.0,
                ) from error
            raise
        for i in self._strings:
            outputs[i] = _encoded(outputs[i])
        return outputs

    def _run_values(self, feeds: dict[str, Array]) -> list[Array]:
        values = {name: _value(array) for name, array in feeds.items()}
        return [_array(value) for value in self._session.run_with_ort_values(self._names, values)]


def load(artifact: Artifact, options: LoadOptions) -> OnnxModel:
    """Make a session from the verified bytes of an ONNX graph and of the files it keeps its weights in.

    Raises FailedPrecondition: ARTIFACT_INVALID (onnxruntime cannot load it, or model.yaml does not describe it), DEVICE_UNAVAILABLE,
    MODEL_UNSUPPORTED (autocast).
    """
    if options.autocast:
        raise FailedPrecondition(
            "onnxruntime has no autocast: convert the graph to that type before it is published", reason="MODEL_UNSUPPORTED"
        )
    providers = _providers(options.device)
    manifest = artifact.manifest
    content = artifact.read(manifest.entry)
    beside = {name: artifact.read(name) for name in manifest.files if _may_hold_weights(manifest, name)}
    # The entry itself stands in the table too: with an empty one onnxruntime would look into the working directory.
    table = {manifest.entry: content, **beside}
    settings = _settings(options)
    settings.add_external_initializers_from_files_in_memory(list(table), list(table.values()), [len(data) for data in table.values()])
    try:
        with tempfile.TemporaryDirectory() as nothing:
            # The weights of a branch or a loop body pass the table by; without this they would be read from the working directory.
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", nothing)
            session = ort.InferenceSession(content, settings, providers=providers)
    except Exception as error:
        raise FailedPrecondition(
            f"onnxruntime {ort.__version__} cannot load it ({type(error).__name__}): export it again for this version, with standard "
            "operators only and every file of external data inside the artifact's folder",
            reason="ARTIFACT_INVALID",
        ) from error
    if _CUDA in str(providers) and _CUDA not in session.get_providers():
        raise _no_cuda()
    inputs, outputs = _arguments(manifest), manifest.outputs
    problems = [*_mismatches("input", inputs, session.get_inputs()), *_mismatches("output", outputs, session.get_outputs())]
    if problems:
        raise FailedPrecondition(f"model.yaml does not describe the graph: {'; '.join(problems)}", reason="ARTIFACT_INVALID")
    return OnnxModel(
        session,
        [(t.name, t.dtype) for t in inputs],
        [(t.name, t.dtype) for t in outputs],
        memory_bytes=len(content) + sum(map(len, beside.values())),
    )


def is_out_of_memory(message: str) -> bool:
    """Say whether an error of onnxruntime means that the device's memory did not suffice; it has no class of its own for that."""
    return any(words in message.lower() for words in _OUT_OF_MEMORY)


def _settings(options: LoadOptions) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.num_threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 4  # what fails is raised too; the log would name paths and values
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a waiting thread takes the CPU from other models
    return settings


def _providers(device: str) -> list[Any]:
    if device == "cpu":
        return [_CPU]
    if _CUDA not in ort.get_available_providers():
        raise _no_cuda()
    return [(_CUDA, {"device_id": index(device)}), _CPU]


def _no_cuda() -> FailedPrecondition:
    return FailedPrecondition(
        "this onnxruntime cannot compute with CUDA: install onnxruntime-gpu and its CUDA libraries, or set the device to cpu",
        reason="DEVICE_UNAVAILABLE",
    )


def _may_hold_weights(manifest: ArtifactManifest, name: str) -> bool:
    test = manifest.self_test
    return name != manifest.entry and name not in manifest.labels.values() and (test is None or name != test.file)


def _arguments(manifest: ArtifactManifest) -> tuple[TensorSpec, ...]:
    splits = manifest.batching.row_splits
    return (*manifest.inputs, TensorSpec(name=splits, dtype="int64", shape=(-1,))) if splits else manifest.inputs


def _mismatches(kind: str, specs: Sequence[TensorSpec], nodes: Sequence[Any]) -> Iterable[str]:
    found = {node.name: node for node in nodes}
    for spec in specs:
        node = found.pop(spec.name, None)
        if node is None:
            yield f"the graph has no {kind} {spec.name!r}"
            continue
        if _TYPES.get(node.type) != spec.dtype:
            yield f"{kind} {spec.name} is {node.type} in the graph, {spec.dtype} in model.yaml"
        if node.shape and not _fits(spec.shape, node.shape):
            yield f"{kind} {spec.name} is {node.shape} in the graph, {list(spec.shape)} in model.yaml (-1 needs a dynamic dimension)"
    if kind == "input":  # an output that nobody asks for is not computed; an input that nobody gives is an error on each request
        yield from (f"the graph needs the input {name!r}" for name in found)


def _fits(spec: Sequence[int], shape: Sequence[Any]) -> bool:
    """Say whether a graph takes what a signature promises: a fixed size must be the signature's, a name or None takes any."""
    return len(spec) == len(shape) and all(not isinstance(has, int) or has == want for want, has in zip(spec, shape, strict=True))


def _decoded(array: Array) -> Array:
    """Return bytes as the str that onnxruntime's strings are made from; its own conversion would give their repr."""
    try:
        texts = [item.decode() for item in array.ravel()]
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            "onnxruntime's strings are UTF-8 and a BYTES input is not: encode it as text", reason="BYTES_NOT_UTF8"
        ) from error
    decoded = np.empty(array.size, np.object_)
    decoded[:] = texts
    return decoded.reshape(array.shape)


def _encoded(array: Array) -> Array:
    encoded = np.empty(array.size, np.object_)
    encoded[:] = [item.encode() for item in array.ravel()]
    return encoded.reshape(array.shape)


def _value(array: Array) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array).view(np.uint16), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _array(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    if 0 in value.shape():
        return np.empty(value.shape(), ml_dtypes.bfloat16)
    return np.asarray(_Held(value)).view(ml_dtypes.bfloat16)


_FEED: Final[dict[str, Callable[[Array], Array]]] = {"bytes": _decoded}
