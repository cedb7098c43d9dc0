"""A Llama with random weights that is small enough for any test, and adapters that are not at their start."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_llama(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attention_bias=True, initializer_range=0.2, **settings)
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def randomise(model, seed=1, size=0.2):
    """Factors of any value; magnitudes near the norms that they started at, so that DoRA's g is of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.mul_(0.7 + 0.6 * torch.rand(p.shape, generator=generator))
        elif "lora_" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * size)
    return model
