"""A tiny Llama with random weights: the model that these tests adapt."""

import pytest
import torch

from tests.tiny_llama import make_llama


@pytest.fixture
def llama():
    return make_llama


@pytest.fixture
def tokens():
    return torch.arange(2 * 9).reshape(2, 9) * 7 % 64
