"""Blocks of transformers' models as one node each: what is found, that it computes the same, and that it comes off."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.fuse import _Fused
from lowrank_kernels.integrations.peft import accelerate, restore

IDS = torch.arange(3, 21).reshape(2, 9) * 7 % 61
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
# model -> (attention's projections are apart, the MLP's f)
MODELS = {
    "Llama": (True, "silu"),
    "Qwen2": (True, "silu"),
    "Qwen3": (True, "silu"),
    "Mistral": (True, "silu"),
    "Gemma": (True, "gelu_tanh"),
    "Phi3": (False, "silu"),
}
ADAPTERS = {"lora": lk.LoRAConfig, "dora": lk.DoRAConfig}


def make(name: str, adapter: str = "lora", *, targets: Any = "all-linear", **settings: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**SIZES))
    lk.adapt(model, ADAPTERS[adapter](r=4, target_modules=targets, **settings))
    return with_trained_factors(model)


def with_trained_factors(model: Any) -> Any:
    for name, p in model.named_parameters():
        if "lora_B" in name and p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


def step(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Loss, logits and gradients of a training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=2e-5, atol=2e-6 * float(value.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


def fused(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _Fused)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_fused_model_computes_the_same_and_is_given_back(name: str, adapter: str) -> None:
    model, (attention, f) = make(name, adapter), MODELS[name]
    model.train()
    before, state, printed = step(model), copy.deepcopy(model.state_dict()), str(model)
    report = lk.fuse(model)
    blocks = ["self_attn"] * attention + ["mlp"]
    assert [r.name for r in report.replaced] == [f"model.layers.{i}.{block}" for i in range(2) for block in blocks]
    assert f"f = {f}" in str(report)
    assert str(model) == printed
    assert model.state_dict().keys() == state.keys()
    nodes: list[str] = []
    assert_same(step(model), before)
    y = model(input_ids=IDS).logits
    queue, seen = [y.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.append(type(node).__name__)
            queue += [parent for parent, _ in node.next_functions]
    assert nodes.count("_BlockBackward") == len(report.replaced)
    report.undo()
    assert fused(model) == []
    after = step(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_second_call_and_a_model_without_adapters_take_nothing() -> None:
    model = make("Llama")
    lk.fuse(model)
    again = lk.fuse(model)
    assert again.replaced == ()
    assert {s.reason for s in again.skipped} == {"already fused"}
    plain = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    assert lk.fuse(plain).replaced == ()
    with pytest.raises(TypeError, match=r"fuse: expected an nn\.Module, got str"):
        lk.fuse("llama")  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["v_proj"], ["down_proj"]], ids=str)
def test_any_linears_of_a_block_may_be_adapted(targets: list[str]) -> None:
    model = make("Llama", targets=targets)
    before = step(model)
    report = lk.fuse(model)
    assert len(report.replaced) == 2 * len({t in ("q_proj", "v_proj") for t in targets})
    assert_same(step(model), before)


def test_copies_pickles_merging_and_hooks() -> None:
    model = make("Llama")
    lk.fuse(model)
    before = step(model)
    assert_same(step(copy.deepcopy(model)), before)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(step(torch.load(file, weights_only=False)), before)
    layer = model.model.layers[0].mlp.up_proj
    layer.merge_()
    torch.testing.assert_close(model(input_ids=IDS).logits, before["logits"], rtol=1e-4, atol=1e-5)
    layer.unmerge_()
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(input_ids=IDS).logits, before["logits"], rtol=1e-4, atol=1e-5)
    assert seen == [1]
    handle.remove()
    with lk.base_only(model):
        base = model(input_ids=IDS).logits
    lk.merge_and_unload(model)
    assert fused(model) == []
    assert not torch.allclose(base, model(input_ids=IDS).logits, atol=1e-3)
    torch.testing.assert_close(model(input_ids=IDS).logits, before["logits"], rtol=1e-4, atol=1e-5)


def test_under_checkpointing_compile_and_generation() -> None:
    model = make("Llama", dropout=0.2)
    lk.fuse(model)
    model.train()
    before = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(model), before)
    model.gradient_checkpointing_disable()
    model.eval()
    plain = step(model)
    texts = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    other = make("Llama", dropout=0.2).eval()
    assert torch.equal(texts, other.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))
    for block in (model.model.layers[0].self_attn, model.model.layers[0].mlp):
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(step(model), plain)


def test_different_dropouts_and_gates_run_by_themselves() -> None:
    model = make("Llama", gate=True)
    before = step(model)
    lk.fuse(model)
    after = step(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    model = make("Llama")
    model.train()
    model.model.layers[0].mlp.up_proj.dropout = 0.5
    before = step(model)
    lk.fuse(model)
    assert_same(step(model), before)


class Other(nn.Module):
    """Has the names of an MLP, and another forward."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.Tanh() if wrong == "activation" else nn.SiLU()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        if self.wrong == "arguments":
            raise KeyError("x")
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.wrong == "order":
            gate, up = up, gate
        if self.wrong == "clamp":
            gate, up = gate.clamp(max=16.0), up.clamp(-16.0, 16.0)
        h = self.act_fn(gate) * up
        return self.down_proj(nn.functional.dropout(h, 0.1, self.training and self.wrong == "dropout"))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("order", "its forward is not down"),
        ("clamp", "its forward is not down"),
        ("dropout", "its forward is not down(f(gate(x)) ∘ up(x)) in training"),
        ("activation", "its activation is none of silu"),
        ("arguments", "its forward takes no rows of x: KeyError"),
    ],
)
def test_what_only_looks_like_an_mlp_is_left(wrong: str, reason: str) -> None:
    model = nn.Sequential(Other(wrong))
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=["up_proj"]))
    state = torch.get_rng_state()
    report = lk.fuse(model)
    assert report.replaced == ()
    assert report.skipped[0].reason.startswith(reason)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


