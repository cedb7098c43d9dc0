"""transformers' ``FP8Linear``: read where it lies, by the block of its config, and adapted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.weights import FP8Weight, of

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="this transformers has no FP8Linear")


def linear(n: int, k: int, block: tuple[int, int]) -> tuple[nn.Module, FP8Weight]:
    module = fp8.FP8Linear(k, n, block_size=block)
    weight = FP8Weight.from_dense(torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5, block)
    with torch.no_grad():
        module.weight.data, module.weight_scale_inv.data = weight.codes, weight.scales
    return module, weight


@pytest.mark.parametrize("shape", [(128, 256), (192, 160)])
def test_its_weight_is_read_by_the_block_of_its_config(shape: tuple[int, int]) -> None:
    module, weight = linear(*shape, (128, 128))
    read = of(module)
    assert isinstance(read, FP8Weight) and read.block == (128, 128)
    assert torch.equal(read.to(torch.float32).dense(), weight.dense())


def test_it_is_adapted_and_gives_x_its_gradient() -> None:
    module, weight = linear(64, 96, (32, 32))
    model = nn.Sequential(module)
    report = lk.adapt(model, lk.LoRAConfig(r=4))
    assert [r.name for r in report.replaced] == ["0"]
    x = torch.randn(5, 96, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y, x @ weight.dense().T, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.dense().sum(0).expand(5, 96), rtol=1e-4, atol=1e-4)
