"""Runs a torch model on one GPU: everything that calls torch.cuda is here, what it decides by is in `staging` and `graphs`.

Whoever calls takes a lane, and gives it back: a stream, a block of pinned memory and the graphs recorded on that stream, so that instances
compute side by side and never wait for each other's work. A thread that hangs keeps its lane, and the one that replaces it gets a new one.
One call: inputs → pinned block → one transfer → graph or model → pinned outputs → wait for the stream. The outputs lie in blocks of
torch's own cache of pinned memory, which come back to it once the answer was sent.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_worker.backends import staging
from model_worker.backends.graphs import Rule
from model_worker.backends.lending import Lender
from model_worker.backends.staging import Place
from model_worker.packed import Array
from model_worker.placement import index
from plait.errors import FailedPrecondition, PlaitError, ResourceExhausted, Unavailable
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

Forward = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # tensors on the device, in and out in the signature's order

_RUNS_BEFORE_RECORDING: Final = 3  # torch's own number: lazy initialisation, and TorchScript's optimiser, must be through
_RETRY_S: Final = 1.0
# TorchScript turns every error into a RuntimeError, and cuBLAS has an error of its own, so the class alone does not tell.
_OUT_OF_MEMORY: Final = ("cuda out of memory", "cuda error: out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
# One recording at a time in a process, says torch's documentation: the allocator's state during one is the process's, and so is this lock.
_RECORDING: Final = threading.Lock()
_STREAMS_IN_TORCH: Final = 32  # of one GPU and priority; handed out in turn


def why_unavailable(*, built: bool, count: int, number: int) -> str:
    """Return why GPU `number` cannot be used by a torch that was `built` for CUDA and sees `count` GPUs, and what to do; "" where it can."""
    if not built:
        return "this torch was built for the CPU only: install a CUDA build of it, or set models.device to cpu"
    if not count:
        return "no GPU is to be seen from this process: check the driver, the container's GPU access and CUDA_VISIBLE_DEVICES, or set models.device to cpu"
    if number >= count:
        return f"there is no cuda:{number}: this process sees {count}, counted from cuda:0 (CUDA_VISIBLE_DEVICES chooses which)"
    return ""


def check(device: str) -> None:
    """Raise FailedPrecondition (DEVICE_UNAVAILABLE) where this process cannot compute on "cuda:<n>"."""
    built = torch.version.cuda is not None
    count = torch.cuda.device_count() if built and torch.cuda.is_available() else 0
    if why := why_unavailable(built=built, count=count, number=index(device)):
        raise FailedPrecondition(why, reason="DEVICE_UNAVAILABLE")


def memory(device: str) -> tuple[int, int] | None:
    """Return a GPU's memory (free, total) in bytes, None where there is no such GPU. What torch caches and nobody uses counts as free."""
    try:
        check(device)
    except FailedPrecondition:
        return None
    number = index(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(number)
    return free_bytes + torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number), total_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the device's memory did not suffice."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _OUT_OF_MEMORY)


class _Streams:
    """torch's streams by GPU, lent so that no two lanes share one before all are lent: see `lending`."""

    def __init__(self) -> None:
        self._lenders: dict[torch.device, Lender[torch.cuda.Stream]] = {}
        self._lock = threading.Lock()

    def of(self, device: torch.device) -> Lender[torch.cuda.Stream]:
        """Return who lends the streams of a GPU."""
        with self._lock:
            if device not in self._lenders:
                self._lenders[device] = Lender(functools.partial(_another_stream, device))
            return self._lenders[device]


_STREAMS: Final = _Streams()  # the streams are the process's, and so is the list of who has which


def _another_stream(device: torch.device, existing: Sequence[torch.cuda.Stream]) -> torch.cuda.Stream | None:
    for _ in range(_STREAMS_IN_TORCH):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if stream not in existing:
            return stream
    return None


class Staging:
    """The block of host memory a lane's inputs travel from. `grown`: how often a larger one was taken."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._block: Tensor | None = None
        self.grown = 0

    def fill(self, arrays: Sequence[Array], laid: Sequence[Place]) -> Tensor:
        """Return the arrays' bytes as a uint8 tensor over the block. What it held before must have arrived."""
        needed = staging.size_bytes(laid)
        block = self._with_room(needed) if staging.keeps(needed) else torch.empty(needed, dtype=torch.uint8)
        octets = block.numpy()
        for array, place in zip(arrays, laid, strict=True):
            np.copyto(octets[place.start : place.stop].view(array.dtype).reshape(array.shape), array)
        return block[:needed]

    def _with_room(self, needed: int) -> Tensor:
        held = 0 if self._block is None else self._block.numel()
        wanted = staging.grown_bytes(held, needed)
        if self._block is None or wanted > held:
            self._block = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pin)
            self.grown += 1
        return self._block


