"""A model that SHERL trained, on disk."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ..over_base import load_over_base, save_over_base
from ..report import Report
from .sherl import SHERLConfig, config_of_sherl, sherl


def save_sherl(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the side path, the LoRA factors where there are any, and a fingerprint of the base.

    Raises:
        ValueError: a model that :func:`sherl` did not make; other parameters that train; merged layers; values that are
            not finite. Nothing is written then.
        ImportError: safetensors is not installed.
    """
    return save_over_base(model, folder, "sherl", asdict(config_of_sherl(model, "save_sherl")), "save_sherl")


def load_sherl(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> Report:
    """Put what :func:`save_sherl` wrote on the base that it was trained over, in place.

    Args:
        trainable: whether side path and factors train afterwards. False freezes everything.

    Returns:
        A report; its ``undo()`` gives the base back.

    Raises:
        ValueError: files that are missing, broken or do not fit; another base. The model is then as it was.
        ImportError: safetensors is not installed.
    """
    return load_over_base(
        model,
        folder,
        "sherl",
        lambda settings: sherl(model, SHERLConfig(**settings)),
        "load_sherl",
        trainable=trainable,
    )
