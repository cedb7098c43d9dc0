"""Every argument of every public function on tensors: a wrong one is refused in a message that names both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.functional import block_adamw_, block_columns

M, K, N, R = 4, 16, 32, 2
NAN, INF = float("nan"), float("inf")


def _tensor(*shape: int) -> list[Any]:
    return [
        None,
        "a",
        3.0,
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(*shape, 3),
        torch.zeros(shape, device="meta"),
    ]


def _optional(*shape: int) -> list[Any]:
    return _tensor(*shape)[1:]


NUMBER = [None, "1", NAN, INF, -INF, 1e300, 1e-300, True, torch.zeros(2)]
PROBABILITY = [None, "1", NAN, 1.0, -0.1, True]
FLAG = ["no", 1, None, torch.tensor(True)]
BACKEND = ["rocket", None, 3]
SEED = [1.5, "x", torch.zeros(()), torch.zeros(2, dtype=torch.int64), True]
STACK = [None, "a", torch.zeros(2), []]
INDEX = [
    None,
    [[0, 0]],
    torch.zeros(1, 2),
    torch.zeros(1, 2, dtype=torch.int64),
    torch.zeros(2, dtype=torch.int32),
    torch.tensor([[9, 0]], dtype=torch.int32),
    torch.tensor([[-1, 0]], dtype=torch.int32),
    torch.tensor([[0, 0], [0, 0]], dtype=torch.int32),
]
IDS = [
    None,
    "a",
    torch.zeros(M),
    torch.zeros(M, dtype=torch.bool),
    torch.zeros(M + 1, dtype=torch.int64),
    torch.full((M,), 2),
    torch.full((M,), -2),
    torch.full((M,), 2**32),
    torch.full((M,), -(2**63)),
    torch.zeros(M, dtype=torch.uint64),
    torch.zeros(M, 0, dtype=torch.int64),
    torch.zeros(M, 1, 1, dtype=torch.int64),
]
BLOCK_SIZE = [None, 0, 8, 17, True, (16,), (16, 8), "16", 16.0]
VELORA_VECTOR = [*_optional(4), torch.zeros(3), torch.zeros(0), torch.zeros(32), torch.zeros(4).requires_grad_()]
WRONG_PAIR = [3, (torch.zeros(N),), (None, torch.zeros(N)), (torch.zeros(N), torch.zeros(N + 1)), "ab"]


def _stack(dora: bool = False) -> lk.LoRAStack:
    part = (torch.zeros(R, K), torch.zeros(N, R), 1.0)
    return lk.LoRAStack.from_factors([(*part, torch.ones(N)) if dora else part] * 2)


def _merge_operands() -> dict[str, Any]:
    return {"weight": torch.zeros(N, K), "lora_a": torch.zeros(R, K), "lora_b": torch.zeros(N, R)}


LINEAR: dict[str, list[Any]] = {
    "x": _tensor(M, K),
    "weight": _tensor(N, K),
    "lora_a": _tensor(R, K),
    "lora_b": _tensor(N, R),
    "bias": _optional(N),
    "scaling": NUMBER,
    "dropout_p": PROBABILITY,
    "backend": BACKEND,
}


def _linear() -> dict[str, Any]:
    return {"x": torch.zeros(M, K), **_merge_operands()}


# function, operands that fit, wrong values by argument, what an argument is called in the message where not by its name
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], dict[str, list[Any]]]] = {
    "lora_linear": (
        lk.lora_linear,
        _linear,
        {**LINEAR, "gate": _optional(R), "velora_vector": VELORA_VECTOR},
    ),
    "frozen_linear": (
        lk.frozen_linear,
        lambda: {"x": torch.zeros(M, K), "weight": torch.zeros(N, K)},
        {name: LINEAR[name] for name in ("x", "weight", "bias", "backend")},
    ),
    "velora_linear": (
        lk.velora_linear,
        lambda: {"x": torch.zeros(M, K), "weight": torch.zeros(N, K), "velora_vector": torch.ones(4)},
        {**{name: LINEAR[name] for name in ("x", "weight", "bias")}, "velora_vector": [None, *VELORA_VECTOR]},
    ),
    "dora_linear": (
        lk.dora_linear,
        lambda: {**_linear(), "magnitude": torch.ones(N)},
        {
            **LINEAR,
            "magnitude": _tensor(N),
            "gate": _optional(R),
            "weight_sq_norm": _optional(N),
            "norm_and_scale": WRONG_PAIR,
            "dropout_base": FLAG,
            "detach_norm": FLAG,
            "scale_cache": ["a", 3],
        },
    ),
    "dora_weight_norm": (
        lk.dora_weight_norm,
        _merge_operands,
        {
            "weight": _tensor(N, K),
            "lora_a": _tensor(R, K),
            "lora_b": _tensor(N, R),
            "scaling": NUMBER,
            "weight_sq_norm": _optional(N),
            "backend": BACKEND,
        },
    ),
    "dora_column_scale": (
        lk.dora_column_scale,
        lambda: {**_merge_operands(), "magnitude": torch.ones(N)},
        {
            "weight": _tensor(N, K),
            "lora_a": _tensor(R, K),
            "lora_b": _tensor(N, R),
            "magnitude": _tensor(N),
            "scaling": NUMBER,
            "weight_sq_norm": _optional(N),
            "backend": BACKEND,
        },
    ),
    "lora_importance": (
        lk.lora_importance,
        lambda: {**_merge_operands(), "grad_a": torch.zeros(R, K), "grad_b": torch.zeros(N, R)},
        {
            "weight": _tensor(N, K),
            **{name: _tensor(R, K) for name in ("lora_a", "grad_a")},
            **{name: _tensor(N, R) for name in ("lora_b", "grad_b")},
            "scaling": NUMBER,
            "dim": ["diagonal", None, 0, ["rows"]],
            "backend": BACKEND,
        },
    ),
    "magnitude_histogram": (
        lk.magnitude_histogram,
        lambda: {"values": torch.zeros(N, K)},
        {
            "values": [None, 1.0, [1.0], torch.zeros(N, K, dtype=torch.int64)],
            "digit": [3, -1, 1.0, None, True, "0"],
            "leading": [1, -1, 1.0, None, True, "0"],
            "backend": BACKEND,
        },
    ),
    "multi_lora_linear": (
        lk.multi_lora_linear,
        lambda: {
            "x": torch.zeros(M, K),
            "weight": torch.zeros(N, K),
            "stack": _stack(),
            "adapter_ids": torch.zeros(M, dtype=torch.int64),
        },
        {
            "x": _tensor(M, K),
            "weight": _tensor(N, K),
            "stack": STACK,
            "adapter_ids": IDS,
            "bias": _optional(N),
            "weights": [w for w in _optional(M, 1) if w is not None] + [torch.zeros(M, 2)],
            "dropout_p": [*PROBABILITY, [0.1], [0.1, 1.0], ["a", "b"]],
            "backend": BACKEND,
        },
    ),
    "plan_batch": (
        lk.plan_batch,
        lambda: {"adapter_ids": torch.zeros(M, dtype=torch.int64), "num_adapters": 2},
        {
            "adapter_ids": [i for i in IDS if not (isinstance(i, torch.Tensor) and i.shape == (M + 1,))],
            "num_adapters": [None, -1, 2.0, True],
        },
    ),
    "stack_column_scale": (
        lk.stack_column_scale,
        lambda: {"weight": torch.zeros(N, K), "stack": _stack(dora=True)},
        {"weight": _tensor(N, K), "stack": [*STACK, _stack()], "backend": BACKEND},
    ),
    "experts_linear": (
        lk.experts_linear,
        lambda: {
            "x": torch.zeros(M, K),
            "weight": torch.zeros(2, N, K),
            "stack": _stack(dora=True),
            "rows": torch.zeros(M, dtype=torch.int64),
        },
        {
            "x": [*_tensor(M, K), torch.zeros(M, K + 1), torch.zeros(M, K).bfloat16()],
            "weight": [*_tensor(2, N, K), torch.zeros(N, K), torch.zeros(2, N, K, requires_grad=True)],
            "stack": [*STACK, lk.LoRAStack.empty(K, N), lk.LoRAStack.empty(K + 1, N)],
            "rows": [*IDS, torch.full((M,), -1), lk.plan_experts(torch.zeros(M, dtype=torch.int64), 3)],
            "norm_and_scale": WRONG_PAIR,
            "dropout_p": PROBABILITY,
            "backend": BACKEND,
        },
    ),
    "experts_column_scale": (
        lk.experts_column_scale,
        lambda: {"weight": torch.zeros(2, N, K), "stack": _stack(dora=True)},
        {"weight": _tensor(2, N, K), "stack": [*STACK, _stack()], "backend": BACKEND},
    ),
    "plan_experts": (
        lk.plan_experts,
        lambda: {"expert_ids": torch.zeros(M, dtype=torch.int64), "num_experts": 2},
        {
            "expert_ids": [
                *[i for i in IDS if not (isinstance(i, torch.Tensor) and i.shape == (M + 1,))],
                torch.full((M,), -1),
                torch.zeros(M, 1, dtype=torch.int64),
            ],
            "num_experts": [None, 0, -1, 2.0, True],
            "adapter_ids": [torch.zeros(M, dtype=torch.int64)],
            "num_adapters": [2],
        },
    ),
    "block_sparse_linear": (
        lk.block_sparse_linear,
        lambda: {
            "x": torch.zeros(M, K),
            "weight": torch.zeros(N, K),
            "blocks": torch.zeros(1, 16, 16),
            "block_index": torch.zeros(1, 2, dtype=torch.int32),
        },
        {
            "x": _tensor(M, K),
            "weight": _tensor(N, K),
            "blocks": [*_tensor(1, 16, 16), torch.zeros(1, 8, 16)],
            "block_index": INDEX,
            "bias": _optional(N),
            "rewrite": FLAG,
            "backend": BACKEND,
        },
    ),
    "block_sparse_weight_grad": (
        lk.block_sparse_weight_grad,
        lambda: {
            "x": torch.zeros(M, K),
            "grad_y": torch.zeros(M, N),
            "block_size": 16,
            "block_index": torch.zeros(1, 2, dtype=torch.int32),
        },
        {
            "x": _tensor(M, K),
            "grad_y": _tensor(M, N),
            "block_index": INDEX,
            "block_size": BLOCK_SIZE,
            "backend": BACKEND,
        },
    ),
    "block_columns": (
        block_columns,
        lambda: {"block_index": torch.zeros(1, 2, dtype=torch.int32), "block_size": 16, "in_features": K},
        {
            "block_index": [None, [[0, 0]], torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32)],
            "block_size": BLOCK_SIZE,
            "in_features": [None, -1, 2.0, True],
        },
    ),
    "block_adamw_": (
        block_adamw_,
        lambda: {
            **{k: torch.zeros(1, 16, 16) for k in ("blocks", "grad", "exp_avg", "exp_avg_sq")},
            "weight": torch.zeros(N, K),
            "block_index": torch.zeros(1, 2, dtype=torch.int32),
            "step": 1,
        },
        {
            **{k: _tensor(1, 16, 16) for k in ("blocks", "grad", "exp_avg", "exp_avg_sq")},
            "weight": _tensor(N, K),
            "block_index": INDEX,
            "step": [None, 0, -1, 1.5, True],
            "lr": [None, NAN, -1.0, "1"],
            "betas": [None, (0.9,), (0.9, 1.0), (NAN, 0.9), (-0.1, 0.9)],
            "eps": [None, NAN, -1.0],
            "weight_decay": [None, NAN, -1.0],
            "seed": SEED,
            "backend": BACKEND,
        },
    ),
    "galore_adam_": (
        lk.galore_adam_,
        lambda: {
            "weight": torch.zeros(N, K),
            "grad": torch.zeros(N, K),
            "basis": torch.zeros(N, R),
            **{k: torch.zeros(R, K) for k in ("exp_avg", "exp_avg_sq")},
            "step": 1,
        },
        {
            "weight": _tensor(N, K)[:-1],
            "grad": _tensor(N, K),
            "basis": _tensor(N, R)[:-1],
            "exp_avg": _tensor(R, K),
            "exp_avg_sq": _tensor(R, K),
            "step": [None, 0, -1, 1.5, True],
            "lr": [None, NAN, -1.0, "1"],
            "betas": [None, (0.9,), (0.9, 1.0), (NAN, 0.9), (-0.1, 0.9)],
            "eps": [None, NAN, -1.0],
            "weight_decay": [None, NAN, -1.0],
            "scale": [None, NAN, -1.0, "1"],
            "backend": BACKEND,
        },
    ),
    "svft_linear": (
        lk.svft_linear,
        lambda: {
            "x": torch.zeros(M, K),
            "weight": torch.zeros(N, K),
            "u": torch.zeros(N, R),
            "vh": torch.zeros(3, K),
            "values": torch.zeros(R),
            "pattern": lk.svft_pattern(torch.tensor([[0, 1], [2, 0]]), R, 3),
        },
        {
            "x": _tensor(M, K),
            "weight": _tensor(N, K),
            "u": [*_tensor(N, R), torch.zeros(N, 0), torch.zeros(N, R, requires_grad=True)],
            "vh": [*_tensor(3, K), torch.zeros(0, K), torch.zeros(3, K, requires_grad=True)],
            "values": [*_tensor(R), torch.zeros(0)],
            "pattern": [
                *_tensor(13),
                torch.zeros(12, dtype=torch.int32),
                torch.zeros(26, dtype=torch.int32)[::2],
                torch.zeros(13, dtype=torch.int32, device="meta"),
            ],
            "bias": _optional(N),
            "backend": BACKEND,
        },
    ),
    "svft_pattern": (
        lk.svft_pattern,
        lambda: {"index": torch.tensor([[0, 1], [2, 0]]), "rows": R, "columns": 3},
        {
            "index": [
                None,
                [[0], [0]],
                torch.zeros(2, 1),
                torch.zeros(2, 1, dtype=torch.bool),
                torch.zeros(1, 2, dtype=torch.int64),
                torch.zeros(2, 0, dtype=torch.int64),
                torch.zeros(2, 1, dtype=torch.int64, device="meta"),
                torch.tensor([[0, 2], [0, 0]]),
                torch.tensor([[0, 1], [0, 3]]),
                torch.tensor([[-1], [0]]),
                torch.tensor([[0, 0], [1, 1]]),
                torch.tensor([[1, 0], [0, 0]]),
            ],
            "rows": [None, 0, 1.0, True],
            "columns": [None, 0, 3.0, True],
        },
    ),
    "merge_lora_": (
        lk.merge_lora_,
        _merge_operands,
        {
            "weight": _tensor(N, K)[:-1],
            "lora_a": _tensor(R, K)[:-1],
            "lora_b": _tensor(N, R)[:-1],
            "scaling": NUMBER,
            "rounding": ["up", None],
            "check_finite": FLAG,
            "backend": BACKEND,
        },
    ),
    "merge_dora_": (
        lk.merge_dora_,
        lambda: {**_merge_operands(), "column_scale": torch.ones(N)},
        {
            "weight": _tensor(N, K)[:-1],
            "lora_a": _tensor(R, K)[:-1],
            "column_scale": _tensor(N)[:-1],
            "scaling": NUMBER,
            "backend": BACKEND,
        },
    ),
    "unmerge_dora_": (
        lk.unmerge_dora_,
        lambda: {**_merge_operands(), "column_scale": torch.ones(N)},
        {
            "weight": _tensor(N, K)[:-1],
            "lora_b": _tensor(N, R)[:-1],
            "column_scale": _tensor(N)[:-1],
            "scaling": NUMBER,
            "backend": BACKEND,
        },
    ),
}


def _cases() -> Iterator[Any]:
    for op, (_, _, wrong) in FUNCTIONS.items():
        for name, values in wrong.items():
            for value in values:
                said = (
                    f"{tuple(value.shape)} {value.dtype} {value.device}"
                    if isinstance(value, torch.Tensor)
                    else repr(value)
                )
                yield pytest.param(op, name, value, id=f"{op}-{name}-{said}")


@pytest.mark.parametrize(("op", "name", "value"), list(_cases()))
def test_a_wrong_argument_is_refused_by_name(op: str, name: str, value: Any) -> None:
    function, fitting, _ = FUNCTIONS[op]
    operands = {**fitting(), name: value}
    kept = {key: t.clone() for key, t in operands.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    with pytest.raises((TypeError, ValueError), match=rf"^{op}: expected .*{name}"):
        function(**operands)
    for key, before in kept.items():  # nothing was written
        assert torch.equal(operands[key].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("op", ["lora_linear", "dora_linear", "multi_lora_linear", "experts_linear"])
@pytest.mark.parametrize("seed", SEED)
def test_a_wrong_seed_is_refused_by_name(op: str, seed: Any) -> None:
    function, fitting, _ = FUNCTIONS[op]
    with pytest.raises(TypeError, match=rf"^{op}: expected dropout_seed"):
        function(**fitting(), dropout_p=0.5, dropout_seed=seed)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_the_operands_that_fit_are_taken(op: str) -> None:
    """Else the tests above would say nothing."""
    function, fitting, _ = FUNCTIONS[op]
    function(**fitting())


@pytest.mark.parametrize("seed", SEED)
def test_a_wrong_seed_of_rounding_is_refused_by_name(seed: Any) -> None:
    operands = {name: t.bfloat16() for name, t in _merge_operands().items()}
    with pytest.raises(TypeError, match=r"^merge_lora_: expected seed"):
        lk.merge_lora_(**operands, rounding="stochastic", seed=seed)
