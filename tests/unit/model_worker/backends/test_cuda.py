"""What runs on a GPU: the parts that decide are tested anywhere, the rest where there is a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from tests.fakes.artifacts import artifact_of
from tests.fakes.gpu import needs_gpu
from tests.fakes.worker_world import scripted
from torch import Tensor, nn

from model_worker import backends
from model_worker.artifacts import Artifact, Sample
from model_worker.backends import LoadOptions, cuda, staging
from model_worker.backends.cuda import CudaModel, Staging
from model_worker.backends.graphs import Rule
from model_worker.process_instance import ProcessModel
from model_worker.proof import prove
from model_worker.ragged import Layout
from plait.errors import FailedPrecondition, ResourceExhausted, Unavailable
from plait.registry import artifact
from plait.registry.artifact import Architecture
from plait.registry.records import Batching, Execution, Signature, TensorSpec

NO_GRAPHS = Rule(buckets=frozenset())
DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64"]


# --- anywhere


@pytest.mark.parametrize(
    ("built", "count", "number", "advice"),
    [
        (False, 0, 0, "install a CUDA build"),
        (True, 0, 0, "CUDA_VISIBLE_DEVICES"),
        (True, 2, 2, "sees 2, counted from cuda:0"),
        (True, 2, 1, ""),
    ],
)
def test_a_gpu_that_cannot_be_used_is_explained(built: bool, count: int, number: int, advice: str) -> None:
    why = cuda.why_unavailable(built=built, count=count, number=number)
    assert advice in why
    assert bool(why) == bool(advice)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_model_for_one_is_refused_and_no_memory_is_known(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"models\.device") as refused:
        backends.load(mlp_artifact(tmp_path, "torchscript"), LoadOptions(device="cuda:0"))
    assert refused.value.reason == "DEVICE_UNAVAILABLE"
    assert backends.device_memory("cuda:0") is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any words"), True),
        (RuntimeError("The following operation failed in the TorchScript interpreter.\nRuntimeError: CUDA out of memory. Tried …"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of range"), False),
    ],
)
def test_too_little_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert cuda.is_out_of_memory(error) is expected


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=5))
def test_a_block_holds_every_tensor_as_it_was(given_: list[tuple[str, list[int]]]) -> None:
    filled = Staging(pin=False)
    random = np.random.default_rng(1)
    for _ in range(2):  # the second time over what was there
        arrays = [random.integers(0, 2, shape).astype(dtype) for dtype, shape in given_]
        laid = staging.places(arrays)
        found = cuda.views(filled.fill(arrays, laid), laid)
        for tensor, array in zip(found, arrays, strict=True):
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{array.dtype.name}", array.shape)
            assert tensor.double().tolist() == array.astype(np.float64).tolist()


def test_a_block_takes_what_is_strided_or_read_only() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    array.flags.writeable = False
    laid = staging.places([array])
    [found] = cuda.views(Staging(pin=False).fill([array], laid), laid)
    assert found.tolist() == array.tolist()


def test_a_block_is_used_again_until_it_is_too_small_and_never_kept_when_giant() -> None:
    filled = Staging(pin=False)

    def fill(count: int) -> int:
        arrays = [np.ones(count, np.uint8)]
        return filled.fill(arrays, staging.places(arrays)).data_ptr()

    first = fill(10)
    assert [fill(60_000), fill(1)] == [first, first]
    assert filled.grown == 1
    larger = fill(100_000)
    assert (filled.grown, larger != first, fill(10)) == (2, True, larger)
    assert fill(staging.LARGEST_BYTES + 1) != larger
    assert (filled.grown, fill(10)) == (2, larger)


# --- where there is a GPU


MADE: list[CudaModel] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close what a test has made: the streams it holds are torch's, who has 32."""
    yield
    while MADE:
        MADE.pop().close()


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)).eval()


def content_of(format_: str, folder: Path) -> bytes:
    module = mlp()
    file = folder / "exported"
    folder.mkdir(parents=True, exist_ok=True)
    if format_ == "torchscript":
        scripted(module).save(str(file))
    elif format_ == "torch_export":
        rows = torch.export.Dim("rows", min=1, max=4096)
        torch.export.save(torch.export.export(module, (torch.ones(4, 16),), dynamic_shapes=({0: rows},)), file)
    else:
        return save({f"layers.{k}.{name}": t for k, at in enumerate((0, 2)) for name, t in module[at].state_dict().items()})
    return file.read_bytes()


