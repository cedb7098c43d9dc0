"""accelerate: PEFT's layers on our op give PEFT's outputs and gradients, whatever LoraConfig says."""

import copy
import io
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lowrank_kernels
from lowrank_kernels.integrations.peft import AcceleratedLinear, accelerate, restore
from lowrank_kernels.reference import dropout_keep_mask_ref
from tests.integrations.beside_peft import TARGETS, assert_agrees, assert_close, calls_of, run
from tests.tiny_llama import randomise


def make(llama, dtype=torch.float32, **settings):
    return randomise(get_peft_model(llama(dtype), LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})))


def op_calls():
    return calls_of("lora_linear")


SETTINGS = {
    "default": {},
    "alpha": {"lora_alpha": 3, "r": 5},
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 1}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "lora_bias": True, "target_modules": ["q_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1.*k_proj"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "layers": {"layers_to_transform": [1]},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "with embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_pefts(llama, tokens, kind, training):
    theirs = make(llama, **SETTINGS[kind]).train(training)
    ours = copy.deepcopy(theirs)
    names = list(ours.state_dict())
    report = accelerate(ours)
    linears = [n for n, m in theirs.named_modules() if type(m) is PeftLinear]
    others = [r.kind for r in report.replaced if r.name not in linears]
    assert len(report.replaced) - len(others) == len(linears) > 0
    assert others == ["lora.Embedding"] * ("embedding" in kind)
    assert list(ours.state_dict()) == names and repr(ours) == repr(theirs)
    with op_calls() as op:
        ours(tokens)
    assert op.call_count == len(linears)
    assert_agrees(ours, theirs, tokens)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"alora_invocation_tokens": [7], "task_type": "CAUSAL_LM"}, "ALoraLinearVariant"),
        ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "KasaLinearVariant"),
    ],
)
def test_variants_run_pefts_own_forward_and_are_listed(llama, tokens, settings, reason):
    theirs = make(llama, **settings).eval()
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert not report.replaced and not any(isinstance(m, AcceleratedLinear) for m in ours.modules())
    assert len(report.skipped) == 6 and all(reason in s.reason for s in report.skipped)
    with op_calls() as op:
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert op.call_count == 0


def test_a_variant_beside_an_ordinary_adapter(llama, tokens):
    theirs = make(llama, task_type="CAUSAL_LM")
    settings = {"alora_invocation_tokens": [7], "task_type": "CAUSAL_LM"}
    theirs.add_adapter("alora", LoraConfig(r=2, target_modules=["q_proj"], **settings))
    randomise(theirs)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert len(report.replaced) == 6
    assert {s.reason for s in report.skipped} == {"adapter 'alora' is a ALoraLinearVariant"}
    assert len(report.skipped) == 2
    for active, calls in (("default", 6), ("alora", 0)):
        ours.set_adapter(active)
        theirs.set_adapter(active)
        with op_calls() as op:
            ours(tokens)
        assert op.call_count == calls
        assert_agrees(ours, theirs, tokens)


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.linear = nn.Embedding(9, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, ids):
        return self.linear(self.conv(self.embed(ids).mT).mT)


def test_a_convolution_that_peft_computes_as_fast_is_listed():
    torch.manual_seed(0)
    theirs = randomise(get_peft_model(Embedder(), LoraConfig(r=2, target_modules=["embed", "conv", "linear"])))
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert [r.name for r in report.replaced] == ["base_model.model.embed", "base_model.model.linear"]
    assert {s.name.split(".")[-1]: s.reason for s in report.skipped} == {
        "conv": "adapter 'default' takes two small convolutions, which are as fast in PEFT's own forward"
    }
    ids = torch.arange(8).reshape(2, 4)
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=2e-6, atol=2e-6)


