"""Offsets beyond 2**31 in the kernels of DoRA, of merging, of SVFT and of many adapters: strides, not gigabytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.kernels.dora import dora_linear_bwd, dora_linear_fwd, dora_norm
from lowrank_kernels.kernels.galore import galore_adam_
from lowrank_kernels.kernels.importance import lora_importance
from lowrank_kernels.kernels.importance_tiles import importance_tiles
from lowrank_kernels.kernels.lora_tiles import lora_tiles
from lowrank_kernels.kernels.merge import merge_lora_
from lowrank_kernels.kernels.svft import svft_grad, svft_multiply
from lowrank_kernels.kernels.target import TARGETS
from tests.interpreter.test_lora import _far_apart, _in_place
from tests.problems.lora import BF16, F32

Tensors = dict[str, Tensor]
TARGET = TARGETS["interpreter"]


def _norm(t: Tensors) -> tuple[Tensor, ...]:
    operands = t["weight"], t["lora_a"], t["lora_b"]
    return dora_norm(*operands, 0.5, TARGET, weight_sq_norm=None, magnitude=t["magnitude"])


def _dora(t: Tensors) -> tuple[Tensor | None, ...]:
    (M, K), (N, R) = t["x"].shape, t["lora_b"].shape
    ones = torch.ones(N)
    operands = t["weight"], t["lora_a"], t["lora_b"]
    tiles = lora_tiles(TARGET, M, K, N, R, BF16, False, scaled=True)
    y, p, u = dora_linear_fwd(t["x"], *operands, ones, tiles, scaling=0.5, save=True)
    saved = {"norm": ones, "column_scale": ones, "p": p, "u": u}
    wanted = {"needs": (True, True, True, True), "magnitude_dtype": F32}
    return y, *dora_linear_bwd(t["grad_y"], t["x"], *operands, tiles, **saved, scaling=0.5, **wanted)


def _merge(t: Tensors) -> tuple[Tensor]:
    weight = t["weight"]
    before = weight.clone(memory_format=torch.contiguous_format)
    merge_lora_(weight, t["lora_a"], t["lora_b"], 0.5, TARGET)
    merged = weight.clone(memory_format=torch.contiguous_format)
    weight.copy_(before)
    return (merged,)


def _importance(t: Tensors) -> tuple[Tensor]:
    weight, a, b = t["weight"], t["lora_a"], t["lora_b"]
    return (lora_importance(weight, a, b, a, b, 0.5, importance_tiles(TARGET, *weight.shape)),)


def _galore(t: Tensors) -> tuple[Tensor, ...]:
    weight, m, v = (t[name].clone() for name in ("weight", "m", "m"))
    written = [t.get("written", weight).copy_(weight), m, v.square() + 1]
    numbers = {"rate": 0.5, "betas": (0.9, 0.99), "eps": 1e-3, "keep": 0.9, "inverse_root": 1.0}
    galore_adam_(written[0], t["weight"], t["lora_b"], *written[1:], TARGET, **numbers)
    return tuple(w.clone(memory_format=torch.contiguous_format) for w in written)


def _svft(t: Tensors) -> tuple[Tensor, ...]:
    rows, columns, values = t["grad_y"], t["x"], torch.linspace(-1, 1, 24)
    pattern = lk.svft_pattern(torch.arange(24).repeat(2, 1), 24, 40)
    products = svft_multiply(columns, values, pattern, 24, False), svft_multiply(rows, values, pattern, 40, True)
    return *products, svft_grad(rows, columns, pattern, 24)


def _many(t: Tensors) -> tuple[Tensor]:
    stack = lk.LoRAStack.from_factors([(t["lora_a"], t["lora_b"], 0.5), (t["lora_a"] + 1, t["lora_b"], 0.25)])
    return (lk.multi_lora_linear(t["x"], t["weight"], stack, torch.tensor([0, 1, -1, 1]), backend="triton"),)


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (_norm, ("weight", "lora_a", "lora_b")),
        (_dora, ("x", "weight", "lora_a", "lora_b", "grad_y")),
        (_merge, ("weight", "lora_a", "lora_b")),
        (_importance, ("weight", "lora_a", "lora_b")),
        (_galore, ("weight", "lora_b", "written")),
        (_svft, ("x", "grad_y")),
        (_many, ("x", "weight")),
    ],
)
def test_strides_beyond_two_to_the_31(run: Callable[[Tensors], tuple[Tensor, ...]], names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    shapes = {"x": (4, 40), "weight": (24, 40), "lora_a": (8, 40), "lora_b": (24, 8), "grad_y": (4, 24)}
    t = {name: torch.randn(shape).to(BF16) for name, shape in shapes.items()} | {"magnitude": torch.rand(24)}
    t |= {"m": torch.randn(8, 40), "written": torch.zeros(24, 40).to(BF16)}
    near = run(t)
    for name in names:
        far = _far_apart(*t[name].shape, BF16)
        far.copy_(t[name])
        found = _in_place(lambda there={**t, name: far}: run(there))  # type: ignore[misc]
        for i, (value, expected) in enumerate(zip(found, near, strict=True)):
            assert torch.equal(value, expected), (name, i)
        del far
