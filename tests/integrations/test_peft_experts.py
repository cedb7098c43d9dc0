"""Adapters of experts beside PEFT's ``target_parameters``: layers, folders, and PEFT's wrappers on our ops."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.integrations.peft import accelerate
from tests.integrations.tiny_models import SMALL
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

peft = pytest.importorskip("peft")
tf = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.torch")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(24).view(2, 12) % 23
SIZES = {**SMALL, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    **SIZES,
    **ROUTED,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**SIZES, **ROUTED, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SIZES, **ROUTED, num_experts=4, head_dim=16),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, pad_token_id=0
    ),
    "deepseek_v2": lambda: tf.DeepseekV2Config(**DEEPSEEK),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**DEEPSEEK),
}


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    config = MODELS[name]()
    config._experts_implementation = "eager"  # the others have no float64
    return tf.AutoModelForCausalLM.from_config(config).double().eval()


def lora(**settings: Any) -> Any:
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj"], "target_parameters": BOTH}
    return peft.LoraConfig(**given | {"init_lora_weights": False} | settings)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


# ----------------------------------------------------------------------------------------------------------- wrappers


def block(experts: int, transposed: bool) -> Any:
    """A block of Mixtral's or GptOss's, H = 24, I = 20, all of its values random."""
    if transposed:
        config = tf.GptOssConfig(hidden_size=24, intermediate_size=20, num_local_experts=experts)
        kind = tf.models.gpt_oss.modeling_gpt_oss.GptOssExperts
    else:
        config = tf.MixtralConfig(hidden_size=24, intermediate_size=20, num_local_experts=experts)
        kind = tf.models.mixtral.modeling_mixtral.MixtralExperts
    config._experts_implementation = "eager"
    made = kind(config)
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 5
    return made


def step(wrapper: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, and the gradients of x, of the router's weights and of the factors."""
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    y = wrapper(x, index, weights)
    wanted = {"x": x, "weights": weights, **{n: p for n, p in wrapper.named_parameters() if p.requires_grad}}
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True))}


@pytest.mark.parametrize(
    ("experts", "top_k", "transposed"),
    [
        (1, 1, False),
        (2, 1, True),
        (4, 2, False),
        (4, 4, True),
        (8, 2, False),
        (8, 8, True),
        (64, 1, True),
        (64, 8, False),
    ],
)
def test_wrappers_on_our_ops_compute_what_peft_does(experts: int, top_k: int, transposed: bool) -> None:
    """Of several experts the last ones get no row; of 64, most."""
    torch.manual_seed(0)
    holder = torch.nn.ModuleDict({"experts": block(experts, transposed)})
    wrapper = peft.get_peft_model(holder, lora(target_modules=[])).base_model.model["experts"]
    exact = copy.deepcopy(wrapper).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(13, 24, generator=generator)
    weights, index = torch.rand(13, max(top_k, experts - 2), generator=generator).topk(top_k)
    theirs, oracle = step(wrapper, x, index, weights), step(exact, x.double(), index, weights.double())
    report = accelerate(wrapper)
    assert len(report.replaced) == 2 and not report.skipped
    ours = step(wrapper, x, index, weights)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        factor = 2.0 if name == "y" else GRADIENT_FACTOR
        assert_as_exact_as_eager(value, theirs[name], oracle[name], factor=factor, what=name)


def test_an_accelerated_model_stays_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_kernels.integrations import peft as ours

    ran: list[int] = []
    run = ours.run_experts
    monkeypatch.setattr(ours, "run_experts", lambda *a: ran.append(1) or run(*a))
    model = peft.get_peft_model(fresh("mixtral"), lora())
    with model.disable_adapter():
        base = logits(model)
    y, state = logits(model), set(model.state_dict())
    report = accelerate(model)
    kinds = {r.name.rpartition("mlp.")[2]: (r.kind, r.shape) for r in report.replaced if "mlp" in r.name}
    assert kinds == {
        "experts": ("lora.ParamWrapper", (32, 48)),
        "experts.base_layer": ("lora.ParamWrapper", (96, 32)),
    }

    def check(expected: torch.Tensor, *, on_ours: bool) -> None:
        ran.clear()
        torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
        assert len(ran) == 2 * on_ours

    check(y, on_ours=True)
    assert set(model.state_dict()) == state
    with model.disable_adapter():
        check(base, on_ours=False)
    model.merge_adapter()
    check(y, on_ours=False)
    model.unmerge_adapter()
    check(y, on_ours=True)
    model.add_adapter("second", lora(r=2))
    check(y, on_ours=True)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)  # several at once: PEFT's
    assert len(ran) == 2
    model.set_adapter("second")
    second = logits(model)
    report.undo()
    check(second, on_ours=False)
    model.base_model.set_adapter(["default", "second"])
    check(both, on_ours=False)