def test_quantised_and_hooked_bases_are_listed():
    class Int8Linear(nn.Linear):
        """As bitsandbytes makes them: a subclass with a weight that is not a float."""

        def __init__(self):
            super().__init__(6, 6)
            self.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)

    class OwnForward(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict(
        {"int8": Int8Linear(), "own": OwnForward(6, 6), "hooked": nn.Linear(6, 6), "ok": nn.Linear(6, 6)}
    )
    model["hooked"].register_forward_hook(lambda module, args, y: y * 2)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=list(model)))
    report = accelerate(model)
    assert [r.name.split(".")[-1] for r in report.replaced] == ["ok"]
    reasons = {s.name.split(".")[-1]: s.reason for s in report.skipped}
    assert "quantised" in reasons["int8"] and "forward of its own" in reasons["own"] and "hooks" in reasons["hooked"]
    x = torch.randn(2, 6)
    layer = model.base_model.model["hooked"]
    assert torch.equal(layer(x), 2 * nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


def test_a_forward_replaced_on_the_instance_is_listed(llama, tokens):
    model = make(llama).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    report = accelerate(model)
    assert len(report.replaced) == 5 and type(layer) is PeftLinear
    assert [s.name for s in report.skipped] == ["base_model.model.model.layers.0.self_attn.q_proj"]
    assert "replaced on the instance" in report.skipped[0].reason


def test_hooks_added_later_still_run(llama, tokens):
    ours = make(llama).eval()
    accelerate(ours)
    layer = next(m for m in ours.modules() if isinstance(m, AcceleratedLinear))
    seen = []
    for module in (layer, layer.base_layer, layer.lora_A["default"]):
        handle = module.register_forward_hook(lambda module, args, y: seen.append(module))
        ours(tokens)
        handle.remove()
        assert seen and seen[-1] is module


def test_a_base_that_trains_is_pefts(llama, tokens):
    theirs = make(llama)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for model in (ours, theirs):
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with op_calls() as op:
        ours(tokens)
    assert op.call_count == 5
    assert_agrees(ours, theirs, tokens)


def test_conv1d_runs_on_the_op():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    base = GPT2LMHeadModel(config).eval()
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    theirs = randomise(get_peft_model(base, lora))
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert len(report.replaced) == 6 and not report.skipped
    tokens = torch.arange(10).reshape(2, 5)
    with op_calls() as op:
        ours(tokens)
    assert op.call_count == 6
    assert_agrees(ours.eval(), theirs.eval(), tokens)


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_pefts_under_our_mask(llama):
    """The same layer, PEFT's dropout replaced by a multiplication with the mask that the op drew."""
    torch.manual_seed(0)
    theirs = randomise(
        get_peft_model(nn.Sequential(nn.Linear(40, 30)), LoraConfig(r=4, target_modules=["0"], lora_dropout=0.3))
    )
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = torch.randn(2, 25, 40)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(7)
    y = ours(x_ours)
    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    keep = dropout_keep_mask_ref(seed, 50, 40, 0.3).reshape(x.shape)
    assert abs(keep.float().mean() - 0.7) < 0.05

    class OurMask(nn.Module):
        def forward(self, x):
            return x * keep / 0.7

    layer = theirs.base_model.model[0]
    layer.lora_dropout["default"] = OurMask()
    expected = theirs(x_theirs)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=2e-5, atol=2e-5)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-5, atol=2e-5, msg=name)


def test_dropout_has_pefts_mean_and_variance():
    torch.manual_seed(0)
    theirs = randomise(
        get_peft_model(nn.Sequential(nn.Linear(16, 4)), LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5))
    )
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = torch.randn(16)
    with torch.no_grad():
        rows = x.expand(20000, 16)
        a, b = ours(rows), theirs(rows)
        torch.testing.assert_close(a.mean(0), ours.eval()(x), atol=0.02, rtol=0.02)
    torch.testing.assert_close(a.var(0), b.var(0), atol=0, rtol=0.06)


def test_dropout_is_off_in_eval(llama, tokens):
    theirs = make(llama, lora_dropout=0.5).eval()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    assert_agrees(ours, theirs, tokens)
    assert not torch.equal(ours.train()(tokens).logits, ours(tokens).logits)


# ------------------------------------------------------------------------------------------------- adapters' life cycle


def two_adapters(llama, **second):
    model = make(llama)
    model.add_adapter(
        "other", LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj"], **second})
    )
    return randomise(model)


def test_several_active_adapters_are_one_correction(llama, tokens):
    theirs = two_adapters(llama, use_rslora=True)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    q_proj = next(r for r in report.replaced if r.name.endswith("q_proj"))
    assert q_proj.rank == {"default": 4, "other": 3}
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    with op_calls() as op:
        ours(tokens)
    assert op.call_count == 8
    assert_agrees(ours, theirs, tokens)


def test_several_active_adapters_with_lora_bias(llama, tokens):
    theirs = two_adapters(llama, lora_bias=True)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert_agrees(ours, theirs, tokens)


def test_several_active_adapters_with_dropout_keep_pefts_independent_masks(llama, tokens):
    theirs = two_adapters(llama, lora_dropout=0.5)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    for training, calls in ((True, 6), (False, 8)):  # the two q_proj hold both adapters
        with op_calls() as op:
            ours.train(training)(tokens)
        assert op.call_count == calls
    assert_agrees(ours.eval(), theirs.eval(), tokens)


