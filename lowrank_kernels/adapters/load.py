"""Adapters read: checked whole, then put on a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapt import Plan, apply_plan, check_can_train_whole, match_targets, whole_modules
from ..config import DoRAConfig, LoRAConfig
from ..functional import fold_gate
from ..names import held, named_buffers, named_modules, named_parameters, unwrapped
from ..nn.experts import expert_weights, from_peft, peft_prefixes, peft_shapes
from ..report import Report, count_parameters
from .adapter import Adapter, Factors
from .convert import convert, format_of
from .folder import CONFIG_FILE, WEIGHTS_FILE, few, inside, is_folder, read_tensors
from .matching import check_patterns_agree
from .settings import read_config


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> Report:
    """Put a LoRA or DoRA adapter, written by PEFT or by :func:`save_adapter`, on a model, in place.

    Or one of another format that :func:`lowrank_kernels.adapters.convert` reads.

    The layers, ranks and scalings are those that the folder's config says; the tensors must be exactly those
    that such layers have. Factors become float32, or stay float64. A DoRA adapter gets PEFT's dropout,
    ``dropout_base=True``. Modules that were trained and saved whole (``modules_to_save``, a task's head, embeddings
    of another size) take the place of the model's own until ``undo()``.

    Args:
        model: the base model, not adapted yet.
        folder: local, with adapter_config.json and adapter_model.safetensors; or an adapter of another format.
        trainable: whether the factors, the modules saved whole, and the biases the config names train afterwards.
            False freezes everything.

    Returns:
        The report of :func:`adapt`; its ``undo()`` takes the adapter off again, saved biases included.

    Raises:
        ValueError: a missing, unreadable, truncated or oversized file; a link that leaves the folder; pickled
            weights; a config of another method, or with a setting that is not supported, by its name; tensors
            that are missing, unexpected, of another shape, or not finite; targets that the model does not
            have; a regular expression that takes too long to match, or has backreferences or flags; two patterns
            that give one layer different ranks or alphas.
        TypeError: tensors that are not floats.
        ImportError: safetensors is not installed.

    The model is exactly as before after every one of these.
    """
    folder = Path(folder)
    config, plan, tensors = read_adapter(model, folder)
    doubles = any(t.dtype == torch.float64 for name, t in tensors.items() if ".lora_" in name)
    dtype = torch.float64 if doubles else None
    report = apply_plan(model, replace(config, init="zero", dtype=dtype), plan)
    try:
        places: dict[str, Tensor] = {**dict(named_buffers(model)), **dict(named_parameters(model))}
        with torch.no_grad():
            for name, t in tensors.items():
                places[name].copy_(t)
        if not trainable:
            for p in model.parameters():
                p.requires_grad = False
    except BaseException:
        report.undo()
        raise
    trains, total = count_parameters(model)
    method = "DoRA" if isinstance(config, DoRAConfig) else "LoRA"
    title = f"{folder.name}: {method}"
    return Report(title, report.replaced, report.skipped, trains, total, report.notes, _undo=report._undo)


class AdapterFile(NamedTuple):
    """What an adapter's folder says, checked against a model: its settings, its targets there, its tensors by the names
    that the parameters of the adapted model have."""

    config: LoRAConfig
    plan: Plan
    tensors: dict[str, Tensor]

    def adapter(self) -> Adapter:
        """The same without a model, with gates in B."""
        others, modules = dict(self.tensors), {}
        for name, module in self.plan.targets.items():
            kind = self.config.layer_class(module)
            keys = kind.tensors(module, self.config.rank_of(name), self.config.lora_bias, self.config.gate)
            own = {key: others.pop(f"{name}.{key}") for key in keys}
            a, b, *_ = own.values()
            b = fold_gate(b, own["lora_gate"]) if "lora_gate" in own else b
            rest = own.get("lora_magnitude_vector"), own.get("lora_B.bias"), "lora_embedding_A" in own
            modules[name] = Factors(a, b, self.config.scaling_of(name), *rest)
        return Adapter(modules, others)


class Expected(NamedTuple):
    """What an adapter's settings say of its file, for one model."""

    config: LoRAConfig
    plan: Plan
    base: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    embeddings: set[str]


