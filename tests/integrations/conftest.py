"""A tiny Llama with random weights: the model that these tests adapt."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach for the network

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_llama(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        initializer_range=0.2,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture
def llama():
    return make_llama


@pytest.fixture
def tokens():
    return torch.arange(2 * 9).reshape(2, 9) * 7 % 64