def test_switching_adding_and_deleting_adapters_afterwards(llama, tokens):
    theirs = make(llama)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for model in (ours, theirs):
        model.add_adapter("late", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        randomise(model, seed=2)
        model.set_adapter("late")
    with op_calls() as op:
        ours(tokens)
    assert op.call_count == 2, "up_proj is a new layer of PEFT's until accelerate runs again"
    assert_agrees(ours, theirs, tokens)
    report = accelerate(ours)
    assert len(report.replaced) == 2 and {s.reason for s in report.skipped} == {"already accelerated"}
    assert_agrees(ours, theirs, tokens)
    for model in (ours, theirs):
        model.delete_adapter("default")
    assert_agrees(ours, theirs, tokens)
    for model in (ours, theirs):
        model.set_adapter("late")
    assert_agrees(ours, theirs, tokens)


def test_scaling_changes_are_seen(llama, tokens):
    theirs = make(llama).eval()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    plain = ours(tokens).logits
    with peft.helpers.rescale_adapter_scale(ours, 0.25), peft.helpers.rescale_adapter_scale(theirs, 0.25):
        assert_agrees(ours, theirs, tokens)
        assert (ours(tokens).logits - plain).abs().max() > 1e-3
    assert torch.equal(ours(tokens).logits, plain)


def test_a_disabled_adapter_leaves_the_base_alone(llama, tokens):
    ours = make(llama).eval()
    accelerate(ours)
    with ours.disable_adapter(), op_calls() as op:
        assert torch.equal(ours(tokens).logits, llama()(tokens).logits)
        assert op.call_count == 0


def test_a_merged_adapter_runs_without_the_op_and_is_unmerged(llama, tokens):
    ours = make(llama).eval()
    accelerate(ours)
    adapted = ours(tokens).logits
    ours.merge_adapter(safe_merge=True)
    with op_calls() as op:
        assert_close(ours(tokens).logits, adapted, 1e-5)
    assert op.call_count == 0
    ours.unmerge_adapter()
    assert_close(ours(tokens).logits, adapted, 1e-5)


def test_merging_and_unloading_gives_what_pefts_own_gives(llama, tokens):
    theirs = make(llama).eval()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    merged = ours.merge_and_unload()
    assert not any(isinstance(m, PeftLinear) for m in merged.modules())
    assert_close(merged(tokens).logits, theirs.merge_and_unload()(tokens).logits, 2e-6)


def test_mixed_batches_are_pefts(llama, tokens):
    theirs = two_adapters(llama).eval()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    with op_calls() as op, torch.no_grad():
        got = ours(tokens, adapter_names=["other", "__base__"]).logits
        assert op.call_count == 0
        assert torch.equal(got, theirs(tokens, adapter_names=["other", "__base__"]).logits)
    with pytest.raises(ValueError, match="adapter_names"):
        ours(tokens, adapter_names=["other"])


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_is_as_near_to_float64_as_peft_is(dtype, autocast_adapter_dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 80)).to(dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    theirs = randomise(get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype))
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    factor_dtype = torch.float32 if autocast_adapter_dtype else dtype
    layer = ours.base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == factor_dtype
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(200, 96, dtype=dtype)
    cotangent = torch.randn(200, 80, dtype=dtype)
    results = []
    for model, inputs in ((ours, x), (theirs, x), (exact, x.double())):
        inputs = inputs.clone().requires_grad_()
        y = model(inputs)
        y.backward(cotangent.to(y.dtype))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert y.dtype == inputs.dtype and len(grads) == 2
        results.append([t.detach().double() for t in (y, inputs.grad, *grads)])
    got, eager, truth = results
    eps = torch.finfo(dtype).eps
    for i, allowed in enumerate((2, 3, 3, 3)):
        error, theirs_error = ((r[i] - truth[i]).norm() / truth[i].norm() for r in (got, eager))
        assert error <= allowed * theirs_error + eps, i
        assert error < 4 * eps


