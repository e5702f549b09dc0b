"""Who may run tests that need a GPU."""

from __future__ import annotations

import pytest
import torch

from model_worker.backends.cuda import why_unavailable

_WHY_NOT = why_unavailable(
    built=torch.version.cuda is not None, count=torch.cuda.device_count() if torch.cuda.is_available() else 0, number=0
)
needs_gpu = pytest.mark.skipif(bool(_WHY_NOT), reason=f"needs a GPU: {_WHY_NOT}")