class Attention(nn.Module):
    """q (k · v) of hidden_states, or with k and v of other states."""

    def __init__(self, of_others: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(of_others, 12), nn.Linear(of_others, 12)

    def forward(self, hidden_states: Tensor, key_value_states: Tensor | None = None) -> Tensor:
        other = hidden_states if key_value_states is None else key_value_states
        return self.q_proj(hidden_states) * (self.k_proj(other) * self.v_proj(other)).sum(0)


def test_cross_attention_runs_its_linears_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([Attention(8), Attention(6)])
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    with_trained_factors(model)
    x, other, narrow = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 6)
    expected = [model[0](x), model[0](x, other), model[0](x, key_value_states=other), model[1](x, narrow)]
    report = lk.fuse(model)
    assert [r.name for r in report.replaced] == ["0"]
    assert "different widths" in report.skipped[0].reason
    calls, qkv_lora = [], lk.qkv_lora

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return qkv_lora(*args, **kwargs)

    monkeypatch.setattr(sys.modules["lowrank_kernels.fuse"], "qkv_lora", counted)
    found = [model[0](x), model[0](x, other), model[0](x, key_value_states=other), model[1](x, narrow)]
    torch.testing.assert_close(found, expected)
    assert len(calls) == 1


def test_an_attention_of_other_arguments_is_left() -> None:
    class OfQueries(Attention):
        def forward(self, query: Tensor) -> Tensor:  # type: ignore[override]
            return self.q_proj(query)

    model = nn.Sequential(OfQueries(8))
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=["q_proj"]))
    assert lk.fuse(model).skipped[0].reason == "its forward takes no hidden_states"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_over_pefts_layers(name: str, dora: bool) -> None:
    torch.manual_seed(0)
    base = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**SIZES))
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=dora, use_rslora=True, target_modules="all-linear")
    model = with_trained_factors(peft.get_peft_model(base, config))
    pefts = step(model)
    report = accelerate(model, blocks=True)
    assert sum(r.kind in ("attention", "mlp") for r in report.replaced) == 4
    assert len(fused(model)) == 4
    for key, value in step(model).items():
        torch.testing.assert_close(value, pefts[key], rtol=1e-4, atol=1e-5 * float(pefts[key].abs().max()))
    with model.disable_adapter():
        plain = model(input_ids=IDS).logits
    assert not torch.allclose(plain, pefts["logits"], atol=1e-3)
    assert restore(model) == 14
    assert fused(model) == []
    again = step(model)
    assert all(torch.equal(again[key], pefts[key]) for key in pefts)


def test_over_pefts_layers_it_is_undone_as_a_whole() -> None:
    model = peft.get_peft_model(
        tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), peft.LoraConfig(target_modules="all-linear")
    )
    kinds = [type(module) for module in model.modules()]
    report = accelerate(model, blocks=True)
    assert [type(module) for module in model.modules()] != kinds
    report.undo()
    assert [type(module) for module in model.modules()] == kinds
