"""Sparse Matrix Tuning on a tiny Llama: warm-up, selection, conversion, deltas on disk, and the way back."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.smt import ATTENTION, MLP, BlockScores, BlockSelection, load_delta, save_delta, to_linear, warm_up


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def batches_of(tokens, count=3):
    return [(tokens + i) % 64 for i in range(count)]


def scores_of(model, tokens, **settings):
    return warm_up(model, batches_of(tokens), loss_of, block_size=16, **settings)


def tuned(model, tokens, steps=2, budget=12, kind="fused"):
    """(report, selection) of a model that was selected for, adapted and trained."""
    selection = scores_of(model, tokens).select(budget)
    report = lk.adapt(model, lk.SMTConfig(selection=selection))
    if kind == "fused":
        optimizer = lk.optim.BlockAdamW(model, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches_of(tokens, steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return report, selection


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------- warm-up


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs"])
@pytest.mark.parametrize("offload", [False, True])
def test_scores_are_those_of_the_accumulated_dense_gradients(llama, tokens, score, offload):
    model = llama()
    before = weights_of(model)
    scores = scores_of(model, tokens, score=score, offload=offload)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for batch in batches_of(tokens):
        loss_of(model, batch).backward()
    assert "lm_head" not in scores.scores and len(scores.scores) == 14
    for name, found in scores.scores.items():
        grad = model.get_submodule(name).weight.grad / 3
        n, k = grad.shape
        for i in range(-(-n // 16)):
            for j in range(-(-k // 16)):
                block = grad[16 * i : 16 * (i + 1), 16 * j : 16 * (j + 1)]
                wanted = block.abs().mean() if score == "abs_mean" else block.mean().abs()
                torch.testing.assert_close(found[i, j], wanted, rtol=1e-4, atol=1e-9)


def test_edges_of_a_matrix_count_for_what_they_have():
    model = nn.Sequential(nn.Linear(20, 24, bias=False))
    scores = warm_up(model, [torch.ones(1, 20)], lambda m, x: m(x).sum(), block_size=16)
    torch.testing.assert_close(scores.scores["0"], torch.ones(2, 2))


def test_updates_are_those_of_plain_training(llama, tokens):
    """The optimizer runs inside backward, parameter by parameter, and trains the whole model as it would outside."""
    model = llama()
    twin = copy.deepcopy(model)
    scores_of(model, tokens, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    for batch in batches_of(tokens):
        loss_of(twin, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6, msg=name)


def test_about_one_gradient_is_alive(llama, tokens):
    model, alive = llama(), []
    for p in model.parameters():  # these hooks run before those of the warm-up
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    scores_of(model, tokens)
    assert len(alive) == 3 * 14 and set(alive) == {1}


def test_gradients_and_flags_are_put_back_even_after_an_error(llama, tokens):
    model = llama()
    model.lm_head.requires_grad_(False)
    loss_of(model, tokens).backward()
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="warm_up: the loss is nan at step 1"):
        warm_up(model, [tokens], lambda m, t: loss_of(m, t) * math.nan, block_size=16)
    assert all((p.requires_grad, p.grad) == before[name] for name, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "median"}, "warm_up: expected score to be one of abs_mean, mean_abs, got 'median'"),
        ({"block_size": 20}, "warm_up: expected block_size"),
        ({"batches": []}, "warm_up: expected at least one batch"),
        ({"target_modules": ("nothing",)}, "replaces nothing"),
    ],
)
def test_messages_of_the_warm_up(llama, tokens, settings, message):
    arguments = {"batches": [tokens], "loss": loss_of, "block_size": 16, **settings}
    with pytest.raises(ValueError, match=message):
        warm_up(llama(), **arguments)


def test_tied_weights_are_refused_by_name(llama, tokens):
    with pytest.raises(ValueError, match=r"lm_head.weight are one weight"):
        scores_of(llama(tie_word_embeddings=True), tokens, target_modules=("lm_head", "q_proj"))


def test_fused_and_transposed_matrices():
    """GPT-2's Conv1D keeps its weight transposed: refused by name; a fused nn.Linear is as good as any."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match=r"c_attn \(transformers' Conv1D keeps its weight as \(in, out\)"):
        warm_up(model, [torch.zeros(1, 4, dtype=torch.long)], loss_of, block_size=16)


