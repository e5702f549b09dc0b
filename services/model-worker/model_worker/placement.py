"""On which devices a version computes: what its model.yaml asks for, within what the worker's settings give; pure.

As Triton's instance groups with a list of GPUs
(https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html#instance-groups).
"""

from __future__ import annotations

from typing import Final

from plait.errors import FailedPrecondition
from plait.registry.records import Execution

CPU: Final = "cpu"
_ANY_GPU: Final = "cuda"


def devices(execution: Execution, setting: str) -> tuple[str, ...]:
    """Return the devices, each of which gets `execution.instances`: ("cpu",) or "cuda:<n>" once or more.

    `setting` is models.device: "cpu"; "cuda" for the GPUs that model.yaml lists, GPU 0 where it lists none; "cuda:<n>" for that one alone.
    Raises FailedPrecondition (DEVICE_UNAVAILABLE) where model.yaml asks for a GPU that the setting does not give.
    """
    asked = execution.devices
    if setting == _ANY_GPU:
        return tuple(f"cuda:{n}" for n in asked or (0,))
    if asked and setting not in {f"cuda:{n}" for n in asked}:
        raise FailedPrecondition(
            f"model.yaml asks for the GPUs {', '.join(map(str, asked))} and this worker computes on {setting}: set models.device to cuda, or "
            "publish the model without execution.devices",
            reason="DEVICE_UNAVAILABLE",
        )
    return (setting,)


def index(device: str) -> int:
    """Return the number of a GPU: 1 for "cuda:1", 0 for "cuda"."""
    return int(device.partition(":")[2] or 0)
