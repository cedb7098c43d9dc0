"""Adapters on disk in PEFT's format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT itself is not needed. A folder may come from anywhere: nothing in it is executed, and a model is changed
only after every name, shape, dtype and value has been checked.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapt import Plan, carry_out, config_of, match_targets
from .config import DoRAConfig, LoRAConfig, MultiLoRAConfig
from .finite import all_finite
from .nn.dora import DoRALinear
from .nn.lora import LoRALinear
from .nn.multi_lora import MultiLoRALinear
from .nn.sharded import whole
from .report import Report, Skipped, count_parameters

logger = logging.getLogger("lowrank_kernels")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_MAX_CONFIG_BYTES = 8 << 20
_MAX_HEADER_BYTES = 16 << 20  # some hundred thousand tensors
_FILE_DTYPES = ("F32", "BF16", "F16", "F64")

# PEFT's names for our settings.
_PEFT_NAMES = {
    "r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules",
    "exclude_modules": "exclude_modules", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora", "lora_bias": "lora_bias", "bias": "bias",
}  # fmt: skip
# Settings that say nothing about the function of a trained adapter.
_INERT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "init_lora_weights", "layers_pattern", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# Tasks for which PEFT wants the model's head in the file, too.
_TASKS_WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# What torch's wrappers put into the names of the modules in them: of FSDP, activation checkpointing, torch.compile.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


# -------------------------------------------------------------------------------------------------- saving


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model_name: str | None = None,
    task_type: str | None = None,
    config: LoRAConfig | None = None,
    adapter: int | None = None,
) -> Path:
    """Write the model's LoRA or DoRA adapter as a folder that PEFT loads.

    Args:
        model: adapted by :func:`adapt`, compiled or with modules that torch has wrapped, too; of DDP's wrapper give
            ``model.module``. Where FSDP2 shards it, every rank has to call this: each gathers the factors and writes
            the files. Under FSDP1 call it in ``FullyShardedDataParallel.summon_full_params(model)``.
        folder: made if missing. Files are written aside and renamed, so that neither is ever half there.
        base_model_name: for PEFT's ``base_model_name_or_path``.
        task_type: for PEFT's ``task_type``, such as "CAUSAL_LM"; PEFT's Auto classes need it. Not of a task for which
            PEFT wants the trained head in the file, which is not written.
        config: for a model whose LoRALinears were put in by hand.
        adapter: which one, of a model adapted by ``MultiLoRAConfig``.

    Returns:
        The folder.

    Tensors keep their dtypes. Merged layers save their factors as they are. The format has no words for DoRA's
    ``dropout_base`` and ``detach_norm``, which matter to training alone; they are not saved. What else trains, such as
    a new head, is not written either: the log names it.

    Raises:
        ValueError: no LoRALinear in the model; no config, or one that does not describe the layers there are; a
            task_type with a head; base weights that LoRA-GA's start or a chain has changed, over which alone the
            factors are right; a value that is not finite, or not at hand: on the meta device, a shard. Nothing is
            written then.
        ImportError: safetensors is not installed.
    """
    if task_type in _TASKS_WITH_A_HEAD:
        raise ValueError(
            f"save_adapter: expected a task_type without a head of its own, got {task_type!r}, for which PEFT wants "
            f"the trained head in the file, where it is not written; leave task_type out, and save the head yourself"
        )
    config = config or config_of(model)  # type: ignore[assignment]
    if isinstance(config, MultiLoRAConfig):
        return _write_adapter(*_one_of_many(model, config, adapter), folder, base_model_name, task_type)
    layers = {_unwrapped(name): m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError(f"save_adapter: expected a model with LoRALinear layers, found none in {type(model).__name__}")
    if not isinstance(config, LoRAConfig):
        raise ValueError(
            "save_adapter: this model was not adapted by lk.adapt(model, LoRAConfig(...)), or is wrapped; "
            "pass config=, or the inner model"
        )
    _check_layers_follow(config, layers)
    _check_whole(layers)
    for name, layer in layers.items():
        if why := getattr(layer, "weight_changed_by", None):
            raise ValueError(
                f"save_adapter: expected layers over the base's own weights, but that of {name} was changed by {why}"
            )
    parameters = _adapter_parameters(model, config, list(layers))
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and _unwrapped(n) not in parameters]
    if left_out:
        logger.warning(
            "save_adapter: these train, and are not in the file: %s; save them yourself", _few(left_out)
        )  # fmt: skip
    return _write_adapter(config, parameters, folder, base_model_name, task_type)


def _one_of_many(
    model: nn.Module, config: MultiLoRAConfig, adapter: int | None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The settings and the tensors, by PEFT's names, of one adapter of a model that has several."""
    if adapter is None or not 0 <= adapter < len(config.ranks):
        raise ValueError(f"save_adapter: expected adapter to name one of {len(config.ranks)}, got {adapter}")
    tensors: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, MultiLoRALinear):
            name = _unwrapped(path)
            if layer.slices is not None:
                raise ValueError(
                    f"save_adapter: {name} has factors of its own for each of {len(layer.slices)} slices, which the "
                    f"format has no words for; save layer.stack.factors(adapter, slice) yourself"
                )
            lora_a, lora_b, _, magnitude = layer.stack.factors(adapter)
            tensors |= {f"{name}.lora_A.weight": lora_a, f"{name}.lora_B.weight": lora_b}
            if magnitude is not None:
                tensors[f"{name}.lora_magnitude_vector"] = magnitude
    return config.of_adapter(adapter), tensors


