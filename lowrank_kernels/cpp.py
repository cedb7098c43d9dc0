"""The C++ ops of the extension, found once: ``cpp.lora_down(...)`` is ``torch.ops.lowrank_kernels.lora_down(...)``."""

from __future__ import annotations

from typing import Any

import torch


class _Cpp:
    """An op's one overload is found at its first use and kept: finding it costs 2 microseconds a call."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.lowrank_kernels, name).default
        setattr(self, name, op)
        return op


cpp = _Cpp()
