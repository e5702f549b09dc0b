"""Who holds how much of each device's memory, so that a version that does not fit is refused in words rather than by the kernel.

The ledger is pure: budgets and free memory are asked of callables that are handed in. A version claims what it is estimated to need before it is loaded, and
settles to what it was measured to hold afterwards. Estimates are peaks (a file is in memory beside what is made of it), so what was
let in can be loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from model_worker import memory_limit
from model_worker.memory_limit import Reading
from model_worker.settings import ModelSettings
from plait.errors import FailedPrecondition
from plait.registry.artifact import ArtifactManifest

REASON: Final = "MEMORY_EXCEEDED"
CPU: Final = "cpu"
_LISTED: Final = 5
_RAISED: Final = "models.max_memory_bytes and the container's limit"
_RAISED_DEVICE: Final = "models.device_memory_share"
# Peak of resident memory (VmHWM) while loading and in the first run, above what the libraries take, per byte of the artifact's files. Measured on
# 84 MB models of linear layers: torchscript 5.0, torch_export 4.3, safetensors 2.0 to 2.11; onnx 2.5 to 3.1 with its weights beside or in the graph, and
# 3.7 to 4.1 where the graph transposes them, which onnxruntime does once. aotinductor is a bound until somebody measures it.
_PEAK: Final = {"torchscript": 5.1, "torch_export": 4.4, "aotinductor": 3.5, "onnx": 4.2, "safetensors": 2.2}
# On a GPU: the weights, which go there once, and what a pass over the sample takes. A bound until somebody measures it.
_DEVICE_PEAK: Final = 1.5
_DEVICE_CONTEXT_BYTES: Final = 512 * 1024**2  # what CUDA and its libraries take there for each further process

Name = tuple[str, str]  # model, version


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of one device's memory."""

    device: str
    size_bytes: int


@dataclass(slots=True, eq=False, kw_only=True)
class Claim:
    """What one version holds of a device, or will once it is loaded (`pending`); `beside`: its claim on another device, if any."""

    name: Name
    device: str
    size_bytes: int
    pending: bool = True
    beside: Claim | None = None

    def all(self) -> tuple[Claim, ...]:
        """Return it and those beside it."""
        return (self, *(self.beside.all() if self.beside is not None else ()))

    def on(self, device: str) -> int:
        """Return the bytes held of a device."""
        return sum(claim.size_bytes for claim in self.all() if claim.device == device)


