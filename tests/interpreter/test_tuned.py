"""Fields of plans that `lrk tune` may settle and the tile rule never takes, run by the launchers."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import tuned
from lowrank_kernels.ops import planning
from lowrank_kernels.reference import block_sparse_weight_grad_ref, lora_linear_ref

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "library"},
        {"strategy": "two_kernel", "BLOCK_M": 32, "BLOCK_N": 16},
        {"strategy": "fused", "BLOCK_M": 32},
    ],
)
def test_lora_linear(fields, dropout_p, monkeypatch):
    seen = []
    rule = planning.lora_tiles
    monkeypatch.setattr(planning, "lora_tiles", lambda *a, **k: seen.append(rule(*a, **k)) or seen[-1])
    x, weight = normal(40, 64), normal(48, 64)
    lora_a, lora_b = (t.requires_grad_() for t in (normal(5, 64), normal(48, 5)))
    seed = torch.tensor(3)
    with tuned.forcing("lora_linear") as force:
        force(fields)
        y = lk.lora_linear(x, weight, lora_a, lora_b, dropout_p=dropout_p, dropout_seed=seed, backend="triton")
    assert seen[0].strategy == fields["strategy"]
    expected, p = lora_linear_ref(x, weight, lora_a, lora_b, dropout_p=dropout_p, dropout_seed=seed)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-4)
    with tuned.forcing("lora_linear_backward") as force:
        force(fields)
        (grad_b,) = torch.autograd.grad(y.sum(), [lora_b], retain_graph=True)
    torch.testing.assert_close(grad_b, p.sum(0).expand(48, 5), rtol=1e-5, atol=2e-4)
    assert len(seen) == 2 and seen[1].strategy == fields["strategy"]


def test_block_sparse_weight_grad():
    x, grad_y, index = normal(70, 64), normal(70, 64), torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
    with tuned.forcing("block_sparse_weight_grad") as force:
        force({"BLOCK_M": 16, "BLOCK_R": 16, "splits": 1})
        blocks = lk.block_sparse_weight_grad(x, grad_y, index, 16, backend="triton")
    expected = block_sparse_weight_grad_ref(x, grad_y, index, (16, 16))
    torch.testing.assert_close(blocks, expected, rtol=1e-5, atol=1e-4)
