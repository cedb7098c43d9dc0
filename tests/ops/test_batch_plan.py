"""The batch plan: the host planner, the one of tensor operations, and a naive one agree."""

from __future__ import annotations

import numpy as np
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


def test_without_the_host_planner(monkeypatch):
    monkeypatch.setattr(batch_plan, "_native", lambda: None)
    ids = population("mixed", 50, 4)
    assert [part[0].tolist() for part in lk.plan_batch(ids, 4)[1:]] == list(naive_plan(ids, 4))
    planner = BatchPlanner(50, 4)
    assert [part[0].tolist() for part in planner.plan(ids.int())[1:]] == list(naive_plan(ids, 4))


@pytest.mark.parametrize("with_host_planner", [True, False])
@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1])
def test_an_id_out_of_range(bad, with_host_planner, monkeypatch):
    if not with_host_planner:
        monkeypatch.setattr(batch_plan, "_native", lambda: None)
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


@pytest.mark.skipif(not _extension.build_info()["native"], reason="the pybind11 module is not built for this Python")
class TestHostPlanner:
    def buffers(self, rows=4, adapters=3):
        sizes = rows, adapters + 2, 3 * tile_capacity(rows, adapters)
        return [np.full(size, 77, dtype=np.int32) for size in sizes]

    def test_larger_buffers_are_filled_up(self):
        from lowrank_kernels._native import plan_batch

        order, bounds, tiles = self.buffers(rows=64)
        assert plan_batch(np.array([2, -1, 2, 0]), 3, TILE_ROWS, order, bounds, tiles) == 3
        assert order[:4].tolist() == [3, 0, 2, 1] and bounds.tolist() == [0, 1, 1, 3, 4]
        assert tiles[:9].tolist() == [0, 0, 1, 2, 1, 2, -1, 3, 1] and set(tiles[9:].tolist()) == {-1, 0}

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_buffers_too_small(self, place):
        from lowrank_kernels._native import plan_batch

        buffers = self.buffers()
        buffers[place] = buffers[place][:-1]
        with pytest.raises(ValueError, match=r"plan_batch: expected (order|bounds|tiles) of at least"):
            plan_batch(np.zeros(4, dtype=np.int64), 3, TILE_ROWS, *buffers)

    def test_buffers_of_another_kind(self):
        from lowrank_kernels._native import plan_batch

        for ids in (np.zeros(4), np.zeros((2, 2), dtype=np.int32), np.zeros(8, dtype=np.int32)[::2]):
            with pytest.raises(ValueError, match="plan_batch: expected ids to be contiguous"):
                plan_batch(ids, 3, TILE_ROWS, *self.buffers())
        order, bounds, tiles = self.buffers()
        order.flags.writeable = False
        with pytest.raises((ValueError, BufferError)):
            plan_batch(np.zeros(4, dtype=np.int32), 3, TILE_ROWS, order, bounds, tiles)

    def test_an_id_out_of_range(self):
        from lowrank_kernels._native import plan_batch

        with pytest.raises(ValueError, match=r"expected ids from -1 to 2, got another in row 1"):
            plan_batch(np.array([0, 3, 0, 0]), 3, TILE_ROWS, *self.buffers())
