"""MultiLoRALinear: the layer, the ids that reach it, merging, training of several adapters in one pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.nn import MultiLoRALinear, use_adapters

K, N = 24, 18


def make_layer(ranks=(4, 2, 7), dora=False, dtype=torch.float32, n=N, **settings):
    torch.manual_seed(0)
    layer = MultiLoRALinear.from_linear(nn.Linear(K, n, dtype=dtype), ranks, dora=dora, **settings)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn_like(layer.lora_B))
    return layer


def test_starts_as_the_wrapped_layer():
    linear = nn.Linear(K, N)
    for dora in (False, True):
        layer = MultiLoRALinear.from_linear(linear, (2, 5), dora=dora)
        x, ids = torch.randn(6, K), torch.tensor([0, 1, -1, 1, 0, 0])
        torch.testing.assert_close(layer(x, ids), linear(x))
    assert layer.weight is linear.weight and not layer.weight.requires_grad
    assert layer.lora_A.shape == (7, K) and layer.lora_B.shape == (7, N) and layer.lora_magnitude.shape == (2, N)


@pytest.mark.parametrize("dora", [False, True])
def test_each_row_is_what_its_adapter_alone_gives(dora):
    layer, x = make_layer(dora=dora), torch.randn(9, K)
    ids = torch.tensor([0, 1, 2, -1, 2, 1, 0, -1, 2])
    y = layer(x, ids)
    for i, rank in enumerate((4, 2, 7)):
        alone = (lk.nn.DoRALinear if dora else lk.nn.LoRALinear)(nn.Linear(K, N), rank)
        with torch.no_grad():
            alone.base_layer.weight.copy_(layer.weight)
            alone.base_layer.bias.copy_(layer.bias)
            a, b, _, m = layer.stack.factors(i)
            alone.lora_A.weight.copy_(a)
            alone.lora_B.weight.copy_(b)
            if dora:
                alone.lora_magnitude_vector.copy_(m)
        torch.testing.assert_close(y[ids == i], alone(x)[ids == i], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[ids == -1], layer.base_layer(x[ids == -1]))


@pytest.mark.parametrize("dora", [False, True])
def test_slices_are_linears_of_their_own(dora):
    """One layer over Q, K and V, against three layers over its rows; and each adapter merged."""
    slices = (8, 4, 6)
    fused, x = make_layer((3, 5), dora=dora, slices=slices), torch.randn(6, K)
    ids, parts, begin = torch.tensor([0, 1, -1, 1, 0, 0]), [], 0
    assert fused.lora_A.shape == (3, 8, K) and fused.lora_B.shape == (8, N)
    for s, width in enumerate(slices):
        alone, own = make_layer((3, 5), dora=dora, n=width), slice(begin, begin + width)
        alone.base_layer.weight.copy_(fused.weight[own])
        alone.base_layer.bias.copy_(fused.bias[own])
        with torch.no_grad():
            alone.lora_A.copy_(fused.lora_A[s])
            alone.lora_B.copy_(fused.lora_B[:, own])
            if dora:
                alone.lora_magnitude.copy_(fused.lora_magnitude[:, own])
        parts.append(alone(x, ids))
        begin += width
    y = fused(x, ids)
    torch.testing.assert_close(y, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)
    fused.merge_(1)
    torch.testing.assert_close(fused(x)[ids == 1], y[ids == 1], rtol=1e-4, atol=1e-4)
    fused.unmerge_()
    with torch.no_grad():
        fused.lora_B[4, -1] = torch.nan  # in the last slice: the first ones are merged before it is seen
    before = fused.weight.clone()
    with pytest.raises(ValueError, match="expected finite factors"):
        fused.merge_(1)
    assert torch.equal(fused.weight, before) and not fused.merged


def test_ids_of_the_context():
    layer, x = make_layer(), torch.randn(3, 5, K)
    ids = torch.tensor([2, -1, 0])
    with use_adapters(ids):
        y = layer(x)
        one_token = layer(x[:, :1])
    expected = layer(x, ids[:, None].expand(3, 5))
    assert torch.equal(y, expected)
    torch.testing.assert_close(one_token, expected[:, :1])
    assert torch.equal(layer(x), layer.base_layer(x))  # outside of it
    with use_adapters([0, 0, 0]), use_adapters(ids):
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_adapter_is_what_every_row_gets(dora):
    layer, x = make_layer(dora=dora), torch.randn(6, K)
    expected = layer(x, torch.full((6,), 1))
    layer.merge_(1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer.merge_(1).merged and layer.merged_adapter == 1


@pytest.mark.parametrize("dora", [False, True])
def test_unmerging_puts_the_weight_back(dora):
    layer = make_layer(dora=dora)
    before = layer.weight.detach().clone()
    layer.merge_(1)
    layer.unmerge_()
    assert torch.equal(layer.weight, before) and not layer.merged


@pytest.mark.parametrize("dora", [False, True])
def test_merges_that_cannot_be_are_refused(dora):
    layer = make_layer(dora=dora)
    layer.merge_(1)
    with pytest.raises(ValueError, match="adapter 1 is merged"):
        layer.merge_(0)
    layer.unmerge_()
    with pytest.raises(ValueError, match="expected an adapter of 3, got 3"):
        layer.merge_(3)
    layer.weight_shared_with = ("head",)
    with pytest.raises(ValueError, match="this weight is also that of head"):
        layer.merge_(0)


def test_state_dict_comes_back():
    layer, other = make_layer(dora=True), make_layer(dora=True)
    state = layer.state_dict()
    assert set(state) == {"lora_A", "lora_B", "lora_magnitude", "base_layer.weight", "base_layer.bias", "ranks"}
    other.load_state_dict(state)
    x, ids = torch.randn(4, K), torch.tensor([0, 1, 2, -1])
    assert torch.equal(layer(x, ids), other(x, ids))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_layer_is_saved_as_the_unmerged_one(dora, assign):
    layer, other, x = make_layer(dora=dora), make_layer(dora=dora), torch.randn(3, K)
    ids = torch.tensor([0, 1, 2])
    expected, state = layer(x, ids), {key: t.clone() for key, t in layer.state_dict().items()}
    layer.merge_(1)
    saved = layer.state_dict()
    assert all(torch.equal(saved[key], state[key]) for key in state) and saved.keys() == state.keys()
    nested = nn.Sequential(layer).state_dict(prefix="model.")
    assert torch.equal(nested["model.0.base_layer.weight"], state["base_layer.weight"])
    other.load_state_dict(saved, assign=assign)
    assert torch.equal(other(x, ids), expected)
    assert layer.merged and not torch.equal(layer.weight, state["base_layer.weight"])


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_weight_that_is_loaded_makes_the_layer_unmerged(assign):
    layer, other, x = make_layer(), make_layer(), torch.randn(3, K)
    with torch.no_grad():
        other.base_layer.weight.add_(1.0)
    model = nn.Sequential(layer.merge_(1))
    model.load_state_dict({f"0.{key}": t for key, t in other.state_dict().items()}, assign=assign)
    ids = torch.tensor([0, 1, 2])
    assert not layer.merged and torch.equal(layer(x, ids), other(x, ids))
    assert torch.equal(layer.unmerge_().weight, other.weight)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 3), None, "text"])
def test_a_merged_layer_whose_load_fails_stays_as_it_was(wrong):
    layer, x = make_layer(), torch.randn(3, K)
    model, before = nn.Sequential(layer.merge_(1)), layer.weight.clone()
    y, unmerged = layer(x), layer.state_dict()["base_layer.weight"]
    state = {**model.state_dict(), "0.base_layer.weight": wrong}
    if wrong is None:
        del state["0.base_layer.weight"]
    with pytest.raises(RuntimeError, match=r"0\.base_layer\.weight"):
        model.load_state_dict(state)
    assert layer.merged_adapter == 1 and torch.equal(layer.weight, before) and torch.equal(layer(x), y)
    assert torch.equal(layer.unmerge_().weight, unmerged)


def test_of_many_merged_layers_the_one_whose_load_fails_stays_merged():
    model = nn.Sequential(*(make_layer(n=K).merge_(1) for _ in range(11)))  # "0." is also the end of "10."
    state = {**model.state_dict(), "10.base_layer.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    assert [layer.merged for layer in model] == [False] * 10 + [True]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moved_to_another_dtype(dora, dtype):
    """The scalings, 16 / 7 among them, stay as exact as they were."""
    layer, x, ids = make_layer(dora=dora), torch.randn(3, K), torch.tensor([0, 1, 2])
    y, scalings = layer(x, ids), layer.stack.scalings
    layer.to(dtype)
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer(x.to(dtype), ids).float(), y, rtol=bound, atol=bound)
    assert torch.equal(layer.stack.scalings, scalings)


@pytest.mark.parametrize("dora", [False, True])
def test_an_emptied_layer_computes_again_once_its_state_is_loaded(dora):
    layer, x, ids = make_layer(dora=dora), torch.randn(3, K), torch.tensor([0, 1, 2])
    y, state = layer(x, ids), {key: t.clone() for key, t in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(layer(x, ids), y)
    layer(x, ids).sum().backward()
    assert layer.lora_B.grad is not None


def test_dropout_in_training_alone():
    layer, x, ids = make_layer(dropout=(0.0, 0.5, 0.5)), torch.randn(4, K), torch.tensor([0, 1, 2, -1])
    assert torch.equal(layer.eval()(x, ids), layer(x, ids))
    layer.train()
    first, second = layer(x, ids), layer(x, ids)
    assert torch.equal(first[[0, 3]], second[[0, 3]]) and not torch.equal(first[1], second[1])


def test_bad_settings():
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match=r"MultiLoRALinear: expected a stack for \(K, N\) = \(24, 18\)"):
        MultiLoRALinear(linear, lk.LoRAStack.empty(K, N + 1))
    with pytest.raises(ValueError, match="MultiLoRALinear: expected 0 <= dropout < 1"):
        MultiLoRALinear.from_linear(linear, (2, 3), dropout=(0.1,))
    with pytest.raises(
        ValueError, match=r"MultiLoRALinear: expected slices, widths that add up to N = 18, got \(8, 9\)"
    ):
        MultiLoRALinear.from_linear(linear, (2, 3), slices=(8, 9))
    with pytest.raises(ValueError, match="MultiLoRALinear: expected r to be an integer"):
        MultiLoRALinear.from_linear(linear, (2, 0))
    with pytest.raises(TypeError, match=r"cannot be wrapped: not an nn\.Linear"):
        MultiLoRALinear(nn.Identity(), lk.LoRAStack.empty(K, N))


@pytest.mark.parametrize("dora", [False, True])
def test_training_together_is_training_one_after_another(dora):
    """Three adapters, ten AdamW steps: in one batch, and each alone on its own rows."""
    torch.manual_seed(3)
    x, target = torch.randn(3, 8, K).double(), torch.randn(3, 8, N).double()
    together, apart = make_layer(dora=dora, dtype=torch.float64), make_layer(dora=dora, dtype=torch.float64)

    def train(layer, batches):
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            of_step = []
            for ids in batches:
                with use_adapters(ids):
                    wrong = layer(x[ids]) - target[ids]
                    each = wrong.square().mean(dim=(1, 2))
                    each.sum().backward()
                of_step += each.tolist()
            losses.append(of_step)
            optimizer.step()
        return torch.tensor(losses)

    first = train(together, [[0, 1, 2]])
    second = train(apart, [[0], [1], [2]])
    assert (first[-1] < first[0]).all()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16).float(), lambda m: m.double(), lambda m: m.half().double()]
)
def test_a_cast_layer_keeps_its_scalings(cast):
    """1.3 is another number in bfloat16."""
    layer = MultiLoRALinear.from_linear(torch.nn.Linear(8, 8), (10, 3), alpha=13.0)
    cast(layer)
    assert layer.stack.scalings.tolist() == pytest.approx([1.3, 13 / 3], rel=1e-7)
    assert layer.stack.scalings.dtype == torch.float32


def test_a_layer_that_was_on_the_meta_device_has_its_places_again():
    layer = MultiLoRALinear.from_linear(nn.Linear(16, 16), (4, 3))
    with torch.device("meta"):
        other = MultiLoRALinear.from_linear(nn.Linear(16, 16), (4, 3))
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(other.stack.table, layer.stack.table)
    assert torch.equal(other.stack.scalings, layer.stack.scalings)


def test_a_state_of_other_ranks_is_refused():
    """The factors' shapes are the same."""
    state = MultiLoRALinear.from_linear(nn.Linear(16, 16), (4, 3)).state_dict()
    layer = MultiLoRALinear.from_linear(nn.Linear(16, 16), (3, 4))
    before = layer.lora_A.detach().clone()
    with pytest.raises(ValueError, match=r"expected a state of adapters of ranks \[3, 4\].*got \[4, 3\]"):
        layer.load_state_dict(state)
    assert torch.equal(layer.lora_A, before)
    del state["ranks"]  # as states were written before
    layer.load_state_dict(state)
