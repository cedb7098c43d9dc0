"""A tuned SVFT model on disk: a folder with ``svft_config.json`` and ``svft.safetensors``, small beside the model.

The tensors are, of each module, ``values`` (E,), ``position`` (E, 2), and what ``SVFTLinear.basis`` gives. Singular
vectors are made of W again where the folder is loaded: the same W, by its fingerprint. That alone would not do, since
another machine may find the same vectors with other signs, and others where singular values are equal: the signs are in
the file, and so are those vectors. A folder may come from anywhere: nothing in it is executed, and a model is changed
only after everything in it has been checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import adapt, config_of
from ..config import SVFTConfig
from ..finite import all_finite
from ..names import named_modules, submodule
from ..nn.matrix import frozen_weight, is_linear
from ..nn.sharded import is_dtensor
from ..nn.svft import SVFTLinear
from ..report import Report, count_parameters
from ..weights import dense
from ..weights.fingerprint import fingerprint
from .folder import FILE_DTYPES, few, inside, is_folder, read_header, read_json, write_aside

CONFIG_FILE = "svft_config.json"
WEIGHTS_FILE = "svft.safetensors"
FORMAT = "lowrank_kernels svft 1"
_MAX_CONFIG_BYTES = 8 << 20
_INTEGERS = ("position", "u_pivot", "u_kept", "vh_pivot", "vh_kept")
_BASIS = tuple(f"{side}_{what}" for side in ("u", "vh") for what in ("pivot", "value", "kept", "vectors"))


def svft_layers(model: nn.Module) -> dict[str, SVFTLinear]:
    """The SVFTLinears of a model, by path."""
    return {name: m for name, m in named_modules(model) if isinstance(m, SVFTLinear)}


def basis_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """``SVFTLinear.basis`` of every layer, by path: what a model that is adapted anew elsewhere needs."""
    return {name: layer.basis() for name, layer in svft_layers(model).items()}


def set_basis_(model: nn.Module, basis: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give every layer of a model, adapted anew, the singular vectors that :func:`basis_of` was asked of.

    Raises:
        ValueError: other modules; as ``SVFTLinear.set_basis_``, with the module's name.
    """
    layers = svft_layers(model)
    if layers.keys() != basis.keys():
        raise ValueError(f"svft: expected SVFTLinears at {few(sorted(basis))}, got {few(sorted(layers))}")
    for name, layer in layers.items():
        try:
            layer.set_basis_(basis[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _identity(weight: Any) -> dict[str, Any]:
    w = dense(weight).detach()
    return {"shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch."), "sha256": fingerprint(w)}


def save_svft(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write M's values and places, and what fixes the singular vectors that it lies between.

    Per module E + 2 E numbers and two for each vector that is used; of vectors whose singular values are within 1e-6 of
    the largest from each other or from 0, the vectors themselves: all of them for a weight such as 0 or the identity,
    and for one that was changed after its SVD was made, as a cast of the model does.
    Files are written aside and renamed.

    Returns:
        The folder, made if missing.

    Raises:
        ValueError: no SVFTLinear in the model; one that is merged, sharded or offloaded; values that are not finite;
            biases that train too (``bias`` of the config), which the file has no place for. Nothing is written then.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    op, layers = "save_svft", svft_layers(model)
    if not layers:
        raise ValueError(f"{op}: expected SVFTLinear layers in the model, got {type(model).__name__}")
    config = config_of(model)
    if config is not None and config.bias != "none":
        raise ValueError(f"{op}: expected bias='none', got {config.bias!r}; merge_and_unload, and save the model")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{op}: expected unmerged layers, got a merged one at {name}; call unmerge_()")
        if any(t.is_meta or is_dtensor(t) for t in (layer.values, layer.u, layer.weight)):
            raise ValueError(f"{op}: expected {name} at hand, got a shard or an offloaded one; gather the model first")
        if not all_finite(layer.values.detach()):
            raise ValueError(f"{op}: expected finite values, found NaN or Inf in {name}; nothing was written")
    tensors, modules = {}, {}
    for name, layer in layers.items():
        own = {"values": layer.values.detach().cpu().clone(), "position": layer.position.clone(), **layer.basis()}
        tensors.update({f"{name}.{key}": t for key, t in own.items()})
        modules[name] = _identity(frozen_weight(layer.base_layer))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps({"format": FORMAT, "modules": modules}, indent=1) + "\n"
    write_aside(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def load_svft(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> Report:
    """Adapt a model as the one was that :func:`save_svft` wrote, in place, with its values.

    Args:
        model: the base that was tuned, bit for bit, not adapted yet. Each weight's SVD is made here.
        folder: local, with svft_config.json and svft.safetensors.
        trainable: whether M trains afterwards. False freezes everything.

    Returns:
        The report of ``adapt``; its ``undo()`` puts the base back.

    Raises:
        ValueError: a missing, unreadable or truncated file; a config of another format; tensors that are missing,
            unexpected, of another shape or dtype, or not finite; another base than the one that was tuned; singular
            vectors that this machine finds otherwise. The model is then as it was.
        ImportError: safetensors is not installed.
    """
    op, folder = "load_svft", Path(folder)
    if not is_folder(folder):
        raise ValueError(f"{op}: expected a folder, got {str(folder)!r:.500}")
    modules = _read_modules(inside(folder, CONFIG_FILE, op))
    _check_base(model, modules)
    tensors = _read_tensors(inside(folder, WEIGHTS_FILE, op), modules)
    (dtype,) = {tensors[f"{name}.values"].dtype for name in modules}
    places = {name: tensors[f"{name}.position"] for name in modules}
    report = adapt(model, SVFTConfig(pattern=places, dtype=dtype))
    try:
        set_basis_(model, {name: {key: tensors[f"{name}.{key}"] for key in _BASIS} for name in modules})
        for name in modules:
            layer = submodule(model, name)
            assert isinstance(layer, SVFTLinear)
            if not torch.equal(layer.position, places[name]):
                raise ValueError(f"{op}: expected {name}.position ascending by row, then column")
            with torch.no_grad():
                layer.values.copy_(tensors[f"{name}.values"])
        if not trainable:
            model.requires_grad_(False)
    except BaseException:
        report.undo()
        raise
    trains, total = count_parameters(model)
    return Report(f"{folder.name}: SVFT", report.replaced, report.skipped, trains, total, _undo=report._undo)


def _read_modules(path: Path) -> dict[str, dict[str, Any]]:
    config = read_json(path, "load_svft", _MAX_CONFIG_BYTES)
    if config.get("format") != FORMAT:
        raise ValueError(f"load_svft: expected {path} to be of the format {FORMAT!r}")
    modules, kinds = config.get("modules"), {"shape": list, "dtype": str, "sha256": str}
    if (
        not isinstance(modules, dict)
        or not modules
        or not all(isinstance(module, dict) for module in modules.values())
        or not all(isinstance(module.get(key), kind) for module in modules.values() for key, kind in kinds.items())
    ):
        raise ValueError(f"load_svft: expected {path} to give shape, dtype and sha256 of each module")
    return modules


def _check_base(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the model has the linears that were tuned, with their weights."""
    there = dict(named_modules(model))
    for name, module in modules.items():
        linear = there.get(name)
        if linear is None or not is_linear(linear):
            raise ValueError(f"load_svft: expected a linear at {name[:200]}, found none: a folder for another model")
        found = _identity(frozen_weight(linear))
        for key, value in found.items():
            if module[key] != value:
                raise ValueError(
                    f"load_svft: expected the base that was tuned, whose {name} has {key} {str(module[key])[:80]}, got "
                    f"{str(value)[:80]}: the singular vectors of another are others"
                )


def _read_tensors(path: Path, modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The file's tensors, once they are known to be just those of the config, and no larger than its modules."""
    from safetensors import SafetensorError, safe_open

    keys = ("values", "position", *_BASIS)
    header = read_header(path, len(keys) * len(modules), "load_svft")
    wanted = {f"{name}.{key}" for name in modules for key in keys}
    if header.keys() != wanted:
        raise ValueError(
            f"load_svft: expected {path} to hold the {len(wanted)} tensors of its config; missing: "
            f"{few(sorted(wanted - header.keys()))}; unexpected: {few(sorted(header.keys() - wanted))}"
        )
    if len({header[f"{name}.values"].dtype for name in modules}) != 1:
        raise ValueError(f"load_svft: expected values of one dtype in {path}")
    for name, module in modules.items():
        n, k = module["shape"]
        r, shapes = min(n, k), {key: header[f"{name}.{key}"].shape for key in keys}
        count = shapes["values"][0] if len(shapes["values"]) == 1 else 0
        fits = 0 < count <= r * r and shapes["position"] == (count, 2)
        for side, width in (("u", n), ("vh", k)):
            used, kept = shapes[f"{side}_pivot"], shapes[f"{side}_kept"]
            fits = fits and len(used) == 1 == len(kept) and kept[0] <= used[0] <= min(r, count)
            fits = fits and shapes[f"{side}_value"] == used and shapes[f"{side}_vectors"] == (*kept, width)
        for key in keys:
            dtypes = ("I32",) if key in _INTEGERS else FILE_DTYPES
            fits = fits and header[f"{name}.{key}"].dtype in dtypes
        if not fits:
            raise ValueError(f"load_svft: expected the tensors of a matrix of shape ({n}, {k}) at {name} in {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(wanted)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_svft: expected {path} to be a whole safetensors file: {error}") from None
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not all_finite(t)]
    if broken:
        raise ValueError(f"load_svft: expected finite values, found NaN or Inf in {few(broken)} of {path}")
    return tensors
