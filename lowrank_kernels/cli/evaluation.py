"""How well a model does on functions that it was not trained on."""

from __future__ import annotations

from typing import Any

import torch

from ..integrations.transformers import answer_loss
from .batches import encode
from .docstrings import Example


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, examples: list[Example], size: int, device: torch.device | str) -> float:
    """Mean loss per target token over the examples, in nats."""
    was_training = model.training
    model.eval()
    total = tokens = 0.0
    by_length = sorted(examples, key=lambda e: len(e.prompt) + len(e.target))
    for start in range(0, len(by_length), size):
        batch = encode(tokenizer, by_length[start : start + size], device)
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(answer_loss(model, **batch)) * count
        tokens += count
    model.train(was_training)
    return total / tokens


@torch.no_grad()
def write_docstrings(model: Any, tokenizer: Any, examples: list[Example], device: torch.device | str) -> list[str]:
    """What the model writes for each prompt, greedily, up to the closing quotes."""
    was_training = model.training
    model.eval()
    inputs = tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True).to(device)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return [text.split('"""')[0].strip().splitlines()[0] if text.strip() else "" for text in texts]
