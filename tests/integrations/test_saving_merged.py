"""Merged models in transformers' format, and PEFT's own merging of accelerated layers."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import lowrank_kernels as lk

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(18).reshape(2, 9) * 7 % 61 + 3
CONFIGS = {
    "LoRA": lk.LoRAConfig(r=4),
    "DoRA": lk.DoRAConfig(r=4),
    "many": lk.MultiLoRAConfig(ranks=(2, 4)),
}


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


def adapted(config):
    model = llama()
    lk.adapt(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_and_unloaded_model_is_saved_and_read_back(name, tmp_path):
    model = adapted(CONFIGS[name])
    if name == "many":
        with lk.nn.use_adapters([1, 1]):
            want = logits(model)
    else:
        want = logits(model)
    lk.merge_and_unload(model, adapter=1 if name == "many" else None).save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("how_many", ["one layer", "all layers"])
def test_save_pretrained_refuses_merged_layers_and_writes_nothing(how_many, tmp_path):
    model = adapted(CONFIGS["LoRA"])
    layers = [m for m in model.modules() if isinstance(m, lk.nn.LoRALinear)]
    for layer in layers[: 1 if how_many == "one layer" else None]:
        layer.merge_()
    with pytest.raises(ValueError, match=r"save_pretrained: .*q_proj.*lk\.merge_and_unload\(model\) first"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_pretrained_of_unmerged_layers_writes_what_a_trainer_resumes_from(tmp_path):
    from safetensors.torch import load_file

    model = adapted(CONFIGS["LoRA"])
    model.save_pretrained(tmp_path)
    again = llama()
    lk.adapt(again, CONFIGS["LoRA"])
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(again), logits(model))


def test_copies_and_pickles_of_an_adapted_model_save_themselves(tmp_path):
    model = adapted(CONFIGS["LoRA"])
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.q_proj.merge_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge_and_unload"):
        twin.save_pretrained(tmp_path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(read), logits(model))
    read.model.layers[0].self_attn.q_proj.merge_()
    with pytest.raises(ValueError, match="merge_and_unload"):
        read.save_pretrained(tmp_path)


def test_undo_gives_the_models_own_save_pretrained_back():
    model = llama()
    report = lk.adapt(model, CONFIGS["LoRA"])
    report.undo()
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_merges_and_unloads_accelerated_layers(use_dora, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=use_dora, init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    report = lk.integrations.peft.accelerate(model)
    assert len(report.replaced) == 4
    want = logits(model)
    plain = model.merge_and_unload()
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in plain.modules())
    torch.testing.assert_close(logits(plain), want, rtol=2e-5, atol=2e-5)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(plain))


def test_a_model_of_pefts_is_refused_with_its_own_way():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    lk.integrations.peft.accelerate(model)
    with pytest.raises(ValueError, match=r"q_proj: .*call the PeftModel's own merge_and_unload\(\)"):
        lk.merge_and_unload(model)
