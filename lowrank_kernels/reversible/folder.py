"""A model that MEFT trained, on disk."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ..over_base import load_over_base, save_over_base
from ..report import Report
from .meft import MEFTConfig, config_of_meft, meft


def save_meft(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write MEFT's adapters and settings, the LoRA factors where there are any, and a fingerprint of the base.

    Raises:
        ValueError: a model that :func:`meft` did not make; other parameters that train; merged layers; values that are
            not finite. Nothing is written then.
        ImportError: safetensors is not installed.
    """
    return save_over_base(model, folder, "meft", asdict(config_of_meft(model, "save_meft")), "save_meft")


def load_meft(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> Report:
    """Put what :func:`save_meft` wrote on the base that it was trained over, in place.

    Args:
        trainable: whether adapters and factors train afterwards. False freezes everything.

    Returns:
        A report; its ``undo()`` gives the base back.

    Raises:
        ValueError: files that are missing, broken or do not fit; another base. The model is then as it was.
        ImportError: safetensors is not installed.
    """
    return load_over_base(
        model,
        folder,
        "meft",
        lambda settings: meft(model, MEFTConfig(**settings)),
        "load_meft",
        trainable=trainable,
    )
