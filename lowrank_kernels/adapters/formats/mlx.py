"""MLX-LM's folder: adapter_config.json and adapters.safetensors, with A (K, R) and B (R, N).

The keys of its config are whole paths: exactly these modules get factors. One rank and one scale hold for the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..adapter import Adapter, Factors
from ..folder import CONFIG_FILE, inside, read_json, write_aside
from .format import FLOAT64, MERGE, Format, Options, common_scaling, one_rank, paired, save_tensors, tensors_of

_WEIGHTS_FILE = "adapters.safetensors"
_ENDS = {".lora_a": "a", ".lora_b": "b", ".m": "magnitude"}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def write(adapter: Adapter, path: Path, options: Options) -> None:
    _check_paths(adapter, options)
    rank, scaling = one_rank(adapter), common_scaling(adapter)
    modules = {name: (f if scaling is not None else f.folded()).padded(rank) for name, f in adapter.modules.items()}
    tensors = {}
    for name, f in modules.items():
        tensors[f"{name}.lora_a"] = f.lora_a.T
        tensors[f"{name}.lora_b"] = f.lora_b.T
        if f.magnitude is not None:
            tensors[f"{name}.m"] = f.magnitude
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": 1 + max((int(n) for name in modules for n in _LAYER.findall(name)), default=0),
        "lora_parameters": {
            "rank": rank,
            "scale": 1.0 if scaling is None else scaling,
            "dropout": 0.0,
            "keys": sorted(modules),
        },
    }
    save_tensors(path / _WEIGHTS_FILE, tensors, {"format": "mlx"})
    text = json.dumps(config, indent=4) + "\n"
    write_aside(path / CONFIG_FILE, lambda place: place.write_text(text, encoding="utf-8"))


def _check_paths(adapter: Adapter, options: Options) -> None:
    strange = [name for name in adapter.modules if not (name.startswith("model.") or name == "lm_head")]
    if strange:
        raise ValueError(
            f"convert: expected modules that mlx-lm has under the same names, model.… and lm_head, got "
            f"{strange[0][:200]}; {MERGE}"
        )
    if "lm_head" in adapter.modules and options.base and options.base.settings.get("tie_word_embeddings"):
        raise ValueError(f"convert: mlx-lm has no head of its own over tied embeddings; {MERGE}")


def read(path: Path, options: Options) -> Adapter:
    config = read_json(path / CONFIG_FILE, "convert")
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora") or isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(
            f"convert: expected fine_tune_type lora or dora and a number as scale in {path / CONFIG_FILE}, got "
            f"{str(kind)[:80]!r} and {str(scale)[:80]!r}"
        )
    weights = inside(path, _WEIGHTS_FILE, "convert")
    with tensors_of(weights) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    modules = {}
    for name, own in paired(weights, tensors, _ENDS).items():
        if own["a"].dim() != 2 or own["b"].dim() != 2 or (kind == "dora") != ("magnitude" in own):
            raise ValueError(
                f"convert: expected lora_a (K, R), lora_b (R, N) and, of DoRA alone, m (N,) of {name[:200]} in "
                f"{weights}; factors of several experts are not read"
            )
        embedding = name.rpartition(".")[2] == "embed_tokens"
        a, b = own["a"].T.contiguous(), own["b"].T.contiguous()
        modules[name] = Factors(a, b, float(scale), own.get("magnitude"), embedding=embedding)
    return Adapter(modules, origin=str(path))


def is_one(path: Path) -> bool:
    """True for a folder with MLX-LM's file of weights."""
    return (path / _WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file()


FORMAT = Format(
    "mlx",
    "",
    is_one,
    write,
    read,
    {
        "DoRA over embeddings and convolutions": MERGE,
        "lora_bias": MERGE,
        "convolutions": MERGE,
        "weights trained whole": MERGE,
        **FLOAT64,
    },
    "mlx-lm",
)
