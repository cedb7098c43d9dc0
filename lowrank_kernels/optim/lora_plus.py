"""LoRA+: B learns faster than A (Hayou et al., arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .settings import check_model, check_number


def lora_plus_groups(
    model: nn.Module, lr: float, *, ratio: float = 16.0, embedding_lr: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups with lr_B = λ · lr_A.

    Args:
        model: with LoRA layers, this package's or PEFT's: parameters are told apart by their names.
        lr: lr_A.
        ratio: λ.
        embedding_lr: of everything that belongs to an nn.Embedding.
        weight_decay: of the factors; biases, other parameters of one dimension, and DoRA's magnitudes do not decay.

    Returns:
        Groups for any optimizer, each with a "name": "A", with any other matrix that trains, "B", "embedding", and
        "vectors", which learn at B's rate.
        Empty ones are left out. Every parameter that trains is in exactly one.

    Raises:
        TypeError: not a module, or a rate or ratio that is not a number.
        ValueError: one below 0 or not finite; no factor trains.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr), ("weight_decay", weight_decay)):
        check_number("lora_plus_groups", name, value)
    check_model("lora_plus_groups", model)
    rates = {"A": lr, "B": lr * ratio, "embedding": embedding_lr, "vectors": lr * ratio}
    params: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    embeddings = [name + "." for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding" in name or any(name.startswith(prefix) for prefix in embeddings):
            group = "embedding"
        elif p.dim() < 2 or "lora_magnitude" in name:
            group = "vectors"
        else:
            group = "B" if "lora_B" in name else "A"
        params[group].append(p)
    if not any(p.requires_grad and ("lora_A" in name or "lora_B" in name) for name, p in model.named_parameters()):
        raise ValueError(f"lora_plus_groups: expected LoRA layers that train, found none in {type(model).__name__}")
    return [
        {"name": name, "params": found, "lr": rates[name], "weight_decay": 0.0 if name == "vectors" else weight_decay}
        for name, found in params.items()
        if found
    ]


def lora_plus(
    model: nn.Module,
    lr: float,
    *,
    ratio: float = 16.0,
    embedding_lr: float = 1e-6,
    weight_decay: float = 0.0,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer over :func:`lora_plus_groups`; ``options`` go to ``optimizer``."""
    if not callable(optimizer):
        raise TypeError(f"lora_plus: expected optimizer to be a class of torch.optim, got {optimizer!r}")
    groups = lora_plus_groups(model, lr, ratio=ratio, embedding_lr=embedding_lr, weight_decay=weight_decay)
    return optimizer(groups, lr=lr, **options)  # type: ignore[call-arg]
