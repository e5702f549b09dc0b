"""The request parameters that mean something here, read by type; unknown ones are ignored, as the protocol asks.

Names and types are Triton's (schedule policy, sequence and decoupled extensions):
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_schedule_policy.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_sequence.md
`sequence_*` are checked and otherwise ignored: no model here has state, so a sequence's requests are answered like any others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from plait.errors import Violation

PRIORITY: Final = "priority"
TIMEOUT: Final = "timeout"
CLASSIFICATION: Final = "classification"
_SHARED_MEMORY: Final = "shared_memory_region"

_WHOLE: Final = ("int64_param", "uint64_param")
_FLAG: Final = ("bool_param",)
_REQUEST: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        PRIORITY: _WHOLE,
        TIMEOUT: _WHOLE,
        "sequence_id": (*_WHOLE, "string_param"),
        "sequence_start": _FLAG,
        "sequence_end": _FLAG,
        "triton_enable_empty_final_response": _FLAG,
    }
)


def schedule(parameters: Any) -> tuple[int, float | None, list[Violation]]:
    """Return (priority, timeout in seconds or None, what is wrong) of a request's parameters.

    `priority`: 0 = the default, 1 the most urgent, as Triton counts. `timeout` is given in microseconds; 0 = none.
    """
    found: dict[str, int] = {}
    problems = []
    for name, kinds in _REQUEST.items():
        if name not in parameters:
            continue
        kind = parameters[name].WhichOneof("parameter_choice")
        if kind not in kinds:
            problems.append(Violation(f"parameters[{name}]", f"expected {' or '.join(kinds)}, found {kind or 'nothing'}"))
        elif kinds is _WHOLE and getattr(parameters[name], kind) < 0:
            problems.append(Violation(f"parameters[{name}]", "expected 0 or more"))
        elif kinds is _WHOLE:
            found[name] = getattr(parameters[name], kind)
    timeout_us = found.get(TIMEOUT, 0)
    return found.get(PRIORITY, 0), timeout_us / 1e6 if timeout_us else None, problems


def classes(parameters: Any, path: str) -> tuple[int, list[Violation]]:
    """Return (classes asked for or 0, what is wrong) of a requested output's parameters, which are found at `path` in the request."""
    problems = shared_memory(parameters, path)
    if CLASSIFICATION not in parameters:
        return 0, problems
    kind = parameters[CLASSIFICATION].WhichOneof("parameter_choice")
    count = getattr(parameters[CLASSIFICATION], kind) if kind in _WHOLE else 0
    if count < 1:
        problems.append(
            Violation(f"{path}.parameters[{CLASSIFICATION}]", "expected the number of classes wanted, an int64_param of 1 or more")
        )
        return 0, problems
    return count, problems


def shared_memory(parameters: Any, path: str) -> list[Violation]:
    """Return the violation of a tensor that refers to shared memory."""
    if _SHARED_MEMORY not in parameters:
        return []
    return [Violation(f"{path}.parameters[{_SHARED_MEMORY}]", "shared memory is not offered here: send the tensor in the message")]
