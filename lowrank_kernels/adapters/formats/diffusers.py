"""diffusers' safetensors: PEFT's names after the part of the pipeline, and PEFT's config as JSON in the header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import Adapter, Factors
from .format import FLOAT64, MERGE, Format, Options, component, is_file, names_in, paired, save_tensors, tensors_of
from .peft import config_of

_KEY = "lora_adapter_metadata"
_ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
}
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_SAID = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")


def write(adapter: Adapter, path: Path, options: Options) -> None:
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for part, own in _by_part(adapter).items():
        for name, f in own.modules.items():
            for key, t in f.tensors().items():
                tensors[f"{part}.{name}.{key}"] = t
        config = config_of(own)
        said |= {f"{part}.{key}": config[key] for key in _SAID}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", _KEY: json.dumps(said, indent=2, sort_keys=True)}
    save_tensors(path, tensors, header)


def _by_part(adapter: Adapter) -> dict[str, Adapter]:
    """{part of the pipeline: its adapter}."""
    part = component(adapter.modules)
    if part:
        return {part: adapter}
    parts: dict[str, dict[str, Factors]] = {}
    for path, f in adapter.modules.items():
        part, _, rest = path.partition(".")
        if part not in _PARTS:
            raise ValueError(
                f"convert: expected modules of a diffusion model or its text encoders, got {path[:200]}; name them "
                f"{', '.join(f'{p}.…' for p in _PARTS)}"
            )
        parts.setdefault(part, {})[rest] = f
    return {part: replace(adapter, modules=own) for part, own in parts.items()}


def read(path: Path, options: Options) -> Adapter:
    with tensors_of(path) as file:
        said = _metadata(path, (file.metadata() or {}).get(_KEY))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    found = paired(path, tensors, _ENDS)
    parts = {name.partition(".")[0] if name.startswith(tuple(f"{p}." for p in _PARTS)) else "" for name in found}
    modules = {}
    for name, own in found.items():
        part = next((p for p in parts if p and name.startswith(f"{p}.")), "")
        below = name.removeprefix(f"{part}.") if part else name
        config = {key: said.get(f"{part}.{key}" if part else key) for key in _SAID}
        path_in_model = below if len(parts) == 1 else name
        rank = own["a"].shape[0]
        scaling = 1.0
        if config["lora_alpha"] is not None:
            scaling = _alpha(path, config, below) / (rank**0.5 if config["use_rslora"] else rank)
        modules[path_in_model] = Factors(own["a"], own["b"], scaling, own.get("magnitude"), own.get("bias"))
    return Adapter(modules, origin=str(path))


def _metadata(path: Path, text: str | None) -> Mapping[str, Any]:
    try:
        said = json.loads(text or "{}")
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"convert: expected {_KEY} of {path} to be a JSON object")
    return said


def _alpha(path: Path, config: Mapping[str, Any], name: str) -> float:
    """lora_alpha of a module. Patterns are read where they name a module, as diffusers and this package write them."""
    patterns = config["alpha_pattern"] or {}
    plain = {re.sub(r"\\(.)", r"\1", str(key)).removeprefix("^"): value for key, value in patterns.items()}
    alpha = next((value for key, value in plain.items() if name == key or name.endswith(f".{key}")), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"convert: expected numbers as alphas in {path}, got {str(alpha)[:80]!r}")
    return float(alpha)


def is_one(path: Path) -> bool:
    """True for a safetensors file of PEFT's names, after a part of a pipeline or none."""
    names = names_in(path) if is_file(path, ".safetensors") else set()
    return any(".lora_A." in name for name in names) and not any(name.startswith("base_model.") for name in names)


FORMAT = Format(
    "diffusers",
    ".safetensors",
    is_one,
    write,
    read,
    {"embeddings": MERGE, "weights trained whole": MERGE, **FLOAT64},
    "diffusers",
)