def mlp_artifact(folder: Path, format_: Any, **execution: Any) -> Artifact:
    """An MLP [rows, 16] → [rows, 2] with a sample of 3 rows, batches of which are padded to 8 and 32."""
    said = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, 16)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1, 2)),)
    )
    shape = Architecture(name="mlp", config={"in": 16, "hidden": (64,), "out": 2}) if format_ == "safetensors" else None
    more = {"batching": Batching(buckets=(8, 32)), "execution": Execution(**execution), "architecture": shape}
    made = artifact_of(folder / "artifact", content_of(format_, folder), format_, said, **more)
    sample = Sample(inputs=(x_of(3),), outputs=(expected(x_of(3)),), tolerance=1e-3)
    return Artifact(manifest=made.manifest, folder=made.folder, sample=sample)


def x_of(rows: int) -> Any:
    return np.random.default_rng(rows).normal(size=(rows, 16)).astype(np.float32)


def expected(x: Any) -> Any:
    with torch.inference_mode():
        return mlp()(torch.from_numpy(x)).numpy()


def on_gpu(made: Artifact, **options: Any) -> CudaModel:
    model = backends.load(made, LoadOptions(device="cuda:0", buckets=made.manifest.batching.buckets, **options))
    assert isinstance(model, CudaModel)
    MADE.append(model)
    return model


def bare(forward: Callable[[Sequence[Tensor]], Sequence[Tensor]], *, rule: Rule = NO_GRAPHS, lanes: int = 1) -> CudaModel:
    model = CudaModel(
        forward,
        device="cuda:0",
        rule=rule,
        lanes=lanes,
        num_threads=1,
        platform="test",
        weight_bytes=0,
        to_array=lambda t: t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy(),
    )
    MADE.append(model)
    return model


FORMATS = pytest.mark.parametrize("format_", ["torchscript", "torch_export", "safetensors"])


@needs_gpu
@FORMATS
def test_a_gpu_answers_as_the_cpu_does_with_and_without_graphs(tmp_path: Path, format_: str) -> None:
    model = on_gpu(mlp_artifact(tmp_path, format_))
    for rows in (1, 8, 32, 33, 8, 32):
        [found] = model([x_of(rows)])
        np.testing.assert_allclose(found, expected(x_of(rows)), rtol=1e-4, atol=1e-4)
    assert (model.recordings, model.replays) == (2, 4)


@needs_gpu
@FORMATS
def test_every_bucket_is_recorded_in_every_lane_before_the_first_request(tmp_path: Path, format_: str) -> None:
    made = mlp_artifact(tmp_path, format_)
    model = on_gpu(made, instances=3)
    proven = prove(model, Layout.of(made.manifest.signature, made.manifest.batching), made, 64)
    assert (proven.joins, model.recordings) == (True, 6)
    before = model.replays
    for rows in (8, 32) * 3:
        model([x_of(rows)])
    assert (model.recordings, model.replays - before) == (6, 6)


@needs_gpu
def test_answers_outlive_the_calls_that_follow(tmp_path: Path) -> None:
    model = on_gpu(mlp_artifact(tmp_path, "torch_export"))
    given_ = [np.full((8, 16), k, np.float32) for k in range(20)]
    answers = [model([x])[0] for x in given_]
    for x, found in zip(given_, answers, strict=True):
        np.testing.assert_allclose(found, expected(x), rtol=1e-4, atol=1e-4)


@needs_gpu
def test_every_type_goes_there_and_back() -> None:
    model = bare(lambda given_: [t.clone() for t in given_])
    arrays = [np.random.default_rng(1).integers(0, 2, (5, 3)).astype(dtype) for dtype in DTYPES]
    for array, found in zip(arrays, model(arrays), strict=True):
        assert found.dtype == array.dtype
        assert np.array_equal(found.astype(np.float64), array.astype(np.float64))


@needs_gpu
def test_pinned_memory_is_used_again() -> None:
    model = bare(lambda given_: [given_[0] + 1])
    for rows in (1, 100, 3) * 50:
        model([np.ones((rows, 16), np.float32)])
    assert model.staged == 1
    model([np.ones((100_000, 16), np.float32)])
    assert model.staged == 2


@needs_gpu
@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [7, 8], ids=["eager", "graph"])
def test_autocast_computes_narrowly_and_answers_in_the_signatures_type(tmp_path: Path, narrow: Any, rows: int) -> None:
    made = mlp_artifact(tmp_path, "safetensors")
    [plain] = on_gpu(made)([x_of(rows)])
    for _ in range(2):
        [cast] = on_gpu(made, autocast=narrow)([x_of(rows)])
        assert cast.dtype == np.float32
        assert not np.array_equal(cast, plain)
        assert np.array_equal(cast, cast.astype(narrow).astype(np.float32))  # so the last layer's result was narrow
        np.testing.assert_allclose(cast, plain, atol=0.05)


