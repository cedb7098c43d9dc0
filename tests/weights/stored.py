"""Weights of formats that have no encoder: any codes, zero points and scales, as files hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_kernels.weights import AWQWeight, CodedWeight, GPTQWeight, Int4Weight, Q4_KWeight, Q8_0Weight

GROUP = 32


def words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).int()


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (0.001 + 0.01 * torch.rand(shape, generator=torch.Generator().manual_seed(1))).to(dtype)


def order(k: int) -> Tensor:
    """The groups of columns in an activation order."""
    return (torch.arange(k) // GROUP)[torch.randperm(k, generator=torch.Generator().manual_seed(2))].int()


def gptq(n: int, k: int, checkpoint_format: str = "gptq", ordered: bool = False) -> GPTQWeight:
    groups = k // GROUP
    g_idx = order(k) if ordered else (torch.arange(k) // GROUP).int()
    parts = words(k // 8, n), words(groups, n // 8, seed=3), scales(groups, n)
    return GPTQWeight.of_words(*parts, g_idx, checkpoint_format)


def awq(n: int, k: int) -> AWQWeight:
    return AWQWeight.of_words(words(k, n // 8), words(k // GROUP, n // 8, seed=3), scales(k // GROUP, n))


def int4(n: int, k: int, zeros: bool = True, ordered: bool = False) -> Int4Weight:
    zero_words = words(-(-n // 8), k // GROUP, seed=3) if zeros else None
    given = words(n, k // 8), scales(n, k // GROUP, dtype=torch.bfloat16), k, torch.bfloat16
    return Int4Weight.of_groups(*given, zero_words, order(k) if ordered else None)


def records(n: int, k: int, elements: int, bytes_: int, halves: int) -> Tensor:
    """Records of a GGUF file with their first ``halves`` float16 in order and any bytes after."""
    generator = torch.Generator().manual_seed(4)
    made = torch.randint(0, 256, (n, k // elements, bytes_), dtype=torch.uint8, generator=generator)
    made[..., : 2 * halves] = scales(n, k // elements, halves).view(torch.uint8)
    return made.view(n, -1)


def q8_0(n: int, k: int) -> Q8_0Weight:
    return Q8_0Weight.of_records(records(n, k, 32, 34, 1), k)


def q4_k(n: int, k: int) -> Q4_KWeight:
    return Q4_KWeight.of_records(records(n, k, 256, 144, 2), k)


STORED: dict[str, tuple[Callable[[int, int], CodedWeight], tuple[int, int]]] = {
    "gptq": (gptq, (40, 96)),
    "gptq v2": (lambda n, k: gptq(n, k, "gptq_v2"), (40, 96)),
    "gptq in an order": (lambda n, k: gptq(n, k, ordered=True), (24, 160)),
    "awq": (awq, (40, 96)),
    "int4 with zero points": (int4, (37, 96)),
    "int4 in an order": (lambda n, k: int4(n, k, zeros=False, ordered=True), (21, 64)),
    "int4 with both": (lambda n, k: int4(n, k, ordered=True), (37, 96)),
    "q8_0": (q8_0, (37, 96)),
    "q4_k": (q4_k, (21, 512)),
}
"""By name: what makes a weight of a shape, and a shape with odd edges."""


def made(name: str) -> CodedWeight:
    make, shape = STORED[name]
    return make(*shape)
