"""Many adapters trained in one batch over a whole model, and served from what they were saved as."""

import copy

import pytest
import torch

import lowrank_kernels as lk
from tests.serving.tiny_model import make_model

RANKS = (4, 2, 7)


def make_tokens(rows, length=9):
    return (torch.arange(rows * length).reshape(rows, length) * 7 + 3) % 64


def train(model, batches, steps=4):
    """Losses by step and sequence; each batch is a list of (adapter, sequence)."""
    tokens = make_tokens(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        of_step = []
        for batch in batches:
            with lk.nn.use_adapters([adapter for adapter, _ in batch]):
                logits = model(tokens[[row for _, row in batch]]).logits
                each = torch.nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), tokens[[row for _, row in batch], 1:], reduction="none"
                ).mean(1)
                each.sum().backward()
            of_step += each.tolist()
        losses.append(of_step)
        optimizer.step()
    return torch.tensor(losses)


def adapted(dora):
    torch.manual_seed(1)
    model = make_model()
    report = lk.adapt(model, lk.MultiLoRAConfig(ranks=RANKS, target_modules=("q_proj", "down_proj"), dora=dora))
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_together_or_one_after_another_the_losses_are_the_same(dora):
    """And each adapter, saved and merged alone or mixed in a bank, says what it said in training."""
    together, apart = adapted(dora), adapted(dora)
    first = train(together, [[(0, 0), (1, 1), (2, 2)]])
    second = train(apart, [[(0, 0)], [(1, 1)], [(2, 2)]])
    assert (first[-1] < first[0]).all()
    torch.testing.assert_close(first, second, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_saved_and_served(dora, tmp_path):
    model = adapted(dora)
    with torch.enable_grad():
        train(model, [[(0, 0), (1, 1), (2, 2)]])
    tokens = make_tokens(3)
    with lk.nn.use_adapters([0, 1, -1]):
        expected = model(tokens).logits
    for i in range(3):
        lk.save_adapter(model, tmp_path / str(i), adapter=i)
    with lk.serving.AdapterBank(make_model()) as bank:
        for i in range(3):
            bank.load(str(i), tmp_path / str(i))
        with bank.batch(["0", "1", None]):
            torch.testing.assert_close(bank.model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    alone = make_model()
    lk.load_adapter(alone, tmp_path / "1")
    torch.testing.assert_close(alone(tokens[1:2]).logits, expected[1:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="save_adapter: expected adapter to name one of 3, got None"):
        lk.save_adapter(model, tmp_path / "which")


def test_slices_are_not_saved_as_something_else(tmp_path):
    model = adapted(False)
    layer = model.model.layers[1].self_attn.q_proj
    model.model.layers[1].self_attn.q_proj = lk.nn.MultiLoRALinear.from_linear(layer.base_layer, RANKS, slices=(20, 12))
    with pytest.raises(ValueError, match="q_proj has factors of its own for each of 2 slices"):
        lk.save_adapter(model, tmp_path / "sliced", adapter=0)
    assert not (tmp_path / "sliced").exists()


def test_bad_settings():
    with pytest.raises(ValueError, match="MultiLoRAConfig: expected a rank, and a dropout, an adapter"):
        lk.MultiLoRAConfig(ranks=(2, 3), dropout=(0.1,))
    with pytest.raises(ValueError, match="expected r to be an integer of at least 1, got 0"):
        lk.MultiLoRAConfig(ranks=(2, 0))
    with pytest.raises(ValueError, match="expected bias to be 'none'"):
        lk.MultiLoRAConfig(ranks=(2,), bias="all")


def test_undo_puts_the_model_back():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    report = lk.adapt(model, lk.MultiLoRAConfig(ranks=RANKS, target_modules=("q_proj",)))
    report.undo()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
