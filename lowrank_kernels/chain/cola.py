"""COLA: a chain of whole LoRAs (Xia et al., arXiv 2401.04151)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .chain import Chain


def cola(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_link: int, *, init: str = "gaussian", **settings: Any
) -> Chain:
    """Chain of LoRA: train A and B, merge, start again with a fresh A and B = 0.

    After T links the total update has a rank of up to T R.

    Args:
        model: adapted with ``LoRAConfig()``, both factors training.
        init: of the fresh A.
        (the others as for :class:`Chain`)

    Raises:
        ValueError: a layer with a frozen factor, and as :class:`Chain`.
    """
    return Chain(model, optimizer, steps_per_link, init=init, one_sided=False, name="cola", **settings)