def test_autocast(llama, tokens):
    theirs = make(llama).eval()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    exact = theirs(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with op_calls() as op:
            got = ours(tokens).logits
        expected = theirs(tokens).logits
    assert op.call_count == 6 and got.dtype == expected.dtype == torch.bfloat16
    assert (got - exact).norm() <= 2 * (expected - exact).norm()


def test_an_input_of_another_dtype_fails_as_in_peft_or_runs_as_in_peft():
    torch.manual_seed(0)
    theirs = randomise(get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"])))
    theirs.base_model.model[0].lora_A.to(torch.bfloat16)
    theirs.base_model.model[0].lora_B.to(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = torch.randn(3, 8)
    exact = copy.deepcopy(theirs).double()(x.double())
    assert ours(x).dtype == theirs(x).dtype == torch.float32
    assert (ours(x) - exact).norm() <= (theirs(x) - exact).norm()
    for model, error in ((theirs, RuntimeError), (ours, TypeError)):
        with pytest.raises(error, match="dtype"):
            model(x.to(torch.float16))
    with peft.helpers.disable_input_dtype_casting(ours), op_calls() as op, pytest.raises(RuntimeError, match="dtype"):
        ours(x)
    assert op.call_count == 0


# ------------------------------------------------------------------------------------------------ still a PEFT model


def test_the_report_counts_and_notes(llama):
    report = accelerate(make(llama).eval())
    assert str(report).startswith("PEFT on lowrank_kernels: 6 replaced, 0 skipped; ")
    first = report.replaced[0]
    assert (first.kind, first.shape, first.rank) == ("lora.Linear", (32, 32), {"default": 4})
    assert "adapter_names" in report.notes[0]


def test_undo_puts_pefts_layers_back(llama, tokens):
    model = make(llama).eval()
    before = model(tokens).logits
    accelerate(model).undo()
    assert not any(isinstance(m, AcceleratedLinear) for m in model.modules())
    assert torch.equal(model(tokens).logits, before)


def test_restore_puts_pefts_layers_back_once(llama, tokens):
    model = make(llama).eval()
    before = model(tokens).logits
    accelerate(model)
    assert restore(model) == 6 and restore(model) == 0
    assert torch.equal(model(tokens).logits, before)
    assert all(type(m) is PeftLinear for m in model.modules() if isinstance(m, PeftLinear))


def test_a_model_without_peft_is_an_error(llama):
    with pytest.raises(ValueError, match=r"found none in this LlamaForCausalLM; for a plain model use"):
        accelerate(llama())


@pytest.fixture
def accelerated(llama, tokens):
    """(an accelerated model, its logits)."""
    model = make(llama).eval()
    accelerate(model)
    return model, model(tokens).logits


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_runs_on_the_op_and_computes_the_same(twin_of, accelerated, tokens):
    model, logits = accelerated
    twin = twin_of(model)
    with op_calls() as op:
        assert torch.equal(twin(tokens).logits, logits)
    assert op.call_count == 6


def test_a_saved_folder_is_read_by_peft_and_by_us(accelerated, llama, tokens, tmp_path):
    model, logits = accelerated
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_close(loaded(tokens).logits, logits, 2e-6)
    assert not any(isinstance(m, AcceleratedLinear) for m in loaded.modules())
    again = llama()
    lowrank_kernels.load_adapter(again, tmp_path)
    assert_close(again(tokens).logits, logits, 2e-6)


def test_a_state_is_loaded_into_a_model_of_pefts(accelerated, llama, tokens):
    model, logits = accelerated
    fresh = make(llama).eval()
    fresh.load_state_dict(model.state_dict())
    assert_close(fresh(tokens).logits, logits, 2e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(llama, tokens, use_reentrant):
    plain = make(llama, lora_dropout=0.2).train()
    accelerate(plain)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    torch.manual_seed(3)
    expected = run(plain, tokens)[1]
    torch.manual_seed(3)
    with op_calls() as op:
        got = run(checkpointed, tokens, use_cache=False)[1]
    assert op.call_count == 12, "each layer's forward runs twice"
    for name, g in expected.items():
        assert_close(got[name], g, 1e-6, name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_block_compiles_as_one_graph(llama, dropout):
    model = make(llama, lora_dropout=dropout).train()
    accelerate(model)
    block = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run_block in (block, compiled):
        torch.manual_seed(2)
        model.zero_grad()
        y = run_block(x)
        y.sin().sum().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters() if p.grad is not None)])
    assert len(results[0]) == 3
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_a_block_with_several_adapters_compiles_as_one_graph(llama):
    model = two_adapters(llama, target_modules=["down_proj"])
    model.base_model.set_adapter(["default", "other"])
    accelerate(model)
    block = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(
        torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x), rtol=2e-6, atol=2e-6
    )


def test_functional_call_reaches_the_factors(llama, tokens):
    model = make(llama).eval()
    accelerate(model)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "lora_B" in n}
    got = torch.func.functional_call(model, zeros, (tokens,)).logits
    assert_close(got, llama()(tokens).logits, 2e-6)


def test_training_follows_peft_step_by_step(llama, tokens):
    theirs = make(llama, bias="lora_only")
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            for part in tokens.split(1):  # gradient accumulation
                loss = model(part, labels=part).loss
                loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
