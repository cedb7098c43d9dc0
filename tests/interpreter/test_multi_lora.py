"""The multi-adapter kernels in the interpreter: what a row may feel, splits, traffic, capacity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import tuned
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.kernels.multi_lora import multi_lora_down, multi_lora_grad, multi_lora_linear_fwd, multi_lora_up_
from lowrank_kernels.kernels.multi_lora_tiles import (
    AdapterRows,
    MultiLoRATiles,
    choose_multi_strategy,
    multi_lora_main_tiles,
    multi_lora_tiles,
)
from lowrank_kernels.kernels.target import TARGETS
from lowrank_kernels.ops import multi_lora as op
from lowrank_kernels.ops.batch_plan import BatchPlan, BatchPlanner
from tests.problems import Problem, differentiate, leaves
from tests.problems.lora import BF16, F16, F32
from tests.problems.multi_lora import POPULATIONS, RANKS, population, problems
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

K, N = 200, 136
TARGET = TARGETS["interpreter"]


def _stack(ranks: tuple[int, ...] = RANKS, dtype: torch.dtype = F16, width: int = K) -> lk.LoRAStack:
    generator = torch.Generator().manual_seed(1)
    return lk.LoRAStack.from_factors(
        (
            (torch.randn(r, width, generator=generator) / 14).to(dtype),
            (torch.randn(N, r, generator=generator) / r**0.5).to(dtype),
            0.5 + i / 8,
        )
        for i, r in enumerate(ranks)
    )


def _x(rows: int, dtype: torch.dtype = F16, width: int = K) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def _rows(stack: lk.LoRAStack, plan: BatchPlan) -> AdapterRows:
    return AdapterRows(stack.table, stack.scalings, plan.order[0], plan.bounds[0], plan.tiles[0])


def _tiles(rows: AdapterRows, stack: lk.LoRAStack, width: int, dtype: torch.dtype) -> MultiLoRATiles:
    return multi_lora_tiles(TARGET, rows.tiles.shape[0], width, stack.max_rank, dtype)


def _down(x: Tensor, stack: lk.LoRAStack, rows: AdapterRows, splits: int | None = None) -> Tensor:
    """P, in parts."""
    tiles = _tiles(rows, stack, x.shape[1], x.dtype)
    tiles = tiles if splits is None else replace(tiles, splits=splits)
    return multi_lora_down(x, stack.lora_a, rows, stack.max_rank, tiles)


def _correction(x: Tensor, stack: lk.LoRAStack, plan: BatchPlan, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """(P, s P Bᵀ), by the launchers."""
    rows = _rows(stack, plan)
    p = _down(x, stack, rows, splits)
    y = torch.zeros(x.shape[0], N, dtype=x.dtype)
    multi_lora_up_(y, p, stack.lora_b, rows, _tiles(rows, stack, N, x.dtype))
    return p.sum(0), y


@pytest.mark.usefixtures("rows_of_a_dot_alone")
@pytest.mark.parametrize("name", POPULATIONS)
def test_a_row_does_not_feel_its_batch(name: str) -> None:
    """Bit for bit the same alone, in any batch, at any place in it."""
    stack, x, ids = _stack(), _x(70), population(name, 70, len(RANKS))
    together = _correction(x, stack, lk.plan_batch(ids, len(stack)))
    turn = torch.randperm(70, generator=torch.Generator().manual_seed(5))
    turned = _correction(x[turn], stack, lk.plan_batch(ids[turn], len(stack)))
    for all_, permuted in zip(together, turned, strict=True):
        assert torch.equal(permuted, all_[turn])
    for row in (0, 41):
        alone = _correction(x[row : row + 1], stack, lk.plan_batch(ids[row : row + 1], len(stack)))
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_splits_change_no_bit(dtype: torch.dtype) -> None:
    """A reduction over 2300 columns by one program, or by three whose parts are added in order."""
    width = 2300
    stack, x = _stack((3, 16, 40), dtype, width), _x(9, dtype, width)
    plan = lk.plan_batch(population("mixed", 9, 3), 3)
    one, three = (_correction(x, stack, plan, splits)[1] for splits in (1, 3))
    assert torch.equal(one, three)


def test_few_rows_split_and_many_do_not() -> None:
    target = TARGETS["sm_90"]
    assert multi_lora_tiles(target, 3, 4096, 16, BF16).splits == 4
    assert multi_lora_tiles(target, 200, 4096, 16, BF16).splits == 1


def test_rows_without_an_adapter_cost_nothing() -> None:
    """Neither factor is read, and nothing is written but P's zeros."""
    stack, x = _stack(), _x(40)
    plan = lk.plan_batch(population("base", 40, len(RANKS)), len(stack))
    with record_memory() as record:
        _correction(x, stack, plan)
    kernels = [launch for launch in record.launches if launch.name.startswith("multi_lora")]
    assert len(kernels) == 2
    for launch in kernels:
        assert launch.tensors["factor_ptr"].read == 0
        assert sum(t.written for t in launch.tensors.values()) == 0
        assert launch.tensors.get("x_ptr", launch.tensors.get("y_ptr")).read == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["distinct", "mixed", "identical"])
