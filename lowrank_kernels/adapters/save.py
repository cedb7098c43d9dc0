"""Adapters written, as folders that PEFT loads."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import TASK_HEADS, config_of, whole_modules
from ..config import ALL_EXPERTS, ALL_LINEAR, DoRAConfig, LaMDAConfig, LoRAConfig, MultiLoRAConfig, names_match
from ..finite import all_finite
from ..functional import check_flag
from ..functional import fold_gate as folded_b
from ..names import named_modules, named_parameters, unwrapped
from ..nn.dora import DoRALayer
from ..nn.experts import ExpertFactors, LoRAExperts, peft_prefixes
from ..nn.lamda import LaMDALinear
from ..nn.lora import LoRALayer, LoRALinear
from ..nn.matrix import is_conv1d, weight_shape
from ..nn.multi_lora import MultiLoRALinear
from ..nn.sharded import whole
from .folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, few, write_aside
from .matching import with_patterns_that_agree
from .settings import written_config

logger = logging.getLogger("lowrank_kernels")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model_name: str | None = None,
    task_type: str | None = None,
    config: LoRAConfig | None = None,
    adapter: int | None = None,
    fold_gate: bool = True,
) -> Path:
    """Write the model's LoRA or DoRA adapter as a folder that PEFT loads.

    Args:
        model: adapted by :func:`adapt`, compiled or wrapped, as a whole or in parts. Where FSDP2 shards it, every rank
            has to call this: each gathers the factors and writes the files. Under FSDP1 call it in
            ``FullyShardedDataParallel.summon_full_params(model)``.
        folder: made if missing. Files are written aside and renamed, so that neither is ever half there.
        base_model_name: for PEFT's ``base_model_name_or_path``.
        task_type: for PEFT's ``task_type``, such as "CAUSAL_LM"; PEFT's Auto classes need it. For "SEQ_CLS",
            "TOKEN_CLS" and "QUESTION_ANS" the model's head is written too, as PEFT expects, whether it trained or not.
        config: for a model whose LoRA layers were put in by hand.
        adapter: which one, of a model adapted by ``MultiLoRAConfig``.
        fold_gate: write B ∘ gate in the place of B, which PEFT and engines read, and which computes the same. False
            keeps the gates, to train on from: a tensor ``lora_gate`` a layer, and a ``peft_type`` of our own, so that
            PEFT refuses what without its gates would be another adapter; :func:`load_adapter` reads it.

    Returns:
        The folder.

    Where patterns of ``rank_pattern`` or ``alpha_pattern`` overlap and disagree, the file has a pattern of each layer's
    own instead: PEFT does not keep their order.

    Tensors keep their dtypes; a B with its gate is written in float32. Merged layers save their factors as they are.
    The format has no words for DoRA's ``dropout_base`` and ``detach_norm``, which matter to training alone; they are
    not saved. Nor is the dropout of a model whose experts are adapted, which PEFT would refuse; and DoRA of experts,
    which PEFT has not, is written with a ``peft_type`` of our own. The modules of ``modules_to_save`` are written
    whole. What else trains is not written: the log names it.
    "all-linear" is written as the names of the layers.

    Raises:
        ValueError: no LoRA layer in the model; no config, or one that does not describe the layers there are; an
            adapter on what is to be written whole; base weights that LoRA-GA's start or a chain has changed, over
            which alone the factors are right; a value that is not finite, or not at hand: on the meta device, a shard.
            Nothing is written then.
        ImportError: safetensors is not installed.
    """
    check_flag("save_adapter", "fold_gate", fold_gate)
    config = config or config_of(model)  # type: ignore[assignment]
    tensors: dict[str, Tensor]
    if isinstance(config, MultiLoRAConfig):
        config, tensors = _one_of_many(model, config, adapter)
        config = _with_head(config, task_type)
        return _write_adapter(
            config, tensors | _saved_whole(model, config, tensors), folder, base_model_name, task_type
        )
    layers = {name: m for name, m in named_modules(model) if isinstance(m, LoRALayer)}
    experts = {name: m for name, m in named_modules(model) if isinstance(m, LoRAExperts)}
    if not layers and not experts:
        raise ValueError(f"save_adapter: expected a model with LoRA layers, found none in {type(model).__name__}")
    if not isinstance(config, LoRAConfig):
        raise ValueError(
            "save_adapter: expected a model that lk.adapt(model, LoRAConfig(...)) has adapted; pass config=, or the "
            "part that was adapted"
        )
    _check_layers_follow(config, layers)
    _check_experts_follow(config, experts)
    _check_whole(layers)
    for name, layer in layers.items():
        if why := getattr(layer, "weight_changed_by", None):
            raise ValueError(
                f"save_adapter: expected layers over the base's own weights, but that of {name} was changed by {why}"
            )
    tensors = {**_adapter_parameters(model, config, layers)}
    tensors |= _of_experts(experts)
    config = _naming_what_it_meant(_with_head(config, task_type), model, layers)
    config = _naming_experts(config, model, experts)
    tensors |= _saved_whole(model, config, tensors)
    written = set(map(id, tensors.values())) | {id(p) for m in experts.values() for p in m.adapters.parameters()}
    left_out = [n for n, p in named_parameters(model) if p.requires_grad and id(p) not in written]
    if left_out:
        logger.warning(
            "save_adapter: these train, and are not in the file: %s; name their modules in modules_to_save, of adapt's "
            "config or of one given to save_adapter",
            few(left_out),
        )
    if isinstance(config, LaMDAConfig):
        config, tensors = _as_lora(config), _with_factors(layers, tensors)
    elif config.gate and fold_gate:
        config, tensors = replace(config, gate=False), _with_gates_folded(layers, tensors)
    transposed = any(is_conv1d(layer.base_layer) for layer in layers.values())
    if experts and config.dropout:
        logger.warning(
            "save_adapter: lora_dropout=%g is written as 0, since PEFT has no dropout over target_parameters",
            config.dropout,
        )
        config = replace(config, dropout=0.0)
    of_experts = [f"{name}.{weight}" for name, m in experts.items() for weight in m.adapters]
    return _write_adapter(
        with_patterns_that_agree(config, [*layers, *of_experts]),
        tensors,
        folder,
        base_model_name,
        task_type,
        transposed,
    )


def _with_gates_folded(layers: Mapping[str, LoRALayer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with B ∘ gate for each B, and without gates."""
    folded = {name: t for name, t in tensors.items() if not name.endswith(".lora_gate")}
    for name, layer in layers.items():
        _, key, *_ = layer.shapes(layer.base_layer, layer.r)
        b, gate = (whole(tensors[f"{name}.{k}"].detach()) for k in (key, "lora_gate"))
        folded[f"{name}.{key}"] = folded_b(b, gate)
    return folded


