"""Problems of merging into a weight, and its plain-PyTorch form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lowrank_kernels as lk

from . import Problem
from .lora import BF16, F16, F32, lora_tensors


def merge_problem(name: str, K: int, N: int, R: int, dtype: torch.dtype, scaling: float = 0.75) -> Problem:
    """A merge into a copy of the weight. It has no gradient: only a factor of each row is differentiated."""
    made = lora_tensors(1, K, N, R, dtype, F32)
    tensors = {key: made[key].detach() for key in ("weight", "lora_a", "lora_b")}
    tensors["ones"] = torch.ones(N, 1, dtype=dtype, requires_grad=True)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        weight = t["weight"].clone()
        return t["ones"] * lk.merge_lora_(weight, t["lora_a"], t["lora_b"], scaling=scaling, backend=backend)

    def eager(t: dict[str, Tensor]) -> Tensor:
        correction = t["lora_b"] @ t["lora_a"]
        return t["ones"] * (t["weight"].to(correction.dtype) + scaling * correction).to(t["weight"].dtype)

    return Problem(f"merge: {name}", tensors, run, eager, rows="weight")


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield merge_problem(f"{dtype}", 136, 88, 16, dtype)
    yield merge_problem("odd sizes", 131, 77, 5, BF16)
    yield merge_problem("odd sizes, float32", 131, 77, 5, F32)
    yield merge_problem("rank 512", 200, 264, 512, BF16)
