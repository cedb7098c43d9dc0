"""transformers' models with random weights, small enough for any test; each with inputs, and what an adapter takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

SMALL = {"vocab_size": 64, "hidden_size": 32}
HEADS = {"num_attention_heads": 2, "intermediate_size": 48}
IDS = torch.arange(3, 15).reshape(2, 6) * 7 % 61


class Tiny(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    """What may train whole: a head, norms, an embedding."""


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**SMALL, **HEADS, num_hidden_layers=2, attention_bias=True, tie_word_embeddings=True)
    )


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(**SMALL, **HEADS, num_hidden_layers=2, max_position_embeddings=16, num_labels=3)
    )


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def vit() -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=32, **HEADS, num_hidden_layers=2, image_size=16, patch_size=8, num_labels=3)
    )


def whisper() -> nn.Module:
    ends = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in SIDES.items()}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"d_model": 32, "max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 8}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(vocab_size=64, **sizes, **ends, **special))


SIDES = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **SMALL,
            **HEADS,
            num_key_value_heads=2,
            num_hidden_layers=2,
            num_local_experts=2,
            experts_implementation="eager",  # the others have no float64
        )
    )


def mamba() -> nn.Module:
    return tf.MambaForCausalLM(tf.MambaConfig(**SMALL, state_size=8, time_step_rank=8, num_hidden_layers=2))


_sound, _image = torch.randn(2, 8, 16), torch.randn(2, 3, 16, 16)
MODELS = {
    "llama": Tiny(llama, {"input_ids": IDS}, ("q_proj", "up_proj"), ("embed_tokens",)),
    "bert": Tiny(bert, {"input_ids": IDS}, ("query", "dense"), ("classifier", "LayerNorm")),
    "t5": Tiny(t5, {"input_ids": IDS, "decoder_input_ids": IDS}, ("q", "wo"), ("lm_head",)),
    "vit": Tiny(vit, {"pixel_values": _image}, ("q_proj", "fc1"), ("classifier",)),
    "whisper": Tiny(
        whisper, {"input_features": _sound, "decoder_input_ids": IDS}, ("v_proj", "fc2"), ("proj_out", "layer_norm")
    ),
    "mixtral": Tiny(mixtral, {"input_ids": IDS}, ("q_proj", "o_proj"), ("gate", "lm_head")),
    "mamba": Tiny(mamba, {"input_ids": IDS}, ("in_proj",), ("conv1d", "norm_f")),
}


@cache
def _made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv" not in name:
                p.mul_(5)  # a spread of logits that an error shows in
    return model


def fresh(make: Callable[[], nn.Module]) -> Any:
    """A model of its own; the same weights each time."""
    return copy.deepcopy(_made(make))


@torch.no_grad()
def exact_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Of a float32 model in float64, where two models that are the same agree whatever the order of their sums."""
    wide = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    out = model.double()(**wide)
    model.float()
    return out.logits if "logits" in out else out.start_logits + 2 * out.end_logits  # type: ignore[no-any-return]


@cache
def plain_logits(kind: str) -> Tensor:
    return exact_logits(fresh(MODELS[kind].make), MODELS[kind].inputs)


@torch.no_grad()
def train(model: nn.Module, seed: int = 1) -> Any:
    """Everything that trains gets other values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            drawn = torch.randn(p.shape, generator=generator)
            if "magnitude" in name:
                p.mul_(1 + 0.3 * drawn.tanh())
            else:
                p.add_(0.2 * drawn)
    return model


def assert_the_same(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