def _write_adapter(
    config: LoRAConfig, parameters: Mapping[str, Tensor], folder: str | os.PathLike[str],
    base_model_name: str | None, task_type: str | None,
) -> Path:  # fmt: skip
    from safetensors.torch import save_file

    absent = [name for name, p in parameters.items() if p.is_meta]
    if absent:
        raise ValueError(
            f"save_adapter: expected parameters that are at hand, got some on the meta device, as where modules are "
            f"offloaded: {_few(absent)}; load them first; nothing was written"
        )
    tensors = {PREFIX + name: whole(p.detach()).cpu().contiguous().clone() for name, p in parameters.items()}
    broken = [name for name, t in tensors.items() if not all_finite(t)]
    if broken:
        raise ValueError(
            f"save_adapter: expected finite values, found NaN or Inf in {_few(broken)}; nothing was written"
        )
    written: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _PEFT_NAMES.items()}
    for theirs, value in written.items():
        written[theirs] = (
            dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        )
    written |= {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_model_name,
        "inference_mode": True, "init_lora_weights": True, "use_dora": isinstance(config, DoRAConfig),
        "exclude_modules": written["exclude_modules"] or None,
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(written, indent=2, allow_nan=False) + "\n"  # unsorted: the first pattern that matches wins
    _write_aside(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write_aside(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
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
    # A model of nothing but the layers, twice as wide, over weights that are not there.
    skeleton, grown = nn.Module(), math.sqrt(2.0) if config.rslora else 2.0
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        if name not in starts:
            raise ValueError(f"save_lora_ga_adapter: expected the start of every layer, got none of {name}")
        why = getattr(layer, "weight_changed_by", None)
        if why and getattr(layer, "lora_ga_start", None) is None:
            raise ValueError(f"save_lora_ga_adapter: expected W - s B₀ A₀, but that of {name} was changed by {why}")
        absent = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        wide = LoRALinear.from_linear(
            absent, 2 * layer.r, alpha=grown * layer.alpha, dropout=layer.dropout, rslora=layer.rslora, init="zero"
        )  # fmt: skip
        a, b = (start.to(layer.weight.device) for start in starts[name])
        wide.lora_A.weight = nn.Parameter(torch.cat([layer.lora_A.weight.detach(), a]))
        wide.lora_B.weight = nn.Parameter(torch.cat([layer.lora_B.weight.detach(), -b], dim=1))
        parent = skeleton
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, wide)
    config = replace(
        config, r=2 * config.r, alpha=grown * config.alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: grown * alpha for pattern, alpha in config.alpha_pattern.items()},
    )  # fmt: skip
    return save_adapter(skeleton, folder, config=config, **names)


def _check_layers_follow(config: LoRAConfig, layers: Mapping[str, LoRALinear]) -> None:
    for name, layer in layers.items():
        has: tuple[Any, ...] = (layer.r, layer.alpha, layer.dropout, layer.rslora, layer.lora_B.bias is not None)
        has += (isinstance(layer, DoRALinear),)
        says: tuple[Any, ...] = (config.rank_of(name), config.alpha_of(name), config.dropout, config.rslora)
        says += (config.lora_bias, isinstance(config, DoRAConfig))
        if has != says:
            raise ValueError(
                f"save_adapter: expected {name} to have (r, alpha, dropout, rslora, lora_bias, dora) = {says} by its "
                f"config, got {has}; pass the config= that describes the layers"
            )


def _check_whole(layers: Mapping[str, LoRALinear]) -> None:
    for name, layer in layers.items():
        for own, p, shape in layer.correction_parameters():
            if tuple(p.shape) != shape:
                raise ValueError(
                    f"save_adapter: expected {own} of {name} to have the shape {shape}, got {tuple(p.shape)}, a shard; "
                    f"call it in FullyShardedDataParallel.summon_full_params(model); nothing was written"
                )


def _unwrapped(name: str) -> str:
    """A module's or parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _adapter_parameters(model: nn.Module, config: LoRAConfig, layers: list[str]) -> dict[str, nn.Parameter]:
    """What a file of PEFT's holds of an adapted model: the factors, and the biases that the config trains."""
    keys = ["lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"]
    keys += ["base_layer.bias"] * (config.bias == "lora_only")
    wanted = {f"{layer}.{key}" for layer in layers for key in keys}
    return {
        name: p
        for path, p in model.named_parameters(remove_duplicate=False)
        for name in [_unwrapped(path)]
        if name in wanted or (config.bias == "all" and f".{name}".endswith(".bias"))
    }


def _write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- loading


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
    config = _read_config(_inside(folder, CONFIG_FILE))
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"load_adapter: expected {WEIGHTS_FILE} in {folder}, found adapter_model.bin, a pickle, which can run "
            f"code when read; load it with PEFT if you trust it, and save it again"
        )
    plan = match_targets(model, config)
    absent = [name for name, linear in plan.targets.items() if linear.weight.is_meta]
    if absent:
        raise ValueError(
            f"load_adapter: expected a model with its weights, got some on the meta device: {_few(absent)}; load those "
            f"first: an adapter on the meta device would be lost"
        )
    base = _base_parameters(model, plan)
    tensors = _read_tensors(_inside(folder, WEIGHTS_FILE), _expected_shapes(base, config, plan), base, plan.skipped)
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
        n, k = linear.weight.shape
        r = config.rank_of(name)
        shapes |= {f"{name}.lora_A.weight": (r, k), f"{name}.lora_B.weight": (n, r)}
        if config.lora_bias:
            shapes[f"{name}.lora_B.bias"] = (n,)
        if isinstance(config, DoRAConfig):
            shapes[f"{name}.lora_magnitude_vector"] = (n,)
        if config.bias == "lora_only" and linear.bias is not None:
            shapes[f"{name}.base_layer.bias"] = (n,)
    if config.bias == "all":
        shapes |= {name: tuple(p.shape) for name, p in base.items() if f".{name}".endswith(".bias")}
    return shapes


