"""BlockSparseLinear and BlockAdamW: full fine-tuning by blocks, write-back, undo, what a module must survive."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_kernels.functional import read_blocks
from lowrank_kernels.nn import BlockSparseLinear
from lowrank_kernels.optim import BlockAdamW

SOME = torch.tensor([(0, 0), (2, 1), (4, 2)])


def make(k=40, n=70, index=SOME, size=16, dtype=torch.float32, bias=True, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    return BlockSparseLinear.from_linear(linear, index, size, **settings)


def every_block(n, k, size):
    return torch.tensor([(i, j) for i in range(-(-n // size)) for j in range(-(-k // size))])


def optimizer_of(layer, kind, lr=1e-2):
    if kind == "fused":
        return BlockAdamW(layer, lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
    return torch.optim.AdamW([layer.blocks], lr=lr, weight_decay=0.01)


def train(module, optimizer, steps, dtype=torch.float32, k=40):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(12, k, generator=generator).to(dtype)
        module(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["fused", "torch"])
def test_all_blocks_is_full_fine_tuning_step_for_step(kind):
    """1e-6 after 20 steps of AdamW, on a weight that no block size divides."""
    layer = make(index=every_block(70, 40, 16))
    full = copy.deepcopy(layer.base_layer).requires_grad_(False)
    full.weight.requires_grad_(True)
    train(layer, optimizer_of(layer, kind), 20)
    train(full, torch.optim.AdamW([full.weight], lr=1e-2, weight_decay=0.01), 20)
    assert (full.weight - layer.weight).abs().max() <= 1e-6
    layer.unmerge_()
    assert (full.weight - layer.base_layer.weight).abs().max() > 0.01  # it had gone somewhere


@pytest.mark.parametrize("kind", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outside_of_the_blocks_nothing_moves_and_unmerge_is_exact(kind, dtype):
    layer = make(dtype=dtype)
    before = layer.base_layer.weight.detach().clone()
    train(layer, optimizer_of(layer, kind), 50, dtype)
    after = layer.weight
    chosen = torch.zeros_like(before, dtype=torch.bool)
    for i, j in SOME.tolist():
        chosen[16 * i : 16 * (i + 1), 16 * j : 16 * (j + 1)] = True
    assert torch.equal(after[~chosen], before[~chosen])
    assert (after[chosen] != before[chosen]).float().mean() > 0.9
    assert torch.equal(read_blocks(after, layer.block_index, (16, 16)), layer.blocks.detach().to(dtype))
    layer.unmerge_()
    assert torch.equal(layer.base_layer.weight, before)
    layer.merge_()
    assert torch.equal(layer.base_layer.weight, after) and layer.merged


def load(assign):
    def change(layer):
        state = layer.state_dict()
        layer.load_state_dict({**state, "blocks": 2 * state["blocks"]}, assign=assign)

    return change


CHANGES = {
    "edit": lambda layer: layer.blocks.mul_(2),
    "raw": lambda layer: layer.blocks.data.mul_(2),
    "foreach": lambda layer: torch._foreach_mul_([layer.blocks], 2),
    "W zeroed": lambda layer: layer.base_layer.weight.zero_(),
    "W zeroed, raw": lambda layer: layer.base_layer.weight.data.zero_(),
    "loaded": load(False),
    "assigned": load(True),
    "replaced": lambda layer: setattr(layer.blocks, "data", layer.blocks.data * 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CHANGES)
def test_the_weight_holds_the_blocks_at_every_forward(kind, dtype):
    layer, x = make(dtype=dtype), torch.randn(3, 40).to(dtype)
    layer(x)
    with torch.no_grad():
        CHANGES[kind](layer)
    layer(x)
    weight = layer.base_layer.weight
    assert torch.equal(read_blocks(weight, layer.block_index, (16, 16)), ragged(layer).to(dtype))


def ragged(layer):
    """The blocks, zero where they stick out of W, as reading them gives."""
    blocks = layer.blocks.detach().clone()
    for b, (i, j) in enumerate(layer.block_index.tolist()):
        blocks[b, max(0, layer.out_features - 16 * i) :] = 0
        blocks[b, :, max(0, layer.in_features - 16 * j) :] = 0
    return blocks


def test_writing_the_same_blocks_again_leaves_saved_graphs_valid_and_other_blocks_do_not():
    layer, x = make(), torch.randn(3, 40, requires_grad=True)
    first, second = layer(x), layer(x)
    (first.sum() + second.sum()).backward()
    y = layer(x)
    with torch.no_grad():
        layer.blocks.mul_(2)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_several_backwards_add_up_and_a_shared_layer_gets_both_gradients():
    layer, x = make(), torch.randn(5, 40)
    layer(x).square().sum().backward()
    once = layer.blocks.grad.clone()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.blocks.grad, 2 * once)
    layer.zero_grad()
    (layer(x).square().sum() + layer(x).square().sum()).backward()
    torch.testing.assert_close(layer.blocks.grad, 2 * once)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    layer, x = make(), torch.randn(5, 40, requires_grad=True)
    layer(x).square().sum().backward()
    wanted, wanted_x = layer.blocks.grad.clone(), x.grad.clone()
    layer.zero_grad()
    x.grad = None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(layer.blocks.grad, wanted) and torch.equal(x.grad, wanted_x)


def test_compiled_training_is_eager_training():
    layer = make()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for module, owner in ((layer, layer), (compiled, twin)):
        train(module, torch.optim.AdamW([owner.blocks], lr=1e-2), 5)
    torch.testing.assert_close(twin.weight, layer.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled(torch.ones(1, 40)), layer(torch.ones(1, 40)))


def trained_layer():
    layer = make()
    train(layer, optimizer_of(layer, "torch"), 3)
    return layer, torch.randn(4, 40)


def test_copies_and_pickles_compute_the_same_and_are_independent():
    layer, x = trained_layer()
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.blocks.zero_()
        assert not torch.equal(other(x), y) and torch.equal(layer(x), y)


def test_a_state_is_loaded_into_a_fresh_layer_and_unmerged_from_it():
    layer, x = trained_layer()
    fresh = make()
    original = fresh.base_layer.weight.detach().clone()
    with torch.no_grad():
        fresh.base_layer.weight.normal_()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.unmerge_().base_layer.weight, original)


def test_a_state_of_other_blocks_is_refused():
    layer, _ = trained_layer()
    with pytest.raises(ValueError, match="expected a state of the same blocks"):
        make(index=SOME[:2]).load_state_dict(layer.state_dict())


def test_moved_to_another_dtype():
    layer = make()
    train(layer, optimizer_of(layer, "torch"), 2)
    y = layer(torch.ones(1, 40))
    layer.to(torch.bfloat16)
    torch.testing.assert_close(layer(torch.ones(1, 40, dtype=torch.bfloat16)).float(), y, rtol=0.05, atol=0.05)


def test_an_emptied_layer_computes_again_once_its_state_is_loaded():
    layer, x = make(), torch.randn(3, 40)
    train(layer, optimizer_of(layer, "torch"), 2)
    y, state = layer(x), {key: t.clone() for key, t in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    train(layer, optimizer_of(layer, "torch"), 1)
    assert not torch.equal(layer(x), y)


def test_optimizer_state_is_float32_and_survives_saving():
    layer = make(dtype=torch.bfloat16)
    assert layer.blocks.dtype == torch.float32
    layers = [BlockSparseLinear(copy.deepcopy(layer.base_layer), SOME, 16, dtype=torch.bfloat16) for _ in range(2)]
    optimizers = [BlockAdamW(one, lr=1e-2, stochastic_rounding=True, seed=3) for one in layers]
    train(layers[0], optimizers[0], 3, torch.bfloat16)
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for one, optimizer in zip(layers, optimizers, strict=True):
        state = optimizer.state[one.blocks]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32 and state["step"] == 3
        train(one, optimizer, 1, torch.bfloat16)
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transposed_weight_and_wider_blocks(dtype):
    """The same steps as on a contiguous weight; float64 blocks over a float32 weight."""
    layers = [make(dtype=torch.float32) for _ in range(2)]
    layers[1].base_layer.weight.data = layers[1].base_layer.weight.data.T.contiguous().T
    layers = [BlockSparseLinear(one.base_layer, SOME, 16, dtype=dtype) for one in layers]
    assert layers[1].base_layer.weight.stride(1) != 1
    for one in layers:
        train(one, BlockAdamW(one, lr=1e-2), 5)
        assert one.blocks.grad is None and one.blocks.dtype == dtype
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-5, atol=1e-5)


def test_scheduler_and_closure():
    layer = make()
    optimizer = BlockAdamW(layer, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = layer.blocks.detach().clone()

    def closure():
        loss = layer(torch.ones(2, 40)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    schedule.step()
    assert torch.equal(layer.blocks, before)  # the rate is 0


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: make(index=torch.zeros(0, 2)), ValueError, "expected block_index with at least one block, got none"),
        (lambda: make(index=torch.tensor([(5, 0)])), ValueError, r"Linear: expected block_index within the 5 × 3"),
        (lambda: make(index=torch.tensor([(1, 0)] * 2)), ValueError, "expected block_index with every block once"),
        (lambda: make(size=20), ValueError, "BlockSparseLinear: expected block_size to be a positive multiple of 16"),
        (lambda: make(index=SOME[0]), ValueError, r"BlockSparseLinear: expected block_index of shape \(n_blocks, 2\)"),
        (lambda: BlockSparseLinear(nn.Conv1d(1, 1, 1), SOME, 16), TypeError, "not an nn.Linear but a Conv1d"),
        (lambda: BlockSparseLinear(nn.Linear(40, 70), SOME, 16, dtype=torch.int8), TypeError, "a floating dtype"),
        (lambda: BlockAdamW(nn.Linear(2, 2)), ValueError, "BlockAdamW: expected a model with BlockSparseLinear layers"),
        (lambda: BlockAdamW(nn.Sequential(make(), nn.Linear(2, 2))), ValueError, r"only blocks to train, and 1.weight"),
        (lambda: BlockAdamW(make(), lr=-1), ValueError, "BlockAdamW: expected lr in its range, got -1"),
        (lambda: BlockAdamW(make(), betas=(0.9, 1.0)), ValueError, "BlockAdamW: expected betas in its range"),
        (lambda: BlockAdamW(make(), stochastic_rounding=True), TypeError, "BlockAdamW: expected bfloat16 blocks"),
        (lambda: setattr(make(), "weight_shared_with", ("head.weight",)), ValueError, "is also that of head.weight"),
    ],
)
def test_messages(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()


def test_blocks_that_a_merged_layer_loads_are_in_its_weight():
    layer = BlockSparseLinear(nn.Linear(32, 32), torch.tensor([[0, 0], [1, 1]]), 16).merge_()
    x, blocks = torch.randn(3, 32), torch.randn(2, 16, 16)
    layer.load_state_dict({"blocks": blocks}, strict=False)
    torch.testing.assert_close(layer.base_layer.weight[:16, :16], blocks[0])
    y = layer(x)
    layer.state_dict()
    assert torch.equal(layer(x), y)


def test_a_base_whose_weight_is_computed_later_is_refused():
    layer = BlockSparseLinear(nn.Linear(32, 32), torch.tensor([[0, 0]]), 16)
    torch.nn.utils.parametrizations.weight_norm(layer.base_layer)
    layer.base_layer.requires_grad_(False)
    with pytest.raises(ValueError, match="remove the parametrization"):
        layer(torch.randn(3, 32))


def test_blocks_of_a_functional_call_do_not_reach_the_weight():
    """A graph may have saved it: its gradient of x is of the layer's own blocks."""
    layer, x = make(), torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    (wanted,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    before = layer.base_layer.weight.detach().clone()
    other = torch.func.functional_call(layer, {"blocks": layer.blocks.detach() + 1}, (x,))
    assert (other - y).abs().max() > 1
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted)
