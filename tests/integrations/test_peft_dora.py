"""accelerate on DoRA adapters: PEFT's outputs and gradients, and a cached scale that follows PEFT's own writes."""

import copy
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.utils import hotswap
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lowrank_kernels import load_adapter
from lowrank_kernels.integrations.peft import AcceleratedLinear, accelerate, restore
from lowrank_kernels.reference import dropout_keep_mask_ref
from tests.integrations.beside_peft import TARGETS, assert_agrees, assert_close, calls_of
from tests.tiny_llama import randomise


def make(llama, dtype=torch.float32, **settings):
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "use_dora": True, **settings})
    return randomise(get_peft_model(llama(dtype), config), size=0.1)


def pair(llama, **settings):
    theirs = make(llama, **settings)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    return ours, theirs


def op_calls():
    return calls_of("dora_linear")


SETTINGS = {
    "default": {},
    "alpha": {"lora_alpha": 3, "r": 5},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 1}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
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
    others = [r for r in report.replaced if r.name not in linears]
    assert len(report.replaced) - len(others) == len(linears) > 0
    assert [r.kind for r in others] == ["lora.Embedding"] * ("embedding" in kind) and not report.skipped
    with op_calls() as op:
        ours(tokens)
    assert op.call_count == len(linears)
    assert_agrees(ours, theirs, tokens)
    assert list(ours.state_dict()) == names and repr(ours) == repr(theirs)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_dropout_is_pefts_under_our_mask(bias, use_rslora):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.3, use_dora=True, bias=bias, use_rslora=use_rslora)
    theirs = randomise(get_peft_model(nn.Sequential(nn.Linear(40, 30)), config))
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = torch.randn(2, 25, 40)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(7)
    y = ours(x_ours)
    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    keep = dropout_keep_mask_ref(seed, 50, 40, 0.3).reshape(x.shape)

    class OurMask(nn.Module):
        def forward(self, x):
            return x * keep / 0.7

    theirs.base_model.model[0].lora_dropout["default"] = OurMask()
    expected = theirs(x_theirs)
    assert_close(y, expected, 2e-6)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    assert_close(x_ours.grad, x_theirs.grad, 2e-5)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_close(p.grad, q.grad, 2e-5, name)


def test_dropout_is_off_in_eval_whatever_its_own_mode(llama, tokens):
    ours, theirs = pair(llama, lora_dropout=0.5)
    assert not torch.equal(ours.train()(tokens).logits, ours(tokens).logits)
    for model in (ours, theirs):
        model.eval()
    assert_agrees(ours, theirs, tokens)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    assert_agrees(ours, theirs, tokens)


def test_conv1d_and_convolutions_run_on_ours():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32)).eval()
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    theirs = randomise(get_peft_model(base, config))
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert [r.kind for r in report.replaced] == ["lora.Linear"] and not report.skipped
    assert_agrees(ours, theirs, torch.randint(64, (2, 9)))
    model = get_peft_model(
        nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0", "1"], use_dora=True)
    )
    twin = copy.deepcopy(model)
    report = accelerate(model)
    assert [r.kind for r in report.replaced] == ["lora.Conv1d", "lora.Linear"] and not report.skipped
    x = torch.randn(2, 4, 6)
    assert_close(model(x), twin(x), 2e-6)


def test_several_adapters(llama, tokens):
    theirs = make(llama)
    theirs.add_adapter("plain", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "k_proj"]))
    theirs.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    randomise(theirs, seed=2)
    ours = copy.deepcopy(theirs)
    assert len(accelerate(ours).replaced) == 8
    # one after the other; then together, where a q_proj with a DoRA among several is PEFT's
    for active, calls in (("default", 6), ("plain", 0), ("other", 2), (["default", "plain"], 4), (["other"], 2)):
        for model in (ours, theirs):
            model.eval().base_model.set_adapter(active)
        with op_calls() as op:
            ours(tokens)
        assert op.call_count == calls, active
        assert_agrees(ours, theirs, tokens)
        assert_agrees(ours.train(), theirs.train(), tokens)


def test_hooks_on_the_magnitude_run(llama, tokens):
    ours, _ = pair(llama)
    layer = next(m for m in ours.modules() if isinstance(m, AcceleratedLinear))
    seen = []
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *args: seen.append(1))
    ours(tokens)
    assert seen


# ----------------------------------------------------------------------------------------------------------- the cache


def merge_and_unmerge(model):
    model.merge_adapter(safe_merge=False)
    model.unmerge_adapter()


def merge_another(model):
    """PEFT adds to and subtracts from W.data; then W is W to within one rounding."""
    model.add_adapter("late", LoraConfig(r=2, target_modules=TARGETS))
    randomise(model, 4)
    model.merge_adapter(["late"])
    model.unmerge_adapter()


def hot_swap(model):
    state = {n: t * 1.5 for n, t in peft.get_peft_model_state_dict(model).items()}
    state = {
        n.replace(".weight", ".default.weight").replace("magnitude_vector", "magnitude_vector.default.weight"): t
        for n, t in state.items()
    }
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])


