"""What only a GPU can show: `pytest -x tests/gpu`. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """A GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")
