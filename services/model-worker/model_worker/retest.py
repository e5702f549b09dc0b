"""A served version's self-test, sent the way a request goes: through its queue, to its instances, and compared with what was published."""

from __future__ import annotations

import asyncio
import time

from model_worker.artifacts import Sample
from model_worker.proof import check_answer
from model_worker.served import Served
from plait.errors import DeadlineExceeded, Internal, PlaitError


async def run(served: Served, sample: Sample | None, timeout_s: float) -> PlaitError | None:
    """Return why the version may not serve, None where it passed. Where no self-test is published any answer of the right shape will do."""
    if sample is None:
        return None
    manifest = served.manifest
    rows = next((len(array) for array, spec in zip(sample.inputs, manifest.inputs, strict=True) if spec.per == "row"), 1)
    try:
        async with asyncio.timeout(timeout_s):  # the deadline alone does not end a pass that never comes back
            answer = await served.batcher.submit(sample.inputs, rows, time.monotonic() + timeout_s)
        check_answer(manifest, sample, answer.outputs)
    except TimeoutError:
        return DeadlineExceeded(f"the self-test was not answered within {timeout_s:g} s", reason="SELF_TEST_FAILED")
    except PlaitError as error:
        return error
    except Exception as error:  # whatever a model does, its test has failed
        return Internal(f"the self-test ended with {type(error).__name__}", reason="SELF_TEST_FAILED")
    return None
