"""pytest-benchmark rows of the LoRA linear on a CPU: `make bench`."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk

SIZE, RANK = 2048, 16


def operands(tokens, dtype, training):
    torch.manual_seed(0)
    return {
        "x": torch.randn(tokens, SIZE).to(dtype).requires_grad_(training),
        "weight": (torch.randn(SIZE, SIZE) / SIZE**0.5).to(dtype),
        "lora_a": (torch.randn(RANK, SIZE) / SIZE**0.5).to(dtype).requires_grad_(training),
        "lora_b": torch.randn(SIZE, RANK).to(dtype).requires_grad_(training),
    }


def frozen(x, weight, lora_a, lora_b):
    return torch.nn.functional.linear(x, weight)


def plain(x, weight, lora_a, lora_b):
    return torch.nn.functional.linear(x, weight) + 2.0 * (x @ lora_a.T @ lora_b.T)


def ours(x, weight, lora_a, lora_b):
    return lk.lora_linear(x, weight, lora_a, lora_b, scaling=2.0)


@pytest.mark.parametrize("provider", [frozen, plain, ours], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("tokens", [16, 1024])
def test_lora_linear(benchmark, tokens, dtype, mode, provider):
    benchmark.group = f"lora_linear {SIZE}x{SIZE}, {tokens} tokens, {dtype}, {mode}"
    training = mode == "training"
    o = operands(tokens, dtype, training)
    grad_y = torch.randn(tokens, SIZE).to(dtype)
    trained = [o["x"], o["lora_a"], o["lora_b"]]

    def run():
        if training:
            torch.autograd.grad(provider(**o), trained, grad_y, allow_unused=True)
        else:
            with torch.no_grad():
                provider(**o)

    benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=2)
