"""Examples as batches of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .docstrings import Example

Batch = dict[str, Tensor]


def encode(tokenizer: Any, examples: list[Example], device: torch.device | str) -> Batch:
    """A left-padded batch of prompts and targets. Prompts and padding have label -100, which no loss counts."""
    rows = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        target = tokenizer(example.target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt + target, [-100] * len(prompt) + target))
    length = max(len(ids) for ids, _ in rows)
    columns = {
        "input_ids": [[tokenizer.pad_token_id] * (length - len(ids)) + ids for ids, _ in rows],
        "attention_mask": [[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows],
        "labels": [[-100] * (length - len(ids)) + labels for ids, labels in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def batches(
    tokenizer: Any, examples: list[Example], size: int, seed: int, device: torch.device | str
) -> Iterator[Batch]:
    """Endless shuffled batches, the same for the same seed."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(examples, len(examples))
        for start in range(0, len(shuffled) - size + 1, size):
            yield encode(tokenizer, shuffled[start : start + size], device)


def in_order(tokenizer: Any, examples: list[Example], size: int, device: torch.device | str) -> Iterator[Batch]:
    """All examples once, as they come."""
    for start in range(0, len(examples), size):
        yield encode(tokenizer, examples[start : start + size], device)
