"""A tiny Llama with random weights, and PEFT adapters of many kinds for it."""

import peft
import torch

from tests.tiny_llama import make_llama, randomise

KINDS = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 7},
        "alpha_pattern": {r"layers\.1\..*": 3.0},
    },
    "everywhere": {"r": 1, "target_modules": "all-linear"},
    "bias": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "rank 16": {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]},
}


def make_model(dtype=torch.float32):
    return make_llama(dtype, pad_token_id=0, eos_token_id=None)


def write_adapter(folder, seed=0, **settings):
    """A PEFT folder with random factors."""
    model = peft.get_peft_model(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def make_tokenizer():
    """A token a character, 64 of them; 0 pads."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = "\0 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!\n|'\"("
    words = tokenizers.models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="\0", padding_side="left")
    fast.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    return fast
