"""Loading and running what teams hand over, on real torch."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.fakes.artifacts import load
from tests.fakes.worker_world import scripted
from torch import Tensor, nn

from model_worker.backends import torch as backend
from plait.errors import FailedPrecondition
from plait.registry.records import Signature, TensorSpec


def signature(dtype: Any = "float32", *outputs: str) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="x", dtype=dtype, shape=(-1,)),),
        outputs=tuple(TensorSpec(name=name, dtype=dtype, shape=(-1,)) for name in outputs or ("y",)),
    )


def saved(module: nn.Module) -> bytes:
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(scripted(module), target)
    return target.getvalue()


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"b": x + 2, "a": x + 1}


class Several(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x])[:, 0::2].t()[:, 0]


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "written-by-a-model")
        return x


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_file("/etc/hostname", False, 1) + x


class Talks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print(x)  # noqa: T201
        return x


class Counts(nn.Module):
    def forward(self, x: Tensor) -> int:
        return x.shape[0]


def run(module: nn.Module, spec: Signature | None = None) -> list[list[Any]]:
    model = load(saved(module), "torchscript", spec or signature())
    return [output.tolist() for output in model([np.array([1, 2, 3, 4], np.float32)])]


def test_outputs_come_in_the_signatures_order() -> None:
    assert run(Named(), signature("float32", "a", "b")) == [[2, 3, 4, 5], [3, 4, 5, 6]]
    assert run(Several(), signature("float32", "a", "b")) == [[2, 3, 4, 5], [3, 4, 5, 6]]


def test_a_model_is_switched_to_inference() -> None:
    assert run(Dropout()) == [[1, 2, 3, 4]]


def test_answers_that_are_not_contiguous_are_straightened() -> None:
    model = load(saved(Strided()), "torchscript", signature())
    [answer] = model([np.array([1, 2, 3, 4], np.float32)])
    assert answer.flags.c_contiguous
    assert answer.tolist() == [1, 3]


@pytest.mark.parametrize("module", [Writes(), Reads(), Talks()], ids=["writes", "reads", "talks"])
def test_torchscript_that_touches_files_or_talks_is_refused(module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FailedPrecondition) as refused:
        load(saved(module), "torchscript", signature())
    assert refused.value.reason == "ARTIFACT_UNSAFE"
    assert not list(tmp_path.iterdir())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)[0]


COMMON = {
    "mlp": (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)), torch.ones(2, 4)),
    "embedding bag": (nn.EmbeddingBag(10, 4), torch.ones(2, 3, dtype=torch.long)),
    "attention": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
        torch.ones(1, 3, 8),
    ),
    "recurrent": (Recurrent(), torch.ones(2, 1, 4)),
}


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_what_teams_hand_over_is_loaded_and_answers_the_same(name: str, how: str) -> None:
    module, example = COMMON[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = scripted(module) if how == "scripted" else torch.jit.trace(module.eval(), example, check_trace=False)
        content = io.BytesIO()
        torch.jit.save(made, content)
    [answer] = load(content.getvalue(), "torchscript", signature())([example.numpy()])
    with torch.inference_mode():
        np.testing.assert_allclose(answer, module.eval()(example).numpy(), rtol=1e-5, atol=1e-6)


def test_an_answer_that_is_no_tensor_is_an_error() -> None:
    model = load(saved(Counts()), "torchscript", signature())
    with pytest.raises(TypeError):
        model([np.ones(3, np.float32)])


@pytest.mark.parametrize("format_", ["torchscript", "torch_export"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x05\x06" + bytes(18)])
def test_what_torch_cannot_load_is_named(format_: str, content: bytes) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        load(content, format_, signature())
    assert refused.value.reason == "ARTIFACT_INVALID"


def test_what_torch_has_no_word_for_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        load(b"", "torchscript", signature("bytes"))
    assert refused.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize("count", [4, 100_000])
@pytest.mark.parametrize("writeable", [True, False])
def test_tensors_hold_the_arrays_values_and_never_warn(count: int, writeable: bool) -> None:
    array = np.frombuffer(np.arange(count, dtype=np.float32).tobytes(), np.float32)
    if writeable:
        array = array.copy()
    tensor = backend.tensor(array)
    assert tensor.numpy().tolist() == array.tolist()
    assert (tensor.data_ptr() == array.ctypes.data) == (writeable or count > 4)


def test_a_borrowed_arrays_memory_outlives_the_array() -> None:
    tensor = backend.tensor(np.frombuffer(np.arange(100_000, dtype=np.float32).tobytes(), np.float32))
    fillers = [np.full(100_000, -1, np.float32) for _ in range(8)]  # what was freed would be used again by these
    assert np.array_equal(tensor.numpy(), np.arange(100_000, dtype=np.float32))
    assert len(fillers) == 8


def test_a_thread_is_given_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        load(saved(Several()), "torchscript", signature("float32", "a", "b"), num_threads=2).prepare_thread()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))
        self.register_buffer("one", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)


@pytest.mark.parametrize("count", [3, 30_000])
def test_bfloat16_is_neither_copied_nor_changed(count: int) -> None:
    array = np.arange(count).astype(ml_dtypes.bfloat16)
    tensor = backend.tensor(array)
    assert tensor.dtype == torch.bfloat16
    assert tensor.data_ptr() == array.ctypes.data
    assert np.array_equal(tensor.float().numpy(), array.astype(np.float32))


def test_bfloat16_comes_back_as_bfloat16() -> None:
    [found] = load(saved(Doubled()), "torchscript", signature("bfloat16"))([np.array([1, 2, 3], ml_dtypes.bfloat16)])
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tolist() == [2, 4, 6]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_computes_narrowly_and_answers_in_the_signatures_type(dtype: str) -> None:
    torch.manual_seed(1)
    module, x = nn.Linear(64, 4).eval(), np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    content = saved(module)
    [plain] = load(content, "torchscript", signature())([x])
    [cast] = load(content, "torchscript", signature(), autocast=dtype)([x])
    assert cast.dtype == np.float32
    assert not np.array_equal(cast, plain)
    np.testing.assert_allclose(cast, plain, atol=0.05)


def test_memory_is_parameters_and_buffers() -> None:
    assert load(saved(Doubled()), "torchscript", signature()).memory_bytes == 16


def test_a_closed_model_holds_nothing_and_says_so() -> None:
    model = load(saved(Doubled()), "torchscript", signature())
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model([np.ones(3, np.float32)])


def test_a_device_other_than_the_cpu_is_refused_not_ignored() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        load(saved(Doubled()), "torchscript", signature(), device="cuda:0")
    assert refused.value.reason == "DEVICE_UNAVAILABLE"


def test_native_code_is_refused_unless_allowed() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        load(b"never opened", "aotinductor", signature())
    assert refused.value.reason == "ARTIFACT_UNSAFE"


class Moves(nn.Module):
    """Has weights, a buffer and a constant, and makes tensors itself, one of them on the device it was exported on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("one", torch.ones(4))
        self.constant = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.arange(x.shape[0], device=x.device).unsqueeze(1) + torch.zeros(x.shape[0], 4)
        return self.linear(x) + self.one + self.constant + made


def test_an_exported_program_goes_to_another_device_with_all_it_holds_and_makes() -> None:
    """The device "meta", which is everywhere, stands for a GPU here: an operator refuses tensors of two devices there too."""
    content = io.BytesIO()
    rows = torch.export.Dim("rows", min=1)
    torch.export.save(torch.export.export(Moves().eval(), (torch.ones(3, 4),), dynamic_shapes=({0: rows},)), content)
    module = backend._load_export(content.getvalue(), "meta")
    with torch.inference_mode():
        assert module(torch.ones(5, 4, device="meta")).device.type == "meta"


def test_torchscript_is_loaded_onto_its_device() -> None:
    module = backend._load_torchscript(saved(Doubled()), "meta")
    assert isinstance(module, torch.jit.ScriptModule)
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
