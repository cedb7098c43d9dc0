"""The DoRA linear's traffic and norm, in the interpreter."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from tests.problems import leaves
from tests.problems.dora import dora_tensors
from tests.problems.lora import BF16, F16, F32, SEED


@pytest.mark.parametrize(
    ("dtype", "dropout_p", "bound", "factor_dtype"),
    [
        (BF16, 0.0, 1.70, F32),
        (BF16, 0.1, 1.88, None),
        *(  # each setting is above; float16 has two bytes, as bfloat16
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in ((BF16, 0.0, 1.70, None), (BF16, 0.1, 1.88, F32), (F16, 0.0, 1.70, None), (F16, 0.0, 1.70, F32))
        ),
    ],
)
def test_launches_and_bytes_of_a_training_step(
    dtype: torch.dtype, dropout_p: float, bound: float, factor_dtype: torch.dtype | None
) -> None:
    """6 launches, 4 of them backward, and 1.7 times the floor: x, W, y once forward; dY, W, x, dX once backward.

    The norm of W is there already, as the layer keeps it. A mask takes a launch and a second read of x: one kernel
    would draw it again for every column of tiles, which costs more than the read does.
    """
    M, K, N, R = 1024, 512, 512, 16
    t = leaves(dora_tensors(M, K, N, R, dtype=dtype, factor_dtype=factor_dtype))
    sq_norm = t["weight"].float().square().sum(1)
    floor = 2 * ((M * K + N * K + M * N) + (M * N + N * K + 2 * M * K))
    grad_y, seed = torch.randn(M, N).to(dtype), torch.tensor(SEED)
    with record_memory() as forward:
        y = lk.dora_linear(
            **t, scaling=0.75, weight_sq_norm=sq_norm, dropout_p=dropout_p, dropout_seed=seed, backend="triton"
        )
    with record_memory() as backward:
        torch.autograd.grad(y, [t[name] for name in ("x", "lora_a", "lora_b", "magnitude")], grad_y)
    launches = len(forward.launches) + len(backward.launches)
    ratio = (forward.nbytes + backward.nbytes) / floor
    print(f"{len(forward.launches)} + {len(backward.launches)} launches, {ratio:.3f} of the floor")
    table = forward.table() + "\n" + backward.table()
    assert launches <= (7 if dropout_p else 6) and len(backward.launches) <= 4, table
    assert ratio <= bound, table


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 70, 7), (130, 257, 33), (64, 96, 200)])
def test_norm_within_its_bound(n: int, k: int, r: int, dtype: torch.dtype) -> None:
    """2e-5 of a dense float64 norm, float32 factors over any weight."""
    torch.manual_seed(0)
    weight, a, b = torch.randn(n, k).to(dtype), torch.randn(r, k) * k**-0.5, torch.randn(n, r)
    dense = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    norm = lk.dora_weight_norm(weight, a, b, scaling=0.5, backend="triton")
    torch.testing.assert_close(norm.double(), dense, rtol=2e-5, atol=0)


def test_norm_where_w_cancels_the_product() -> None:
    """What is left is a hundredth of its two parts: their squares would agree in all digits that it has."""
    torch.manual_seed(0)
    a, b, rest = torch.randn(5, 96), torch.randn(40, 5), torch.randn(40, 96)
    weight = 0.01 * rest - 0.5 * b @ a
    dense = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    norm = lk.dora_weight_norm(weight, a, b, scaling=0.5, backend="triton")
    torch.testing.assert_close(norm.double(), dense, rtol=2e-5, atol=0)