def _inside(folder: Path, name: str) -> Path:
    """The real path of a regular file of the folder. Links may stay in it, or go to a Hub cache's blobs."""
    path = folder / name
    real = path.resolve()
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if not real.exists():
        raise ValueError(f"load_adapter: expected {name} in {folder}, found none")
    if not real.is_file():
        raise ValueError(f"load_adapter: expected {path} to be a regular file")
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"load_adapter: expected {path} to be in its folder, got a link to {real}")
    return real


def _read_config(path: Path) -> LoRAConfig:
    """The settings in an adapter_config.json of PEFT's; ValueError names the one that does not fit."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"load_adapter: expected {path} of at most {_MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}"
        )
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_adapter: expected {path} to hold JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"load_adapter: expected {path} to hold a JSON object, got {type(given).__name__}")
    if given.get("peft_type") != "LORA":
        raise ValueError(
            f"load_adapter: expected an adapter of peft_type 'LORA', got {given.get('peft_type')!r} in {path}"
        )
    unsupported = {k: v for k, v in given.items() if v and k not in {*_PEFT_NAMES, *_INERT, "use_dora"}}
    init = given.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        unsupported["init_lora_weights"] = init
    if unsupported:
        said = ", ".join(f"{k}={v!r}"[:80] for k, v in sorted(unsupported.items()))
        raise ValueError(f"load_adapter: {path} uses settings that are not supported: {said}")
    settings = {ours: given[theirs] for theirs, ours in _PEFT_NAMES.items() if given.get(theirs) is not None}
    missing = [theirs for theirs in ("r", "lora_alpha", "target_modules") if given.get(theirs) is None]
    if missing:
        raise ValueError(f"load_adapter: expected {', '.join(missing)} in {path}")
    try:
        return DoRAConfig(**settings, dropout_base=True) if given.get("use_dora") else LoRAConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from None


def _read_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    base: Mapping[str, nn.Parameter],
    skipped: Sequence[Skipped] = (),
) -> dict[str, Tensor]:
    """The file's tensors by parameter, once they are known to be just the expected ones, and finite.

    PEFT also writes the base weights of adapted embeddings and heads. Those must be the model's own.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    available = path.stat().st_size - 8
    if not 0 < header <= min(available, _MAX_HEADER_BYTES):
        raise ValueError(
            f"load_adapter: expected {path} to start with a safetensors header that is within the file and of at "
            f"most {_MAX_HEADER_BYTES} bytes, got {header} of {max(available, 0)}; it is truncated or not safetensors"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
            copies = [n for n in found if n.removeprefix(PREFIX) in base and n.removeprefix(PREFIX) not in expected]
            for name in copies:
                own = base[name.removeprefix(PREFIX)]
                if not _same_values(file.get_tensor(name), own.detach().cpu()):
                    raise ValueError(
                        f"load_adapter: expected {name} to be the model's own value, got another in {path}; "
                        f"changed base weights are not supported"
                    )
            headers = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in found.items() if n not in copies}
            _check_tensors(path, headers, expected, skipped)
            tensors = {name: file.get_tensor(PREFIX + name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"load_adapter: expected {path} to be a whole safetensors file: {error}") from None
    broken = [name for name, t in tensors.items() if not all_finite(t)]
    if broken:
        raise ValueError(f"load_adapter: expected finite values, found NaN or Inf in {_few(broken)} of {path}")
    return tensors


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in the narrower of their dtypes: a copy may have been rounded on its way."""
    narrow = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps) if a.is_floating_point() else b.dtype
    return torch.equal(a.to(narrow), b.to(narrow))


def _check_tensors(
    path: Path,
    found: Mapping[str, tuple[tuple[int, ...], str]],
    expected: Mapping[str, tuple[int, ...]],
    skipped: Sequence[Skipped],
) -> None:
    wanted = {PREFIX + name: shape for name, shape in expected.items()}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    if missing or unexpected:
        why = [f"{s.name}: {s.reason}" for s in skipped if any(n.startswith(f"{PREFIX}{s.name}.") for n in unexpected)]
        raise ValueError(
            f"load_adapter: expected {path} to hold the {len(wanted)} tensors of its config on this model; "
            f"missing: {_few(missing)}; unexpected: {_few(unexpected)}"
            + (f"; modules that take no adapter: {_few(why)}" if why else "")
        )
    for name, (shape, dtype) in found.items():
        if shape != wanted[name]:
            raise ValueError(f"load_adapter: expected {name} of shape {wanted[name]}, got {shape} in {path}")
        if dtype not in _FILE_DTYPES:
            raise TypeError(f"load_adapter: expected {name} of {', '.join(_FILE_DTYPES)}, got {dtype} in {path}")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(name[:200] for name in names[:5]) or "none") + more