def test_each_adapter_is_read_once_at_its_own_rank(name: str) -> None:
    stack, x, ids = _stack(), _x(24), population(name, 24, len(RANKS))
    there = sorted(set(ids.tolist()) - {-1})
    ranks = sum(stack.ranks[i] for i in there)
    with record_memory() as record:
        _correction(x, stack, lk.plan_batch(ids, len(stack)))
    down, up = (launch for launch in record.launches if launch.name.startswith("multi_lora"))
    assert down.tensors["factor_ptr"].read == ranks * K * 2
    assert up.tensors["factor_ptr"].read == ranks * N * 2
    assert down.tensors["out_ptr"].written == 4 * sum(stack.ranks[i] for i in ids.tolist() if i >= 0)
    assert down.tensors["x_ptr"].read == 2 * K * int((ids >= 0).sum())


def test_gradients_of_adapters_without_rows_are_zero() -> None:
    stack, x = _stack((3, 16, 5)), _x(40)
    plan = lk.plan_batch(torch.ones(40, dtype=torch.int64), 3)
    small = torch.randn(40, 16)
    rows = _rows(stack, plan)
    grad = multi_lora_grad(x, small, rows, 24, F32, _tiles(rows, stack, K, x.dtype))
    assert not grad[:3].any() and not grad[19:].any()
    expected = 0.625 * small.to(F16).double().T @ x.double()
    torch.testing.assert_close(grad[3:19].double(), expected, rtol=1e-4, atol=1e-4)


def test_one_launch_serves_other_ids_and_other_ranks() -> None:
    """What a captured graph does: the same tensors and the same grid, with other contents."""
    stack, x = _stack((3, 16, 5)), _x(40)
    table, scalings = stack.table.clone(), stack.scalings.clone()
    planner = BatchPlanner(40, 3)
    for name, ranks in (("mixed", (3, 16, 5)), ("identical", (16, 1, 2)), ("base", (1, 1, 1)), ("zipf", (2, 0, 16))):
        now = _stack(tuple(max(r, 1) for r in ranks))
        table.copy_(now.table)
        table[:, 1] = torch.tensor(ranks)
        ids = population(name, 40, 3)
        plan = planner.plan(ids.int())
        reused = lk.LoRAStack(now.lora_a, now.lora_b, stack.places, table_and_scalings=(table, scalings))
        _, y = _correction(x, reused, plan)
        for i, rank in enumerate(ranks):
            start, mine = int(table[i, 0]), ids == i
            a, b = (f[start : start + rank].double() for f in (now.lora_a, now.lora_b))
            expected = float(scalings[i]) * x[mine].double() @ a.T @ b
            torch.testing.assert_close(y[mine].double(), expected, rtol=1e-2, atol=1e-2)
        assert not y[ids == -1].any()


# ------------------------------------------------------------------- the base product with the correction in it, or not


def _whole(x: Tensor, weight: Tensor, stack: lk.LoRAStack, ids: Tensor, splits: int | None = None) -> Tensor:
    """The base product and the correction by one kernel, whatever the rule says."""
    plan = lk.plan_batch(ids, len(stack))
    rows = _rows(stack, plan)
    p = _down(x, stack, rows, splits)
    y = torch.full((x.shape[0], N), torch.nan, dtype=x.dtype)
    tiles = multi_lora_main_tiles(TARGET, x.shape[0], x.dtype)
    multi_lora_linear_fwd(x, weight, p, stack.lora_b, rows, plan.adapter_ids[:, 0], y, tiles)
    return y


@contextmanager
def plans_forgotten() -> Iterator[None]:
    """Inside, plans are made anew, and those that were made there are forgotten."""
    tuned.forget()
    try:
        yield
    finally:
        tuned.forget()


def _named(words: tuple[str, ...]) -> list[Problem]:
    return [p for p in problems() if p.name.removeprefix("multi_lora: ") in words]