@needs_gpu
def test_a_batch_too_large_for_the_device_is_refused_and_the_next_one_served() -> None:
    def forward(given_: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.empty(given_[0].shape[0], 1 << 30, device=given_[0].device)[:, 0] * 0 + given_[0][:, 0]]

    model = bare(forward)
    for _ in range(2):
        with pytest.raises(ResourceExhausted) as refused:
            model([np.ones((4096, 2), np.float32)])
        assert (refused.value.reason, refused.value.retry_after_s) == ("OUT_OF_DEVICE_MEMORY", 1.0)
    held = torch.cuda.memory_allocated(0)
    [found] = model([np.ones((1, 2), np.float32)])
    assert found.shape == (1,)
    assert torch.cuda.memory_allocated(0) <= held + (1 << 20)  # nothing of what was refused is still there


@needs_gpu
def test_two_instances_compute_at_the_same_time_on_streams_of_their_own() -> None:
    both = threading.Barrier(2, timeout=30)
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []

    def forward(given_: Sequence[Tensor]) -> Sequence[Tensor]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        both.wait()
        begin.record()
        torch.cuda._sleep(200_000_000)  # cycles; about a tenth of a second
        end.record()
        spans.append((begin, end, torch.cuda.current_stream().cuda_stream))
        return [given_[0] * 2]

    model = bare(forward, lanes=2)
    threads = [threading.Thread(target=model, args=([np.ones(4, np.float32)],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (begin_a, end_a, stream_a), (begin_b, end_b, stream_b) = spans
    assert stream_a != stream_b
    assert begin_a.elapsed_time(end_b) > 0  # each began before the other ended
    assert begin_b.elapsed_time(end_a) > 0


@needs_gpu
def test_a_thread_that_hangs_keeps_its_lane_and_others_get_a_new_one() -> None:
    entered, go = threading.Event(), threading.Event()

    def forward(given_: Sequence[Tensor]) -> Sequence[Tensor]:
        if given_[0].shape[0] == 1:
            entered.set()
            assert go.wait(60)
        return [given_[0] * 2]

    model = bare(forward)
    hangs = threading.Thread(target=model, args=([np.ones(1, np.float32)],))
    hangs.start()
    assert entered.wait(30)
    assert model([np.ones(2, np.float32)])[0].tolist() == [2, 2]
    assert "lanes=2" in repr(model)
    go.set()
    hangs.join(30)


@needs_gpu
def test_a_model_that_waits_for_the_device_runs_without_graphs() -> None:
    model = bare(lambda given_: [given_[0] * float(given_[0].sum().item())], rule=Rule(buckets=frozenset({4})))
    for _ in range(3):
        assert model([np.ones(4, np.float32)])[0].tolist() == [4, 4, 4, 4]
    assert (model.recordings, model.replays) == (0, 0)
    other = bare(lambda given_: [given_[0] + 1], rule=Rule(buckets=frozenset({4})))
    assert other([np.ones(4, np.float32)])[0].tolist() == [2, 2, 2, 2]
    assert (other.recordings, other.replays) == (1, 1)  # a recording that failed spoils none that follow


@needs_gpu
def test_graphs_are_recorded_while_other_models_serve() -> None:
    stop = threading.Event()
    errors: list[Exception] = []

    def serve() -> None:
        busy = bare(lambda given_: [torch.cat([given_[0]] * 3).sum(0, keepdim=True)])
        try:
            for k in range(1_000_000):
                if stop.is_set():
                    return
                rows = 1 + k % 1000
                assert busy([np.ones((rows, 64), np.float32)])[0][0, 0] == 3 * rows
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(5):
            model = bare(lambda given_: [given_[0] @ given_[0].T], rule=Rule(buckets=frozenset({4, 64, 512})))
            for rows in (4, 64, 512):
                model([np.ones((rows, 8), np.float32)])
            assert model.recordings == 3
            model.close()
    finally:
        stop.set()
        thread.join(60)
    assert errors == []


@needs_gpu
def test_what_a_model_holds_is_known_and_given_back(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated(0)
    model = on_gpu(mlp_artifact(tmp_path, "safetensors"))
    weights = model.memory_bytes
    assert weights == sum(p.nbytes for p in mlp().parameters())
    model([x_of(32)])
    assert model.memory_bytes > weights
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model([x_of(1)])
    assert torch.cuda.memory_allocated(0) - before < 128 * 1024**2  # cuBLAS may keep workspaces, of 32 MiB on large GPUs
    free, total = backends.device_memory("cuda:0") or (0, 0)
    assert 0 < free <= total


@needs_gpu
def test_an_instance_in_a_process_computes_there(tmp_path: Path) -> None:
    made = mlp_artifact(tmp_path, "torch_export")
    model = ProcessModel(made.folder, artifact.digest(made.folder), LoadOptions(device="cuda:0", buckets=(8, 32)), name="m/1")
    try:
        for rows in (3, 8):
            [found] = model([x_of(rows)])
            np.testing.assert_allclose(found, expected(x_of(rows)), rtol=1e-4, atol=1e-4)
    finally:
        model.close()


@needs_gpu
def test_an_index_outside_of_a_table_is_told_as_a_lost_device(tmp_path: Path) -> None:
    """In a process of its own, for no CUDA call works afterwards."""
    scripted(nn.EmbeddingBag(10, 4)).save(str(tmp_path / "bag"))
    said = Signature(
        inputs=(TensorSpec(name="x", dtype="int64", shape=(-1, 3)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1, 4)),)
    )
    made = artifact_of(tmp_path / "artifact", (tmp_path / "bag").read_bytes(), "torchscript", said)
    model = ProcessModel(made.folder, artifact.digest(made.folder), LoadOptions(device="cuda:0"), name="m/1")
    try:
        assert model([np.ones((2, 3), np.int64)])[0].shape == (2, 4)
        with pytest.raises(Unavailable) as lost:
            model([np.full((2, 3), 10**6)])
        assert lost.value.reason == "DEVICE_LOST"
    finally:
        model.close()


@needs_gpu
def test_a_gpu_that_is_not_there_is_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="there is no cuda:99") as refused:
        backends.load(mlp_artifact(tmp_path, "torchscript"), LoadOptions(device="cuda:99"))
    assert refused.value.reason == "DEVICE_UNAVAILABLE"


@needs_gpu
def test_no_two_lanes_share_a_stream_before_torch_has_no_more() -> None:
    for _ in range(40):  # loads and unloads: torch hands its 32 streams out in turn
        bare(lambda given_: given_).close()
    models = [bare(lambda given_: [given_[0] + 1], lanes=16) for _ in range(2)]
    streams = [lane.stream for model in models for lane in model._lanes]
    assert len(set(streams)) == len(streams)
    third = bare(lambda given_: [given_[0] + 1], rule=Rule(buckets=frozenset({2})))
    for _ in range(2):
        assert third([np.ones(2, np.float32)])[0].tolist() == [2, 2]
    assert third.recordings == 0  # on a stream that is another's too
    for model in models:
        model.close()
    assert third([np.ones(2, np.float32)])[0].tolist() == [2, 2]
    assert third.recordings == 1
    third.close()


@needs_gpu
def test_graphs_outlive_those_of_other_models_that_come_and_go(tmp_path: Path) -> None:
    """cuBLAS's workspaces are kept by stream, and are freed with the graphs that were recorded on it."""
    kept = on_gpu(mlp_artifact(tmp_path, "safetensors"), instances=2)
    for rows in (8, 8, 32, 32):
        kept([x_of(rows)])
    for number in range(40):
        other = bare(lambda given_: [given_[0] @ given_[0].T], rule=Rule(buckets=frozenset({64, 512})), lanes=1 + number % 3)
        for rows in (64, 64, 64, 512, 512, 512):
            other([np.ones((rows, 256), np.float32)])
        other.close()
        for rows in (8, 32):
            np.testing.assert_allclose(kept([x_of(rows)])[0], expected(x_of(rows)), rtol=1e-4, atol=1e-4)
    assert kept.recordings == 4


@needs_gpu
def test_a_lane_whose_recording_fails_gives_up_its_other_graphs() -> None:
    model = bare(lambda given_: [given_[0] * (given_[0].sum().item() if len(given_[0]) == 8 else 1)], rule=Rule(buckets=frozenset({4, 8})))
    model([np.ones(4, np.float32)])
    assert model.recordings == 1
    assert model([np.ones(8, np.float32)])[0].tolist() == [8] * 8
    assert model([np.ones(4, np.float32)])[0].tolist() == [1] * 4
    assert model.recordings == 0
