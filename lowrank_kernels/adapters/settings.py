"""PEFT's adapter_config.json and our configs, each made from the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import DoRAConfig, LoRAConfig

_MAX_CONFIG_BYTES = 8 << 20

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
    "ensure_weight_tying", "fan_in_fan_out",
}  # fmt: skip


_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def read_config(path: Path) -> LoRAConfig:
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


def written_config(config: LoRAConfig, *, task_type: str | None, base_model_name: str | None) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of this config."""
    written = {theirs: getattr(config, ours) for theirs, ours in _PEFT_NAMES.items()}
    for theirs, value in written.items():
        written[theirs] = (
            dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        )
    return written | {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_model_name,
        "inference_mode": True, "init_lora_weights": True, "use_dora": isinstance(config, DoRAConfig),
        "exclude_modules": written["exclude_modules"] or None,
    }  # fmt: skip