def _as_lora(config: LaMDAConfig) -> LoRAConfig:
    return LoRAConfig(**{f.name: getattr(config, f.name) for f in fields(LoRAConfig)})


def _with_factors(layers: Mapping[str, LoRALayer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with A and B of LoRA in the place of LaMDA's."""
    found = {name: t for name, t in tensors.items() if ".lamda_" not in name}
    for name, layer in layers.items():
        assert isinstance(layer, LaMDALinear)
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = layer.whole_factors()
    return found


def _with_head(config: LoRAConfig, task_type: str | None) -> LoRAConfig:
    """The config with the task's head added to modules_to_save, as PEFT adds it."""
    return replace(config, modules_to_save=(*config.modules_to_save, *TASK_HEADS.get(task_type or "", ())))


def _saved_whole(model: nn.Module, config: LoRAConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the modules that are saved whole, by PEFT's names."""
    modules = whole_modules(model, config)
    adapted = [name for name in tensors if ".lora_" in name and any(name.startswith(f"{path}.") for path in modules)]
    if adapted:
        raise ValueError(
            f"save_adapter: expected no adapter on what is written whole, by modules_to_save={config.modules_to_save} "
            f"with the head of task_type, got {few(adapted)}; leave task_type out, or adapt the model without that "
            f"layer"
        )
    _check_no_shards(modules)
    return {
        unwrapped(f"{path}.{key}"): t
        for path, module in modules.items()
        for key, t in module.state_dict(keep_vars=True).items()
        if isinstance(t, Tensor)
    }


def _one_of_many(
    model: nn.Module, config: MultiLoRAConfig, adapter: int | None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The settings and the tensors, by PEFT's names, of one adapter of a model that has several."""
    if adapter is None or not 0 <= adapter < len(config.ranks):
        raise ValueError(f"save_adapter: expected adapter to name one of {len(config.ranks)}, got {adapter}")
    tensors: dict[str, Tensor] = {}
    layers = {name: m for name, m in named_modules(model) if isinstance(m, MultiLoRALinear)}
    for name, layer in layers.items():
        if layer.slices is not None:
            raise ValueError(
                f"save_adapter: {name} has factors of its own for each of {len(layer.slices)} slices, which the "
                f"format has no words for; save layer.stack.factors(adapter, slice) yourself"
            )
        lora_a, lora_b, _, magnitude = layer.stack.factors(adapter)
        tensors |= {f"{name}.lora_A.weight": lora_a, f"{name}.lora_B.weight": lora_b}
        if magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = magnitude
    return _naming_what_it_meant(config.of_adapter(adapter), model, layers), tensors


def _naming_what_it_meant(config: LoRAConfig, model: nn.Module, layers: Mapping[str, nn.Module]) -> LoRAConfig:
    """The config with names in the place of "all-linear", which other versions and tools take to mean other modules."""
    if config.target_modules != ALL_LINEAR:
        return config
    every = [name for name, _ in named_modules(model)]
    for names in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        if {name for name in every if names_match(sorted(names), name)} == set(layers):
            return replace(config, target_modules=sorted(names), exclude_modules=())
    return replace(config, target_modules="|".join(map(re.escape, layers)), exclude_modules=())


def _naming_experts(config: LoRAConfig, model: nn.Module, experts: Mapping[str, LoRAExperts]) -> LoRAConfig:
    """The config with names in the place of "all-experts"."""
    if config.target_parameters != ALL_EXPERTS:
        return config
    paths = {f"{name}.{weight}" for name, m in experts.items() for weight in m.adapters}
    every = [name for name, _ in named_parameters(model)]
    short = sorted({".".join(path.split(".")[-2:]) for path in paths})
    plain = {name.replace(".base_layer.", ".") for name in every}
    fits = {name for name in plain if names_match(short, name)} == paths
    return replace(config, target_parameters=short if fits else sorted(paths))


def _of_experts(experts: Mapping[str, LoRAExperts]) -> dict[str, Tensor]:
    """The tensors of the experts' corrections, by PEFT's names."""
    found: dict[str, Tensor] = {}
    for name, layer in experts.items():
        for weight, prefix in peft_prefixes(layer.base_layer, list(layer.adapters)).items():
            of: Any = layer.adapters[weight]
            found |= {f"{name}.{prefix}{key}": t for key, t in of.peft_tensors().items()}
    return found


def _check_experts_follow(config: LoRAConfig, experts: Mapping[str, LoRAExperts]) -> None:
    for name, layer in experts.items():
        wanted = config.expert_targets(name, layer.base_layer)
        if sorted(layer.adapters) != sorted(wanted):
            raise ValueError(
                f"save_adapter: expected target_parameters of the config to name {list(layer.adapters)} of {name}, got "
                f"{str(config.target_parameters)[:200]}; pass the config= that describes the layers"
            )
        for weight, of in layer.adapters.items():
            assert isinstance(of, ExpertFactors)
            path = f"{name}.{weight}"
            has = (of.r, of.alpha, layer.dropout, of.rslora, of.lora_magnitude is not None)
            says = config.rank_of(path), config.alpha_of(path), config.dropout, config.rslora
            if has != (*says, isinstance(config, DoRAConfig)):
                raise ValueError(
                    f"save_adapter: expected {path} to have (r, alpha, dropout, rslora, dora) = "
                    f"{(*says, isinstance(config, DoRAConfig))} by its config, got {has}; pass the config= that "
                    f"describes the layers"
                )
            of_rank = (of.experts * of.r, of.in_features), (of.experts * of.r, of.out_features)
            for factor, p, shape in zip(("lora_A", "lora_B"), (of.lora_A, of.lora_B), of_rank, strict=True):
                _check_shape(f"{factor} of {path}", p, shape)


def _write_adapter(
    config: LoRAConfig,
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    base_model_name: str | None,
    task_type: str | None,
    transposed: bool = False,
) -> Path:
    from safetensors.torch import save_file

    absent = [name for name, t in tensors.items() if t.is_meta]
    if absent:
        raise ValueError(
            f"save_adapter: expected parameters that are at hand, got some on the meta device, as where modules are "
            f"offloaded: {few(absent)}; load them first; nothing was written"
        )
    tensors = {PREFIX + name: whole(t.detach()).cpu().contiguous().clone() for name, t in tensors.items()}
    broken = [name for name, t in tensors.items() if not all_finite(t)]
    if broken:
        raise ValueError(
            f"save_adapter: expected finite values, found NaN or Inf in {few(broken)}; nothing was written"
        )
    written = written_config(config, task_type=task_type, base_model_name=base_model_name)
    written["fan_in_fan_out"] = transposed  # PEFT's word for weights as transformers' Conv1D keeps them
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(written, indent=2, allow_nan=False) + "\n"
    write_aside(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_aside(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def save_lora_ga_adapter(
    model: nn.Module,
    starts: Mapping[str, tuple[Tensor, Tensor]],
    folder: str | os.PathLike[str],
    **names: Any,
) -> Path:
    """Write what a model learnt from LoRA-GA's start as an adapter of rank 2 R for the untouched base.

    ΔW = s (B A - B₀ A₀) = s [B, -B₀] [A; A₀], in PEFT's format, with an alpha that keeps s.

    Args:
        model: adapted with LoRAConfig, started by :func:`lowrank_kernels.init.lora_ga_`, and trained.
        starts: what that returned.
        folder: made if missing.
        names: ``base_model_name`` and ``task_type``, as for :func:`save_adapter`.

    Raises:
        ValueError: layers without a start, or over whose start a chain merged; a DoRA or biases that train; and as
            :func:`save_adapter`.
    """
    config = config_of(model)
    if (
        not isinstance(config, LoRAConfig)
        or isinstance(config, DoRAConfig)
        or config.bias != "none"
        or config.lora_bias
    ):
        raise ValueError("save_lora_ga_adapter: expected a model adapted with LoRAConfig and without trained biases")
    config = _naming_what_it_meant(config, model, {n: m for n, m in named_modules(model) if isinstance(m, LoRALinear)})
    # A model of nothing but the layers, twice as wide, over weights that are not there, and what is saved whole.
    skeleton, grown = nn.Module(), math.sqrt(2.0) if config.rslora else 2.0
    for name, module in whole_modules(model, _with_head(config, names.get("task_type"))).items():
        _put_at(skeleton, name, module)
    for name, layer in named_modules(model):
        if not isinstance(layer, LoRALayer):
            continue
        if name not in starts or not isinstance(layer, LoRALinear):
            raise ValueError(f"save_lora_ga_adapter: expected the start of every layer, got none of {name}")
        why = getattr(layer, "weight_changed_by", None)
        if why and getattr(layer, "lora_ga_start", None) is None:
            raise ValueError(f"save_lora_ga_adapter: expected W - s B₀ A₀, but that of {name} was changed by {why}")
        absent = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        wide = LoRALinear.from_linear(
            absent, 2 * layer.r, alpha=grown * layer.alpha, dropout=layer.dropout, rslora=layer.rslora, init="zero"
        )
        a, b = (start.to(layer.weight.device) for start in starts[name])
        now_a, now_b = (factor.detach() for factor in layer.factors())
        wide.lora_A.weight = nn.Parameter(torch.cat([now_a, a]))
        wide.lora_B.weight = nn.Parameter(torch.cat([now_b, -b], dim=1))
        _put_at(skeleton, name, wide)
    config = replace(
        config,
        r=2 * config.r,
        gate=False,
        alpha=grown * config.alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: grown * alpha for pattern, alpha in config.alpha_pattern.items()},
    )
    return save_adapter(skeleton, folder, config=config, **names)


def _put_at(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)


def _check_layers_follow(config: LoRAConfig, layers: Mapping[str, LoRALayer]) -> None:
    for name, layer in layers.items():
        has: tuple[Any, ...] = (layer.r, layer.alpha, layer.dropout, layer.rslora, layer.lora_bias is not None)
        has += (layer.lora_gate is not None, isinstance(layer, DoRALayer), isinstance(layer, LaMDALinear))
        says: tuple[Any, ...] = (config.rank_of(name), config.alpha_of(name), config.dropout, config.rslora)
        says += (config.lora_bias, config.gate, isinstance(config, DoRAConfig), isinstance(config, LaMDAConfig))
        if has != says:
            raise ValueError(
                f"save_adapter: expected {name} to have (r, alpha, dropout, rslora, lora_bias, gate, dora, lamda) = "
                f"{says} by its config, got {has}; pass the config= that describes the layers"
            )
        if config.target_modules != ALL_LINEAR and not names_match(config.target_modules, name):
            raise ValueError(
                f"save_adapter: expected target_modules of the config to name {name}, got "
                f"{str(config.target_modules)[:200]}; pass the config= that describes the layers"
            )


def _check_whole(layers: Mapping[str, LoRALayer]) -> None:
    for name, layer in layers.items():
        for own, p, shape in layer.correction_parameters():
            _check_shape(f"{own} of {name}", p, shape)


def _check_no_shards(modules: Mapping[str, nn.Module]) -> None:
    """Check the shapes of modules that are saved whole: against those that they had, or that their attributes say."""
    for path, module in modules.items():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            _check_shape(f"the weight of {path}", module.weight, weight_shape(module))
        for key, shape in getattr(module, "trains_whole", {}).items():
            _check_shape(f"{key} of {path}", module.get_parameter(key), shape)


def _check_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"save_adapter: expected {what} to have the shape {shape}, got {tuple(tensor.shape)}, a "
            f"shard; call it in FullyShardedDataParallel.summon_full_params(model); nothing was written"
        )


def _adapter_parameters(
    model: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALayer]
) -> dict[str, nn.Parameter]:
    """What a file of PEFT's holds of an adapted model: the factors, and the biases that the config trains."""
    wanted = {f"{name}.base_layer.bias" for name in layers if config.bias == "lora_only"}
    for name, layer in layers.items():
        has = layer.lora_bias is not None, layer.lora_gate is not None
        wanted |= {f"{name}.{key}" for key in layer.tensors(layer.base_layer, layer.r, *has)}
    return {
        name: p
        for name, p in named_parameters(model)
        if name in wanted or (config.bias == "all" and f".{name}".endswith(".bias"))
    }
