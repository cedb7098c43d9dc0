"""Adapters read: checked whole, then put on a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapt import Plan, carry_out, match_targets
from ..config import DoRAConfig, LoRAConfig
from ..report import Report, count_parameters
from .folder import CONFIG_FILE, WEIGHTS_FILE, few, inside, read_tensors
from .settings import read_config


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> Report:
    """Put a LoRA or DoRA adapter, written by PEFT or by :func:`save_adapter`, on a model, in place.

    The layers, ranks and scalings are those that the folder's config says; the tensors must be exactly those
    that such layers have. Factors become float32, or stay float64. A DoRA adapter gets PEFT's dropout,
    ``dropout_base=True``.

    Args:
        model: the base model, not adapted yet.
        folder: local, with adapter_config.json and adapter_model.safetensors.
        trainable: whether the factors, and the biases the config names, train afterwards. False freezes
            everything.

    Returns:
        The report of :func:`adapt`; its ``undo()`` takes the adapter off again, saved biases included.

    Raises:
        ValueError: a missing, unreadable, truncated or oversized file; a link that leaves the folder; pickled
            weights; a config of another method, or with a setting that is not supported, by its name; tensors
            that are missing, unexpected, of another shape, or not finite; targets that the model does not
            have.
        TypeError: tensors that are not floats.
        ImportError: safetensors is not installed.

    The model is exactly as before after every one of these.
    """
    folder = Path(folder)
    config, plan, tensors = read_adapter(model, folder)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else None
    report = carry_out(model, replace(config, init="zero", dtype=dtype), plan)
    try:
        with torch.no_grad():
            for name, t in tensors.items():
                model.get_parameter(name).copy_(t)
        if not trainable:
            model.requires_grad_(False)
    except BaseException:
        report.undo()
        raise
    trains, total = count_parameters(model)
    method = "DoRA" if isinstance(config, DoRAConfig) else "LoRA"
    return Report(f"{folder.name}: {method}", report.replaced, report.skipped, trains, total, _undo=report._undo)


class AdapterFile(NamedTuple):
    """What an adapter's folder says, checked against a model: its settings, its targets there, its tensors by the names
    that the parameters of the adapted model have."""

    config: LoRAConfig
    plan: Plan
    tensors: dict[str, Tensor]


def read_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and check a folder as :func:`load_adapter` does, and raise as it does; the model is not touched."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"load_adapter: expected a folder, got {str(folder)!r}")
    config = read_config(inside(folder, CONFIG_FILE))
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"load_adapter: expected {WEIGHTS_FILE} in {folder}, found adapter_model.bin, a pickle, which can run "
            f"code when read; load it with PEFT if you trust it, and save it again"
        )
    plan = match_targets(model, config)
    absent = [name for name, linear in plan.targets.items() if linear.weight.is_meta]
    if absent:
        raise ValueError(
            f"load_adapter: expected a model with its weights, got some on the meta device: {few(absent)}; load those "
            f"first: an adapter on the meta device would be lost"
        )
    base = _base_parameters(model, plan)
    tensors = read_tensors(inside(folder, WEIGHTS_FILE), _expected_shapes(base, config, plan), base, plan.skipped)
    return AdapterFile(config, plan, tensors)


def _base_parameters(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The model's parameters, by the names that they will have when the plan is carried out."""
    return {
        f"{owner}.base_layer.{key}" if owner in plan.targets else name: p
        for name, p in model.named_parameters(remove_duplicate=False)
        for owner, _, key in [name.rpartition(".")]
    }


def _expected_shapes(base: Mapping[str, nn.Parameter], config: LoRAConfig, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in plan.targets.items():
        own = config.layer_class(linear).shapes(linear, config.rank_of(name), config.lora_bias)
        shapes |= {f"{name}.{key}": shape for key, shape in own.items()}
        bias = getattr(linear, "bias", None)
        if config.bias == "lora_only" and bias is not None:
            shapes[f"{name}.base_layer.bias"] = tuple(bias.shape)
    if config.bias == "all":
        shapes |= {name: tuple(p.shape) for name, p in base.items() if f".{name}".endswith(".bias")}
    return shapes