# --------------------------------------------------------------------------------------------------------- selection


def made_up(*, ties=False):
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.{m}": (64, 48) for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")}
    scores = {n: torch.ones(4, 3) if ties else torch.rand(4, 3, generator=generator) for n in shapes}
    return BlockScores(scores, shapes, (16, 16), parameters=20_000)


def counts(selection):
    return {name: len(index) for name, index in selection.blocks.items()}


@pytest.mark.parametrize(
    ("budget", "options", "chosen"),
    [
        (7, {}, 7),
        (0.25, {}, 12),
        (0.3, {}, 14),
        (1.0, {}, 48),
        (48, {}, 48),
        (0.1, {"of": "parameters"}, 7),
        (0.0128, {"of": "parameters"}, 1),
        (2, {"per": "matrix"}, 8),
        (0.25, {"per": "matrix"}, 12),
        ({ATTENTION: 0.25, MLP: 0}, {}, 6),
        ({ATTENTION: 3, MLP: 0.5}, {}, 15),
        ({ATTENTION: 1}, {"per": "matrix"}, 2),
        ({"q_proj": 0.06, ".*": 0.02}, {"of": "parameters"}, 5),
    ],
)
def test_the_budget_is_met_exactly(budget, options, chosen):
    selection = made_up().select(budget, **options)
    assert len(selection) == chosen and selection.elements == 256 * chosen


def test_the_best_are_chosen_and_ties_go_in_order():
    scores = made_up()
    selection = scores.select(9)
    taken = [scores.scores[name][i, j] for name, index in selection.blocks.items() for i, j in index.tolist()]
    everything = torch.cat([s.flatten() for s in scores.scores.values()]).sort(descending=True).values
    assert sorted(float(t) for t in taken) == sorted(everything[:9].tolist())
    tied = made_up(ties=True).select(14)
    assert counts(tied) == {"layers.0.self_attn.q_proj": 12, "layers.0.mlp.up_proj": 2}
    assert tied.blocks["layers.0.mlp.up_proj"].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (0, {}, "select: budget=0 selects nothing of the 48 blocks"),
        (0.001, {}, "selects nothing"),
        (49, {}, "at most the 48 blocks there are, got 49"),
        (1.5, {}, "at most the 48 blocks"),
        (-1, {}, "a budget of 0 or more, got -1"),
        (math.nan, {}, "a budget of 0 or more, got nan"),
        (True, {}, "a budget of 0 or more, got True"),
        ({"k_proj": 3}, {}, "'k_proj', which matches no module"),
        (3, {"of": "blocks"}, "expected of to be"),
        (3, {"per": "layer"}, "expected per to be"),
        (0.1, {"of": "parameters", "per": "matrix"}, "of='targets' with per='matrix'"),
    ],
)
def test_messages_of_the_selection(budget, options, message):
    with pytest.raises(ValueError, match=message):
        made_up().select(budget, **options)


