"""transformers' models of which a module reads a linear's weight: that linear is not replaced, and all others train."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk

tf = pytest.importorskip("transformers")

IDS = torch.arange(2, 14).reshape(2, 6)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}


def mamba():
    return tf.MambaForCausalLM(tf.MambaConfig(**SMALL, state_size=8, time_step_rank=8))


def falcon_mamba():
    return tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**SMALL, state_size=8, time_step_rank=8))


def mamba2():
    return tf.Mamba2ForCausalLM(
        tf.Mamba2Config(**SMALL, state_size=8, num_heads=4, head_dim=16, n_groups=1, expand=2, chunk_size=4)
    )


def jamba():
    return tf.JambaForCausalLM(
        tf.JambaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=4,
            expert_layer_offset=3,
            num_experts=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        )
    )


def deberta():
    return tf.DebertaModel(
        tf.DebertaConfig(
            **SMALL, num_attention_heads=2, intermediate_size=32, relative_attention=True, pos_att_type=["c2p"]
        )
    )


def bloom(**settings):
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2, **settings))


MODELS = {
    mamba: {"x_proj", "dt_proj", "out_proj"},
    falcon_mamba: {"x_proj", "dt_proj", "out_proj"},
    mamba2: {"out_proj"},
    jamba: {"dt_proj"},
    deberta: {"in_proj"},
    bloom: set(),
}


def leaf(name):
    return name.rpartition(".")[2]


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_read_linears_are_refused_by_name_and_every_replaced_one_trains(make):
    model = make().eval()
    report = lk.adapt(model, lk.LoRAConfig(r=4))
    refused = {leaf(s.name) for s in report.skipped if "reads its weight instead of calling it" in s.reason}
    assert refused == MODELS[make]
    output = model(IDS)
    (output.logits if "logits" in output else output.last_hidden_state).square().mean().backward()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, lk.nn.LoRALinear)}
    assert layers and all(layer.lora_B.weight.grad is not None for layer in layers.values())


def test_merging_keeps_what_mamba_computes():
    model = mamba().eval()
    lk.adapt(model, lk.LoRAConfig(r=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
        want = model(IDS).logits
        torch.testing.assert_close(lk.merge_and_unload(model)(IDS).logits, want, rtol=2e-5, atol=2e-5)


def test_only_linears_whose_weights_are_read_leave_nothing_to_replace():
    with pytest.raises(ValueError, match=r"dt_proj \(its parent, MambaMixer, reads its weight instead of calling it"):
        lk.adapt(mamba(), lk.LoRAConfig(r=4, target_modules=("dt_proj",)))


def test_a_reading_that_the_settings_switch_off_is_no_reading():
    sliced = lk.adapt(bloom(pretraining_tp=2, slow_but_exact=True), lk.LoRAConfig(r=4))
    assert {leaf(r.name) for r in sliced.replaced} == {"query_key_value", "dense_h_to_4h"}
    whole = lk.adapt(bloom(), lk.LoRAConfig(r=4))
    assert {leaf(r.name) for r in whole.replaced} >= {"dense", "dense_4h_to_h"}