def views(block: Tensor, laid: Sequence[Place]) -> list[Tensor]:
    """Return the tensors that lie in a uint8 block, without a copy."""
    return [block[p.start : p.stop].view(getattr(torch, p.dtype)).view(p.shape) for p in laid]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph, the block its inputs are read from and the tensors it leaves its outputs in."""

    graph: torch.cuda.CUDAGraph
    block: Tensor
    outputs: Sequence[Tensor]


class _Lane:
    """What one call at a time computes with. The graphs share a pool: they never run at once, so what one is done with the next may use.

    They come and go together, and only on a stream that is no other's: torch keeps cuBLAS's workspaces by stream, and the end of one graph frees
    those that the others on its stream still write to (https://github.com/pytorch/pytorch/issues/193402). That they are kept for the process, and
    not for the thread that recorded, which ends after the load, holds for torch 2.13 (https://github.com/pytorch/pytorch/pull/180283 tried the other).
    """

    def __init__(self, streams: Lender[torch.cuda.Stream]) -> None:
        self.loan = streams.take()
        self.stream = self.loan.thing
        self.staging = Staging(pin=True)
        self.pool = torch.cuda.graph_pool_handle()
        self.recorded: dict[int, _Recorded] = {}
        self.replays = 0

    @property
    def pool_bytes(self) -> int:
        """Bytes its graphs hold."""
        if not self.recorded:
            return 0
        segments: list[dict[str, int]] = torch.cuda.memory_snapshot(self.pool, include_traces=False)  # type: ignore[no-untyped-call]
        return sum(segment["total_size"] for segment in segments)

    def quiet(self) -> bool:
        """Wait until nothing of a failed call runs any more; False where the device does not answer this process, and never will again."""
        try:
            self.stream.synchronize()
        except RuntimeError:  # an error that ended the CUDA context is told again by every later call
            return False
        return True


class CudaModel:
    """A model on one GPU. Called from any thread, from several at once; `lanes` calls in a row visit each of its lanes once.

    `replays` counts the batches a graph answered, `recordings` the graphs, `staged` how often a lane took pinned memory for inputs.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        device: str,
        rule: Rule,
        lanes: int,
        num_threads: int,
        platform: str,
        weight_bytes: int,
        to_array: Callable[[Tensor], Array],
    ) -> None:
        """`forward` computes on `device` ("cuda:<n>"), where its weights are; `to_array` gives a tensor's memory to numpy."""
        self._forward: Forward | None = forward
        self._device = torch.device(device)
        self._streams = _STREAMS.of(self._device)
        self._rule = rule
        self._num_threads = num_threads
        self._to_array = to_array
        self._weight_bytes = weight_bytes
        self._records = True
        self._lanes = [_Lane(self._streams) for _ in range(lanes)]
        self._free = deque(self._lanes)
        self.lanes = lanes
        self.platform = platform
        if rule.why_not:
            log.info("a model on a GPU runs without CUDA graphs", device=device, why=rule.why_not)
        torch.cuda.current_stream(self._device).synchronize()  # the weights were sent on another stream than those that will read them

    def __repr__(self) -> str:
        return f"<CudaModel {self._device} lanes={len(self._lanes)} recordings={self.recordings} replays={self.replays}>"

    @property
    def memory_bytes(self) -> int:
        """Bytes on the device: the weights, and what recorded graphs keep."""
        kept = sum(r.block.nbytes for lane in self._lanes for r in tuple(lane.recorded.values()))
        return self._weight_bytes + kept + sum(lane.pool_bytes for lane in self._lanes)

    @property
    def recordings(self) -> int:
        """Graphs held."""
        return sum(len(lane.recorded) for lane in self._lanes)

    @property
    def replays(self) -> int:
        """Batches answered by a graph."""
        return sum(lane.replays for lane in self._lanes)

    @property
    def staged(self) -> int:
        """How often pinned memory was taken for inputs."""
        return sum(lane.staging.grown for lane in self._lanes)

    def prepare_thread(self) -> None:
        """Set what torch keeps per thread: the threads of one operator, the current GPU."""
        torch.set_num_threads(self._num_threads)
        torch.cuda.set_device(self._device)

    def close(self) -> None:
        """Let go of the weights and graphs, and give what torch has cached of them back to the device."""
        self._forward = None
        with contextlib.suppress(IndexError):
            while True:  # not the lane of a thread which hangs: waiting for its stream would hang too
                lane = self._free.popleft()
                with lane.loan.lock:
                    lane.quiet()
                lane.recorded.clear()
                self._streams.give_back(lane.loan)
        _give_back()

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Run one forward pass; inputs are copied once, outputs are views of pinned memory that is theirs alone.

        Raises what the model raises; ResourceExhausted (OUT_OF_DEVICE_MEMORY), Unavailable (DEVICE_LOST).
        """
        forward = self._forward
        if forward is None:
            raise RuntimeError("the model was closed")
        lane = self._take()
        try:
            with lane.loan.lock:
                return self._guarded(forward, lane, inputs)
        finally:
            self._free.append(lane)

    def _take(self) -> _Lane:
        try:
            return self._free.popleft()
        except IndexError:  # a thread that hangs has not given its lane back
            lane = _Lane(self._streams)
            self._lanes.append(lane)
            return lane

    def _guarded(self, forward: Forward, lane: _Lane, inputs: Sequence[Array]) -> list[Array]:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(lane.stream), torch.inference_mode():
                return self._computed(forward, lane, inputs)
        except Exception as error:
            explained = self._explained(lane, error)
            if explained is error:
                raise
            raise explained from error

    def _computed(self, forward: Forward, lane: _Lane, inputs: Sequence[Array]) -> list[Array]:
        laid = staging.places(inputs)
        host = lane.staging.fill(inputs, laid)
        recorded = self._recorded(forward, lane, self._rule.bucket(inputs), host, laid)
        if recorded is None:
            answer = forward(views(host.to(self._device, non_blocking=True), laid))
        else:
            recorded.block.copy_(host, non_blocking=True)
            recorded.graph.replay()
            lane.replays += 1
            answer = recorded.outputs
        outputs = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in answer]
        lane.stream.synchronize()
        return [self._to_array(t) for t in outputs]

    def _recorded(self, forward: Forward, lane: _Lane, bucket: int, host: Tensor, laid: Sequence[Place]) -> _Recorded | None:
        """Return the bucket's graph, recorded now where that has not been tried; None where the model runs without."""
        if not bucket:
            return None
        if bucket not in lane.recorded and self._records and not lane.loan.shared:
            block = host.to(self._device)
            given = views(block, laid)
            for _ in range(_RUNS_BEFORE_RECORDING):
                forward(given)
            if (recorded := self._record(forward, lane, block, given)) is not None:
                lane.recorded[bucket] = recorded
        return lane.recorded.get(bucket)

    def _record(self, forward: Forward, lane: _Lane, block: Tensor, given: Sequence[Tensor]) -> _Recorded | None:
        """Record one pass. Only this thread is held to what a recording allows, for others serve meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            with _RECORDING, torch.cuda.graph(graph, pool=lane.pool, stream=lane.stream, capture_error_mode="thread_local"):
                outputs = forward(given)
        except Exception as error:  # whatever it is, the passes before it have shown that the model runs without a graph
            self._records = False  # what one bucket does not allow no other will; and each attempt costs
            lane.recorded.clear()
            log.warning("a model runs without CUDA graphs: one could not be recorded", device=str(self._device), error=_first_line(error))
            traceback.clear_frames(error.__traceback__)
            return None
        return _Recorded(graph, block, outputs)

    def _explained(self, lane: _Lane, error: Exception) -> Exception:
        """Return what to raise for an error, once its tensors are free and the lane can be used again."""
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not leave enough room
        if isinstance(error, PlaitError):
            return error
        if not lane.quiet():
            return Unavailable(
                f"{self._device} does not answer this process any more, as after an index outside of a table: its process must be started "
                "again (execution.kind process keeps that from others)",
                reason="DEVICE_LOST",
            )
        if is_out_of_memory(error):
            _give_back()
            return ResourceExhausted(
                f"the memory of {self._device} did not suffice for this batch: send fewer rows, or publish a smaller batching.max_rows",
                reason="OUT_OF_DEVICE_MEMORY",
                retry_after_s=_RETRY_S,
            )
        return error


def _give_back() -> None:
    """Give the device what torch has cached of it. Not while a graph is recorded: the allocator takes that for an error of its own."""
    with _RECORDING, contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
