"""The batch plan: the host planner, the one of tensor operations, and a naive one agree."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.kernels.multi_lora_tiles import TILE_ROWS, tile_capacity
from lowrank_kernels.ops import batch_plan
from lowrank_kernels.ops.batch_plan import BatchPlanner, plan_on_device
from tests.problems.multi_lora import POPULATIONS, population


def naive_plan(ids, adapters):
    order, bounds, tiles = [], [0], []
    for adapter in [*range(adapters), -1]:
        rows = [row for row, i in enumerate(ids.tolist()) if i == adapter]
        for first in range(0, len(rows), TILE_ROWS):
            tiles.append([adapter, len(order) + first, min(TILE_ROWS, len(rows) - first)])
        order += rows
        bounds.append(len(order))
    return order, bounds, tiles + [[-1, 0, 0]] * (tile_capacity(len(ids), adapters) - len(tiles))


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 300])
@pytest.mark.parametrize("name", POPULATIONS)
def test_all_planners_agree(name, rows):
    adapters = 9
    ids = population(name, max(rows, 1), adapters)[:rows]
    expected = naive_plan(ids, adapters)
    for dtype in (torch.int32, torch.int64):
        plan = lk.plan_batch(ids.to(dtype), adapters)
        assert [part[0].tolist() for part in plan[1:]] == list(expected)
    by_tensors = plan_on_device(ids[:, None].int(), adapters)
    assert [part[0].tolist() for part in by_tensors] == list(expected)
    assert all(part.dtype == torch.int32 for part in (*plan[1:], *by_tensors))


def test_shapes_depend_on_nothing_but_sizes():
    shapes = {tuple(part.shape for part in lk.plan_batch(population(n, 70, 5), 5)) for n in POPULATIONS}
    assert len(shapes) == 1


def test_no_adapters_at_all():
    plan = lk.plan_batch(torch.full((40,), -1), 0)
    assert plan.tiles[0, :2].tolist() == [[-1, 0, 32], [-1, 32, 8]]


def test_several_adapters_a_row():
    ids = torch.stack([population("mixed", 50, 4, seed) for seed in (1, 2)], dim=1)
    plan = lk.plan_batch(ids, 4)
    for j in range(2):
        assert [part[j].tolist() for part in plan[1:]] == list(naive_plan(ids[:, j], 4))


def test_planned_again_and_again_into_the_same_memory():
    planner = BatchPlanner(40, 6)
    for name in POPULATIONS:
        ids = population(name, 40, 6)
        plan = planner.plan(ids.int())
        assert [part[0].tolist() for part in plan[1:]] == list(naive_plan(ids, 6))
        assert plan.adapter_ids[:, 0].tolist() == ids.tolist()
    assert planner.plan(population("base", 40, 6).int()).tiles.data_ptr() == plan.tiles.data_ptr()
    with pytest.raises(ValueError, match="BatchPlanner: expected 40 ids"):
        planner.plan(torch.zeros(39, dtype=torch.int32))
    with pytest.raises(ValueError, match="BatchPlanner: expected adapter_ids from -1 to 5, got 0 to 6"):
        planner.plan(torch.tensor([6] + [0] * 39, dtype=torch.int32))


def test_without_the_host_planner(monkeypatch):
    monkeypatch.setattr(batch_plan, "_host_planner", lambda: None)
    ids = population("mixed", 50, 4)
    assert [part[0].tolist() for part in lk.plan_batch(ids, 4)[1:]] == list(naive_plan(ids, 4))
    planner = BatchPlanner(50, 4)
    assert [part[0].tolist() for part in planner.plan(ids.int())[1:]] == list(naive_plan(ids, 4))


@pytest.mark.parametrize("with_host_planner", [True, False])
@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1])
def test_an_id_out_of_range(bad, with_host_planner, monkeypatch):
    if not with_host_planner:
        monkeypatch.setattr(batch_plan, "_host_planner", lambda: None)
    ids = torch.tensor([0, 3, bad, -1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected adapter_ids from -1 to 3, got"):
        lk.plan_batch(ids, 4)
    with pytest.raises(RuntimeError, match="an adapter id out of range"):
        plan_on_device(ids[:, None], 4)


def test_ids_that_are_no_ids():
    with pytest.raises(TypeError, match=r"expected adapter_ids to be a tensor of integers, got torch.float32"):
        lk.plan_batch(torch.zeros(3), 4)
    with pytest.raises(TypeError, match="got list"):
        lk.plan_batch([0, 1], 4)
    with pytest.raises(ValueError, match=r"expected adapter_ids of shape \(M,\) or \(M, J\), got \(1, 2, 3\)"):
        lk.plan_batch(torch.zeros(1, 2, 3, dtype=torch.int32), 4)


@pytest.mark.skipif(not _extension.has_op("plan_batch_"), reason=f"no compiled extension: {_extension.reason()}")
class TestTheExtensionsOp:
    """Its own checks: whatever it is handed, it writes inside of the tensors."""

    @staticmethod
    def arguments(rows=4, choices=2, adapters=3, **others):
        sizes = {
            "order": (choices, rows),
            "bounds": (choices, adapters + 2),
            "tiles": (choices, tile_capacity(rows, adapters), 3),
        }
        parts = {name: torch.full(size, 77, dtype=torch.int32) for name, size in sizes.items()}
        ids = torch.zeros(rows, choices, dtype=torch.int32)
        return {"ids": ids, "num_adapters": adapters, "tile_rows": TILE_ROWS, **parts, **others}

    def test_writes_all_of_a_plan(self):
        ids = torch.tensor([[2, 0], [-1, 1], [2, 2], [0, -1]], dtype=torch.int32)
        given = self.arguments(ids=ids)
        torch.ops.lowrank_kernels.plan_batch_(**given)
        for j in range(2):
            parts = [given[name][j].tolist() for name in ("order", "bounds", "tiles")]
            assert parts == list(naive_plan(ids[:, j], 3))

    @pytest.mark.parametrize("name", ["order", "bounds", "tiles"])
    @pytest.mark.parametrize("dim", [0, 1])
    def test_a_part_of_another_shape(self, name, dim):
        given = self.arguments()
        size = list(given[name].shape)
        for change in (-1, 1):
            size[dim] += change
            given[name] = torch.zeros(size, dtype=torch.int32)
            with pytest.raises(RuntimeError, match=f"plan_batch_: expected {name} of shape"):
                torch.ops.lowrank_kernels.plan_batch_(**given)
            size[dim] -= change

    @pytest.mark.parametrize("name", ["ids", "order", "bounds", "tiles"])
    def test_a_part_of_another_kind(self, name):
        given = self.arguments()
        strided = given[name].repeat_interleave(2, dim=-1)[..., ::2]
        for other in (given[name].long(), strided):
            with pytest.raises(RuntimeError, match=f"plan_batch_: expected {name} to be contiguous, .*int32"):
                torch.ops.lowrank_kernels.plan_batch_(**{**given, name: other})

    @pytest.mark.parametrize("sizes", [{"num_adapters": -1}, {"tile_rows": 0}, {"num_adapters": 2**31}])
    def test_sizes_that_are_none(self, sizes):
        with pytest.raises(RuntimeError, match="plan_batch_: expected 0 or more adapters"):
            torch.ops.lowrank_kernels.plan_batch_(**{**self.arguments(), **sizes})

    def test_an_id_out_of_range(self):
        given = self.arguments(ids=torch.tensor([[0, 0], [0, 3], [0, 0], [0, 0]], dtype=torch.int32))
        with pytest.raises(RuntimeError, match=r"plan_batch_: expected ids from -1 to 2, got another in row 1"):
            torch.ops.lowrank_kernels.plan_batch_(**given)
