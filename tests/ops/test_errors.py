"""Every message of a bad call: which op, what was expected, what was given."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk


def lora_operands(**changes):
    operands = {
        "x": torch.zeros(3, 8),
        "weight": torch.zeros(6, 8),
        "lora_a": torch.zeros(2, 8),
        "lora_b": torch.zeros(6, 2),
    }
    return {**operands, **changes}


LORA_LINEAR = [
    ({"x": torch.zeros(3, 7)}, ValueError, r"expected x of shape \(\.\.\., K\) = \(\.\.\., 8\), got \(3, 7\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"expected x of shape"),
    ({"x": [1.0]}, TypeError, r"expected x to be a tensor, got list"),
    ({"x": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, r"expected x of a floating dtype, got torch.int64"),
    (
        {name: torch.zeros(size, dtype=torch.int64) for name, size in (("x", (3, 8)), ("weight", (6, 8)))},
        TypeError,
        r"expected x of a floating dtype, got torch.int64",
    ),
    ({"lora_a": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, r"expected lora_a of a floating dtype"),
    ({"lora_b": torch.zeros(6, 2, dtype=torch.int64)}, TypeError, r"expected lora_b of a floating dtype"),
    ({"x": torch.zeros(3, 8, dtype=torch.bfloat16)}, TypeError, r"expected x and weight of one dtype, got .*bfloat16"),
    ({"weight": torch.zeros(6, 8, 1)}, ValueError, r"expected weight of shape \(N, K\), got \(6, 8, 1\)"),
    ({"weight": torch.zeros(6, 8, requires_grad=True)}, ValueError, r"expected a frozen weight.*requires_grad_"),
    ({"lora_a": torch.zeros(2, 7)}, ValueError, r"expected lora_a of shape \(R, K\) = \(R, 8\), got \(2, 7\)"),
    ({"lora_a": torch.zeros(8)}, ValueError, r"expected lora_a of shape"),
    ({"lora_a": torch.zeros(0, 8), "lora_b": torch.zeros(6, 0)}, ValueError, r"expected a rank of at least 1"),
    ({"lora_b": torch.zeros(2, 6)}, ValueError, r"expected lora_b of shape \(N, R\) = \(6, 2\), got \(2, 6\)"),
    ({"bias": torch.zeros(8)}, ValueError, r"expected bias of shape \(N,\) = \(6,\), got \(8,\)"),
    ({"bias": torch.zeros(6, dtype=torch.int64)}, TypeError, r"expected bias of a floating dtype, got torch.int64"),
    ({"gate": torch.zeros(2, dtype=torch.bool)}, TypeError, r"expected gate of a floating dtype, got torch.bool"),
    ({"gate": torch.zeros(3)}, ValueError, r"expected gate of shape \(R,\) = \(2,\), got \(3,\)"),
    ({"lora_a": torch.zeros(2, 8, device="meta")}, ValueError, r"expected lora_a on cpu like x, got meta"),
    ({"weight": torch.zeros(6, 8, device="meta")}, ValueError, r"expected weight on cpu like x, got meta"),
    ({"lora_b": torch.zeros(6, 2, device="meta")}, ValueError, r"expected lora_b on cpu like x, got meta"),
    ({"bias": torch.zeros(6, device="meta")}, ValueError, r"expected bias on cpu like x, got meta"),
    ({"gate": torch.zeros(2, device="meta")}, ValueError, r"expected gate on cpu like x, got meta"),
    ({"dropout_p": 1.0}, ValueError, r"expected 0 <= dropout_p < 1, got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"expected 0 <= dropout_p < 1"),
    ({"dropout_p": float("nan")}, ValueError, r"expected 0 <= dropout_p < 1"),
    ({"dropout_p": 0.5, "dropout_seed": 1.5}, TypeError, r"expected dropout_seed to be an int or an int64 scalar"),
    ({"dropout_p": 0.5, "dropout_seed": torch.zeros(2, dtype=torch.int64)}, TypeError, r"expected dropout_seed"),
    ({"backend": "rocket"}, ValueError, r"expected backend to be one of auto, .*, cuda, got 'rocket'"),
    ({"backend": "triton"}, ValueError, r"backend 'triton' cannot run here: .*TRITON_INTERPRET=1"),
    ({"backend": "cuda"}, ValueError, r"backend 'cuda' cannot run here: .*use backend='triton'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), LORA_LINEAR)
def test_lora_linear(changes, error, message):
    with pytest.raises(error, match=rf"^lora_linear: {message}"):
        lk.lora_linear(**lora_operands(**changes))


def test_what_needs_a_closer_look_may_still_fit():
    trained = torch.zeros(6, 8, requires_grad=True)
    with torch.no_grad():
        assert lk.lora_linear(**lora_operands(weight=trained)).shape == (3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.lora_linear(**lora_operands(x=torch.zeros(3, 8, dtype=torch.bfloat16)))
    assert y.dtype == torch.bfloat16


def test_float64_on_a_named_kernel_backend_says_what_to_use():
    operands = {name: tensor.double() for name, tensor in lora_operands().items()}
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run here: .*float64; use backend='reference'"):
        lk.lora_linear(**operands, backend="cpu")
