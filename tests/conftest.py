"""What every test folder shares."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test may reach for the network
os.environ["LRK_TUNE_FILE"] = ""  # what a user's own table says is no part of the tests


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """torch.compile counts recompilations of shared code, such as nn.Sequential, across tests; each starts at none."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