def test_selections_made_by_hand_are_checked():
    shapes = {"a": (64, 48)}
    for blocks, size, message in (
        ({"a": [(4, 0)]}, 16, "a: expected block_index within"),
        ({"a": [(0, 0), (0, 0)]}, 16, "every block once"),
        ({"a": []}, 16, "at least one block"),
        ({"b": [(0, 0)]}, 16, "expected the shape of b"),
        ({"a": [(0, 0)]}, 8, "expected block_size"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockSelection(blocks, shapes, size)


def test_heat_map_and_picture(tmp_path):
    selection = made_up().select(9)
    layers, matrices, share = selection.heat_map()
    assert (layers, matrices) == (["0", "1"], ["self_attn.q_proj", "mlp.up_proj"])
    assert int((share * 12).round().sum()) == 9
    selection.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "9 blocks of 16×16 (2,304 elements)" in str(selection)


def test_what_the_train_command_selects(llama, tokens, tmp_path):
    from argparse import Namespace

    from lowrank_kernels.cli.smt import select_blocks

    model = llama()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    args = Namespace(warmup_steps=2, block_size=16, budget=0.05)
    selection = select_blocks(model, iter([batch] * 9), args, ("q_proj", "up_proj"))
    assert len(selection) == int(0.05 * sum(p.numel() for p in model.parameters()) / 256) > 0
    assert all(name.endswith(("q_proj", "up_proj")) for name in selection.blocks)
    selection.plot(tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").exists()
    assert len(select_blocks(model, iter([batch] * 9), args, ("q_proj",), blocks=3)) == 3


# -------------------------------------------------------------------------------------------------------- conversion


def test_adapt_changes_no_output_and_counts_what_trains(llama, tokens):
    model = llama()
    y = model(tokens).logits
    report, selection = tuned(model, tokens, steps=0)
    assert torch.equal(model(tokens).logits, y)
    assert report.trainable == selection.elements == 12 * 256
    assert f"SMTConfig: {len(selection.blocks)} replaced" in str(report) and "blocks of 16×16" in str(report)


@pytest.mark.parametrize("steps", [0, 2])
def test_undo_is_exact(llama, tokens, steps):
    model = llama()
    before, y = weights_of(model), model(tokens).logits
    report, _ = tuned(model, tokens, steps=steps)
    assert torch.equal(model(tokens).logits, y) == (steps == 0)
    report.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(tokens).logits, y)


@pytest.mark.parametrize("kind", ["fused", "torch"])
def test_to_linear_leaves_a_plain_model_that_can_be_adapted_again(llama, tokens, kind):
    model = llama()
    before = weights_of(model)
    _, selection = tuned(model, tokens, kind=kind)
    y = model(tokens).logits
    assert to_linear(model) == list(selection.blocks)
    assert {type(m) for n, m in model.named_modules() if n in selection.blocks} == {nn.Linear}
    assert torch.equal(model(tokens).logits, y)
    for name, p in model.named_parameters():
        owner, _, key = name.rpartition(".")
        changed = (p != before[name]).sum()
        most = 256 * len(selection.blocks[owner]) if owner in selection.blocks and key == "weight" else 0
        assert 0.5 * most <= changed <= most, name
    lk.adapt(model, lk.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="to_linear: expected a model with BlockSparseLinear"):
        to_linear(model)


def test_a_selection_of_another_model_is_refused(llama, tokens):
    selection = scores_of(llama(), tokens).select(60)
    taller = BlockSelection(selection.blocks, {m: (n + 16, k) for m, (n, k) in selection.shapes.items()}, 16)
    for model, chosen, message in (
        (llama(), taller, r"adapt: expected model.*of shape"),
        (nn.Sequential(nn.Linear(16, 16)), selection, "adapt: expected every module of the selection"),
    ):
        before = weights_of(model)
        with pytest.raises(ValueError, match=message):
            lk.adapt(model, lk.SMTConfig(selection=chosen))
        assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    with pytest.raises(TypeError, match="SMTConfig: expected a BlockSelection, got dict"):
        lk.SMTConfig(selection={})
    with pytest.raises(ValueError, match="the selection names its modules"):
        lk.SMTConfig(selection=selection, target_modules="all-linear.*")


# ------------------------------------------------------------------------------------------------------ deltas on disk


def test_a_saved_delta_makes_the_tuned_model_of_the_base_and_back(llama, tokens, tmp_path):
    model = llama()
    tuned(model, tokens)
    save_delta(model, tmp_path)
    # From the base, in another process as it were.
    base = llama()
    before = weights_of(base)
    report = load_delta(base, tmp_path)
    assert torch.equal(base(tokens).logits, model(tokens).logits)
    assert not any(p.requires_grad for p in base.parameters())
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "smt_delta.safetensors").stat().st_size < 0.5 * whole
    report.undo()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    load_delta(base, tmp_path, trainable=True)
    loss_of(base, tokens).backward()


def test_another_base_is_refused_unless_forced(llama, tokens, tmp_path):
    model = llama()
    tuned(model, tokens)
    save_delta(model, tmp_path)
    other = llama()
    owner = next(iter(json.loads((tmp_path / "smt_config.json").read_text())["modules"]))
    with torch.no_grad():
        other.get_submodule(owner).weight[-1, -1] += 1  # any element, in a chosen block or not
    before = weights_of(other)
    with pytest.raises(ValueError, match=r"load_delta: expected the base that was tuned.*force=True"):
        load_delta(other, tmp_path)
    with pytest.raises(ValueError, match="load_delta: expected the base that was tuned"):
        load_delta(llama(dtype=torch.bfloat16), tmp_path)
    with pytest.raises(ValueError, match=r"load_delta: expected a linear at .*: a delta for another model"):
        load_delta(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    report = load_delta(other, tmp_path, force=True)
    report.undo()
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def _spoiled(kind, folder):
    config, weights = folder / "smt_config.json", folder / "smt_delta.safetensors"
    text, tensors = json.loads(config.read_text()), load_file(weights)
    name = next(iter(text["modules"]))
    if kind == "no config":
        config.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "not json":
        config.write_text("{")
    elif kind == "other format":
        config.write_text(json.dumps({**text, "format": "x"}))
    elif kind == "no shape":
        del text["modules"][name]["shape"]
        config.write_text(json.dumps(text))
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        blocks, index = f"{name}.blocks", f"{name}.block_index"
        if kind == "missing":
            del tensors[blocks]
        elif kind == "nan":
            tensors[blocks][0, 0, 0] = math.nan
        elif kind == "out of range":
            tensors[index][0] = 1000
        elif kind == "duplicate":
            tensors[index][:] = tensors[index][:1]
            tensors[index] = tensors[index].repeat(2, 1)[: max(2, len(tensors[index]))]
            tensors[blocks] = tensors[blocks].repeat(2, 1, 1)[: max(2, len(tensors[blocks]))]
        elif kind == "other shape":
            tensors[blocks] = tensors[blocks][:, :8].contiguous()
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "expected smt_config.json in"),
        ("no weights", "expected smt_delta.safetensors in"),
        ("not json", "to hold JSON"),
        ("other format", "to be of the format"),
        ("no shape", "shape, dtype and sha256"),
        ("truncated", "a whole safetensors file"),
        ("missing", "missing: .*blocks"),
        ("nan", "found NaN or Inf"),
        ("out of range", "expected block_index within"),
        ("duplicate", "expected block_index with every block once"),
        ("other shape", r"blocks of shape"),
    ],
)
def test_bad_files(llama, tokens, tmp_path, kind, message):
    model = llama()
    tuned(model, tokens, steps=1)
    save_delta(model, tmp_path)
    _spoiled(kind, tmp_path)
    base = llama()
    before = weights_of(base)
    with pytest.raises(ValueError, match=message):
        load_delta(base, tmp_path)
    assert weights_of(base).keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_nothing_is_saved_of_other_models_or_of_nan(llama, tokens, tmp_path):
    with pytest.raises(ValueError, match="save_delta: expected BlockSparseLinear layers"):
        save_delta(llama(), tmp_path / "none")
    model = llama()
    tuned(model, tokens, steps=0)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(ValueError, match="save_delta: expected finite blocks"):
        save_delta(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
