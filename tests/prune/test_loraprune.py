"""LoRAPrune: importance, masks, the schedule, the cut, going on, and what is refused."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.prune import LoRAPrune, cubic, decoder_groups

transformers = pytest.importorskip("transformers")

KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")


def tiny(kind="Llama", **settings):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        head_dim=4,
    )
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model


def adapted(kind="Llama", targets="all-linear", **settings):
    model = tiny(kind, **settings)
    lk.adapt(model, lk.LoRAConfig(r=4, target_modules=targets, dropout=0.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


IDS = torch.arange(24).view(2, 12) % 32


def train(model, optimizer, steps, clip=None):
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        ids = (IDS + step) % 32
        model(input_ids=ids, labels=ids).loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    model.eval()


def test_importance_is_the_dense_formula_summed_over_every_structure():
    model = adapted()
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.25, steps=10, warmup=5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {}
    for path, group in prune.groups.items():
        total = torch.zeros(group.count, dtype=torch.float64)
        for part in group.parts:
            layer = model.get_submodule(part.path)
            a, b = layer.lora_A.weight, layer.lora_B.weight
            w, a, b, da, db = (t.detach().double() for t in (layer.weight, a, b, a.grad, b.grad))
            dense = ((db @ a + b @ da - db @ da) * (w + layer.scaling * b @ a)).square()
            total += dense.sum(1 if part.rows else 0).view(group.count, part.width).sum(1)
        expected[path] = total
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)  # importance is of the gradients before
    optimizer.step()
    for path, total in expected.items():
        torch.testing.assert_close(prune._importance[path].double(), total, rtol=1e-5, atol=0.0)


def test_importance_is_averaged():
    model = adapted()
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.25, steps=10, warmup=5, decay=0.75)
    found = []
    scores = prune._scores
    prune._scores = lambda scale: found.append(scores(scale)) or found[-1]
    train(model, optimizer, 3)
    for path in prune.groups:
        a, b, c = (f[path] for f in found)
        torch.testing.assert_close(prune._importance[path], 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c)


def test_the_schedule_is_cubic():
    assert [cubic(s, 2, 6) for s in (0, 2, 4, 6, 9)] == [0.0, 0.0, 1 - 0.5**3, 1.0, 1.0]
    model = adapted()
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.3, steps=8, warmup=2)
    smallest = 2 * next(g.size for g in prune.groups.values() if g.kind == "channels")  # one in each layer
    for step in range(1, 11):
        train(model, optimizer, 1)
        assert abs(prune.masked - 0.3 * cubic(step, 2, 8) * prune.prunable) <= smallest / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_the_cut_model_is_the_masked_one_and_loads_in_plain_transformers(tmp_path, kind, ratio):
    model = adapted(kind)
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=ratio, steps=3)
    before = sum(p.numel() for p in tiny(kind).parameters())
    train(model, optimizer, 3)
    with torch.no_grad():
        masked, prunable, cut = model(input_ids=IDS).logits, prune.prunable, prune.masked
        smallest = 2 * next(g.size for g in prune.groups.values() if g.kind == "channels")
        assert abs(cut - ratio * prunable) <= smallest / 2
        plain = prune.cut()
        assert plain is model and not any(hasattr(m, "base_layer") for m in model.modules())
        torch.testing.assert_close(model(input_ids=IDS).logits, masked, rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in model.parameters()) == before - cut
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
        generated = loaded.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert generated.shape == (2, 9)


def test_planted_structures_are_cut():
    """Channels and heads whose weights are next to nothing."""
    model = adapted()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear, rows in ((layer.mlp.up_proj, [3, 7]), (layer.mlp.gate_proj, [3, 7])):
                linear.weight[rows] *= 1e-3
                linear.lora_B.weight[rows] = 0.0
            layer.mlp.down_proj.weight[:, [3, 7]] *= 1e-3
            layer.mlp.down_proj.lora_A.weight[:, [3, 7]] *= 1e-3
    optimizer = adamw(model)
    groups = decoder_groups(model, "test")
    two_channels = sum(2 * group.size for group in groups if group.kind == "channels")
    ratio = two_channels / sum(group.count * group.size for group in groups)
    prune = LoRAPrune(model, optimizer, ratio=ratio, steps=2)
    train(model, optimizer, 2)
    for path, mask in prune.masks.items():
        assert (mask == 0).nonzero().flatten().tolist() == ([3, 7] if path.endswith("mlp") else []), path


def test_it_goes_on_bit_for_bit():
    def start():
        model = adapted()
        optimizer = adamw(model)
        return model, optimizer, LoRAPrune(model, optimizer, ratio=0.3, steps=8, warmup=2)

    model, optimizer, prune = start()
    train(model, optimizer, 5)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    train(model, optimizer, 4)
    again, other, resumed = start()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    train(again, other, 4)
    assert resumed.taken == prune.taken and resumed.history == prune.history
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    assert all(torch.equal(mask, resumed.masks[path]) for path, mask in prune.masks.items())


def test_accumulated_gradients_count_as_their_sum():
    found = []
    for parts in (1, 2):
        model = adapted()
        optimizer = adamw(model)
        prune = LoRAPrune(model, optimizer, ratio=0.25, steps=10, warmup=5)
        for ids in IDS.chunk(parts):
            (model(input_ids=ids, labels=ids).loss / parts).backward()
        optimizer.step()
        found.append(prune._importance)
    for path, one in found[0].items():
        torch.testing.assert_close(found[1][path], one, rtol=1e-4, atol=0.0)


def test_frozen_weights_get_no_gradient_and_layers_that_are_not_adapted_are_left_out():
    model = adapted(targets=["q_proj", "down_proj"])
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.2, steps=2)
    train(model, optimizer, 2)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert prune.masked > 0


def test_detach_takes_every_hook_off():
    model = adapted()
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.3, steps=2)
    train(model, optimizer, 2)
    prune.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        full = model(input_ids=IDS).logits
        torch.testing.assert_close(lk.merge_and_unload(model)(input_ids=IDS).logits, full, rtol=1e-4, atol=1e-5)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))


@pytest.mark.parametrize("make", [gpt2, lambda: nn.Sequential(nn.Linear(4, 4))])
def test_a_structure_that_is_not_recognised_is_named(make):
    model = make()
    with pytest.raises(ValueError, match=f"{type(model).__name__}, whose structure is not recognised"):
        decoder_groups(model, "LoRAPrune")


def test_what_is_refused():
    model = adapted()
    optimizer = adamw(model)
    for ratio in (0.0, 1.0, -0.1, math.nan, "a", True):
        with pytest.raises(ValueError, match="ratio"):
            LoRAPrune(model, optimizer, ratio=ratio, steps=2)
    with pytest.raises(ValueError, match="that leaves one of each in every layer"):
        LoRAPrune(model, optimizer, ratio=0.999, steps=2)
    for settings in ({"steps": 0}, {"warmup": -1}, {"every": 0}):
        with pytest.raises(ValueError, match=f"expected {next(iter(settings))} to be an integer"):
            LoRAPrune(model, optimizer, **{"ratio": 0.2, "steps": 4, **settings})
    with pytest.raises(ValueError, match="warmup below steps"):
        LoRAPrune(model, optimizer, ratio=0.2, steps=4, warmup=4)
    with pytest.raises(ValueError, match=r"adapted linears in model\.layers\.0\.mlp"):
        LoRAPrune(adapted(targets=["q_proj"]), optimizer, ratio=0.2, steps=4)
    for config in (lk.DoRAConfig(r=2), lk.LoRAConfig(r=2, gate=True)):
        other = tiny()
        lk.adapt(other, config)
        with pytest.raises(ValueError, match="LoRALinear layers without a gate"):
            LoRAPrune(other, optimizer, ratio=0.2, steps=4)


def test_importance_that_is_not_finite_changes_no_mask():
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    prune = LoRAPrune(model, optimizer, ratio=0.3, steps=2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    prune._gradients[id(layer.lora_B.weight)][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or Inf for model\.layers\.0\.mlp; no mask has changed"):
        optimizer.step()
    assert prune.masked == 0


def test_a_merge_that_fails_leaves_the_model_masked():
    model = adapted()
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.3, steps=2)
    train(model, optimizer, 2)
    masked = model(input_ids=IDS).logits
    broken = copy.deepcopy(model.model.layers[1].mlp.up_proj.lora_A.weight.data)
    model.model.layers[1].mlp.up_proj.lora_A.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        prune.cut()
    model.model.layers[1].mlp.up_proj.lora_A.weight.data.copy_(broken)
    assert torch.equal(model(input_ids=IDS).logits, masked)


def test_numbers_of_heads_that_the_config_refuses_are_not_taken(tmp_path):
    """Llama's config wants hidden_size to be a multiple of the number of heads; 6 of 8 heads cannot be saved."""
    model = adapted()
    with torch.no_grad():
        for layer in model.model.layers:  # one KV head of four, with its two query heads, is next to nothing
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                rows = linear.out_features // 4
                linear.weight[:rows] *= 1e-4
                linear.lora_B.weight[:rows] = 0.0
            layer.self_attn.o_proj.weight[:, :8] *= 1e-4
            layer.self_attn.o_proj.lora_A.weight[:, :8] *= 1e-4
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.15, steps=2)
    train(model, optimizer, 2)
    assert abs(prune.masked - 0.15 * prune.prunable) <= 96
    prune.cut()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("kind, name", [("Olmo2", "q_norm"), ("BitNet", "attn_sub_norm"), ("DiffLlama", "lambda_q1")])
