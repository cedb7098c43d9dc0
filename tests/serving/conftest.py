"""The adapters on disk, and what PEFT's own model says with each."""

import copy

import peft
import pytest
import torch

from tests.serving.tiny_model import KINDS, make_model, write_adapter


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, i, **kind) for i, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="session")
def alone(folders):
    """The logits of PEFT's own model with one adapter, by name (None: the base), and tokens."""
    base, models = make_model(), {}

    @torch.no_grad()
    def logits(name, tokens, **inputs):
        if name is None:
            return base(tokens, **inputs).logits
        if name not in models:
            models[name] = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[name]).eval()
        return models[name](tokens, **inputs).logits

    logits.models = models
    return logits


@pytest.fixture
def model():
    return make_model()
