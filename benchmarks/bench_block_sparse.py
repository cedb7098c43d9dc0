"""pytest-benchmark rows of the block-sparse gradient on a CPU: `make bench`."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def operands(request):  # type: ignore[no-untyped-def]
    """1024 tokens, a weight of 4096×4096, and 1% of its blocks of 64."""
    torch.manual_seed(0)
    x, grad_y = (torch.randn(1024, 4096).to(request.param) for _ in range(2))
    chosen = torch.randperm(64 * 64)[:41].sort().values
    return x, grad_y, torch.stack((chosen // 64, chosen % 64), 1).to(torch.int32)


def test_block_sparse_weight_grad(benchmark, operands):  # type: ignore[no-untyped-def]
    benchmark(lambda: lk.block_sparse_weight_grad(*operands, 64))


def test_gather_and_bmm(benchmark, operands):  # type: ignore[no-untyped-def]
    x, grad_y, index = operands
    rows, columns = index.long().unbind(1)

    def gathered():  # type: ignore[no-untyped-def]
        left = grad_y.view(1024, 64, 64)[:, rows].permute(1, 2, 0)
        return torch.bmm(left, x.view(1024, 64, 64)[:, columns].permute(1, 0, 2))

    benchmark(gathered)


def test_dense_weight_grad(benchmark, operands):  # type: ignore[no-untyped-def]
    x, grad_y, _ = operands
    benchmark(lambda: grad_y.T @ x)
