"""Problems of the DoRA linear, and its plain-PyTorch form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.reference import dropout_keep_mask_ref

from . import Problem
from .lora import BF16, F16, F32, SEED, _strided, lora_tensors


def eager_dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_base: bool = False,
    detach_norm: bool = True,
) -> Tensor:
    """What one would write with PyTorch alone, the norm of the dense sum included: every step rounds to x's dtype."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    if gate is not None:
        b = b * gate.to(x.dtype)
    norm = (weight + scaling * (b @ a)).norm(dim=1)
    if detach_norm:
        norm = norm.detach()
    scale = torch.where(norm > 0, magnitude.to(x.dtype) / torch.where(norm > 0, norm, 1), 0)
    dropped = x
    if dropout_p:
        rows = x.reshape(-1, x.shape[-1])
        keep = dropout_keep_mask_ref(torch.tensor(SEED), *rows.shape, dropout_p).reshape(x.shape)
        dropped = torch.where(keep, x, 0) / (1.0 - dropout_p)
    correction = scale * (scaling * (dropped @ a.T @ b.T))
    if dropout_base:
        y = x @ weight.T + (scale - 1) * (dropped @ weight.T) + correction
    else:
        y = scale * (x @ weight.T) + correction
    return y if bias is None else y + bias


def dora_tensors(*sizes: int, dtype: torch.dtype, factor_dtype: torch.dtype | None = None, **more: bool):  # type: ignore[no-untyped-def]
    tensors = lora_tensors(*sizes, dtype, factor_dtype, **more)
    n = sizes[2]
    generator = torch.Generator().manual_seed(n)
    magnitude = (0.5 + torch.rand(n, generator=generator)).to(factor_dtype or dtype)
    return {**tensors, "magnitude": magnitude.requires_grad_()}


def dora_problem(name: str, tensors: dict[str, Tensor], **options: object) -> Problem:
    options.setdefault("scaling", 0.75)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return lk.dora_linear(**t, **options, dropout_seed=SEED, backend=backend)  # type: ignore[arg-type]

    def eager(t: dict[str, Tensor]) -> Tensor:
        return eager_dora_linear(**t, **options)  # type: ignore[arg-type]

    return Problem(f"dora: {name}", tensors, run, eager)


def _with_zero_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows 3 and 4 of both W and B are zero, so that their norm is."""
    tensors = dict(tensors)
    for name in ("weight", "lora_b"):
        t = tensors[name].detach().clone()
        t[3:5] = 0
        tensors[name] = t.requires_grad_(tensors[name].requires_grad)
    return tensors


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield dora_problem(f"{dtype}", dora_tensors(70, 136, 88, 16, dtype=dtype))
    for rank in (1, 7, 64):
        yield dora_problem(f"rank {rank}", dora_tensors(70, 96, 72, rank, dtype=BF16, factor_dtype=F32))
    yield dora_problem("rank 100", dora_tensors(66, 144, 130, 100, dtype=BF16))
    yield dora_problem("odd sizes, bias", dora_tensors(67, 131, 77, 5, dtype=F32, bias=True), dropout_p=0.3)
    yield dora_problem("bias", dora_tensors(70, 136, 88, 7, dtype=BF16, factor_dtype=F32, bias=True))
    yield dora_problem("dropout", dora_tensors(70, 136, 88, 16, dtype=BF16, factor_dtype=F32), dropout_p=0.1)
    yield dora_problem(
        "dropout of the base", dora_tensors(70, 136, 88, 16, dtype=F16, bias=True), dropout_p=0.2, dropout_base=True
    )
    yield dora_problem(
        "dropout of the base, float32", dora_tensors(33, 50, 40, 4, dtype=F32), dropout_p=0.4, dropout_base=True
    )
    yield dora_problem("full gradients", dora_tensors(70, 136, 88, 16, dtype=F32), detach_norm=False)
    yield dora_problem("full gradients, half", dora_tensors(70, 136, 88, 7, dtype=BF16), detach_norm=False)
    yield dora_problem("zero rows", _with_zero_rows(dora_tensors(70, 136, 88, 16, dtype=BF16, bias=True)))
    yield dora_problem("few tokens", dora_tensors(5, 136, 88, 16, dtype=BF16, factor_dtype=F32))
    yield dora_problem("one token", dora_tensors(1, 136, 88, 16, dtype=F32))
    yield dora_problem("no token", dora_tensors(0, 136, 88, 16, dtype=BF16, bias=True))
    yield dora_problem("gate", dora_tensors(70, 136, 88, 7, dtype=BF16, factor_dtype=F32, bias=True, gate=True))
    yield dora_problem("gate, full gradients", dora_tensors(5, 50, 40, 4, dtype=F32, gate=True), detach_norm=False)
    strided = dora_tensors(70, 136, 88, 16, dtype=BF16)
    yield dora_problem("strided", _strided(strided))