def test_what_depends_on_all_heads_is_refused(kind, name):
    with pytest.raises(ValueError, match=f"depends on its structures .* got {name}"):
        decoder_groups(tiny(kind), "LoRAPrune")


def test_a_frozen_factor_is_refused():
    model = tiny()
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules="all-linear", train="b"))
    with pytest.raises(ValueError, match="factors both train"):
        LoRAPrune(model, adamw(model), ratio=0.2, steps=4)


def test_few_bits_are_trained_over_and_made_dense_before_the_cut():
    model = tiny(hidden_size=64, intermediate_size=64)
    lk.quantize_(model, "nf4")
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=["v_proj", "up_proj"]))
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.3, steps=2)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"dense weights to cut, got one stored as nf4 in model\.layers\.0"):
        prune.cut()
    lk.dequantize_(model)
    with torch.no_grad():
        masked = model(input_ids=IDS).logits
        torch.testing.assert_close(prune.cut()(input_ids=IDS).logits, masked, rtol=1e-4, atol=1e-5)


def test_a_masked_model_is_pickled_and_copied_with_masks_of_its_own():
    model = adapted()
    optimizer = adamw(model)
    prune = LoRAPrune(model, optimizer, ratio=0.3, steps=2)
    train(model, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        masked = model(input_ids=IDS).logits
        for mask in prune.masks.values():
            mask.fill_(1.0)
        assert not torch.equal(model(input_ids=IDS).logits, masked)
        assert all(torch.equal(other(input_ids=IDS).logits, masked) for other in copies)


def test_a_model_that_was_compiled_and_called_before_is_masked():
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        whole = compiled(input_ids=IDS).logits
        optimizer = adamw(model)
        prune = LoRAPrune(model, optimizer, ratio=0.3, steps=2)
        for mask in prune.masks.values():
            mask[:2] = 0.0
        masked = model(input_ids=IDS).logits
        torch.testing.assert_close(compiled(input_ids=IDS).logits, masked)
        prune.detach()
        torch.testing.assert_close(compiled(input_ids=IDS).logits, whole)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_the_scale_of_a_grad_scaler_is_taken_out(fused, unscale):
    found = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        model = adapted()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=fused)
        prune = LoRAPrune(model, optimizer, ratio=0.25, steps=10, warmup=5, scaler=scaler)
        scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append(prune._importance)
    for path, plain in found[0].items():
        torch.testing.assert_close(found[1][path], plain, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_checkpointed_layers_are_kept(reentrant):
    found = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = adamw(model)
        prune = LoRAPrune(model, optimizer, ratio=0.25, steps=10, warmup=5)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        found.append(prune._importance)
    for path, plain in found[0].items():
        torch.testing.assert_close(found[1][path], plain, rtol=1e-4, atol=0.0)