def test_what_is_no_block_of_experts_is_left_to_peft() -> None:
    holder = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 6), "experts": block(2, False)})
    holder["experts"]._is_expert_parallel = True
    model = peft.get_peft_model(holder, lora(target_modules=[], target_parameters=["a.weight", *BOTH]))
    report = accelerate(model)
    assert not report.replaced
    assert sorted({s.reason.split(",")[0][:40] for s in report.skipped}) == [
        "a Linear",
        "its experts are spread over several rank",
    ]


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name", MODELS)
def test_folders_go_both_ways_and_the_report_names_every_group(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(fresh(name), lora(rank_pattern={".*gate_up_proj": 2})).eval()
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = fresh(name)
    report = lk.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    stacked = {n.replace(".base_layer", "") for n, p in model.named_parameters() if p.dim() == 3}
    assert {r.name for r in report.replaced if "experts" in r.name} == stacked
    assert {r.rank for r in report.replaced if "gate_up" in r.name} == {2}
    lk.save_adapter(model, tmp_path / "ours", base_model_name=None)
    files = [st.load_file(tmp_path / of / "adapter_model.safetensors") for of in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[1][key], t.to(files[1][key].dtype)) for key, t in files[0].items())
    again = peft.PeftModel.from_pretrained(fresh(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    report.undo()
    torch.testing.assert_close(logits(model), logits(fresh(name)), rtol=0, atol=0)


def test_linears_that_peft_turns_into_weights_of_experts_are_read_as_those(tmp_path: Path) -> None:
    """PEFT takes gate_proj and up_proj of these models for halves of the experts' gate_up_proj, of twice the rank."""
    config = lora(target_modules=["gate_proj", "up_proj", "down_proj"], target_parameters=None)
    theirs = peft.get_peft_model(fresh("deepseek_v3"), config).eval()
    theirs.save_pretrained(tmp_path)
    model = fresh("deepseek_v3")
    report = lk.load_adapter(model, tmp_path)
    assert {r.name.rpartition(".")[2]: r.rank for r in report.replaced} == {"gate_up_proj": 6, "down_proj": 3}
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_every_expert_by_one_word_is_written_by_names(tmp_path: Path) -> None:
    model = fresh("deepseek_v3")
    lk.adapt(
        model, lk.LoRAConfig(r=2, alpha=4, dropout=0.1, target_modules=["o_proj"], target_parameters="all-experts")
    )
    lk.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_parameters"] == sorted(BOTH) and written["lora_dropout"] == 0.0
    again = peft.PeftModel.from_pretrained(fresh("deepseek_v3"), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_dora_of_experts_comes_back_and_is_refused_by_peft(tmp_path: Path) -> None:
    model = fresh("gpt_oss")
    lk.adapt(model, lk.DoRAConfig(r=2, target_modules=(), target_parameters=["experts.down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapters" in name:
                p.add_(torch.randn(p.shape) / 9)
    lk.save_adapter(model, tmp_path)
    again = fresh("gpt_oss")
    lk.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)
    with pytest.raises(KeyError, match="LORA_DORA_EXPERTS"):
        peft.PeftModel.from_pretrained(fresh("gpt_oss"), tmp_path)


def test_folders_that_do_not_fit_leave_the_model_as_it_is(tmp_path: Path) -> None:
    peft.get_peft_model(fresh("mixtral"), lora()).save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, text = st.load_file(file), config.read_text()
    model = fresh("mixtral")
    before = copy.deepcopy(model.state_dict())

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            lk.load_adapter(model, tmp_path)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    key = next(key for key in tensors if key.endswith("experts.lora_B.weight"))
    st.save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, file)
    refused("expected .*experts.lora_B.weight of shape")
    st.save_file({**tensors, key: torch.full_like(tensors[key], torch.nan)}, file)
    refused("NaN")
    st.save_file({name: t for name, t in tensors.items() if name != key}, file)
    refused("missing: .*experts.lora_B.weight")
    st.save_file(tensors, file)
    for value in (["experts.router"], "experts.*", [3]):
        config.write_text(json.dumps(json.loads(text) | {"target_parameters": value}))
        refused("target_parameters|experts.router|unexpected")
    config.write_text(text)
    with lk.serving.AdapterBank(fresh("mixtral").float()) as bank, pytest.raises(ValueError, match="target_parameters"):
        bank.load("a", tmp_path)
