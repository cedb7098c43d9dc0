"""``lk.adapt(model, LoRAConfig())`` on tiny models of many architectures: all linears are told, all layers train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_kernels as lk

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = TEXT | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 8}
ONE_IMAGE = {"image_size": 16, "patch_size": 8}

MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("CausalLM", LLAMA),
    "mistral": ("CausalLM", LLAMA),
    "qwen2": ("CausalLM", LLAMA),
    "qwen3": ("CausalLM", LLAMA),
    "gemma2": ("CausalLM", LLAMA),
    "phi3": ("CausalLM", LLAMA),
    "olmo2": ("CausalLM", LLAMA),
    "mixtral": ("CausalLM", LLAMA | {"num_local_experts": 4}),
    "gpt2": ("CausalLM", TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}),
    "gpt_neox": ("CausalLM", BERT),
    "falcon": ("CausalLM", BERT | {"multi_query": True}),
    "bloom": ("CausalLM", TEXT | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("CausalLM", BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mamba": ("CausalLM", TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "bert": ("SequenceClassification", BERT),
    "roberta": ("SequenceClassification", BERT),
    "electra": ("TokenClassification", BERT | {"embedding_size": 16}),
    "deberta-v2": ("SequenceClassification", BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "distilbert": (
        "SequenceClassification",
        TEXT | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40},
    ),
    "xlnet": ("SequenceClassification", TEXT | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "t5": ("Seq2SeqLM", TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "bart": (
        "Seq2SeqLM",
        TEXT
        | {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 40,
        },
    ),
    "vit": ("ImageClassification", BERT | ONE_IMAGE),
    "dinov2": ("ImageClassification", BERT | ONE_IMAGE | {"mlp_ratio": 2}),
    "whisper": (
        "SpeechSeq2Seq",
        TEXT
        | {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "decoder_start_token_id": 1,
        },
    ),
}


def build(name: str) -> nn.Module:
    task, settings = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **settings)
    return getattr(transformers, f"AutoModelFor{task}").from_config(config)


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    task, tokens = MODELS[name][0], torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    if task == "ImageClassification":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    if task == "SpeechSeq2Seq":
        return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens}
    if task == "Seq2SeqLM":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def step(model: nn.Module, name: str) -> torch.Tensor:
    return model(**inputs_of(name)).logits.float().square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_each_linear_is_told_once_and_each_layer_trains(name):
    model = build(name).train()
    linears = {path for path, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    report = lk.adapt(model, lk.LoRAConfig())
    replaced = [r.name for r in report.replaced]
    told = replaced + [s.name for s in report.skipped]
    assert len(told) == len(set(told)) and linears <= set(told) and replaced
    step(model, name).backward()
    for path in replaced:
        layer = model.get_submodule(path)
        assert layer.lora_B.weight.grad is not None, path
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_most_of_a_model_is_not_passed_over_in_silence(name):
    """Of all matrices, and stacks of them, that are not embeddings or convolutions, each is told."""
    model = build(name)
    outside = (nn.Embedding, nn.modules.conv._ConvNd)
    matrices = {
        f"{path}.{key}": p
        for path, module in model.named_modules()
        if not isinstance(module, outside)
        for key, p in module.named_parameters(recurse=False)
        if p.dim() >= 2 and p.numel() > 0.05 * sum(q.numel() for q in model.parameters())
    }
    report = lk.adapt(model, lk.LoRAConfig())
    told = {r.name for r in report.replaced} | {s.name for s in report.skipped}
    untold = [name for name in matrices if name not in told and name.rpartition(".")[0] not in told]
    assert not untold


@pytest.mark.parametrize("name", ["falcon", "gpt2", "bert", "t5"])
def test_a_trained_adapter_merges_into_a_plain_model_of_the_same_logits(name):
    model = build(name).eval()
    lk.adapt(model, lk.LoRAConfig())
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lora_B" in path:
                p.normal_(std=0.1)
    expected = model(**inputs_of(name)).logits
    torch.testing.assert_close(lk.merge_and_unload(model)(**inputs_of(name)).logits, expected, rtol=1e-4, atol=1e-5)