@pytest.mark.parametrize("strategy", ["one_kernel", "library"])
@pytest.mark.parametrize(
    "problem",
    _named(("torch.bfloat16", "torch.float32", "long segments", "DoRA among LoRA", "weighted", "slices, DoRA")),
    ids=lambda p: p.name,
)
def test_either_strategy_is_as_exact_as_eager(problem: Problem, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by `tuned.forcing`: plans take one kernel for aligned rows alone, and it is right with any.
    monkeypatch.setattr(op, "choose_multi_strategy", lambda *_, **__: strategy)
    with plans_forgotten(), record_memory() as record:
        y, grads = differentiate(lambda t: problem.run(t, "triton"), leaves(problem.tensors))
    assert ("multi_lora_linear_fwd_kernel" in {launch.name for launch in record.launches}) == (strategy == "one_kernel")
    eager_y, eager_grads = differentiate(problem.eager, leaves(problem.tensors))
    oracle_y, oracle = differentiate(lambda t: problem.run(t, "reference"), leaves(problem.tensors, torch.float64))
    assert_as_exact_as_eager(y, eager_y, oracle_y, what="y")
    for name in grads:
        assert_as_exact_as_eager(grads[name], eager_grads[name], oracle[name], factor=GRADIENT_FACTOR, what=name)


@pytest.mark.usefixtures("rows_of_a_dot_alone")
@pytest.mark.parametrize("name", ["mixed", "distinct", "identical"])
def test_a_row_of_one_kernel_does_not_feel_its_batch(name: str) -> None:
    stack, x, ids = _stack(), _x(50), population(name, 50, len(RANKS))
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3)).to(F16)
    together = _whole(x, weight, stack, ids)
    turn = torch.randperm(50, generator=torch.Generator().manual_seed(5))
    assert torch.equal(_whole(x[turn], weight, stack, ids[turn]), together[turn])
    for row in (0, 41):
        alone = _whole(x[row : row + 1], weight, stack, ids[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_a_factor_with_inf_stays_with_its_own_rows() -> None:
    stack, x, ids = _stack((4, 8, 3)), _x(50), population("mixed", 50, 3)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3)).to(F16)
    before = _whole(x, weight, stack, ids)
    stack.lora_b[4:12] = torch.inf
    after = _whole(x, weight, stack, ids)
    assert torch.equal(after[ids != 1], before[ids != 1]) and not after[ids == 1].isfinite().any()


def test_one_kernel_reads_the_weight_and_each_factor_once() -> None:
    stack, x, ids = _stack(), _x(40), population("mixed", 40, len(RANKS))
    there = sorted(set(ids.tolist()) - {-1})
    with record_memory() as record:
        _whole(x, torch.randn(N, K).to(F16), stack, ids)
    down, whole = (launch for launch in record.launches if launch.name.startswith("multi_lora"))
    assert whole.tensors["w"].read == 2 * N * K and whole.tensors["x"].read == 2 * 40 * K
    assert whole.tensors["factor_ptr"].read == 2 * N * sum(stack.ranks[i] for i in there)
    assert (whole.tensors["y_ptr"].read, whole.tensors["y_ptr"].written) == (0, 2 * 40 * N)
    assert down.tensors["factor_ptr"].read == 2 * K * sum(stack.ranks[i] for i in there)


def test_decoding_takes_one_kernel_and_prefill_the_library() -> None:
    for arch in ("sm_80", "sm_90", "sm_100"):
        target = TARGETS[arch]
        for rows in (1, 16, 64):
            assert choose_multi_strategy(target, rows, 4096, 4096, 16, 64, BF16) == "one_kernel"
        assert choose_multi_strategy(target, 8192, 4096, 4096, 16, 8, BF16) == "library"
    assert choose_multi_strategy(TARGETS["sm_90"], 16, 4096, 4097, 16, 8, BF16, aligned=False) == "library"
    sizes = {multi_lora_main_tiles(TARGETS["sm_90"], rows, BF16).BLOCK_K for rows in (1, 64, 65, 8192)}
    assert len(sizes) == 1  # a row's sum has one order


# In float32, whose one kernel takes minutes here, `test_splits_change_no_bit` shows it of the kernel that is split.
@pytest.mark.parametrize("dtype", [BF16, pytest.param(F32, marks=pytest.mark.nightly)])
def test_splits_change_no_bit_of_one_kernel(dtype: torch.dtype) -> None:
    width = 2304
    stack, x = _stack((3, 16, 40), dtype, width), _x(9, dtype, width)
    weight = torch.randn(N, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids = population("mixed", 9, 3)
    found = [_whole(x, weight, stack, ids, splits) for splits in (1, 3)]
    assert torch.equal(*found) and not torch.equal(found[0], x @ weight.T)