class Ledger:
    """All claims. `budget(device)`: bytes that models may take there, None = any number; `free(device)`: bytes that are really left there
    now, None = unknown. Called from loading threads too."""

    def __init__(self, budget: Callable[[str], int | None], free: Callable[[str], int | None] = lambda _: None) -> None:
        self._budget = budget
        self._free = free
        self._claims: list[Claim] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        devices = sorted({claim.device for claim in self._claims})
        return f"<Ledger {' '.join(f'{d}={self.used_bytes(d)}/{self._budget(d)}' for d in devices)} claims={len(self._claims)}>"

    def used_bytes(self, device: str) -> int:
        """Return what is claimed of a device."""
        return sum(claim.size_bytes for claim in self._claims if claim.device == device)

    def shortfall_bytes(self, need: Need) -> int:
        """Return how many bytes would have to be freed for `need` to fit; 0 or less where it does."""
        with self._lock:
            return self._shortfall(need, self._claims)

    def claim(self, name: Name, need: Need, beside: Claim | None = None) -> Claim:
        """Take `need` for a version that is to be loaded; `beside` is what it has claimed elsewhere, and is settled and released with it.

        Raises FailedPrecondition (MEMORY_EXCEEDED) where it does not fit.
        """
        with self._lock:
            if self._shortfall(need, self._claims) > 0:
                raise self._exceeded(name, need, self._claims)
            claim = Claim(name=name, device=need.device, size_bytes=need.size_bytes, beside=beside)
            self._claims.append(claim)
            return claim

    def settle(self, claim: Claim, size_bytes: int) -> None:
        """Set a claim to what was measured; the memory is taken already. Of a version on several GPUs, each holds the same part of that, and
        the process's own memory, through which the weights went, nothing.

        Raises FailedPrecondition (MEMORY_EXCEEDED) and leaves all as it is where a budget has no room for that.
        """
        with self._lock:
            everywhere = claim.all()
            holding = [c for c in everywhere if c is claim or c.device != CPU]
            each_bytes = -(-size_bytes // len(holding))
            others = [c for c in self._claims if c not in everywhere]
            for held in holding:
                need, budget = Need(device=held.device, size_bytes=each_bytes), self._budget(held.device)
                if budget is not None and each_bytes + sum(c.size_bytes for c in others if c.device == held.device) > budget:
                    raise self._exceeded(claim.name, need, others)
            for held in everywhere:
                held.size_bytes, held.pending = (each_bytes if held in holding else 0), False

    def release(self, claim: Claim) -> None:
        """Give a claim and those beside it back, once; their memory is free again."""
        with self._lock:
            for held in claim.all():
                if held in self._claims:
                    self._claims.remove(held)

    def _shortfall(self, need: Need, claims: Iterable[Claim]) -> int:
        here = [claim for claim in claims if claim.device == need.device]
        budget, free = self._budget(need.device), self._free(need.device)
        over_budget = 0 if budget is None else need.size_bytes + sum(c.size_bytes for c in here) - budget
        over_free = 0 if free is None else need.size_bytes + sum(c.size_bytes for c in here if c.pending) - free
        return max(over_budget, over_free)

    def _exceeded(self, name: Name, need: Need, claims: Sequence[Claim]) -> FailedPrecondition:
        budget, free = self._budget(need.device), self._free(need.device)
        here = sorted((c for c in claims if c.device == need.device), key=lambda c: -c.size_bytes)
        held = ", ".join(f"{'/'.join(c.name)} {_amount(c.size_bytes)}" for c in here[:_LISTED]) or "nothing"
        more = f" and {len(here) - _LISTED} more" if len(here) > _LISTED else ""
        left = "" if free is None else f"; {_amount(free)} are free"
        return FailedPrecondition(
            f"{'/'.join(name)} needs {_amount(need.size_bytes)} of {need.device} memory, and {_amount(sum(c.size_bytes for c in here))} of "
            f"{_amount(budget) if budget is not None else 'no fixed budget'} are held by {held}{more}{left}: "
            f"unload something, or raise {_RAISED if need.device == CPU else _RAISED_DEVICE}",
            reason=REASON,
        )


def estimate(manifest: ArtifactManifest, device: str, copies: int) -> Need:
    """Return the peak a version needs of a device while it is loaded: `copies` of its weights (one per process), and what its format makes
    of them."""
    stored = sum(file.size_bytes for file in manifest.files.values())
    if device != CPU:
        contexts = copies if manifest.execution.kind == "process" else 0
        return Need(device=device, size_bytes=int(stored * _DEVICE_PEAK) * copies + contexts * _DEVICE_CONTEXT_BYTES)
    return Need(device=device, size_bytes=int(stored * _PEAK[manifest.format] * copies))


def automatic_budget(reading: Reading | None, resident_bytes: int, share: float) -> int | None:
    """Return what models may take of the process's memory: `share` of its limit, less what the process holds without any."""
    return None if reading is None else max(0, int(reading.limit_bytes * share) - resident_bytes)


def ledger(settings: ModelSettings, accelerator: Callable[[str], tuple[int, int] | None] = lambda _: None) -> Ledger:
    """Return the ledger of a process, with the budgets its settings and its surroundings give it.

    `accelerator(device)`: its memory (free, total) in bytes, None where there is no such device.
    """
    automatic = automatic_budget(memory_limit.read(), memory_limit.resident_bytes(), settings.memory_share)
    cpu_budget = settings.max_memory_bytes or automatic

    def budget(device: str) -> int | None:
        if device == CPU:
            return cpu_budget
        found = accelerator(device)
        return None if found is None else int(found[1] * settings.device_memory_share)

    def free(device: str) -> int | None:
        if device == CPU:
            reading = memory_limit.read()
            return None if reading is None else reading.free_bytes
        found = accelerator(device)
        return None if found is None else found[0]

    return Ledger(budget, free)


def _amount(size_bytes: int) -> str:
    """Return a size for people: 3 significant figures, binary units."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
