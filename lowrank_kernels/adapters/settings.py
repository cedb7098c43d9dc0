"""PEFT's adapter_config.json and our configs, each made from the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import DoRAConfig, LoRAConfig, names_match
from ..patterns import FilePattern
from .folder import read_json
from .matching import bounded_pattern_list, bounded_patterns

# PEFT's names for our settings.
_PEFT_NAMES = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora",
    "lora_bias": "lora_bias",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
}
_GATED = "LORA_GATED"
"""Our own ``peft_type`` for factors with a gate; the rest of the file is as PEFT's."""
_DORA_EXPERTS = "LORA_DORA_EXPERTS"
"""Our own ``peft_type`` for DoRA with magnitudes of experts, which PEFT has not; the rest of the file is as PEFT's."""
# Settings that are read in ways of their own.
_READ = {"use_dora", "init_lora_weights", "layers_to_transform", "layers_pattern"}
# Settings that say nothing about the function of a trained adapter. The settings of a start matter where it changed the
# base, which init_lora_weights says.
_INERT = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
}


_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(path: Path, names: Iterable[str]) -> LoRAConfig:
    """The settings in an adapter_config.json of PEFT's; ValueError names the one that does not fit.

    ``layers_to_transform`` becomes those of ``names``, the paths of the model's modules, that it means.
    """
    given = read_json(path)
    if given.get("peft_type") not in ("LORA", _GATED, _DORA_EXPERTS):
        raise ValueError(
            f"load_adapter: expected an adapter of peft_type 'LORA', got {given.get('peft_type')!r} in {path}"
        )
    init = str(given.get("init_lora_weights")).lower()
    unsupported = {k: v for k, v in given.items() if v and k not in {*_PEFT_NAMES, *_READ, *_INERT}}
    cure = ""
    if init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        unsupported["init_lora_weights"] = given["init_lora_weights"]
        cure = (
            "; that start changes the base's weights: let PEFT convert the adapter, by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if unsupported:
        said = ", ".join(f"{k}={v!r}"[:80] for k, v in sorted(unsupported.items()))
        raise ValueError(f"load_adapter: {path} uses settings that are not supported: {said}{cure}")
    settings = {ours: given[theirs] for theirs, ours in _PEFT_NAMES.items() if given.get(theirs) is not None}
    if given.get("target_parameters"):
        settings.setdefault("target_modules", ())
    needed = {"r": "r", "lora_alpha": "alpha", "target_modules": "target_modules"}
    missing = [theirs for theirs, ours in needed.items() if ours not in settings]
    if missing:
        raise ValueError(f"load_adapter: expected {', '.join(missing)} in {path}")
    settings["gate"] = given["peft_type"] == _GATED
    if init == "mica":  # trains A alone
        settings["train"] = "a"
    if given.get("layers_to_transform") not in (None, []):
        settings["target_modules"] = _targets_in_layers(given, names, path)
    use_dora = given.get("use_dora") or False
    if not isinstance(use_dora, bool):
        raise ValueError(f"load_adapter: expected use_dora to be true or false, got {str(use_dora)[:80]!r} in {path}")
    try:
        settings = bounded_patterns(settings)
        return DoRAConfig(**settings, dropout_base=True) if use_dora else LoRAConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {str(error)[:1000]}") from None


def _targets_in_layers(given: Mapping[str, Any], names: Iterable[str], path: Path) -> list[str]:
    """Names of the targets that are in the layers of ``layers_to_transform``, or are named by their whole path."""
    wanted: Any = given.get("target_modules")
    layers: Any = given["layers_to_transform"]
    patterns: Any = given.get("layers_pattern")
    layers = [layers] if isinstance(layers, int) else layers
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    lists = isinstance(layers, list) and isinstance(wanted, list) and isinstance(patterns, list)
    if not (lists and all(isinstance(i, int) for i in layers) and all(isinstance(p, str) for p in wanted + patterns)):
        raise ValueError(
            f"load_adapter: expected layers_to_transform to be numbers of layers, beside names in layers_pattern and "
            f"target_modules, got {str(layers)[:80]}, {str(patterns)[:80]} and {str(wanted)[:80]} in {path}"
        )
    try:
        places = bounded_pattern_list("layers_pattern", patterns)
    except ValueError as error:
        raise ValueError(f"load_adapter: {path}: {str(error)[:1000]}") from None
    matching = [name for name in names if names_match(wanted, name)]
    targets = [name for name in matching if name in wanted or _layer_number(name, places) in layers]
    if not targets:
        raise ValueError(
            f"load_adapter: expected layers_to_transform to name layers of the model with targets in them, got "
            f"{str(layers)[:80]} in {path}"
        )
    return targets


def _layer_number(name: str, patterns: list[FilePattern]) -> int | None:
    """The first number in a module's path that follows what a pattern matches; without patterns, two names or more."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    if not patterns:
        return next((int(parts[i]) for i in numbers if i >= 2), None)
    return next((int(parts[i]) for p in patterns for i in numbers if i and p.matches_ending(".".join(parts[:i]))), None)


def written_config(config: LoRAConfig, *, task_type: str | None, base_model_name: str | None) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of this config."""
    written, dora = (
        {theirs: getattr(config, ours) for theirs, ours in _PEFT_NAMES.items()},
        isinstance(config, DoRAConfig),
    )
    for theirs, value in written.items():
        written[theirs] = (
            dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        )
    return written | {
        "peft_type": _GATED if config.gate else _DORA_EXPERTS if dora and config.target_parameters else "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": dora,
        "exclude_modules": written["exclude_modules"] or None,
        "modules_to_save": written["modules_to_save"] or None,
        "target_parameters": written["target_parameters"] or None,
    }
