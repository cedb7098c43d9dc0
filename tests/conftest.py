"""What every test folder shares."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """torch.compile counts recompilations of shared code, such as nn.Sequential, across tests; each starts at none."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
