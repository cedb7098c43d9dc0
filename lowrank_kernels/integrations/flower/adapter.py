"""The adapter of a round: named tensors, as a model's layers take them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapt import adapt, plan_adaptation
from ...config import LoRAConfig
from ...federated import Factors, flex_lora
from ...merge import merge_lora_
from ...names import named_modules, named_parameters
from ...nn import BlockSparseLinear
from ...nn.lora import LoRALayer
from ...nn.matrix import matrix_shape
from ...report import Report
from ...smt import SMTConfig
from ...smt.selection import BlockSelection

Tensors = dict[str, Tensor]
BLOCK = 16
"""Rows and columns of a block of SLoRA's first stage."""


def name_a(path: str) -> str:
    """Of the layer's A, as in PEFT's files."""
    return f"{path}.lora_A.weight"


def name_b(path: str) -> str:
    """Of the layer's B, as in PEFT's files."""
    return f"{path}.lora_B.weight"


@dataclass(frozen=True)
class Layer:
    """What the server knows of an adapted linear: W is (N, K), its correction s B A of rank R."""

    n: int
    k: int
    r: int
    scaling: float

    @classmethod
    def of(cls, layer: LoRALayer) -> Layer:
        n, k = layer.matrix.shape
        return cls(n, k, layer.r, layer.scaling)


def factor_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The layers of an adapted model whose factors are matrices, by path.

    Raises:
        ValueError: none, or one of another kind, such as a convolution's.
    """
    layers = {path: m for path, m in named_modules(model) if isinstance(m, LoRALayer)}
    other = [path for path, m in layers.items() if not isinstance(getattr(m, "lora_A", None), nn.Linear)]
    if not layers or other:
        got = f"other layers in {', '.join(other[:5])}" if other else "none"
        raise ValueError(f"federated: expected LoRA layers on linears, got {got}; name linears in target_modules")
    return layers


def other_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains beside the factors: magnitudes, biases, whole modules."""
    factors = {name for path in factor_layers(model) for name in (name_a(path), name_b(path))}
    return {name: p for name, p in named_parameters(model) if p.requires_grad and name not in factors}


def ranked(model: nn.Module, config: LoRAConfig, rank: int | None, trains: str = "both") -> LoRAConfig:
    """The config with no rank over ``rank``, and each module's scaling as it was.

    Args:
        model: not adapted yet.
        trains: which factors train, "both" or "b".
    """
    plan = plan_adaptation(model, config)
    fitted: Any = plan.config
    if rank is not None:
        ranks = {path: min(fitted.rank_of(path), rank) for path in plan.targets}
        power = 0.5 if config.rslora else 1.0
        alphas = {path: fitted.scaling_of(path) * r**power for path, r in ranks.items()}
        names = {path: "^" + re.escape(path) for path in ranks}
        fitted = replace(
            fitted,
            rank_pattern={names[path]: r for path, r in ranks.items()},
            alpha_pattern={names[path]: alpha for path, alpha in alphas.items()},
        )
    return replace(fitted, train=trains)


def cut(tensors: Mapping[str, Tensor], layers: Mapping[str, Layer], rank: int, how: str) -> Tensors:
    """The factors among the tensors at no more than ``rank``: their first ranks ("first") or the best ("svd")."""
    found = dict(tensors)
    for path, layer in layers.items():
        a, b = tensors.get(name_a(path)), tensors.get(name_b(path))
        r = min(layer.r, rank)
        if a is not None and b is not None and how == "svd" and a.shape[0] > r:
            a, b, _ = flex_lora([Factors(a, b, layer.scaling)], rank=r)
        if a is not None:
            found[name_a(path)] = a[:r]
        if b is not None:
            found[name_b(path)] = b[:, :r]
    return found


def start_without(taken: Mapping[str, Tensor]) -> Tensors:
    """Factors that start where W was left without them: A and -B of a change of W."""
    return {name: -t if name.endswith(".lora_B.weight") else t for name, t in taken.items()}


@torch.no_grad()
def assemble(
    model: nn.Module,
    config: LoRAConfig,
    tensors: Mapping[str, Tensor],
    kept: Sequence[Mapping[str, Tensor]] = (),
    *,
    trains: str = "both",
    cut_by: str = "first",
) -> Report:
    """Adapt a base model in place and put the round's adapter into it.

    Args:
        model: the base, fresh; its weights are changed where ``kept`` says so.
        config: with the ranks of this client.
        tensors: by name; factors of a higher rank are cut to the layer's.
        kept: what earlier rounds have left, in their order. A alone is shared by all from there on; B alone changes W
            by s B A with that A; both change it by s B A of their own, and factors that ``tensors`` lacks start at A
            and -B; a block index says what trains instead of factors.
        trains: which factors train, "both" or "b".
        cut_by: "first" or "svd", as :func:`cut`.

    Returns:
        The report of ``lk.adapt``.

    Raises:
        ValueError: as ``lk.adapt``; tensors of a name that the model does not have, or of a shape that does not fit.
    """
    if any(name.endswith(".blocks") for name in tensors):
        return _assemble_blocks(model, tensors, kept)
    report = adapt(model, ranked(model, config, None, trains))
    layers, others = factor_layers(model), other_trained(model)
    shared: Tensors = {}
    start: Tensors = {}
    for changes in kept:
        for path, layer in layers.items():
            a, b = changes.get(name_a(path)), changes.get(name_b(path))
            if b is not None:
                merge_lora_(layer.matrix, shared[path] if a is None else a, b, scaling=layer.scaling)
                if a is not None:
                    start |= start_without({name_a(path): a, name_b(path): b})
            elif a is not None:
                shared[path] = a
    whole = start | {name_a(path): a for path, a in shared.items()} | dict(tensors)
    sizes = {path: Layer.of(layer) for path, layer in layers.items()}
    places: dict[str, Tensor] = dict(others)
    for path, layer in layers.items():
        places[name_a(path)], places[name_b(path)] = layer.factor_parameters()
    for name, value in cut(whole, sizes, max(layer.r for layer in layers.values()), cut_by).items():
        if name not in places or places[name].shape != value.shape:
            wanted = f"shape {tuple(places[name].shape)}" if name in places else "no such tensor"
            raise ValueError(f"assemble: expected {wanted} for {name}, got shape {tuple(value.shape)}")
        places[name].copy_(value)
    return report


def _assemble_blocks(model: nn.Module, tensors: Mapping[str, Tensor], kept: Sequence[Mapping[str, Tensor]]) -> Report:
    """SLoRA's first stage: blocks of W train, and ``tensors`` are how much they have changed so far."""
    paths = [name.removesuffix(".blocks") for name in tensors]
    index = {path: next(k[f"{path}.block_index"] for k in kept if f"{path}.block_index" in k) for path in paths}
    shapes = {path: matrix_shape(m) for path, m in named_modules(model) if path in index}
    report = adapt(model, SMTConfig(selection=BlockSelection(index, shapes, (BLOCK, BLOCK))))
    for path, layer in block_layers(model).items():
        layer.blocks.add_(tensors[f"{path}.blocks"].to(layer.blocks))
    return report


def block_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {path: m for path, m in named_modules(model) if isinstance(m, BlockSparseLinear)}


@torch.no_grad()
def trained_tensors(model: nn.Module) -> Tensors:
    """What a client sends back: every trained tensor in float32, blocks as their change."""
    blocks = block_layers(model)
    if blocks:
        return {
            f"{path}.blocks": (m.blocks - m.original_blocks.to(m.blocks.dtype)).float() for path, m in blocks.items()
        }
    return {name: p.detach().float() for name, p in named_parameters(model) if p.requires_grad}
