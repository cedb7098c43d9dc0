"""kohya's and LyCORIS' safetensors: paths with ``_`` for ``.``, ``lora_down``, ``lora_up``, always ``alpha`` = s · R.

``lora_unet_`` and ``lora_te_`` stand before the paths of a diffusion model and its text encoder, ``lycoris_`` before
others. What the dots of a path were is lost, and stands in the header of files that are written here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter, Factors
from ..folder import few
from .format import (
    FLOAT64,
    MERGE,
    Format,
    Options,
    alpha_for,
    component,
    is_file,
    names_in,
    paired,
    save_tensors,
    tensors_of,
)

_ENDS = {".lora_down.weight": "a", ".lora_up.weight": "b", ".alpha": "alpha", ".dora_scale": "magnitude"}
_PREFIXES = {"unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_PATHS = "lowrank_kernels.paths"


def write(adapter: Adapter, path: Path, options: Options) -> None:
    names = _names(adapter.modules)
    if len(set(names.values())) < len(names):
        raise ValueError("convert: kohya's names have _ for ., which makes two of these modules one; merge the adapter")
    tensors: dict[str, Tensor] = {}
    for module, f in adapter.modules.items():
        alpha = torch.tensor(alpha_for(f.scaling, f.rank), dtype=torch.float64)
        exact = bool(alpha.float().double() == alpha)
        tensors[f"{names[module]}.lora_down.weight"] = f.lora_a
        tensors[f"{names[module]}.lora_up.weight"] = f.lora_b
        tensors[f"{names[module]}.alpha"] = alpha.float() if exact else alpha
        if f.magnitude is not None:
            n = f.lora_b.shape[0]
            tensors[f"{names[module]}.dora_scale"] = f.magnitude.reshape(n, *[1] * (f.lora_b.dim() - 1))
    metadata = {_PATHS: json.dumps(sorted(adapter.modules))}
    save_tensors(path, tensors, metadata)


def _names(paths: Iterable[str]) -> dict[str, str]:
    """{path: the file's name of it}."""
    paths = dict.fromkeys(paths)
    common = component(paths)
    found = {}
    for path in paths:
        first, _, rest = path.partition(".")
        part, below = (common, path) if common or first not in _PREFIXES else (first, rest)
        found[path] = f"{_PREFIXES.get(part, 'lycoris')}_{below.replace('.', '_')}"
    return found


def read(path: Path, options: Options) -> Adapter:
    with tensors_of(path) as file:
        said = (file.metadata() or {}).get(_PATHS)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    found = paired(path, tensors, _ENDS)
    known = _known_paths(path, said, options)
    lost = [name for name in found if name not in known]
    if lost:
        raise ValueError(
            f"convert: expected base=, the model with the modules of {path}: its names have _ for ., and {few(lost)} "
            f"could be many"
        )
    modules = {known[name]: _factors(path, name, own) for name, own in found.items()}
    return Adapter(modules, origin=str(path))


def _known_paths(path: Path, said: str | None, options: Options) -> Mapping[str, str]:
    paths: Iterable[str] = options.base.shapes if options.base else ()
    if said is not None and not options.base:
        try:
            paths = json.loads(said)
        except (ValueError, RecursionError):
            paths = ()
        if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
            raise ValueError(f"convert: expected {_PATHS} in {path} to be a list of names")
    own = Counter(_names(paths).values())
    found = {name: p for p, name in _names(paths).items() if own[name] == 1}
    return found | {f"lycoris_{p.replace('.', '_')}": p for p in found.values()}


def _factors(path: Path, name: str, own: Mapping[str, Tensor]) -> Factors:
    a, b, magnitude = own["a"], own["b"], own.get("magnitude")
    if "alpha" not in own or own["alpha"].numel() != 1 or not a.shape[0]:
        raise ValueError(f"convert: expected one number as alpha of {name[:200]} in {path}; readers guess differently")
    if magnitude is not None:
        n = b.shape[0]
        if magnitude.numel() != n or magnitude.shape[0] != n:
            raise ValueError(
                f"convert: expected dora_scale (N, 1) = ({n}, 1) of {name[:200]} in {path}, got "
                f"{tuple(magnitude.shape)}; one a column is another function than PEFT's DoRA; {MERGE}"
            )
        magnitude = magnitude.reshape(n) if a.dim() == 2 else magnitude.reshape(1, n, *[1] * (a.dim() - 2))
    return Factors(a, b, float(own["alpha"]) / a.shape[0], magnitude)


def is_one(path: Path) -> bool:
    """True for a safetensors file with kohya's names of factors."""
    return is_file(path, ".safetensors") and any(".lora_down." in name for name in names_in(path))


FORMAT = Format(
    "kohya",
    ".safetensors",
    is_one,
    write,
    read,
    {"lora_bias": MERGE, "embeddings": MERGE, "weights trained whole": MERGE, **FLOAT64},
    "LyCORIS, ComfyUI; diffusers where every s is 1 (portable=True)",
)
