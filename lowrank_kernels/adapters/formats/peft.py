"""PEFT's folder: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ...functional import fold_gate
from ..adapter import Adapter, Factors
from ..folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, inside, read_json, write_aside
from ..matching import check_patterns_agree
from ..settings import read_config
from .format import Format, Options, alpha_for, names_in, plain_settings, save_tensors, tensors_of

_KEYS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_gate": "gate",
}


def read(path: Path, options: Options) -> Adapter:
    weights = inside(path, WEIGHTS_FILE, "convert")
    modules: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    others: dict[str, Tensor] = {}
    with tensors_of(weights) as file:
        for full in file.keys():  # noqa: SIM118 (not a dict)
            name = full.removeprefix(PREFIX)
            end = next((end for end in _KEYS if name.endswith(f".{end}")), None)
            if end is None:
                others[name] = file.get_tensor(full)
                continue
            module = name.removesuffix(f".{end}")
            modules.setdefault(module, {})[_KEYS[end]] = file.get_tensor(full)
            if end.startswith("lora_embedding"):
                embeddings.add(module)
    alone = [name for name, own in modules.items() if not {"a", "b"} <= own.keys()]
    if alone:
        raise ValueError(f"convert: expected both factors of {alone[0][:200]} in {weights}")
    config = read_config(inside(path, CONFIG_FILE, "convert"), list(modules))
    check_patterns_agree(path, config, modules)
    dora = bool(read_json(path / CONFIG_FILE).get("use_dora"))
    found = {}
    for name, own in modules.items():
        if own["a"].dim() < 2 or own["a"].shape[0] != config.rank_of(name):
            raise ValueError(
                f"convert: expected A of {name[:200]} in {weights} of rank {config.rank_of(name)}, as its config says, "
                f"got the shape {tuple(own['a'].shape)}"
            )
        if dora != ("magnitude" in own):
            raise ValueError(f"convert: expected a magnitude of {name[:200]} in {weights} if use_dora, and only then")
        b = fold_gate(own["b"], own["gate"]) if "gate" in own else own["b"]
        rest = own.get("magnitude"), own.get("bias"), name in embeddings
        found[name] = Factors(own["a"], b, config.scaling_of(name), *rest)
    settings = plain_settings(config, read_json(path / CONFIG_FILE))
    return Adapter(found, others, settings, str(path))


def write(adapter: Adapter, path: Path, options: Options) -> None:
    tensors = {f"{name}.{key}": t for name, f in adapter.modules.items() for key, t in f.tensors().items()}
    write_folder(path, config_of(adapter), tensors | dict(adapter.others))


def config_of(adapter: Adapter) -> dict[str, Any]:
    """PEFT's config of an adapter: its most frequent rank and alpha, and a pattern for each module of another."""
    ranks = {name: f.rank for name, f in adapter.modules.items()}
    root = not _exact(adapter, False) and _exact(adapter, True)
    alphas = {name: alpha_for(f.scaling, f.rank, root) for name, f in adapter.modules.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    whole = adapter.settings.get("modules_to_save") or []
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.modules),
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "use_rslora": root,
        "use_dora": adapter.dora,
        "lora_bias": any(f.lora_bias is not None for f in adapter.modules.values()),
        "bias": "none",
        "init_lora_weights": True,
        **adapter.settings,
        "modules_to_save": whole or None,
    }


def _exact(adapter: Adapter, root: bool) -> bool:
    """True if alphas over r (or √r) give every scaling to the last bit."""
    return all(
        alpha_for(f.scaling, f.rank, root) / (math.sqrt(f.rank) if root else f.rank) == f.scaling
        for f in adapter.modules.values()
    )


def write_folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    own = {PREFIX + name: t for name, t in tensors.items()}
    save_tensors(path / WEIGHTS_FILE, own, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_aside(path / CONFIG_FILE, lambda place: place.write_text(text, encoding="utf-8"))


def is_one(path: Path) -> bool:
    """True for a folder whose config has PEFT's ``peft_type``."""
    if not (path / CONFIG_FILE).is_file():
        return False
    try:
        return "peft_type" in read_json(path / CONFIG_FILE)
    except ValueError:
        return bool(names_in(path / WEIGHTS_FILE))


FORMAT = Format("peft", "", is_one, write, read, {}, "PEFT, vLLM")