def initialise_from_the_base(model):
    model.add_adapter("late", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="olora"))


def load(model):
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, {n: t * 1.5 for n, t in state.items()})


def step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def rescale(model):
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.scale_layer(0.5)


CHANGES = (merge_and_unmerge, merge_another, hot_swap, initialise_from_the_base, load, step, rescale, randomise)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_the_cache_follows_what_peft_does_to_the_model(llama, tokens, change):
    ours, theirs = pair(llama)
    for model in (ours, theirs):
        model.eval()
    before = ours(tokens).logits
    for model in (ours, theirs):
        change(model)
    assert_close(ours(tokens).logits, theirs(tokens).logits, 2e-6)
    if "merge" not in change.__name__:
        assert (ours(tokens).logits - before).abs().max() > 1e-3
    assert_agrees(ours, theirs, tokens)


def test_a_disabled_adapter_leaves_the_base_alone(llama, tokens):
    ours, _ = pair(llama)
    ours.eval()
    with ours.disable_adapter(), op_calls() as op:
        assert torch.equal(ours(tokens).logits, llama()(tokens).logits) and op.call_count == 0


def test_a_merged_adapter_runs_without_the_op_and_is_unmerged(llama, tokens):
    ours, _ = pair(llama)
    adapted = ours.eval()(tokens).logits
    ours.merge_adapter(safe_merge=True)
    with op_calls() as op:
        assert_close(ours(tokens).logits, adapted, 1e-5)
    assert op.call_count == 0
    ours.unmerge_adapter()
    assert_close(ours(tokens).logits, adapted, 1e-5)


def test_merging_and_unloading_gives_what_pefts_own_gives(llama, tokens):
    ours, theirs = (model.eval() for model in pair(llama))
    merged = ours.merge_and_unload()
    assert not any(isinstance(m, PeftLinear) for m in merged.modules())
    assert_close(merged(tokens).logits, theirs.merge_and_unload()(tokens).logits, 1e-5)


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_the_same_and_is_independent(twin_of, llama, tokens):
    ours, theirs = pair(llama)
    expected = theirs.eval()(tokens).logits
    ours.eval()(tokens)
    twin = twin_of(ours)
    with torch.no_grad():
        assert_close(twin(tokens).logits, expected, 2e-6)
        for name, p in twin.named_parameters():
            if "magnitude" in name:
                p.zero_()
    assert_close(ours(tokens).logits, expected, 2e-6)


def test_a_saved_folder_is_read_by_peft_and_by_us(llama, tokens, tmp_path):
    ours, theirs = pair(llama)
    expected = theirs.eval()(tokens).logits
    ours.eval()(tokens)
    ours.save_pretrained(tmp_path)
    assert_close(peft.PeftModel.from_pretrained(llama(), tmp_path).eval()(tokens).logits, expected, 2e-6)
    again = llama()
    load_adapter(again, tmp_path)
    assert_close(again(tokens).logits, expected, 2e-6)


def test_restore_leaves_nothing_on_pefts_layers(llama, tokens):
    ours, theirs = pair(llama)
    expected = theirs.eval()(tokens).logits
    attributes = {n: set(vars(m)) for n, m in theirs.named_modules()}
    assert ours.eval()(tokens) and restore(ours) == 6
    assert {n: set(vars(m)) for n, m in ours.named_modules()} == attributes
    assert torch.equal(ours(tokens).logits, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_block_compiles_as_one_graph(llama, dropout):
    model = make(llama, lora_dropout=dropout).train()
    accelerate(model)
    block = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    results = []
    for run_block in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        model.zero_grad()
        y = run_block(x)
        y.sin().sum().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters() if p.grad is not None)])
    assert len(results[0]) == 4
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_peft_is(dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 80)).to(dtype)
    theirs = randomise(get_peft_model(base, LoraConfig(r=8, target_modules=["0"], use_dora=True)))
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    accelerate(ours)
    x, cotangent = torch.randn(200, 96, dtype=dtype), torch.randn(200, 80, dtype=dtype)
    results = []
    for model, inputs in ((ours, x), (theirs, x), (exact, x.double())):
        inputs = inputs.clone().requires_grad_()
        y = model(inputs)
        y.backward(cotangent.to(y.dtype))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert y.dtype == inputs.dtype and len(grads) == 3
        results.append([t.detach().double() for t in (y, inputs.grad, *grads)])
    eps = torch.finfo(dtype).eps
    for i, allowed in enumerate((2, 3, 3, 3, 3)):
        error, theirs_error = ((r[i] - results[2][i]).norm() / results[2][i].norm() for r in results[:2])
        assert error <= allowed * theirs_error + eps, i


def test_training_follows_peft_step_by_step(llama, tokens):
    losses = []
    for model in pair(llama, bias="lora_only"):
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
