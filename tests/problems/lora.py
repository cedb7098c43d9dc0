"""Problems of the LoRA linear, and its plain-PyTorch form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.reference import dropout_keep_mask_ref

from . import Problem

SEED = 0x1234_5678_9ABC
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def eager_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    velora_vector: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """What one would write with PyTorch alone: every step rounds to x's dtype."""
    dropped = x
    if dropout_p:
        rows = x.reshape(-1, x.shape[-1])
        keep = dropout_keep_mask_ref(torch.tensor(SEED), *rows.shape, dropout_p).reshape(x.shape)
        dropped = torch.where(keep, x, 0) / (1.0 - dropout_p)
    if velora_vector is None:
        p = dropped @ lora_a.to(x.dtype).T
    else:
        p = eager_velora_linear(dropped, lora_a.to(x.dtype), velora_vector)
    if gate is not None:
        p = p * gate.to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias) + scaling * (p @ lora_b.to(x.dtype).T)


def eager_velora_linear(x: Tensor, weight: Tensor, velora_vector: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, whose gradient of W is that of x̂ Wᵀ: the difference of W and a constant W is 0, and has one."""
    v = velora_vector.to(x.dtype)
    subtokens = x.detach().reshape(*x.shape[:-1], x.shape[-1] // len(v), len(v))
    estimate = ((subtokens @ v)[..., None] * v).reshape(x.shape)
    constant = weight.detach()
    return torch.nn.functional.linear(x, constant, bias) + estimate @ (weight - constant).T


def lora_tensors(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    *,
    bias: bool = False,
    gate: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs whose products have about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    factor_dtype = factor_dtype or dtype

    def random(*shape: int, scale: float = 1.0, of: torch.dtype = dtype, grad: bool = True) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(of).requires_grad_(grad)

    tensors = {
        "x": random(M, K),
        "weight": random(N, K, scale=K**-0.5, grad=False),
        "lora_a": random(R, K, scale=K**-0.5, of=factor_dtype),
        "lora_b": random(N, R, scale=R**-0.5, of=factor_dtype),
    }
    if bias:
        tensors["bias"] = random(N)
    if gate:
        tensors["gate"] = random(R, of=factor_dtype)
    return tensors


def lora_problem(name: str, tensors: dict[str, Tensor], *, dropout_p: float = 0.0, scaling: float = 0.75) -> Problem:
    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return lk.lora_linear(**t, scaling=scaling, dropout_p=dropout_p, dropout_seed=SEED, backend=backend)

    def eager(t: dict[str, Tensor]) -> Tensor:
        return eager_lora_linear(**t, scaling=scaling, dropout_p=dropout_p)

    return Problem(f"lora: {name}", tensors, run, eager)


def unit_vector(length: int) -> dict[str, Tensor]:
    vector = torch.randn(length, generator=torch.Generator().manual_seed(1))
    return {"velora_vector": vector / vector.norm()}


def velora_problem(name: str, M: int, K: int, N: int, dtype: torch.dtype) -> Problem:
    """A linear of which W trains: no backend is chosen."""
    of_lora = lora_tensors(M, K, N, 1, dtype, bias=True)
    tensors = {name: of_lora[name] for name in ("x", "weight", "bias")} | unit_vector(10)
    tensors["weight"] = tensors["weight"].detach().requires_grad_()

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return lk.velora_linear(**t)

    return Problem(f"velora: {name}", tensors, run, lambda t: eager_velora_linear(**t))


def _strided(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values: x as every other column of a wider tensor, the weight transposed, rows of A apart."""

    def like(t: Tensor, view: Tensor) -> Tensor:
        view.copy_(t.detach())
        return view.requires_grad_(t.requires_grad)

    x, weight, a, b = (tensors[k] for k in ("x", "weight", "lora_a", "lora_b"))
    return {
        **tensors,
        "x": like(x, torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)[:, ::2]),
        "weight": like(weight, torch.zeros(weight.shape[::-1], dtype=weight.dtype).T),
        "lora_a": like(a, torch.zeros(a.shape[0], a.shape[1] + 3, dtype=a.dtype)[:, 1:-2]),
        "lora_b": like(b, torch.zeros(b.shape[::-1], dtype=b.dtype).T),
    }


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield lora_problem(f"{dtype}", lora_tensors(70, 136, 88, 16, dtype))
    for rank in (1, 2, 7, 33, 64, 100):
        yield lora_problem(f"rank {rank}", lora_tensors(70, 96, 72, rank, BF16, F32), dropout_p=0.0)
    yield lora_problem("rank 512", lora_tensors(66, 544, 520, 512, BF16))
    yield lora_problem("odd sizes", lora_tensors(67, 131, 77, 5, BF16))
    yield lora_problem("odd sizes, float32", lora_tensors(67, 131, 77, 5, F32), dropout_p=0.3)
    yield lora_problem("several tiles", lora_tensors(150, 200, 300, 8, F16))
    yield lora_problem("bias, gate", lora_tensors(70, 136, 88, 7, BF16, F32, bias=True, gate=True))
    yield lora_problem("dropout", lora_tensors(70, 136, 88, 16, BF16, F32), dropout_p=0.1)
    yield lora_problem("dropout, bias, gate", lora_tensors(70, 90, 88, 33, F16, bias=True, gate=True), dropout_p=0.5)
    yield lora_problem("velora", lora_tensors(70, 136, 88, 16, BF16, F32) | unit_vector(17), dropout_p=0.1)
    yield lora_problem("velora, gate", lora_tensors(67, 130, 77, 5, F32, bias=True, gate=True) | unit_vector(13))
    yield lora_problem("velora, one token", lora_tensors(1, 136, 88, 16, F16) | unit_vector(1))
    yield lora_problem("velora, no token", lora_tensors(0, 136, 88, 16, F32) | unit_vector(136))
    for dtype in (BF16, F32):
        yield velora_problem(f"{dtype}", 70, 130, 88, dtype)
    yield lora_problem("few tokens", lora_tensors(5, 136, 88, 16, BF16, F32), dropout_p=0.1)
    yield lora_problem("one token", lora_tensors(1, 136, 88, 16, BF16))
    yield lora_problem("no token", lora_tensors(0, 136, 88, 16, BF16, bias=True, gate=True))
    yield lora_problem("strided", _strided(lora_tensors(70, 136, 88, 16, BF16)))
    yield lora_problem("strided, dropout", _strided(lora_tensors(70, 136, 88, 16, F32, gate=True)), dropout_p=0.2)
