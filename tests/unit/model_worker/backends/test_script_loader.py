"""TorchScript loaded with its weights handed over beside it is what torch loads itself."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from tests.fakes.worker_world import scripted
from torch import Tensor, nn

from model_worker.backends import script_guard, script_loader
from model_worker.backends.script_loader import _weights

WIDE = 600  # [WIDE, WIDE] float32 are more than a large member


class Tied(nn.Module):
    """Two parameters that share their memory, one of them a part of it; buffers of several types; a plain tensor and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(WIDE, WIDE)
        self.whole = nn.Parameter(weight)
        self.part = nn.Parameter(weight[10:20, ::2])
        self.narrow = nn.Buffer(torch.randn(WIDE).half())
        self.brain = nn.Buffer(torch.randn(3).bfloat16())
        self.flags = nn.Buffer(torch.tensor([True, False]))
        self.nothing = nn.Buffer(torch.empty(0))
        self.attribute = torch.arange(7)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.whole + self.narrow.float() + self.brain.float().sum() + self.attribute.sum()
        return y.sum() + self.part.sum() + self.flags.sum() + self.nothing.sum()


class WithConstant(nn.Module):
    """A weight, and a tensor in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + torch.tensor([1.0, 2.0, 3.0])


def saved(module: Any) -> bytes:
    target = io.BytesIO()
    quietly(torch.jit.save, module, target)
    return target.getvalue()


def quietly(call: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return call(*args)


def frozen(module: nn.Module) -> Any:
    return quietly(torch.jit.freeze, scripted(module))


def traced(module: nn.Module) -> Any:
    return quietly(torch.jit.trace, module.eval(), torch.ones(3))


@pytest.mark.parametrize(
    ("made", "x", "handed_over"),
    [
        (lambda: scripted(Tied()), torch.randn(2, WIDE), True),
        (lambda: frozen(Tied()), torch.randn(2, WIDE), True),  # all of its weights are constants
        (lambda: traced(WithConstant()), torch.ones(3), False),  # weights and constants
        (lambda: scripted(nn.ReLU()), torch.ones(3), True),  # neither
    ],
)
def test_it_is_the_module_that_torch_loads(made: Any, x: Tensor, handed_over: bool) -> None:
    content = saved(made())
    members = script_guard.check(content)
    assert (_weights(members) is not None) is handed_over
    found, expected = quietly(script_loader.load, members), quietly(torch.jit.load, io.BytesIO(content))
    del content, members  # nothing of the archive is borrowed
    assert torch.equal(found(x), expected(x))
    ours, theirs = dict(found.named_parameters()) | dict(found.named_buffers()), dict(expected.named_parameters())
    theirs |= dict(expected.named_buffers())
    assert {n: (t.dtype, t.shape, t.stride()) for n, t in ours.items()} == {n: (t.dtype, t.shape, t.stride()) for n, t in theirs.items()}
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert {n: t.requires_grad for n, t in ours.items()} == {n: t.requires_grad for n, t in theirs.items()}


def test_shared_memory_stays_shared_and_aligned() -> None:
    found = quietly(script_loader.load, script_guard.check(saved(scripted(Tied()))))
    assert found.whole.untyped_storage().data_ptr() == found.part.untyped_storage().data_ptr()
    assert found.whole.data_ptr() % 64 == 0


@pytest.mark.parametrize("more", [{"byteorder": b"big"}, {"attributes.pkl": b""}, {"tensors/0": b""}, {"constants/0": b""}])
def test_what_a_package_would_mix_up_is_left_to_torch(more: dict[str, bytes]) -> None:
    members = {"data/0": b"1234", "data.pkl": b"", "byteorder": b"little"}
    assert _weights(members) == {"0": b"1234"}
    assert _weights({**members, **more}) is None