def read_adapter(model: nn.Module, folder: str | os.PathLike[str], known: list[Expected] | None = None) -> AdapterFile:
    """Read and check a folder as :func:`load_adapter` does, and raise as it does; the model is not touched.

    ``known`` keeps what was found for a model that does not change, so that the next adapter of the same settings is
    not matched again.
    """
    folder = Path(folder)
    if format_of(folder) not in (None, "peft"):
        with TemporaryDirectory() as place:
            return read_adapter(model, convert(folder, place, to="peft", base=model), known)
    if not is_folder(folder):
        raise ValueError(f"load_adapter: expected a folder, got {str(folder)!r:.500}")
    config = read_config(inside(folder, CONFIG_FILE), (name for name, _ in named_modules(model)))
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"load_adapter: expected {WEIGHTS_FILE} in {folder}, found adapter_model.bin, a pickle, which can run "
            f"code when read; load it with PEFT if you trust it, and save it again"
        )
    expected = next((one for one in known or () if one.config == config), None)
    if expected is None:
        expected = _expected(model, folder, config)
        if known is not None:
            known[:] = [*known[-7:], expected]
    _, plan, base, shapes, embeddings = expected
    tensors = read_tensors(
        inside(folder, WEIGHTS_FILE),
        shapes,
        base,
        plan.skipped,
        replaceable={f"{name}.{key}" for name in embeddings for key in ("weight", "bias")},
        ignored=_second_copies(config, plan),
    )
    resized = tuple(name for name in embeddings - plan.whole.keys() if f"{name}.weight" in tensors)
    if resized:
        config = replace(config, modules_to_save=(*config.modules_to_save, *sorted(resized)))
        plan = replace(plan, whole=whole_modules(model, config))
        check_can_train_whole(model, plan.whole)
    return AdapterFile(config, plan, _of_our_experts(tensors, config, plan))


def _expected(model: nn.Module, folder: Path, config: LoRAConfig) -> Expected:
    plan = match_targets(model, config)
    touched = {**plan.targets, **plan.experts, **plan.whole}
    absent = [name for name, module in touched.items() if any(p.is_meta for p in module.parameters())]
    if absent:
        raise ValueError(
            f"load_adapter: expected a model with its weights, got some on the meta device: {few(absent)}; load those "
            f"first: an adapter on the meta device would be lost"
        )
    check_patterns_agree(folder, config, plan.matrices())
    base = _base_tensors(model, plan)
    shapes = _expected_shapes(base, config, plan)
    return Expected(config, plan, base, shapes, _embeddings(model) - plan.targets.keys())


def _of_our_experts(tensors: dict[str, Tensor], config: LoRAConfig, plan: Plan) -> dict[str, Tensor]:
    """The tensors with those of experts as our layers have them."""
    for name, module in plan.experts.items():
        own = config.expert_targets(name, module)
        for weight, prefix in peft_prefixes(module, own).items():
            experts = len(expert_weights(module)[weight])
            theirs, ours = f"{name}.{prefix}", f"{name}.adapters.{weight}"
            tensors[f"{ours}.lora_A"] = tensors.pop(f"{theirs}lora_A.weight")
            tensors[f"{ours}.lora_B"] = from_peft(tensors.pop(f"{theirs}lora_B.weight"), experts)
            if isinstance(config, DoRAConfig):
                tensors[f"{ours}.lora_magnitude"] = tensors.pop(f"{theirs}lora_magnitude_vector")
    return tensors


def _base_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The model's parameters and saved buffers, by the names that they will have when the plan is carried out."""
    named: dict[str, Tensor] = dict(named_parameters(model))
    named |= {f"{path}.{key}": t for path, module in plan.whole.items() for key, t in _state(module).items()}
    return {
        f"{owner}.base_layer.{key}" if owner in plan.targets or owner in plan.experts else name: t
        for name, t in named.items()
        for owner, _, key in [name.rpartition(".")]
    }


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _embeddings(model: nn.Module) -> set[str]:
    """Paths of a transformers model's input and output embeddings, which PEFT saves where they were resized."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(held(model), get)())
        except (AttributeError, NotImplementedError):
            continue
    return {
        unwrapped(name)
        for name, module in held(model).named_modules(remove_duplicate=False)
        if name and any(module is embedding for embedding in found)
    }


def _second_copies(config: LoRAConfig, plan: Plan) -> set[str]:
    """Names of biases that PEFT writes more than once: with ``bias="all"``, those of modules that are saved whole."""
    if config.bias != "all":
        return set()
    return {
        f"{path}.{copy}.{key}"
        for path, module in plan.whole.items()
        for key, _ in module.named_parameters()
        for copy in ("original_module", "modules_to_save")
        if f".{key}".endswith(".bias")
    }


def _expected_shapes(base: Mapping[str, Tensor], config: LoRAConfig, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in plan.targets.items():
        own = config.layer_class(linear).tensors(linear, config.rank_of(name), config.lora_bias, config.gate)
        shapes |= {f"{name}.{key}": shape for key, shape in own.items()}
        bias = getattr(linear, "bias", None)
        if config.bias == "lora_only" and bias is not None:
            shapes[f"{name}.base_layer.bias"] = tuple(bias.shape)
    for name, module in plan.experts.items():
        weights = expert_weights(module)
        for weight, prefix in peft_prefixes(module, config.expert_targets(name, module)).items():
            of_one = peft_shapes(weights[weight], config.rank_of(f"{name}.{weight}"), isinstance(config, DoRAConfig))
            shapes |= {f"{name}.{prefix}{key}": shape for key, shape in of_one.items()}
    if config.bias == "all":
        shapes |= {name: tuple(p.shape) for name, p in base.items() if f".{name}".endswith(".bias")}
    for path, module in plan.whole.items():
        shapes |= {f"{path}.{key}": tuple(t.shape) for key, t in _state(module).items()}
    return shapes
